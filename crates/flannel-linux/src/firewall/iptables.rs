//! The rules through iptables: list as text, compare, restore what differs.
//!
//! The `iptables` crate lists, through the one call of it that tells the exit
//! status; its other calls read every failure as "not there". What is to be
//! written goes to `iptables-restore`, a table in one transaction.
//!
//! A check forks four processes. Where the rules are in nf_tables it can wait
//! until something has changed, because the kernel counts the changes:
//!
//! ```text
//!   ask for the generation ─┬─ the one at which these rules were right ─▶ done
//!                           └─ another, or none to be had ─▶ list ─┬─ right ─▶ remember it
//!                                                                  └─ not ───▶ write, forget
//! ```
//!
//! The question comes before the lists: what changes later has a generation of its
//! own, whether the lists show it or not, and the next call looks at it. A write is
//! looked at by the next call too, with whatever others wrote around it.
//!
//! The kernel counts one statement before it shows what has changed
//! (`nf_tables_commit`); between the question and the lists a process is started.

use std::error::Error;
use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

use flannel_core::firewall::iptables::{Listed, restore};
use flannel_core::firewall::{Purpose, Ruleset};
use flannel_core::host::{Ensured, Firewall, HostError};
use iptables::IPTables;
use tokio::task::spawn_blocking;
use tracing::debug;

use super::generation::generation;

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
}

/// The rules that a check found right, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    rules: Ruleset,
    /// That of nf_tables before the check.
    generation: u32,
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
        Self { programs: Programs { program, restorer, version: None }, found: None }
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
        let ensured;
        (ensured, self.found) = blocking(move || programs.ensure(rules, found)).await?;
        Ok(ensured)
    }
}

impl Programs {
    /// Whether masqueraded packets can leave from a port that nobody can guess.
    fn supports_random_fully(self) -> bool {
        self.version.is_some_and(|version| version.number >= RANDOM_FULLY)
    }

    /// Makes the rules stand, if it is not known that they do; tells what was found right.
    fn ensure(self, rules: Ruleset, found: Option<Found>) -> Result<(Ensured, Option<Found>), HostError> {
        let generation = self.generation();
        if found.as_ref().is_some_and(|found| found.rules == rules && Some(found.generation) == generation) {
            return Ok((Ensured::Unchanged, found));
        }
        let ensured = self.make_stand(&rules)?;
        let found = match ensured {
            Ensured::Unchanged => generation.map(|generation| Found { rules, generation }),
            Ensured::Written => None,
        };
        Ok((ensured, found))
    }

    /// The generation of the tables, where they have one and we may ask for it.
    fn generation(self) -> Option<u32> {
        if self.version?.tables == Tables::Legacy {
            return None;
        }
        generation().inspect_err(|error| debug!(%error, "cannot ask for the generation of nf_tables")).ok()
    }

    fn make_stand(self, rules: &Ruleset) -> Result<Ensured, HostError> {
        let mut ensured = Ensured::Unchanged;
        for chain in &rules.chains {
            let listed = self.list(chain.purpose)?;
            if let Some(text) = restore(rules, chain, &listed) {
                self.restore(&text)?;
                ensured = Ensured::Written;
            }
        }
        Ok(ensured)
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
        command.arg("--noflush").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.supports_random_fully() {
            command.args(WAIT.split(' '));
        }
        let mut child = command.spawn()?;
        let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
        let output = child.wait_with_output()?;
        // A program that ends early leaves the pipe broken; what it says is worth more.
        match fed {
            Err(error) if output.status.success() => Err(error),
            _ => Ok(output),
        }
    }
}

/// Runs what forks and waits where it holds nobody up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let outcome = spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| {
        Err(HostError::Broken { operation: "cannot ask iptables".into(), source: error.into() })
    })
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
    let source = match error.downcast::<io::Error>() {
        Ok(error) if error.kind() == io::ErrorKind::NotFound => {
            return HostError::Missing {
                missing: program.into(),
                remedy: "install iptables, or switch --ip-masq and --iptables-forward-rules off".into(),
            };
        }
        Ok(error) => (*error).into(),
        Err(error) => error.to_string().into(),
    };
    HostError::Broken { operation: format!("cannot run {program}"), source }
}

fn failed(program: &str, operation: String, output: &Output) -> HostError {
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    HostError::Broken {
        operation,
        source: format!("{program}: {}: {}", output.status, said.join("; ")).into(),
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
