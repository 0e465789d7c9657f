//! The rules through nft: list the table as JSON, compare, replace it whole if
//! it differs. No iptables is needed.
//!
//! As nf_tables counts its transactions, nothing is listed while it has counted
//! none, see `generation.rs`.

use std::process::{Command, Output};

use flannel_core::firewall::nftables::{Listed, Table, replace};
use flannel_core::firewall::{Ruleset, nftables};
use flannel_core::host::{Ensured, Firewall, HostError};
use tracing::{debug, warn};

use super::generation::{Found, generation};
use super::program::{blocking, failed, feed, not_run};

const REMEDY: &str = "install nftables, leave EnableNFTables out of the network config, or switch --ip-masq and \
                      --iptables-forward-rules off";

/// What nft says of a table that is not there; its words are those of errno.
const NO_SUCH_TABLE: &str = "No such file or directory";

/// The traffic rules of one family in a table of nftables, in the network
/// namespace of whoever asks; it is to be the same one each time.
#[derive(Clone, Debug)]
pub struct NftablesFirewall {
    nft: Nft,
    found: Option<Found>,
}

#[derive(Clone, Copy, Debug)]
struct Nft {
    program: &'static str,
    /// Whether the kernel can masquerade from a port that nobody can guess; the
    /// first rules that want it tell.
    random_fully: Option<bool>,
}

impl Default for NftablesFirewall {
    fn default() -> Self {
        Self::with_program("nft")
    }
}

impl NftablesFirewall {
    /// The rules through a program of that name.
    pub fn with_program(program: &'static str) -> Self {
        Self { nft: Nft { program, random_fully: None }, found: None }
    }

    /// Whether nf_tables is as it was when the rules were found right.
    pub(super) fn is_at_rest(&self) -> bool {
        self.found.as_ref().is_some_and(|found| Some(found.generation) == generation().ok())
    }
}

impl Firewall for NftablesFirewall {
    /// Makes the rules stand as given; writes nothing if they do, and starts no
    /// process if nf_tables has not changed since they were found to.
    async fn ensure(&mut self, rules: &Ruleset) -> Result<Ensured, HostError> {
        // Should this call fail or be dropped, the next one checks.
        let found = self.found.take();
        let (mut nft, rules) = (self.nft, rules.clone());
        let ensured;
        (ensured, self.nft, self.found) = blocking(move || {
            let (ensured, found) = nft.ensure(rules, found)?;
            Ok((ensured, nft, found))
        })
        .await?;
        Ok(ensured)
    }
}

impl Nft {
    fn ensure(
        &mut self,
        rules: Ruleset,
        found: Option<Found>,
    ) -> Result<(Ensured, Option<Found>), HostError> {
        let before =
            generation().inspect_err(|error| debug!(%error, "cannot ask for the generation of nf_tables"));
        let before = before.ok();
        if found.as_ref().is_some_and(|found| found.rules == rules && Some(found.generation) == before) {
            return Ok((Ensured::Unchanged, found));
        }
        let listed = self.list(Table::of(rules.network))?;
        Ok(match self.make_stand(&rules, &listed)? {
            Ensured::Unchanged => (Ensured::Unchanged, Found::at(rules, before)),
            Ensured::Written => (Ensured::Written, Found::after(1, rules, before)),
        })
    }

    fn make_stand(&mut self, rules: &Ruleset, listed: &Listed) -> Result<Ensured, HostError> {
        let plain = rules.without_random_fully();
        if self.random_fully == Some(false) || *rules == plain {
            return self.write(replace(&plain, listed));
        }
        let refused = match self.write(replace(rules, listed)) {
            Ok(Ensured::Written) => {
                self.random_fully = Some(true);
                return Ok(Ensured::Written);
            }
            Err(refused) if self.random_fully.is_none() => refused,
            other => return other,
        };
        // Whether it is for want of that.
        let ensured = self.write(replace(&plain, listed)).map_err(|_| refused)?;
        warn!("this kernel's nftables knows no fully-random; masquerading without it");
        self.random_fully = Some(false);
        Ok(ensured)
    }

    fn write(&self, text: Option<String>) -> Result<Ensured, HostError> {
        let Some(text) = text else { return Ok(Ensured::Unchanged) };
        debug!(program = self.program, text, "writing rules");
        let output = self.feed(&["-f", "-"], &text)?;
        if !output.status.success() {
            return Err(failed(self.program, "cannot write the rules".into(), &output));
        }
        Ok(Ensured::Written)
    }

    fn list(&self, Table { family, name }: Table) -> Result<Listed, HostError> {
        let output = self.feed(&["-j", "list", "table", family, name], "")?;
        let cannot = || format!("cannot list table {family} {name}");
        if !output.status.success() {
            if String::from_utf8_lossy(&output.stderr).contains(NO_SUCH_TABLE) {
                return Ok(Listed::default());
            }
            return Err(failed(self.program, cannot(), &output));
        }
        let listed = nftables::Listed::read(&String::from_utf8_lossy(&output.stdout));
        listed.map_err(|error| HostError::Broken { operation: cannot(), source: error.into() })
    }

    fn feed(&self, words: &[&str], text: &str) -> Result<Output, HostError> {
        let mut command = Command::new(self.program);
        command.args(words).env("LC_ALL", "C");
        feed(command, text).map_err(|error| not_run(self.program, error, REMEDY))
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::firewall::{Wanted, rules};

    use super::*;

    #[tokio::test]
    async fn a_missing_nft_is_told_apart_with_a_remedy() {
        let mut firewall = NftablesFirewall::with_program("no-such-nft");
        let wanted = Wanted { masquerade: false, random_fully: true, forward: true };
        let rules = rules("10.5.0.0/16".parse().unwrap(), "10.5.1.0/24".parse().unwrap(), wanted, vec![]);

        let error = firewall.ensure(&rules).await.unwrap_err();

        assert!(matches!(&error, HostError::Missing { missing, .. } if missing == "no-such-nft"), "{error}");
        assert!(error.to_string().contains("EnableNFTables"), "{error}");
    }
}
