//! The rules in iptables' own words: `-S` lists them so, `iptables-restore`
//! takes them so, and comparing the two as text is sound.
//!
//! Another agent with another network may run on this host and use the same two
//! chains. So a chain is not rewritten blindly: rules that name a network of
//! ours are ours, the others keep their place in front.

use std::fmt::Write;

use ipnetwork::IpNetwork;

use super::{Chain, Match, Purpose, Rule, Ruleset, Verdict};

impl Purpose {
    /// The table our chain is in.
    pub fn table(self) -> &'static str {
        match self {
            Self::Masquerade => "nat",
            Self::Forward => "filter",
        }
    }

    /// The name of our chain, flannel's.
    pub fn chain(self) -> &'static str {
        match self {
            Self::Masquerade => "FLANNEL-POSTRTG",
            Self::Forward => "FLANNEL-FWD",
        }
    }

    /// The built-in chain that jumps to ours.
    pub fn parent(self) -> &'static str {
        match self {
            Self::Masquerade => "POSTROUTING",
            Self::Forward => "FORWARD",
        }
    }

    fn comment(self) -> &'static str {
        match self {
            Self::Masquerade => "flanneld masq",
            Self::Forward => "flanneld forward",
        }
    }

    /// The rule in the built-in chain, as `-S` lists it.
    pub fn jump(self) -> String {
        format!("-A {} -m comment --comment \"{}\" -j {}", self.parent(), self.comment(), self.chain())
    }
}

/// What a table holds of ours now: the `-S` lines of both chains, rules only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Whether our chain is there.
    pub exists: bool,
    /// Its `-A` lines.
    pub rules: Vec<String>,
    /// The `-A` lines of the built-in chain.
    pub parent: Vec<String>,
}

impl Chain {
    /// The rules as `-S` lists them.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.rules.iter().map(|rule| self.line(rule))
    }

    fn line(&self, rule: &Rule) -> String {
        let mut line = format!("-A {}", self.purpose.chain());
        for (flag, side) in [("-s", rule.source), ("-d", rule.destination)] {
            match side {
                Match::Any => {}
                Match::In(network) => line += &format!(" {flag} {network}"),
                Match::NotIn(network) => line += &format!(" ! {flag} {network}"),
            }
        }
        if let Some((mark, mask)) = rule.mark {
            line += &format!(" -m mark --mark {mark:#x}/{mask:#x}");
        }
        line += &format!(" -m comment --comment \"{}\" -j ", self.purpose.comment());
        line += match rule.verdict {
            Verdict::Return => "RETURN",
            Verdict::Accept => "ACCEPT",
            Verdict::Masquerade { random_fully: false } => "MASQUERADE",
            Verdict::Masquerade { random_fully: true } => "MASQUERADE --random-fully",
        };
        line
    }
}

/// The input of `iptables-restore --noflush` that brings one chain from
/// `listed` to what `rules` want; `None` if it is so already.
///
/// One table is one transaction: there is no moment without the rules.
pub fn restore(rules: &Ruleset, chain: &Chain, listed: &Listed) -> Option<String> {
    let purpose = chain.purpose;
    let (name, jump) = (purpose.chain(), purpose.jump());
    let wanted: Vec<String> = chain.lines().collect();
    // A rule without any network, like the one on the mark, belongs to all agents and stands once.
    let comment = format!("--comment \"{}\"", purpose.comment());
    let shared = |line: &&String| prefixes(line).next().is_none() && line.contains(&comment);
    let theirs = |line: &&String| !rules.owns(prefixes(line)) && !shared(line);
    let foreign: Vec<&String> = listed.rules.iter().filter(theirs).collect();
    // With our rules off, it stays for whoever else is there.
    let of_others = wanted.is_empty() && !foreign.is_empty();
    let of_all = if of_others { &listed.rules } else { &wanted }.iter().filter(shared);
    let ours = wanted.iter().filter(|line| !shared(line));
    let target: Vec<&String> = of_all.clone().chain(foreign).chain(ours.clone()).collect();
    // Where ours stand among the others' does not matter: two agents that each
    // insisted on the last place would never come to rest.
    let in_order = listed.rules.iter().filter(|line| !theirs(line)).eq(of_all.chain(ours));
    let jumps = listed.parent.iter().filter(|line| **line == jump).count();

    let mut text = format!("*{}\n", purpose.table());
    let mut line = |words: &str| writeln!(text, "{words}").expect("a string takes all that is written to it");
    if target.is_empty() {
        if !listed.exists && jumps == 0 {
            return None;
        }
        for _ in 0..jumps {
            line(&jump.replacen("-A", "-D", 1));
        }
        // Declaring the chain empties it, and makes it where only the jump was left.
        line(&format!(":{name} - [0:0]"));
        line(&format!("-X {name}"));
    } else {
        let standing = listed.exists && in_order;
        if standing && jumps == 1 {
            return None;
        }
        if !standing {
            line(&format!(":{name} - [0:0]"));
            for rule in target {
                line(rule);
            }
        }
        for _ in 1..jumps {
            line(&jump.replacen("-A", "-D", 1));
        }
        if jumps == 0 {
            line(&jump);
        }
    }
    line("COMMIT");
    Some(text)
}

/// The prefixes that a rule names after `-s` and `-d`.
fn prefixes(line: &str) -> impl Iterator<Item = IpNetwork> {
    let words = line.split_whitespace();
    let next = words.clone().skip(1);
    words.zip(next).filter(|(flag, _)| matches!(*flag, "-s" | "-d")).filter_map(|(_, word)| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::{Wanted, rules};

    fn ruleset(masquerade: bool, forward: bool) -> Ruleset {
        let wanted = Wanted { masquerade, random_fully: true, forward };
        rules("10.5.0.0/16".parse().unwrap(), "10.5.86.0/24".parse().unwrap(), wanted, vec![])
    }

    fn listed(rules: &[&str], parent: &[&str]) -> Listed {
        let owned = |lines: &[&str]| lines.iter().map(ToString::to_string).collect();
        Listed { exists: true, rules: owned(rules), parent: owned(parent) }
    }

    const JUMP: &str = r#"-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD"#;
    const FROM: &str = r#"-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#;
    const TO: &str = r#"-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#;
    const OTHER: &str = r#"-A FLANNEL-FWD -s 10.9.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#;

    #[test]
    fn masquerade_is_written_as_flannel_writes_it() {
        let ruleset = ruleset(true, true);

        let text = restore(&ruleset, &ruleset.chains[0], &Listed::default()).unwrap();

        assert_eq!(
            text,
            r#"*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.86.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.86.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.86.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
"#
        );
    }

    #[test]
    fn what_stands_right_is_not_written_again() {
        let ruleset = ruleset(false, true);

        assert_eq!(restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[JUMP])), None);
    }

    #[test]
    fn only_a_missing_jump_is_added_to_a_chain_that_stands() {
        let ruleset = ruleset(false, true);

        let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[])).unwrap();

        assert_eq!(text, format!("*filter\n{JUMP}\nCOMMIT\n"));
    }

    #[test]
    fn a_second_jump_is_taken_away() {
        let ruleset = ruleset(false, true);

        let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[JUMP, JUMP])).unwrap();

        assert_eq!(text, format!("*filter\n{}\nCOMMIT\n", JUMP.replace("-A FORWARD", "-D FORWARD")));
    }

    #[test]
    fn rules_of_another_network_in_our_chain_keep_their_place() {
        let ruleset = ruleset(false, true);

        let text = restore(&ruleset, &ruleset.chains[1], &listed(&[TO, OTHER], &[JUMP])).unwrap();

        assert_eq!(text, format!("*filter\n:FLANNEL-FWD - [0:0]\n{OTHER}\n{FROM}\n{TO}\nCOMMIT\n"));
    }

    #[test]
    fn two_agents_in_one_chain_come_to_rest() {
        let ruleset = ruleset(false, true);

        for order in [[OTHER, FROM, TO], [FROM, OTHER, TO], [FROM, TO, OTHER]] {
            assert_eq!(restore(&ruleset, &ruleset.chains[1], &listed(&order, &[JUMP])), None);
        }
    }

    #[test]
    fn the_rule_that_names_no_network_goes_with_the_last_agent() {
        let (on, off) = (ruleset(true, false), ruleset(false, false));
        let jump = Purpose::Masquerade.jump();
        let lines: Vec<String> = on.chains[0].lines().collect();
        let other = lines[1].replace("10.5.", "10.9.");
        let mut shown: Vec<&str> = lines.iter().map(String::as_str).collect();

        let alone = restore(&off, &off.chains[0], &listed(&shown, &[&jump])).unwrap();
        shown.push(&other);
        let shared = restore(&off, &off.chains[0], &listed(&shown, &[&jump])).unwrap();

        assert!(alone.contains("-X FLANNEL-POSTRTG"), "{alone}");
        assert_eq!(shared, format!("*nat\n:FLANNEL-POSTRTG - [0:0]\n{}\n{other}\nCOMMIT\n", lines[0]));
    }

    #[test]
    fn rules_that_are_no_longer_wanted_go_with_chain_and_jump() {
        let ruleset = ruleset(false, false);

        let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[JUMP])).unwrap();

        let gone = JUMP.replace("-A FORWARD", "-D FORWARD");
        assert_eq!(text, format!("*filter\n{gone}\n:FLANNEL-FWD - [0:0]\n-X FLANNEL-FWD\nCOMMIT\n"));
    }

    #[test]
    fn nothing_wanted_and_nothing_there_needs_nothing() {
        let ruleset = ruleset(false, false);

        assert_eq!(restore(&ruleset, &ruleset.chains[0], &Listed::default()), None);
    }

    #[test]
    fn rules_of_our_former_network_go() {
        let mut ruleset = ruleset(false, true);
        ruleset.former = vec!["10.9.0.0/16".parse().unwrap()];

        let text = restore(&ruleset, &ruleset.chains[1], &listed(&[OTHER, FROM, TO], &[JUMP])).unwrap();

        assert_eq!(text, format!("*filter\n:FLANNEL-FWD - [0:0]\n{FROM}\n{TO}\nCOMMIT\n"));
    }
}
