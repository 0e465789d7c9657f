//! The rules in iptables' own words: `-S` lists them so, `iptables-restore`
//! takes them so, and comparing the two as text is sound.
//!
//! Another agent with another network may run on this host and use the same
//! chains. So a chain is not rewritten blindly: what such an agent writes keeps its
//! place in front. Whatever else is in there goes: it could only shadow ours.
//!
//! Our jump stands before the first rule that could decide about our packets,
//! and no further up: what only counts, logs or accepts may stand above it, and who
//! denies has to.
//!
//! ```text
//!   cali-FORWARD, KUBE-*        who says what may pass, of us too: we go behind them
//!   DOCKER-USER                 the operator's place for denials: likewise; it comes along where we go up
//!   LOG, ACCEPT, from elsewhere to elsewhere
//!   ── FLANNEL-FWD ──
//!   DROP, REJECT, DOCKER-FORWARD, any chain that we do not know
//! ```

use std::fmt::Write;

use ipnetwork::IpNetwork;

use super::{Chain, Match, Purpose, Rule, Ruleset, Verdict, of_all};
use crate::claim::overlap;

mod older;

impl Purpose {
    /// The table our chain is in.
    pub fn table(self) -> &'static str {
        match self {
            Self::Masquerade => "nat",
            Self::Forward => "filter",
            Self::Admit => "raw",
        }
    }

    /// The name of our chain: flannel's, where it has one.
    pub fn chain(self) -> &'static str {
        match self {
            Self::Masquerade => "FLANNEL-POSTRTG",
            Self::Forward => "FLANNEL-FWD",
            Self::Admit => "FLANNEL-ADMIT",
        }
    }

    /// The built-in chain that jumps to ours.
    pub fn parent(self) -> &'static str {
        match self {
            Self::Masquerade => "POSTROUTING",
            Self::Forward => "FORWARD",
            Self::Admit => "PREROUTING",
        }
    }

    fn comment(self) -> &'static str {
        match self {
            Self::Masquerade => "flanneld masq",
            Self::Forward => "flanneld forward",
            Self::Admit => "flanneld admit",
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
        line + &match rule.verdict {
            Verdict::Return => "RETURN".to_owned(),
            Verdict::Accept => "ACCEPT".to_owned(),
            Verdict::Mark(mark) => format!("MARK --set-xmark {mark:#x}/{mark:#x}"),
            Verdict::Masquerade { random_fully: false } => "MASQUERADE".to_owned(),
            Verdict::Masquerade { random_fully: true } => "MASQUERADE --random-fully".to_owned(),
        }
    }
}

/// The input of `iptables-restore --noflush` that brings one chain from
/// `listed` to what `rules` want; `None` if it is so already.
///
/// One table is one transaction: there is no moment without the rules, and those
/// that an older flannel left go as ours come. For a `conceded` rule our jump
/// does not move now, because somebody insists on its place.
pub fn restore(rules: &Ruleset, chain: &Chain, listed: &Listed, conceded: &[String]) -> Option<String> {
    let purpose = chain.purpose;
    let (name, parent, jump) = (purpose.chain(), purpose.parent(), purpose.jump());
    let wanted: Vec<String> = chain.lines().collect();
    // The rule on the mark belongs to all agents and stands once.
    let shared = |line: &&String| of_all(purpose).any(|rule| chain.line(&rule) == **line);
    let theirs = |line: &&String| {
        let prefixes: Vec<IpNetwork> = prefixes(line).collect();
        rules.of_another(purpose, &prefixes).any(|rule| chain.line(&rule) == **line)
    };
    let foreign: Vec<&String> = listed.rules.iter().filter(theirs).collect();
    // With our rules off, it stays for whoever else is there.
    let of_others = wanted.is_empty() && !foreign.is_empty();
    let of_everybody = if of_others { &listed.rules } else { &wanted }.iter().filter(shared);
    let ours = wanted.iter().filter(|line| !shared(line));
    let target: Vec<&String> = of_everybody.clone().chain(foreign).chain(ours.clone()).collect();
    // Where ours stand among the others' does not matter: two agents that each
    // insisted on the last place would never come to rest.
    let in_order = listed.rules.iter().filter(|line| !theirs(line)).eq(of_everybody.chain(ours));
    let jumps = listed.parent.iter().filter(|line| **line == jump).count();
    let flat = older::left_in(rules, chain, &listed.parent);

    let mut text = format!("*{}\n", purpose.table());
    let mut line = |words: &str| writeln!(text, "{words}").expect("a string takes all that is written to it");
    for rule in &flat {
        line(&rule.replacen("-A", "-D", 1));
    }
    if target.is_empty() {
        if !listed.exists && jumps == 0 && flat.is_empty() {
            return None;
        }
        for _ in 0..jumps {
            line(&jump.replacen("-A", "-D", 1));
        }
        if listed.exists || jumps > 0 {
            // Declaring the chain empties it, and makes it where only the jump was left.
            line(&format!(":{name} - [0:0]"));
            line(&format!("-X {name}"));
        }
    } else {
        let standing = listed.exists && in_order;
        let Place { before, brings_operator, wrong } = place(rules, purpose, listed, &flat, conceded);
        let misplaced =
            !of_others && wrong.iter().any(|(_, rule)| !conceded.iter().any(|conceded| conceded == rule));
        if standing && jumps == 1 && !misplaced && flat.is_empty() {
            return None;
        }
        if !standing {
            line(&format!(":{name} - [0:0]"));
            for rule in target {
                line(rule);
            }
        }
        for _ in usize::from(!misplaced)..jumps {
            line(&jump.replacen("-A", "-D", 1));
        }
        if jumps == 0 || misplaced {
            match before {
                Some(before) => {
                    let insert = |number: usize| format!("-I {parent} {number}");
                    let mut number = before + 1;
                    if brings_operator {
                        line(&operator_jump(parent).replacen("-A", "-D", 1));
                        line(&operator_jump(parent).replacen(&format!("-A {parent}"), &insert(number), 1));
                        number += 1;
                    }
                    line(&jump.replacen(&format!("-A {parent}"), &insert(number), 1));
                }
                None => line(&jump),
            }
        }
    }
    line("COMMIT");
    Some(text)
}

/// Why our jump does not belong where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// A rule above it could decide about our packets.
    Above,
    /// What the operator denies comes below it.
    AboveOperator,
    /// Who says what may pass comes below it, and may insist on that.
    AbovePolicy,
}

/// The rules that are on the wrong side of our jump, conceded or not; none where we want no rules.
pub fn wrong<'a>(rules: &Ruleset, chain: &Chain, listed: &'a Listed) -> Vec<(Wrong, &'a str)> {
    if chain.rules.is_empty() {
        return vec![];
    }
    let flat = older::left_in(rules, chain, &listed.parent);
    place(rules, chain.purpose, listed, &flat, &[]).wrong
}

/// Where our jump belongs among the other rules, which are counted from 0.
struct Place<'a> {
    /// Before this one; or else at the end.
    before: Option<usize>,
    /// Whether the operator's place would be behind it there.
    brings_operator: bool,
    /// What is on the wrong side of where it stands.
    wrong: Vec<(Wrong, &'a str)>,
}

/// Docker's place for what the operator denies; its contract says that it comes first.
const OPERATOR: &str = "DOCKER-USER";

fn operator_jump(parent: &str) -> String {
    format!("-A {parent} -j {OPERATOR}")
}

/// Chains in which somebody says what may pass, of us too: we never go before them.
const POLICIES: [&str; 5] = ["cali-", "KUBE-", "CILIUM_", "WEAVE-", "FELIX-"];

/// Chains that let our packets through: the operator's, other flannels', and the
/// one in which Docker keeps its own bridges apart.
const HARMLESS: [&str; 3] = [OPERATOR, "FLANNEL-", "DOCKER-ISOLATION-STAGE-1"];

/// Targets after which a packet goes on to the next rule.
const PASSING: [&str; 18] = [
    "CT",
    "NOTRACK",
    "LOG",
    "NFLOG",
    "ULOG",
    "TRACE",
    "MARK",
    "CONNMARK",
    "SECMARK",
    "CONNSECMARK",
    "CLASSIFY",
    "TCPMSS",
    "TOS",
    "DSCP",
    "TTL",
    "HL",
    "SET",
    "AUDIT",
];

fn place<'a>(
    rules: &Ruleset,
    purpose: Purpose,
    listed: &'a Listed,
    flat: &[&String],
    conceded: &[String],
) -> Place<'a> {
    let (parent, jump) = (purpose.parent(), purpose.jump());
    let is_other = |line: &&String| **line != jump && !flat.contains(line);
    let others = || listed.parent.iter().filter(is_other).map(String::as_str).enumerate();
    let is_policy =
        |line| target(line).is_some_and(|to| POLICIES.iter().any(|policy| to.starts_with(policy)));
    let decides = |line: &str| {
        let Some(to) = target(line) else { return false };
        if HARMLESS.iter().any(|harmless| to.starts_with(harmless))
            || PASSING.contains(&to)
            || !may_be_ours(rules, line)
        {
            return false;
        }
        match purpose {
            // We would say the same.
            Purpose::Forward | Purpose::Admit => to != "ACCEPT",
            // Who comes from elsewhere is masqueraded by us too, or else by this rule after all.
            Purpose::Masquerade => to != "MASQUERADE" || comes_from_us(rules, line),
        }
    };
    // Of several jumps the last one is kept.
    let last = listed.parent.iter().rposition(|line| *line == jump);
    let stands = last.map(|last| listed.parent[..last].iter().filter(is_other).count());
    let policies = others().filter(|(_, line)| is_policy(line));
    let least = policies.clone().last().map_or(0, |(at, _)| at + 1);
    let deciders = others().skip(least).filter(|(_, line)| decides(line));
    let is_above = |(at, _): &(usize, &str)| stands.is_some_and(|stands| *at < stands);
    let is_below = |(at, _): &(usize, &str)| stands.is_some_and(|stands| stands <= *at);
    // Where we are behind it already; a jump that has to be put in anyway goes before it.
    let is_conceded = |rule: &(usize, &str)| is_above(rule) && conceded.iter().any(|line| line == rule.1);
    let before = deciders.clone().find(|rule| !is_conceded(rule)).map(|(at, _)| at);
    let is_operator = |line: &&str| purpose == Purpose::Forward && *line == operator_jump(parent);
    let operator = others().find(|(_, line)| is_operator(line));
    let brings_operator =
        before.is_some_and(|before| operator.is_some_and(|(operator, _)| before <= operator));

    let above = deciders.filter(is_above).map(|(_, line)| (Wrong::Above, line));
    let operator = operator.into_iter().filter(is_below).map(|(_, line)| (Wrong::AboveOperator, line));
    let policies = policies.filter(is_below).map(|(_, line)| (Wrong::AbovePolicy, line));
    Place { before, brings_operator, wrong: above.chain(operator).chain(policies).collect() }
}

/// Where a rule sends a packet.
fn target(line: &str) -> Option<&str> {
    after(line, &["-j", "-g"])
}

/// Whether a rule can match packets from or to our network.
fn may_be_ours(rules: &Ruleset, line: &str) -> bool {
    let elsewhere = |flag| only_prefix(line, flag).is_some_and(|prefix| !overlap(prefix, rules.network));
    !(elsewhere("-s") && elsewhere("-d"))
}

/// Whether a rule can match packets from our network.
fn comes_from_us(rules: &Ruleset, line: &str) -> bool {
    only_prefix(line, "-s").is_none_or(|source| overlap(source, rules.network))
}

/// The prefix after a flag, unless it is turned round.
fn only_prefix(line: &str, flag: &str) -> Option<IpNetwork> {
    if line.contains(&format!("! {flag} ")) { None } else { after(line, &[flag])?.parse().ok() }
}

/// The word after one of these.
fn after<'a>(line: &'a str, flags: &[&str]) -> Option<&'a str> {
    let mut words = line.split_whitespace();
    words.find(|word| flags.contains(word))?;
    words.next()
}

/// The prefixes that a rule names after `-s` and `-d`.
fn prefixes(line: &str) -> impl Iterator<Item = IpNetwork> {
    let words = line.split_whitespace();
    let next = words.clone().skip(1);
    words.zip(next).filter(|(flag, _)| matches!(*flag, "-s" | "-d")).filter_map(|(_, word)| word.parse().ok())
}

#[cfg(test)]
mod tests;
