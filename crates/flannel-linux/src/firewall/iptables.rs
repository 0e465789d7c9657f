//! The rules through iptables: list as text, compare, restore what differs.
//!
//! The `iptables` crate lists, through the one call of it that tells the exit
//! status; its other calls read every failure as "not there". What is to be
//! written goes to `iptables-restore`, a table in one transaction.
//!
//! A check forks six processes. Where the rules are in nf_tables it can wait
//! until something has changed, because the kernel counts the changes:
//!
//! ```text
//!   ask for the generation ─┬─ the one at which these rules were right ─▶ done
//!                           └─ another, or none to be had ─▶ list ─┬─ right ─▶ remember it
//!                                                                  └─ not ───▶ write
//! ```
//!
//! The question comes before the lists: what changes later has a generation of its
//! own, whether the lists show it or not, and the next call looks at it. After a
//! write the generation is remembered if there was no transaction but ours since
//! the question.
//!
//! The kernel counts one statement before it shows what has changed
//! (`nf_tables_commit`); between the question and the lists a process is started.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::process::{Command, Output};

use flannel_core::firewall::iptables::{Listed, Wrong, restore, wrong};
use flannel_core::firewall::{Purpose, Ruleset};
use flannel_core::host::{Ensured, Firewall, HostError};
use iptables::IPTables;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::generation::{Found, generation};
use super::insistence::Insistence;
use super::program::{self, blocking, failed};

const REMEDY: &str = "install iptables, or switch --ip-masq and --iptables-forward-rules off";

/// How long the programs wait for others of their kind, in seconds.
const WAIT: &str = "--wait 5";

/// The exit status for "no such chain", among others; a lack of permission or
/// of the lock is 4, bad words are 2.
const NO_SUCH_CHAIN: i32 = 1;

/// The first version that knows `--random-fully`, and `--wait` of the restore.
const RANDOM_FULLY: (u32, u32, u32) = (1, 6, 2);

/// Which of the two iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `iptables`.
    Ipv4,
    /// `ip6tables`.
    Ipv6,
}

/// The traffic rules of one family, in the network namespace of whoever asks; it
/// is to be the same one each time.
#[derive(Clone, Debug)]
pub struct IptablesFirewall {
    programs: Programs,
    found: Option<Found>,
    insistence: Insistence,
}

#[derive(Clone, Copy, Debug)]
struct Programs {
    program: &'static str,
    restorer: &'static str,
    /// Asked for with the first rules: the programs may be installed later than we start.
    version: Option<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    number: (u32, u32, u32),
    tables: Tables,
}

/// Where in the kernel the rules are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tables {
    /// In nf_tables, which counts its generations.
    Nft,
    /// In x_tables, which count nothing.
    Legacy,
}

impl IptablesFirewall {
    /// The rules of `family`, through the programs that the path leads to.
    pub fn new(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::with_programs("iptables", "iptables-restore"),
            Family::Ipv6 => Self::with_programs("ip6tables", "ip6tables-restore"),
        }
    }

    /// The rules through programs of that name, like `iptables-legacy`.
    pub fn with_programs(program: &'static str, restorer: &'static str) -> Self {
        Self {
            programs: Programs { program, restorer, version: None },
            found: None,
            insistence: Insistence::default(),
        }
    }
}

impl Firewall for IptablesFirewall {
    /// Makes the rules stand as given; writes nothing if they do, and starts no
    /// process if nf_tables has not changed since they were found to.
    async fn ensure(&mut self, rules: &Ruleset) -> Result<Ensured, HostError> {
        // Should this call fail or be dropped, the next one checks.
        let found = self.found.take();
        if self.programs.version.is_none() {
            let program = self.programs.program;
            self.programs.version = Some(blocking(move || version(program)).await?);
        }
        let programs = self.programs;
        let rules =
            if programs.supports_random_fully() { rules.clone() } else { rules.without_random_fully() };
        let conceded = self.insistence.conceded(Instant::now());
        let Check { ensured, found, moved_for } =
            blocking(move || programs.ensure(rules, found, &conceded)).await?;
        self.found = found;
        self.moved(moved_for);
        Ok(ensured)
    }
}

/// What a check has done and seen.
struct Check {
    ensured: Ensured,
    found: Option<Found>,
    /// The rules that stood on the wrong side of our jumps, which were moved, with their chains.
    moved_for: BTreeSet<(Wrong, &'static str, String)>,
}

impl IptablesFirewall {
    /// Takes in, and tells, that our jumps were moved for these rules.
    fn moved(&mut self, rules: BTreeSet<(Wrong, &'static str, String)>) {
        let now = Instant::now();
        let (given_up, others): (Vec<_>, Vec<_>) =
            rules.into_iter().partition(|(wrong, _, rule)| match wrong {
                Wrong::Above | Wrong::AboveOperator => self.insistence.moved(rule, now),
                Wrong::AbovePolicy => {
                    self.insistence.gave_way(rule, now);
                    false
                }
            });
        for (wrong, chain, rule) in given_up {
            if wrong == Wrong::Above {
                error!(
                    chain, %rule,
                    "somebody keeps putting a rule above ours; leaving it there for ten minutes, with what it does to the \
                     network's packets"
                );
            } else {
                error!(
                    chain, %rule,
                    "somebody keeps putting the operator's rules below ours; leaving them there for ten minutes, without a \
                     look at the network's packets"
                );
            }
        }
        let (above, below): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|(wrong, ..)| *wrong == Wrong::Above);
        if let Some((_, chain, rule)) = below.first() {
            let rules = below.len();
            info!(chain, %rule, rules, "ours stood before a rule that may deny; they go behind it");
        }
        let rules = above.len();
        let of_docker = |rule: &str| rule.contains(" -j DOCKER");
        if let Some((_, chain, rule)) = above.iter().find(|(.., rule)| !of_docker(rule)) {
            warn!(chain, %rule, rules, "a rule above ours could decide about the network's packets; ours go before it");
        } else if let Some((_, chain, rule)) = above.first() {
            // It does so whenever it starts, and up to 27 with each network.
            info!(chain, %rule, rules, "docker has put a rule above ours; ours go before it");
        }
    }

    /// What lists the rules.
    pub(super) fn program(&self) -> &'static str {
        self.programs.program
    }

    /// When our jumps may be moved again, if they had to be left where they were.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        self.insistence.waits_until(Instant::now()).filter(|_| self.found.is_none())
    }

    /// Whether the rules are where the kernel tells of changes; `None` before the first check.
    pub(super) fn is_told(&self) -> Option<bool> {
        self.programs.version.map(|version| version.tables == Tables::Nft)
    }

    /// Whether nf_tables is as it was when the rules were found right.
    pub(super) fn is_at_rest(&self) -> bool {
        self.found.as_ref().is_some_and(|found| Some(found.generation) == self.programs.generation())
    }
}

impl Programs {
    /// Whether masqueraded packets can leave from a port that nobody can guess.
    fn supports_random_fully(self) -> bool {
        self.version.is_some_and(|version| version.number >= RANDOM_FULLY)
    }

    /// Makes the rules stand, if it is not known that they do; tells what was found right.
    fn ensure(self, rules: Ruleset, found: Option<Found>, conceded: &[String]) -> Result<Check, HostError> {
        let before = self.generation();
        if found.as_ref().is_some_and(|found| found.rules == rules && Some(found.generation) == before) {
            return Ok(Check { ensured: Ensured::Unchanged, found, moved_for: BTreeSet::new() });
        }
        let (mut writes, mut texts, mut moved_for) = (0, String::new(), BTreeSet::new());
        let mut is_final = true;
        for chain in &rules.chains {
            let listed = match self.list(chain.purpose) {
                // A kernel without the table has nothing of ours in it. And the raw table is needed only
                // beside Docker from 28 on, which would not start without it.
                Err(HostError::Missing { missing, .. })
                    if chain.rules.is_empty() || chain.purpose == Purpose::Admit =>
                {
                    debug!(missing, table = chain.purpose.table(), "the table is not there");
                    continue;
                }
                listed => listed?,
            };
            let (left, moved): (Vec<_>, Vec<_>) = wrong(&rules, chain, &listed)
                .into_iter()
                .partition(|(_, rule)| conceded.iter().any(|conceded| conceded == rule));
            // What stays where it is now the next check may not leave there; but a policy
            // engine's can wait until something has changed.
            is_final &= left.iter().all(|(wrong, _)| *wrong == Wrong::AbovePolicy);
            if let Some(text) = restore(&rules, chain, &listed, conceded) {
                let parent = chain.purpose.parent();
                moved_for.extend(moved.into_iter().map(|(wrong, rule)| (wrong, parent, rule.to_owned())));
                texts += &text;
                writes += 1;
            }
        }
        if writes > 0 {
            // Each table is a transaction of its own.
            self.restore(&texts)?;
        }
        let (ensured, found) = match writes {
            0 => (Ensured::Unchanged, Found::at(rules, before)),
            _ => (Ensured::Written, Found::after(writes, rules, before)),
        };
        Ok(Check { ensured, found: found.filter(|_| is_final), moved_for })
    }

    /// The generation of the tables, where they have one and we may ask for it.
    fn generation(self) -> Option<u32> {
        if self.version?.tables == Tables::Legacy {
            return None;
        }
        generation().inspect_err(|error| debug!(%error, "cannot ask for the generation of nf_tables")).ok()
    }

    fn list(self, purpose: Purpose) -> Result<Listed, HostError> {
        // The built-in chain is always there: what fails here is not about a chain.
        let parent = self.list_chain(purpose.table(), purpose.parent())?;
        if !parent.status.success() {
            let operation = format!("cannot list {} of table {}", purpose.parent(), purpose.table());
            return Err(failed(self.program, operation, &parent));
        }
        let own = self.list_chain(purpose.table(), purpose.chain())?;
        if !own.status.success() && own.status.code() != Some(NO_SUCH_CHAIN) {
            let operation = format!("cannot list {} of table {}", purpose.chain(), purpose.table());
            return Err(failed(self.program, operation, &own));
        }
        let exists = own.status.success();
        let rules = if exists { rules_in(&own) } else { vec![] };
        Ok(Listed { exists, rules, parent: rules_in(&parent) })
    }

    fn list_chain(self, table: &str, chain: &str) -> Result<Output, HostError> {
        // Without `has_wait` the crate adds no `--wait` of its own, which would be without limit.
        let tables = IPTables { cmd: self.program, has_check: true, has_wait: false, is_numeric: false };
        tables.execute(table, &format!("-S {chain} {WAIT}")).map_err(|error| not_run(self.program, error))
    }

    fn restore(self, text: &str) -> Result<(), HostError> {
        debug!(program = self.restorer, text, "writing rules");
        let output = self.feed(text).map_err(|error| not_run(self.restorer, error.into()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(self.restorer, "cannot write the rules".into(), &output))
    }

    fn feed(self, text: &str) -> io::Result<Output> {
        let mut command = Command::new(self.restorer);
        command.arg("--noflush");
        if self.supports_random_fully() {
            command.args(WAIT.split(' '));
        }
        program::feed(command, text)
    }
}

fn version(program: &'static str) -> Result<Version, HostError> {
    let output = Command::new(program).arg("--version").output();
    let output = output.map_err(|error| not_run(program, error.into()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).ok_or_else(|| HostError::Broken {
        operation: format!("cannot tell the version of {program}"),
        source: format!("it says {:?}", text.trim()).into(),
    })
}

/// Reads `iptables v1.8.9 (nf_tables)`.
fn parse_version(text: &str) -> Option<Version> {
    let word = text.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
    let mut parts = word.split('.').map(|part| part.parse().ok());
    let number = (parts.next()??, parts.next()??, parts.next().unwrap_or(Some(0))?);
    let tables = if text.contains("(nf_tables)") { Tables::Nft } else { Tables::Legacy };
    Some(Version { number, tables })
}

fn rules_in(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(str::trim_end).filter(|line| line.starts_with("-A ")).map(str::to_owned).collect()
}

fn not_run(program: &str, error: Box<dyn Error>) -> HostError {
    match error.downcast::<io::Error>() {
        Ok(error) => program::not_run(program, *error, REMEDY),
        Err(error) => {
            HostError::Broken { operation: format!("cannot run {program}"), source: error.to_string().into() }
        }
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::firewall::{Wanted, rules};

    use super::*;

    #[test]
    fn a_version_is_read_from_what_iptables_says() {
        let version = |number, tables| Some(Version { number, tables });

        assert_eq!(parse_version("iptables v1.8.9 (nf_tables)\n"), version((1, 8, 9), Tables::Nft));
        assert_eq!(parse_version("iptables v1.4.7"), version((1, 4, 7), Tables::Legacy));
        assert_eq!(parse_version("ip6tables v1.10.0 (legacy)"), version((1, 10, 0), Tables::Legacy));
        assert_eq!(parse_version("busybox"), None);
    }

    #[test]
    fn random_ports_came_with_1_6_2() {
        let supports = |number| {
            let version = Some(Version { number, tables: Tables::Legacy });
            Programs { program: "iptables", restorer: "iptables-restore", version }.supports_random_fully()
        };

        assert!(!supports((1, 6, 1)));
        assert!(supports((1, 6, 2)));
        assert!(supports((1, 10, 0)));
    }

    #[tokio::test]
    async fn a_missing_program_is_told_apart_with_a_remedy() {
        let mut firewall = IptablesFirewall::with_programs("no-such-iptables", "no-such-restore");
        let network = "10.5.0.0/16".parse().unwrap();
        let wanted = Wanted { masquerade: false, random_fully: true, forward: true };
        let rules = rules(network, "10.5.1.0/24".parse().unwrap(), wanted, vec![]);

        let error = firewall.ensure(&rules).await.unwrap_err();

        assert!(
            matches!(&error, HostError::Missing { missing, .. } if missing == "no-such-iptables"),
            "{error}"
        );
    }
}
