use super::*;
use crate::firewall::{Wanted, rules};

const ALL: Wanted = Wanted { masquerade: true, random_fully: true, forward: true };
const NONE: Wanted = Wanted { masquerade: false, random_fully: true, forward: false };

fn ours(wanted: Wanted) -> Ruleset {
    ruleset("10.5.0.0/16", "10.5.86.0/24", wanted)
}

fn ruleset(network: &str, subnet: &str, wanted: Wanted) -> Ruleset {
    rules(network.parse().unwrap(), subnet.parse().unwrap(), wanted, vec![])
}

/// A table that holds these rules and nothing else.
fn holding(sets: &[&Ruleset]) -> Listed {
    let chains = Purpose::ALL.into_iter().filter_map(|purpose| {
        let chains = sets.iter().flat_map(|set| &set.chains).filter(|chain| chain.purpose == purpose);
        let mut rules: Vec<Option<Rule>> = vec![];
        for rule in chains.flat_map(|chain| &chain.rules) {
            if !rule.is_of_all(purpose) || !rules.contains(&Some(*rule)) {
                rules.push(Some(*rule));
            }
        }
        (!rules.is_empty()).then_some(ListedChain { purpose, hooked: true, rules })
    });
    Listed { exists: true, foreign: false, chains: chains.collect() }
}

/// What nft 1.0.6 prints of a table, of which `chains` and `rules` are given.
fn printed(items: &str) -> String {
    format!(
        r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}}}},
        {{"table": {{"family": "ip", "name": "flannel-ipv4", "handle": 2}}}}{items}]}}"#
    )
}

const FORWARD: &str = r#", {"chain": {"family": "ip", "table": "flannel-ipv4", "name": "forward", "handle": 1, "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}}"#;

fn in_forward(expressions: &str) -> String {
    format!(
        r#"{FORWARD}, {{"rule": {{"family": "ip", "table": "flannel-ipv4", "chain": "forward", "handle": 7, "expr": [{expressions}]}}}}"#
    )
}

fn read_one(expressions: &str) -> Option<Rule> {
    let listed = Listed::read(&printed(&in_forward(expressions))).unwrap();
    listed.chains[0].rules[0]
}

const FROM: &str = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.5.0.0", "len": 16}}}}"#;

#[test]
fn a_rule_is_read_from_what_nft_lists() {
    let network: IpNetwork = "10.5.0.0/16".parse().unwrap();
    let any = Rule { mark: None, source: Match::Any, destination: Match::Any, verdict: Verdict::Return };
    let from = Rule { source: Match::In(network), ..any };
    let marked = |left: &str| {
        format!(r#"{{"match": {{"op": "==", "left": {left}, "right": 16384}}}}, {{"return": null}}"#)
    };

    let accept = read_one(&format!(r#"{FROM}, {{"accept": null}}"#));
    let random = read_one(&format!(r#"{FROM}, {{"masquerade": {{"flags": "fully-random"}}}}"#));
    let listed = read_one(&format!(r#"{FROM}, {{"masquerade": {{"flags": ["fully-random"]}}}}"#));
    let plain = read_one(&format!(r#"{FROM}, {{"masquerade": null}}"#));
    let masked = read_one(&marked(r#"{"&": [{"meta": {"key": "mark"}}, 16384]}"#));
    let whole = read_one(&marked(r#"{"meta": {"key": "mark"}}"#));

    assert_eq!(accept, Some(Rule { verdict: Verdict::Accept, ..from }));
    assert_eq!(random, Some(Rule { verdict: Verdict::Masquerade { random_fully: true }, ..from }));
    assert_eq!(listed, random);
    assert_eq!(plain, Some(Rule { verdict: Verdict::Masquerade { random_fully: false }, ..from }));
    assert_eq!(masked, Some(Rule { mark: Some((0x4000, 0x4000)), ..any }));
    assert_eq!(whole, Some(Rule { mark: Some((0x4000, u32::MAX)), ..any }));
}

#[test]
fn what_no_flannel_writes_is_no_rule() {
    for expressions in [
        format!(r#"{FROM}, {{"drop": null}}"#),
        format!(r#"{FROM}, {{"counter": {{"packets": 0, "bytes": 0}}}}, {{"accept": null}}"#),
        format!(r#"{FROM}, {FROM}, {{"accept": null}}"#),
        format!(r#"{FROM}, {{"masquerade": {{"flags": ["fully-random", "persistent"]}}}}"#),
        format!(r#"{FROM}, {{"masquerade": {{"port": 5}}}}"#),
        r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"}}, {"accept": null}"#
            .into(),
        r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "@set"}}, {"accept": null}"#
            .into(),
        String::new(),
    ] {
        assert_eq!(read_one(&expressions), None, "{expressions}");
    }
}

#[test]
fn a_chain_that_is_hooked_in_elsewhere_is_told() {
    for (was, is) in
        [(r#""prio": 0"#, r#""prio": 5"#), (r#""accept""#, r#""drop""#), (r#""hook": "forward", "#, "")]
    {
        let listed = Listed::read(&printed(&FORWARD.replace(was, is))).unwrap();

        assert!(!listed.chains[0].hooked, "{is}");
    }
    assert!(Listed::read(&printed(FORWARD)).unwrap().chains[0].hooked);
}

#[test]
fn what_is_not_flannel_s_in_the_table_is_told() {
    let chain = FORWARD.replace(r#""name": "forward""#, r#""name": "extra""#);
    let set = r#", {"set": {"family": "ip", "name": "s", "table": "flannel-ipv4", "type": "ipv4_addr", "handle": 2}}"#;

    for items in [&chain, set] {
        assert!(Listed::read(&printed(items)).unwrap().foreign, "{items}");
    }
    let dormant = printed(FORWARD).replacen(r#""handle": 2"#, r#""handle": 2, "flags": "flannel-ipv4""#, 1);
    assert!(Listed::read(&dormant).unwrap().foreign);
    assert!(!Listed::read(&printed(FORWARD)).unwrap().foreign);
}

#[test]
fn what_is_no_listing_is_an_error() {
    for text in ["", "Error: syntax error, unexpected -j", "[]"] {
        assert!(Listed::read(text).is_err(), "{text}");
    }
}

#[test]
fn what_stands_right_is_not_written_again() {
    assert_eq!(replace(&ours(ALL), &holding(&[&ours(ALL)])), None);
    assert_eq!(replace(&ours(NONE), &Listed::default()), None);
}

#[test]
fn whatever_differs_is_written() {
    let right = holding(&[&ours(ALL)]);
    let altered = |alter: &dyn Fn(&mut Listed)| {
        let mut listed = right.clone();
        alter(&mut listed);
        listed
    };

    for listed in [
        Listed::default(),
        altered(&|listed| listed.foreign = true),
        altered(&|listed| listed.chains[1].hooked = false),
        altered(&|listed| drop(listed.chains.pop())),
        altered(&|listed| listed.chains[0].rules.truncate(5)),
        altered(&|listed| listed.chains[1].rules.swap(0, 1)),
        altered(&|listed| listed.chains[1].rules.insert(0, None)),
        altered(&|listed| listed.chains[0].rules[0].as_mut().unwrap().mark = Some((0x4000, u32::MAX))),
    ] {
        assert!(replace(&ours(ALL), &listed).is_some(), "{listed:?}");
    }
}

#[test]
fn the_table_goes_with_the_last_rule() {
    let text = replace(&ours(NONE), &holding(&[&ours(ALL)])).unwrap();

    assert_eq!(text, "add table ip flannel-ipv4\ndelete table ip flannel-ipv4\n");
}

#[test]
fn a_table_with_nothing_in_it_is_nobody_s() {
    let listed = Listed { exists: true, ..Listed::default() };

    assert!(replace(&ours(NONE), &listed).is_some());
}

#[test]
fn rules_of_another_network_are_written_again_as_they_were() {
    let other = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);

    let text = replace(&ours(ALL), &holding(&[&other])).unwrap();

    let both = holding(&[&other, &ours(ALL)]);
    for (number, chain) in both.chains.iter().enumerate() {
        let lines: Vec<String> = chain.rules.iter().flatten().map(|rule| line(rule, "ip")).collect();
        let block = text.split("policy accept;\n").nth(number + 1).unwrap();
        let block: Vec<&str> = block.lines().map(str::trim).take(lines.len()).collect();
        assert_eq!(block, lines);
    }
}

#[test]
fn two_agents_in_one_table_come_to_rest() {
    let (one, other) = (ours(ALL), ruleset("10.9.0.0/16", "10.9.1.0/24", ALL));

    for listed in [holding(&[&one, &other]), holding(&[&other, &one])] {
        assert_eq!(replace(&one, &listed), None);
        assert_eq!(replace(&other, &listed), None);
    }
}

#[test]
fn the_rules_of_others_stay_when_ours_go() {
    let other = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);

    let text = replace(&ours(NONE), &holding(&[&ours(ALL), &other])).unwrap();

    assert!(!text.contains("10.5."), "{text}");
    assert_eq!(text.matches("10.9.0.0/16").count(), 10);
    assert_eq!(text.matches("meta mark &").count(), 1);
    assert_eq!(replace(&ours(NONE), &holding(&[&other])), None);
}

fn rule(source: Match, destination: Match, verdict: Verdict) -> Rule {
    Rule { mark: None, source, destination, verdict }
}

fn within(prefix: &str) -> Match {
    Match::In(prefix.parse().unwrap())
}

fn outside(prefix: &str) -> Match {
    Match::NotIn(prefix.parse().unwrap())
}

/// Rules that somebody may put into our chains in front of ours, and that no agent writes.
fn shadows() -> [(usize, Rule); 7] {
    [
        (0, rule(within("10.5.1.0/24"), Match::Any, Verdict::Return)),
        (0, rule(within("10.9.0.0/16"), Match::Any, Verdict::Return)),
        (0, rule(outside("10.9.0.0/16"), Match::Any, Verdict::Return)),
        (1, rule(Match::Any, Match::Any, Verdict::Accept)),
        (1, rule(within("10.0.0.0/8"), Match::Any, Verdict::Accept)),
        (1, Rule { mark: Some((0x4000, 0x4000)), ..rule(Match::Any, Match::Any, Verdict::Return) }),
        (2, rule(within("10.9.0.0/16"), within("10.5.86.0/24"), Verdict::Accept)),
    ]
}

#[test]
fn what_no_agent_writes_into_our_chains_goes() {
    let other = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);

    for (chain, shadow) in shadows() {
        let mut listed = holding(&[&other, &ours(ALL)]);
        let right = replace(&ours(ALL), &Listed { foreign: true, ..listed.clone() });
        listed.chains[chain].rules.insert(0, Some(shadow));

        assert_eq!(replace(&ours(ALL), &listed), right, "{shadow:?}");
    }
}

#[test]
fn what_no_agent_writes_keeps_no_table() {
    for (chain, shadow) in shadows() {
        let mut listed = holding(&[&ours(ALL)]);
        listed.chains.iter_mut().for_each(|chain| chain.rules.clear());
        listed.chains[chain].rules.push(Some(shadow));

        let text = replace(&ours(NONE), &listed);

        assert_eq!(
            text.as_deref(),
            Some("add table ip flannel-ipv4\ndelete table ip flannel-ipv4\n"),
            "{shadow:?}"
        );
    }
}

#[test]
fn the_rules_of_a_go_flanneld_with_another_network_stay() {
    let mut theirs = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);
    theirs.chains[0].rules[3] = rule(outside("10.9.1.0/24"), within("10.9.0.0/16"), Verdict::Return);

    let listed = holding(&[&theirs, &ours(ALL)]);

    assert_eq!(replace(&ours(ALL), &listed), None);
}

#[test]
fn rules_of_our_former_network_go() {
    let former = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);
    let rules = Ruleset { former: vec![former.network], ..ours(ALL) };

    let text = replace(&rules, &holding(&[&former, &ours(ALL)])).unwrap();

    assert!(!text.contains("10.9."), "{text}");
}
