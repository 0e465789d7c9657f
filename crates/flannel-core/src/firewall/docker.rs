//! What Docker's own rules drop that no rule of ours can let pass, and which of
//! its options take that back.
//!
//! A drop is final in nf_tables, in whichever table it stands. So where Docker's
//! stands before ours, or beside them in a table of its own, only Docker can be
//! asked to leave it out. `mk-docker-opts.sh` does, by version; here it is read
//! off the rules whether that has worked:
//!
//! ```text
//!   28.0   iptables   raw PREROUTING   -d ADDRESS ! -i BRIDGE -p tcp --dport PORT -j DROP
//!   28.2   iptables   raw PREROUTING   -d ADDRESS ! -i BRIDGE -j DROP
//!   29     nftables   raw-PREROUTING   ip daddr ADDRESS iifname != BRIDGE drop
//!                     filter-forward-in__BRIDGE        drop, and no accept of our mark
//! ```

use std::fmt::Write;

/// The mark that our rules give to what comes from the network, a bit of its own
/// that neither kube-proxy (0x4000, 0x8000) nor the CNI plugins (0x2000) use.
pub const NETWORK_MARK: u32 = 0x1000;

/// The option by which Docker leaves out its rules on direct access.
const DIRECT_ROUTING: &str = "--allow-direct-routing";

/// What dockerd is to be told so that packets of other hosts reach the containers
/// on `bridge`; `None` if nothing of Docker's stands in their way.
///
/// `listing` is the raw table as `iptables -S` or the table `docker-bridges` as
/// `nft list` shows it, or one after the other.
pub fn advice(listing: &str, bridge: &str) -> Option<String> {
    let lines = || listing.lines().map(Line::of);
    let mut options = vec![];
    let direct = lines().any(|line| line.drops_direct_access(bridge) && !line.has("--dport"));
    if direct {
        options.push(DIRECT_ROUTING.to_owned());
    }
    if !accepts_our_mark(listing, bridge) {
        options.push(format!("--bridge-accept-fwmark={NETWORK_MARK:#x}/{NETWORK_MARK:#x}"));
    }
    let mut advice = format!("docker drops what other hosts send to containers on {bridge}");
    let told = if !options.is_empty() {
        write!(advice, ": start dockerd with {}, as mk-docker-opts.sh has it", options.join(" "))
    } else if lines().any(|line| line.drops_direct_access(bridge)) {
        write!(
            advice,
            " whose ports are published: docker from 28.2 on can be told not to, by {DIRECT_ROUTING}"
        )
    } else {
        return None;
    };
    told.expect("a string takes all that is written to it");
    Some(advice)
}

/// Whether Docker's nftables let pass what has our mark; they do where there are none.
fn accepts_our_mark(listing: &str, bridge: &str) -> bool {
    let head = format!("chain filter-forward-in__{bridge} {{");
    let mut chain = listing
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != head)
        .take_while(|line| *line != "}")
        .map(Line::of)
        .filter(|line| line.has("drop") || line.accepts(NETWORK_MARK));
    // The first of the two decides.
    chain.next().is_none_or(|line| !line.has("drop"))
}

/// A rule in words, without the quotes that some listings have and others not.
struct Line<'a>(Vec<&'a str>);

impl<'a> Line<'a> {
    fn of(line: &'a str) -> Self {
        // Behind "comment" is what somebody thought of it.
        let words = line.split_whitespace().take_while(|word| *word != "comment");
        Self(words.map(|word| word.trim_matches(['"', ','])).collect())
    }

    fn has(&self, word: &str) -> bool {
        self.0.contains(&word)
    }

    /// Whether the words stand there one after the other.
    fn says(&self, words: &[&str]) -> bool {
        self.0.windows(words.len()).any(|window| window == words)
    }

    /// Whether it keeps packets from a container that do not come from its bridge.
    fn drops_direct_access(&self, bridge: &str) -> bool {
        let of_iptables =
            self.says(&["!", "-i", bridge]) && self.says(&["-A", "PREROUTING"]) && self.has("-d");
        let of_nftables = self.says(&["ip", "daddr"])
            // With interfaces that are trusted as the bridge is, it is one of a set.
            && (self.says(&["iifname", "!=", bridge]) || self.says(&["iifname", "!=", "{", bridge]));
        (of_iptables && self.says(&["-j", "DROP"])) || (of_nftables && self.has("drop"))
    }

    /// Whether it accepts packets with that mark: `meta mark & 0x00001000 == 0x00001000 … accept`.
    fn accepts(&self, mark: u32) -> bool {
        let number = |word: &&str| {
            word.strip_prefix("0x").map_or_else(|| word.parse().ok(), |hex| u32::from_str_radix(hex, 16).ok())
        };
        let place = self.0.windows(2).position(|words| words == ["meta", "mark"]);
        let Some(place) = place.filter(|_| self.has("accept")) else { return false };
        let words = &self.0[place + 2..];
        match words {
            ["&" | "and", mask, "==", value, ..] => {
                number(mask).zip(number(value)).is_some_and(|(mask, value)| mark & mask == value)
            }
            ["==", value, ..] | [value, ..] => number(value) == Some(mark),
            [] => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCKER_27: &str = include_str!("../../../../tests/firewall/docker-27.iptables");
    const DOCKER_28_0: &str = include_str!("../../../../tests/firewall/docker-28.0.iptables");
    const DOCKER_28_2: &str = include_str!("../../../../tests/firewall/docker-28.2.iptables");
    const DOCKER_29: &str = include_str!("../../../../tests/firewall/docker-29.iptables");
    const DOCKER_29_NFT: &str = include_str!("../../../../tests/firewall/docker-29.nft");

    /// The rules of a docker0 with two containers, with these options.
    fn rules(text: &str, options: &[&str]) -> String {
        let text = text
            .replace("{bridge}", "docker0")
            .replace("{container}", "10.5.1.2")
            .replace("{published}", "10.5.1.3")
            .replace("{mark}", "0x00001000");
        let mut kept = String::new();
        for line in text.lines() {
            let (line, wanted) = match (line.split_once(" # without "), line.split_once(" # with ")) {
                (Some((line, option)), _) => (line, !options.contains(&option)),
                (_, Some((line, option))) => (line, options.contains(&option)),
                _ => (line, true),
            };
            if wanted {
                kept += line;
                kept.push('\n');
            }
        }
        kept
    }

    fn advice_on(text: &str, options: &[&str]) -> Option<String> {
        advice(&rules(text, options), "docker0")
    }

    #[test]
    fn docker_to_27_needs_no_option() {
        assert_eq!(advice_on(DOCKER_27, &[]), None);
        assert_eq!(advice("", "docker0"), None);
    }

    #[test]
    fn docker_28_0_drops_published_ports() {
        assert_eq!(
            advice_on(DOCKER_28_0, &[]).unwrap(),
            "docker drops what other hosts send to containers on docker0 whose ports are published: \
             docker from 28.2 on can be told not to, by --allow-direct-routing"
        );
        assert_eq!(advice_on(DOCKER_28_0, &["DOCKER_INSECURE_NO_IPTABLES_RAW"]), None);
    }

    #[test]
    fn docker_from_28_2_is_to_allow_direct_routing() {
        for text in [DOCKER_28_2, DOCKER_29] {
            assert_eq!(
                advice_on(text, &[]).unwrap(),
                "docker drops what other hosts send to containers on docker0: \
                 start dockerd with --allow-direct-routing, as mk-docker-opts.sh has it"
            );
            assert_eq!(advice_on(text, &[DIRECT_ROUTING]), None);
        }
    }

    #[test]
    fn docker_with_nftables_is_to_accept_our_mark_too() {
        assert_eq!(
            advice_on(DOCKER_29_NFT, &[]).unwrap(),
            "docker drops what other hosts send to containers on docker0: start dockerd with \
             --allow-direct-routing --bridge-accept-fwmark=0x1000/0x1000, as mk-docker-opts.sh has it"
        );
        assert_eq!(
            advice_on(DOCKER_29_NFT, &[DIRECT_ROUTING]).unwrap(),
            "docker drops what other hosts send to containers on docker0: start dockerd with \
             --bridge-accept-fwmark=0x1000/0x1000, as mk-docker-opts.sh has it"
        );
        assert_eq!(advice_on(DOCKER_29_NFT, &[DIRECT_ROUTING, "--bridge-accept-fwmark"]), None);
    }

    #[test]
    fn the_mark_is_the_one_that_docker_is_told() {
        let script = include_str!("../../../../scripts/mk-docker-opts.sh");

        assert!(script.contains(&format!("\nmark={NETWORK_MARK:#x}/{NETWORK_MARK:#x}\n")));
    }

    #[test]
    fn another_mark_is_not_ours() {
        let rules = rules(DOCKER_29_NFT, &[DIRECT_ROUTING, "--bridge-accept-fwmark"]);

        for (theirs, ours) in [
            ("meta mark & 0x00000007 == 0x00000007", false),
            ("meta mark 0x00000001", false),
            ("meta mark 0x00001000", true),
            ("meta mark and 4096 == 4096", true),
            ("meta mark & 0x0000ff00 == 0x00001000", true),
        ] {
            let rules = rules.replace("meta mark & 0x00001000 == 0x00001000", theirs);

            assert_eq!(advice(&rules, "docker0").is_none(), ours, "{theirs}");
        }
    }

    #[test]
    fn other_bridges_are_not_our_concern() {
        assert_eq!(advice(&rules(DOCKER_28_2, &[]), "docker1"), None);
        assert_eq!(advice(&rules(DOCKER_29_NFT, &[]), "docker1"), None);
    }

    #[test]
    fn trusted_interfaces_beside_the_bridge_change_nothing_for_ours() {
        let text = DOCKER_29_NFT.replace(
            r#"iifname != "{bridge}" counter drop"#,
            r#"iifname != { "{bridge}", "eth7" } counter drop"#,
        );

        assert_eq!(advice_on(&text, &[]), advice_on(DOCKER_29_NFT, &[]));
    }
}
