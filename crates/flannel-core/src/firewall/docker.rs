//! What Docker's own rules drop that no rule of ours can let pass, and which of
//! its options take that back.
//!
//! A drop is final in nf_tables, in whichever table it stands. Our jump goes before
//! those of Docker's that stand in iptables; where they are in a table beside ours,
//! or ours in one beside theirs, only Docker can be asked to leave them out.
//! `mk-docker-opts.sh` does, by version; here it is read off the rules whether that
//! has worked:
//!
//! ```text
//!   28.0   iptables   raw PREROUTING   -d ADDRESS ! -i BRIDGE -p tcp --dport PORT -j DROP
//!   28.2   iptables   raw PREROUTING   -d ADDRESS ! -i BRIDGE -j DROP
//!   29     nftables   raw-PREROUTING   ip daddr ADDRESS iifname != BRIDGE drop
//!                     filter-forward-in__BRIDGE        drop, and no accept of our mark
//! ```

use std::fmt::Write;

use ipnetwork::IpNetwork;

use super::Purpose;

/// The mark that our rules give to what comes from the network, a bit of its own
/// that neither kube-proxy (0x4000, 0x8000) nor the CNI plugins (0x2000) use.
pub const NETWORK_MARK: u32 = 0x1000;

/// The option by which Docker leaves out its rules on direct access.
const DIRECT_ROUTING: &str = "--allow-direct-routing";

/// The rules of this host as they are listed, as far as they could be in our way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Listing<'a> {
    /// What `iptables -t raw -S PREROUTING` prints.
    pub raw: &'a str,
    /// What `iptables -S` prints; not asked for where our rules are in iptables, too.
    pub filter: Option<&'a str>,
    /// What `nft list table ip docker-bridges` prints.
    pub bridges: &'a str,
}

/// What is to be changed so that packets of other hosts reach the containers on
/// `bridge`; `None` if nothing stands in their way that our rules cannot pass.
pub fn advice(listing: &Listing<'_>, network: IpNetwork, bridge: &str) -> Option<String> {
    if listing.filter.is_some_and(|filter| iptables_drops(filter, network, bridge)) {
        return Some(format!(
            "rules in iptables drop what other hosts send to containers on {bridge}, and rules in nftables cannot let it \
             pass: leave EnableNFTables out of the network config"
        ));
    }
    // What stands behind our jump comes too late to drop what we admit.
    let jump = Purpose::Admit.jump();
    let raw = || listing.raw.lines().take_while(|line| line.trim_end() != jump);
    let lines = || raw().chain(listing.bridges.lines()).map(Line::of);
    let mut options = vec![];
    let direct = lines().any(|line| line.drops_direct_access(bridge) && !line.has("--dport"));
    if direct {
        options.push(DIRECT_ROUTING.to_owned());
    }
    if !accepts_our_mark(listing.bridges, bridge) {
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

/// Whether the filter table drops what comes for the bridge, whatever our rules in nftables say.
fn iptables_drops(listing: &str, network: IpNetwork, bridge: &str) -> bool {
    let network = network.to_string();
    let mark = format!("{NETWORK_MARK:#x}/{NETWORK_MARK:#x}");
    let has = |wanted: &dyn Fn(&Line<'_>) -> bool| listing.lines().map(Line::of).any(|line| wanted(&line));
    let is_let_in = has(&|line| {
        line.says(&["-j", "ACCEPT"])
            && (line.says(&["--mark", &mark]) || line.says(&["-A", "FORWARD"]) && line.has(&network))
    });
    let drops = has(&|line| {
        line.says(&["-P", "FORWARD", "DROP"])
            || line.says(&["-A", "DOCKER", "!", "-i", bridge, "-o", bridge, "-j", "DROP"])
    });
    drops && !is_let_in
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

    fn network() -> IpNetwork {
        "10.5.0.0/16".parse().unwrap()
    }

    fn advice_on(text: &str, options: &[&str]) -> Option<String> {
        said_of(&rules(text, options), "docker0")
    }

    fn said_of(rules: &str, bridge: &str) -> Option<String> {
        advice(&Listing { raw: rules, filter: None, bridges: rules }, network(), bridge)
    }

    #[test]
    fn docker_to_27_needs_no_option() {
        assert_eq!(advice_on(DOCKER_27, &[]), None);
        assert_eq!(said_of("", "docker0"), None);
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

            assert_eq!(said_of(&rules, "docker0").is_none(), ours, "{theirs}");
        }
    }

    #[test]
    fn what_our_jump_stands_before_is_not_in_the_way() {
        let (rules, jump) = (rules(DOCKER_28_2, &[]), Purpose::Admit.jump());
        let of_raw = |raw: String| advice(&Listing { raw: &raw, ..Listing::default() }, network(), "docker0");

        assert_eq!(of_raw(format!("{jump}\n{rules}")), None);
        assert!(of_raw(format!("{rules}\n{jump}")).is_some());
    }

    #[test]
    fn rules_in_nftables_cannot_pass_what_iptables_drops() {
        let drop = "-A DOCKER ! -i docker0 -o docker0 -j DROP";
        let marked = "-A DOCKER-FORWARD -m mark --mark 0x1000/0x1000 -j ACCEPT";
        let by_hand = "-A FORWARD -s 10.5.0.0/16 -j ACCEPT";
        let filter = |lines: &[&str]| {
            let filter = lines.join("\n");
            advice(&Listing { filter: Some(&filter), ..Listing::default() }, network(), "docker0")
        };

        for policy in ["-P FORWARD ACCEPT", "-P FORWARD DROP"] {
            assert!(filter(&[policy, drop]).unwrap().contains("leave EnableNFTables out"));
            for let_in in [marked, by_hand] {
                assert_eq!(filter(&[policy, let_in, drop]), None);
            }
        }
        assert!(filter(&["-P FORWARD DROP"]).is_some());
        assert_eq!(filter(&["-P FORWARD ACCEPT", "-A DOCKER ! -i docker1 -o docker1 -j DROP"]), None);
    }

    #[test]
    fn other_bridges_are_not_our_concern() {
        assert_eq!(said_of(&rules(DOCKER_28_2, &[]), "docker1"), None);
        assert_eq!(said_of(&rules(DOCKER_29_NFT, &[]), "docker1"), None);
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
