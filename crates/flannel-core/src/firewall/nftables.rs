//! The rules in nftables' words: `nft -j list table` tells what stands, and
//! `nft -f -` takes what should, a whole table in one transaction.
//!
//! What stands is read back into the [`Rule`]s it means, so "in sync" does not
//! hang on how some version of nft spells a rule. Whatever cannot be read so
//! was made by no flannel, and the table is flannel's: it goes.
//!
//! ```text
//!   add table; delete table     whatever stands is gone, if anything does
//!   table { … }                 and this stands instead: no packet sees the gap
//! ```
//!
//! The tables and chains have the names that Go flanneld gives them, so that each
//! replaces what the other has left. Two agents with two networks share a table
//! as they share iptables' chains: what such another agent writes is written again
//! as it was. Whatever else is in there goes: it could only shadow ours.

use std::fmt::Write;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

use super::{Chain, Match, Purpose, Rule, Ruleset, Verdict};

/// The family of a table and what it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// `ip` or `ip6`.
    pub family: &'static str,
    /// Flannel's name for it.
    pub name: &'static str,
}

/// For rules on IPv4.
pub const IPV4: Table = Table { family: "ip", name: "flannel-ipv4" };

/// For rules on IPv6.
pub const IPV6: Table = Table { family: "ip6", name: "flannel-ipv6" };

impl Table {
    /// The one for a network.
    pub fn of(network: IpNetwork) -> Self {
        if network.is_ipv4() { IPV4 } else { IPV6 }
    }
}

/// What a chain of a table is hooked to.
struct Hook {
    chain: &'static str,
    kind: &'static str,
    hook: &'static str,
    /// A word of nft's, and the number it stands for.
    priority: (&'static str, i64),
}

fn hook(purpose: Purpose) -> Hook {
    match purpose {
        Purpose::Masquerade => {
            Hook { chain: "postrtg", kind: "nat", hook: "postrouting", priority: ("srcnat", 100) }
        }
        Purpose::Forward => {
            Hook { chain: "forward", kind: "filter", hook: "forward", priority: ("filter", 0) }
        }
        Purpose::Admit => {
            Hook { chain: "admit", kind: "filter", hook: "prerouting", priority: ("raw", -300) }
        }
    }
}

/// What a table holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Whether it is there at all.
    pub exists: bool,
    /// Whether it has something that no flannel puts there: a flag, another chain.
    pub foreign: bool,
    /// Our chains.
    pub chains: Vec<ListedChain>,
}

/// A chain of ours that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedChain {
    /// Which.
    pub purpose: Purpose,
    /// Whether it is hooked in as it should be, with the policy to accept.
    pub hooked: bool,
    /// Its rules in order; `None` for one that no flannel makes.
    pub rules: Vec<Option<Rule>>,
}

/// An answer of nft that is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("not the JSON that nft lists a table in")]
pub struct BadListing(#[from] serde_json::Error);

#[derive(Deserialize)]
struct Answer {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Item {
    Table(TableItem),
    Chain(ChainItem),
    Rule(RuleItem),
    #[serde(untagged)]
    Other(Value),
}

#[derive(Deserialize)]
struct TableItem {
    flags: Option<Value>,
}

#[derive(Deserialize)]
struct ChainItem {
    name: String,
    r#type: Option<String>,
    hook: Option<String>,
    prio: Option<i64>,
    policy: Option<String>,
}

#[derive(Deserialize)]
struct RuleItem {
    chain: String,
    expr: Vec<Value>,
}

impl Listed {
    /// Reads what `nft -j list table` prints.
    ///
    /// # Errors
    /// It is something else.
    pub fn read(json: &str) -> Result<Self, BadListing> {
        let answer: Answer = serde_json::from_str(json)?;
        let mut listed = Self { exists: true, ..Self::default() };
        let purpose = |name: &str| Purpose::ALL.into_iter().find(|purpose| hook(*purpose).chain == name);
        for item in answer.nftables {
            match item {
                Item::Table(table) => listed.foreign |= table.flags.is_some(),
                Item::Chain(chain) => match purpose(&chain.name) {
                    Some(purpose) => {
                        let Hook { kind, hook, priority: (_, priority), .. } = hook(purpose);
                        let hooked = chain.r#type.as_deref() == Some(kind)
                            && chain.hook.as_deref() == Some(hook)
                            && chain.prio == Some(priority)
                            && chain.policy.as_deref() == Some("accept");
                        listed.chains.push(ListedChain { purpose, hooked, rules: vec![] });
                    }
                    None => listed.foreign = true,
                },
                Item::Rule(rule) => {
                    let chain = purpose(&rule.chain)
                        .and_then(|purpose| listed.chains.iter_mut().find(|chain| chain.purpose == purpose));
                    match chain {
                        Some(chain) => chain.rules.push(read_rule(&rule.expr)),
                        None => listed.foreign = true,
                    }
                }
                // A set, a map; and what nft tells of itself.
                Item::Other(other) => listed.foreign |= other.get("metainfo").is_none(),
            }
        }
        Ok(listed)
    }

    /// Whether nothing is left in it to do anything.
    fn is_idle(&self) -> bool {
        !self.foreign && self.chains.iter().all(|chain| chain.rules.is_empty())
    }
}

/// The rule that some expressions mean; `None` if no rule of ours can mean that.
fn read_rule(expressions: &[Value]) -> Option<Rule> {
    let (verdict, matches) = expressions.split_last()?;
    let (name, detail) = only(verdict)?;
    let verdict = match (name, detail) {
        ("return", Value::Null) => Verdict::Return,
        ("accept", Value::Null) => Verdict::Accept,
        ("mangle", detail) if detail["key"]["meta"]["key"] == "mark" => {
            let [key, bits] = detail["value"].get("|")?.as_array()?.as_slice() else { return None };
            let bits = bits.as_u64().filter(|_| key["meta"]["key"] == "mark")?;
            Verdict::Mark(u32::try_from(bits).ok()?)
        }
        ("masquerade", Value::Null) => Verdict::Masquerade { random_fully: false },
        ("masquerade", detail) if detail.as_object()?.keys().eq(["flags"]) => {
            // One flag stands alone or in a list of one.
            let flags = &detail["flags"];
            let flag = flags.as_array().map_or(Some(flags), |flags| only_one(flags))?;
            (flag == "fully-random").then_some(Verdict::Masquerade { random_fully: true })?
        }
        _ => return None,
    };
    let mut rule = Rule { mark: None, source: Match::Any, destination: Match::Any, verdict };
    for expression in matches {
        let (name, detail) = only(expression)?;
        let equal = match detail["op"].as_str().filter(|_| name == "match")? {
            "==" => true,
            "!=" => false,
            _ => return None,
        };
        let (left, right) = (&detail["left"], &detail["right"]);
        if left.get("payload").is_some() {
            let prefix = read_prefix(right)?;
            let side = match left["payload"]["field"].as_str()? {
                "saddr" => &mut rule.source,
                "daddr" => &mut rule.destination,
                _ => return None,
            };
            if *side != Match::Any {
                return None;
            }
            *side = if equal { Match::In(prefix) } else { Match::NotIn(prefix) };
        } else {
            let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
            let (key, mask) = match left.get("&").and_then(Value::as_array).map(Vec::as_slice) {
                Some([key, mask]) => (key, number(mask)?),
                Some(_) => return None,
                None => (left, u32::MAX),
            };
            if key["meta"]["key"] != "mark" || !equal || rule.mark.is_some() {
                return None;
            }
            rule.mark = Some((number(right)?, mask));
        }
    }
    Some(rule)
}

/// The one member of an object.
fn only(value: &Value) -> Option<(&str, &Value)> {
    let members = value.as_object()?;
    let (name, value) = members.iter().next().filter(|_| members.len() == 1)?;
    Some((name, value))
}

fn only_one(values: &[Value]) -> Option<&Value> {
    values.first().filter(|_| values.len() == 1)
}

fn read_prefix(value: &Value) -> Option<IpNetwork> {
    let prefix = value.get("prefix")?;
    let length = prefix["len"].as_u64().and_then(|length| u8::try_from(length).ok())?;
    IpNetwork::new(prefix["addr"].as_str()?.parse().ok()?, length).ok()
}

/// The input of `nft -f -` that brings the table from `listed` to what `rules`
/// want; `None` if it is so already.
pub fn replace(rules: &Ruleset, listed: &Listed) -> Option<String> {
    let Table { family, name } = Table::of(rules.network);
    let mut in_sync = !listed.foreign;
    let mut body = String::new();
    for chain in &rules.chains {
        let stands = listed.chains.iter().find(|listed| listed.purpose == chain.purpose);
        let standing = stands.map_or(&[][..], |listed| &listed.rules);
        // Of what no flannel makes nothing is kept.
        let is_theirs = |rule: &Rule| {
            let prefixes: Vec<IpNetwork> = rule.prefixes().collect();
            rules.of_another(chain.purpose, &prefixes).any(|theirs| theirs == *rule)
        };
        let is_of_all = |rule: &Rule| rule.is_of_all(chain.purpose);
        let (theirs, rest): (Vec<Rule>, Vec<Rule>) =
            standing.iter().flatten().partition(|rule| is_theirs(rule));
        let ours: Vec<Rule> = match chain.rules.is_empty() && !theirs.is_empty() {
            // With our rules off, what belongs to all stays for whoever else is there.
            true => rest.iter().copied().filter(is_of_all).collect(),
            false => chain.rules.clone(),
        };
        let wanted = !ours.is_empty() || !theirs.is_empty();
        // Where ours stand among the others' does not matter, see `iptables::restore`.
        in_sync &= standing.iter().all(Option::is_some)
            && rest == ours
            && stands.is_some_and(|stands| stands.hooked) == wanted
            && (wanted || stands.is_none());
        if wanted {
            let (of_all, own): (Vec<Rule>, Vec<Rule>) = ours.iter().partition(|rule| is_of_all(rule));
            body += &block(chain, of_all.iter().chain(&theirs).chain(&own), family);
        }
    }
    let head = format!("add table {family} {name}\ndelete table {family} {name}\n");
    match (body.is_empty(), listed.exists) {
        (true, false) => None,
        // An empty table is nobody's.
        (true, true) if in_sync && !listed.is_idle() => None,
        (true, true) => Some(head),
        (false, true) if in_sync => None,
        (false, _) => Some(format!("{head}table {family} {name} {{\n{body}}}\n")),
    }
}

fn block<'a>(chain: &Chain, rules: impl Iterator<Item = &'a Rule>, family: &str) -> String {
    let Hook { chain, kind, hook, priority: (priority, _) } = hook(chain.purpose);
    let mut text = format!("\tchain {chain} {{\n");
    text += &format!("\t\ttype {kind} hook {hook} priority {priority}; policy accept;\n");
    for rule in rules {
        writeln!(text, "\t\t{}", line(rule, family)).expect("a string takes all that is written to it");
    }
    text + "\t}\n"
}

fn line(rule: &Rule, family: &str) -> String {
    let mut line = String::new();
    if let Some((mark, mask)) = rule.mark {
        line += &match mask {
            u32::MAX => format!("meta mark {mark:#x} "),
            mask => format!("meta mark & {mask:#x} == {mark:#x} "),
        };
    }
    for (field, side) in [("saddr", rule.source), ("daddr", rule.destination)] {
        match side {
            Match::Any => {}
            Match::In(network) => line += &format!("{family} {field} {network} "),
            Match::NotIn(network) => line += &format!("{family} {field} != {network} "),
        }
    }
    line + &match rule.verdict {
        Verdict::Return => "return".to_owned(),
        Verdict::Accept => "accept".to_owned(),
        Verdict::Mark(mark) => format!("meta mark set meta mark | {mark:#x}"),
        Verdict::Masquerade { random_fully: false } => "masquerade".to_owned(),
        Verdict::Masquerade { random_fully: true } => "masquerade fully-random".to_owned(),
    }
}

#[cfg(test)]
mod tests;
