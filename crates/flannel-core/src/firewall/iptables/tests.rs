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

    let text = restore(&ruleset, &ruleset.chains[0], &Listed::default(), &[]).unwrap();

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

    assert_eq!(restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[JUMP]), &[]), None);
}

#[test]
fn only_a_missing_jump_is_added_to_a_chain_that_stands() {
    let ruleset = ruleset(false, true);

    let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[]), &[]).unwrap();

    assert_eq!(text, format!("*filter\n{JUMP}\nCOMMIT\n"));
}

#[test]
fn a_second_jump_is_taken_away() {
    let ruleset = ruleset(false, true);

    let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[JUMP, JUMP]), &[]).unwrap();

    assert_eq!(text, format!("*filter\n{}\nCOMMIT\n", JUMP.replace("-A FORWARD", "-D FORWARD")));
}

#[test]
fn rules_of_another_network_in_our_chain_keep_their_place() {
    let ruleset = ruleset(false, true);

    let text = restore(&ruleset, &ruleset.chains[1], &listed(&[TO, OTHER], &[JUMP]), &[]).unwrap();

    assert_eq!(text, format!("*filter\n:FLANNEL-FWD - [0:0]\n{OTHER}\n{FROM}\n{TO}\nCOMMIT\n"));
}

#[test]
fn two_agents_in_one_chain_come_to_rest() {
    let ruleset = ruleset(false, true);

    for order in [[OTHER, FROM, TO], [FROM, OTHER, TO], [FROM, TO, OTHER]] {
        assert_eq!(restore(&ruleset, &ruleset.chains[1], &listed(&order, &[JUMP]), &[]), None);
    }
}

/// Rules that somebody may put into our chain in front of ours, and that no agent writes.
const SHADOWS: [&str; 9] = [
    "-A FLANNEL-FWD -j DROP",
    "-A FLANNEL-FWD -m comment --comment \"flanneld forward\" -j DROP",
    "-A FLANNEL-FWD -s 10.5.3.0/24 -j REJECT --reject-with icmp-port-unreachable",
    "-A FLANNEL-FWD -s 10.5.3.0/24 -m comment --comment \"flanneld forward\" -j ACCEPT",
    "-A FLANNEL-FWD -s 10.0.0.0/8 -m comment --comment \"flanneld forward\" -j ACCEPT",
    "-A FLANNEL-FWD -s 10.9.0.0/16 -m comment --comment \"flanneld forward\" -j RETURN",
    "-A FLANNEL-FWD -s 10.9.0.0/16 -j ACCEPT",
    "-A FLANNEL-FWD ! -s 10.9.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
    "-A FLANNEL-FWD -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld forward\" -j RETURN",
];

#[test]
fn what_no_agent_writes_into_our_chain_goes() {
    let ruleset = ruleset(false, true);

    for shadow in SHADOWS {
        let listed = listed(&[shadow, OTHER, FROM, TO], &[JUMP]);
        let text = restore(&ruleset, &ruleset.chains[1], &listed, &[]);

        let expected = format!("*filter\n:FLANNEL-FWD - [0:0]\n{OTHER}\n{FROM}\n{TO}\nCOMMIT\n");
        assert_eq!(text, Some(expected), "{shadow}");
    }
}

#[test]
fn what_no_agent_writes_keeps_no_chain() {
    let off = ruleset(false, false);

    for shadow in SHADOWS {
        let listed = listed(&[shadow], &[JUMP]);
        let text = restore(&off, &off.chains[1], &listed, &[]).unwrap();

        assert!(text.contains("-X FLANNEL-FWD"), "{shadow}: {text}");
    }
}

#[test]
fn whatever_another_agent_writes_stays() {
    let ours = ruleset(true, true);
    let network = "10.9.0.0/16".parse().unwrap();

    for random_fully in [true, false] {
        let wanted = Wanted { masquerade: true, random_fully, forward: true };
        let other = rules(network, "10.9.3.0/24".parse().unwrap(), wanted, vec![]);
        for (chain, theirs) in ours.chains.iter().zip(&other.chains) {
            let mut lines: Vec<String> = theirs.lines().collect();
            lines.extend(chain.lines().filter(|line| prefixes(line).next().is_some()));
            let listed = Listed { exists: true, rules: lines, parent: vec![chain.purpose.jump()] };
            assert_eq!(restore(&ours, chain, &listed, &[]), None);
        }
    }
    // As a Go flanneld of 0.20 has them.
    let old = [
        "-A FLANNEL-POSTRTG -s 10.9.0.0/16 -d 10.9.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN",
        "-A FLANNEL-POSTRTG ! -s 10.9.0.0/16 -d 10.9.3.0/24 -m comment --comment \"flanneld masq\" -j RETURN",
    ];
    let lines: Vec<String> = old.map(String::from).into_iter().chain(ours.chains[0].lines()).collect();
    let listed = Listed { exists: true, rules: lines, parent: vec![Purpose::Masquerade.jump()] };
    assert_eq!(restore(&ours, &ours.chains[0], &listed, &[]), None);
}

#[test]
fn the_rule_that_names_no_network_goes_with_the_last_agent() {
    let (on, off) = (ruleset(true, false), ruleset(false, false));
    let jump = Purpose::Masquerade.jump();
    let lines: Vec<String> = on.chains[0].lines().collect();
    let other = lines[1].replace("10.5.", "10.9.");
    let mut shown: Vec<&str> = lines.iter().map(String::as_str).collect();

    let alone = restore(&off, &off.chains[0], &listed(&shown, &[&jump]), &[]).unwrap();
    shown.push(&other);
    let shared = restore(&off, &off.chains[0], &listed(&shown, &[&jump]), &[]).unwrap();

    assert!(alone.contains("-X FLANNEL-POSTRTG"), "{alone}");
    assert_eq!(shared, format!("*nat\n:FLANNEL-POSTRTG - [0:0]\n{}\n{other}\nCOMMIT\n", lines[0]));
}

#[test]
fn rules_that_are_no_longer_wanted_go_with_chain_and_jump() {
    let ruleset = ruleset(false, false);

    let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], &[JUMP]), &[]).unwrap();

    let gone = JUMP.replace("-A FORWARD", "-D FORWARD");
    assert_eq!(text, format!("*filter\n{gone}\n:FLANNEL-FWD - [0:0]\n-X FLANNEL-FWD\nCOMMIT\n"));
}

#[test]
fn nothing_wanted_and_nothing_there_needs_nothing() {
    let ruleset = ruleset(false, false);

    assert_eq!(restore(&ruleset, &ruleset.chains[0], &Listed::default(), &[]), None);
}

#[test]
fn rules_of_our_former_network_go() {
    let mut ruleset = ruleset(false, true);
    ruleset.former = vec!["10.9.0.0/16".parse().unwrap()];

    let text = restore(&ruleset, &ruleset.chains[1], &listed(&[OTHER, FROM, TO], &[JUMP]), &[]).unwrap();

    assert_eq!(text, format!("*filter\n:FLANNEL-FWD - [0:0]\n{FROM}\n{TO}\nCOMMIT\n"));
}

const DOCKER_USER: &str = "-A FORWARD -j DOCKER-USER";

/// What is written for a FORWARD chain with these rules, if anything is.
fn forward(parent: &[&str]) -> Option<Vec<String>> {
    let ruleset = ruleset(false, true);
    let text = restore(&ruleset, &ruleset.chains[1], &listed(&[FROM, TO], parent), &[])?;
    let lines = text.lines().map(str::to_owned);
    Some(lines.filter(|line| !line.starts_with('*') && line != "COMMIT").collect())
}

/// Our jump taken away, and put in at that place.
fn moved(number: usize) -> Vec<String> {
    vec![JUMP.replace("-A FORWARD", "-D FORWARD"), inserted(number)]
}

fn inserted(number: usize) -> String {
    JUMP.replace("-A FORWARD", &format!("-I FORWARD {number}"))
}

#[test]
fn our_jump_goes_before_what_could_decide_about_our_packets() {
    for rule in [
        "-A FORWARD -j DROP",
        "-A FORWARD -j REJECT --reject-with icmp-port-unreachable",
        "-A FORWARD -i docker0 -j DROP",
        "-A FORWARD -s 10.5.3.0/24 -j DROP",
        "-A FORWARD ! -s 10.5.0.0/16 -d 192.168.0.0/16 -j DROP",
        "-A FORWARD -s 192.168.0.0/16 -j DROP",
        "-A FORWARD -j DOCKER-FORWARD",
        "-A FORWARD -g SOMEBODY",
        "-A FORWARD -j RETURN",
    ] {
        assert_eq!(forward(&[rule, JUMP]), Some(moved(1)), "{rule}");
        assert_eq!(forward(&[rule]), Some(vec![inserted(1)]), "{rule}");
        assert_eq!(forward(&[JUMP, rule]), None, "{rule}");
    }
}

#[test]
fn our_jump_stays_behind_what_does_it_no_harm() {
    for rule in [
        "-A FORWARD -j LOG",
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -s 192.168.0.0/16 -d 192.168.0.0/16 -j DROP",
        "-A FORWARD -m comment --comment count",
        "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "-A FORWARD -j cali-FORWARD",
        "-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD",
        DOCKER_USER,
    ] {
        assert_eq!(forward(&[rule, JUMP]), None, "{rule}");
        assert_eq!(forward(&[rule]), Some(vec![JUMP.into()]), "{rule}");
    }
}

#[test]
fn our_jump_goes_no_further_up_than_it_must() {
    let forwarding = "-A FORWARD -j DOCKER-FORWARD";

    assert_eq!(forward(&[DOCKER_USER, "-A FORWARD -j LOG", forwarding, JUMP]), Some(moved(3)));
    assert_eq!(forward(&[DOCKER_USER, forwarding]), Some(vec![inserted(2)]));
    assert_eq!(forward(&[DOCKER_USER, JUMP, forwarding]), None);
}

#[test]
fn the_operator_s_denials_come_before_us_wherever_we_go() {
    let [gone, ours] = moved(2).try_into().unwrap();

    assert_eq!(
        forward(&["-A FORWARD -j DROP", DOCKER_USER, JUMP]),
        Some(vec![gone, "-D FORWARD -j DOCKER-USER".into(), "-I FORWARD 1 -j DOCKER-USER".into(), ours])
    );
}

#[test]
fn our_jump_never_goes_before_those_who_say_what_may_pass() {
    let drop = "-A FORWARD -j DROP";

    assert_eq!(forward(&[drop, "-A FORWARD -j cali-FORWARD", JUMP]), None);
    assert_eq!(forward(&["-A FORWARD -j cali-FORWARD", drop, JUMP]), Some(moved(2)));
}

#[test]
fn our_jump_goes_behind_those_who_deny_and_before_those_who_decide() {
    let (policy, docker) = ("-A FORWARD -j cali-FORWARD", "-A FORWARD -j DOCKER-FORWARD");

    for denies in [DOCKER_USER, policy] {
        let [gone, _] = moved(0).try_into().unwrap();
        assert_eq!(forward(&[JUMP, denies]), Some(vec![gone, JUMP.into()]), "{denies}");
        assert_eq!(forward(&[JUMP, denies, docker]), Some(moved(2)), "{denies}");
        assert_eq!(forward(&[denies, JUMP, docker]), None, "{denies}");
    }
    assert_eq!(forward(&[policy, JUMP, DOCKER_USER, docker]), Some(moved(3)));
    assert_eq!(forward(&[DOCKER_USER, JUMP, policy, docker]), Some(moved(3)));
    // One look of the operator's is enough.
    assert_eq!(forward(&[DOCKER_USER, JUMP, docker, DOCKER_USER]), None);
    assert_eq!(forward(&[DOCKER_USER, docker, DOCKER_USER, JUMP]), Some(moved(2)));
}

#[test]
fn the_operator_s_denials_come_before_us_where_they_were_put_last() {
    let [gone, ours] = moved(2).try_into().unwrap();

    assert_eq!(
        forward(&[JUMP, "-A FORWARD -j DROP", DOCKER_USER]),
        Some(vec![gone, "-D FORWARD -j DOCKER-USER".into(), "-I FORWARD 1 -j DOCKER-USER".into(), ours])
    );
}

#[test]
fn our_jump_goes_behind_nobody_because_he_was_conceded() {
    let ruleset = ruleset(false, true);
    let drop = "-A FORWARD -j DROP";
    let listed = listed(&[FROM, TO], &[JUMP, "-A FORWARD -j cali-FORWARD", drop]);

    let text = restore(&ruleset, &ruleset.chains[1], &listed, &[drop.to_owned()]).unwrap();

    assert!(text.contains("-I FORWARD 2 -m comment"), "{text}");
}

#[test]
fn the_jump_of_others_stays_where_it_is() {
    let off = ruleset(false, false);
    let listed = listed(&[OTHER], &["-A FORWARD -j DROP", JUMP]);

    assert_eq!(restore(&off, &off.chains[1], &listed, &[]), None);
    assert_eq!(wrong(&off, &off.chains[1], &listed), []);
}

#[test]
fn our_jump_stays_above_who_insists_on_being_last() {
    let ruleset = ruleset(false, true);
    let policy = "-A FORWARD -j cali-FORWARD";
    let listed = listed(&[FROM, TO], &[JUMP, policy]);

    assert_eq!(restore(&ruleset, &ruleset.chains[1], &listed, &[policy.to_owned()]), None);
    assert_eq!(wrong(&ruleset, &ruleset.chains[1], &listed), [(Wrong::AbovePolicy, policy)]);
}

#[test]
fn our_jump_stays_where_somebody_insists_on_theirs() {
    let ruleset = ruleset(false, true);
    let (theirs, another) = ("-A FORWARD -j DROP", "-A FORWARD -j REJECT");
    let chain = &ruleset.chains[1];
    let conceded = [theirs.to_owned()];
    let alone = listed(&[FROM, TO], &[theirs, JUMP]);
    let both = listed(&[FROM, TO], &[theirs, another, JUMP]);

    assert_eq!(restore(&ruleset, chain, &alone, &conceded), None);
    assert_eq!(wrong(&ruleset, chain, &both), [(Wrong::Above, theirs), (Wrong::Above, another)]);
    // What somebody else puts there is no less in our way.
    let text = restore(&ruleset, chain, &both, &conceded).unwrap();
    assert!(text.contains("-I FORWARD 2 -m comment"), "{text}");
}

/// What is written for a POSTROUTING chain with these rules before our jump, if anything is.
fn postrouting(rules: &[&str]) -> Option<String> {
    let ruleset = ruleset(true, false);
    let lines: Vec<String> = ruleset.chains[0].lines().collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let jump = Purpose::Masquerade.jump();
    let parent: Vec<&str> = rules.iter().copied().chain([&*jump]).collect();
    restore(&ruleset, &ruleset.chains[0], &listed(&lines, &parent), &[])
}

#[test]
fn who_gives_our_packets_another_address_comes_after_us() {
    for rule in [
        "-A POSTROUTING -j MASQUERADE",
        "-A POSTROUTING -o eth0 -j SNAT --to-source 192.0.2.1",
        "-A POSTROUTING -s 10.5.0.0/16 -j ACCEPT",
        "-A POSTROUTING -j SOMEBODY",
    ] {
        let text = postrouting(&[rule]).unwrap();
        assert!(text.contains("-I POSTROUTING 1 -m comment"), "{rule}: {text}");
    }
}

#[test]
fn who_masquerades_others_may_come_before_us() {
    for rule in [
        "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "-A POSTROUTING -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN",
        "-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING",
    ] {
        assert_eq!(postrouting(&[rule]), None, "{rule}");
    }
}

const OLD_POSTROUTING: [&str; 4] = [
    "-A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
    "-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
    "-A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.7.0/24 -j RETURN",
    "-A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE --random-fully",
];

fn commented(rule: &str, comment: &str) -> String {
    rule.replace(" -j ", &format!(" -m comment --comment \"{comment}\" -j "))
}

fn deleted(text: &str) -> Vec<String> {
    text.lines().filter(|line| line.starts_with("-D")).map(|line| line.replacen("-D", "-A", 1)).collect()
}

#[test]
fn rules_of_an_older_flannel_in_the_built_in_chains_go_as_ours_come() {
    let bare = OLD_POSTROUTING.map(String::from);
    let plain = bare.clone().map(|rule| rule.replace(" --random-fully", ""));
    let commented = bare.clone().map(|rule| commented(&rule, "flanneld masq"));
    let ruleset = ruleset(true, false);

    for old in [bare, plain, commented] {
        let listed = Listed { parent: old.to_vec(), ..Listed::default() };
        let text = restore(&ruleset, &ruleset.chains[0], &listed, &[]).unwrap();

        assert_eq!(deleted(&text), old);
        assert!(
            text.contains("-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n"),
            "{text}"
        );
    }
}

#[test]
fn rules_of_an_older_flannel_go_with_masquerading_switched_off_too() {
    let ruleset = ruleset(false, false);
    let listed = Listed { parent: OLD_POSTROUTING.map(String::from).to_vec(), ..Listed::default() };

    let text = restore(&ruleset, &ruleset.chains[0], &listed, &[]).unwrap();

    assert_eq!(deleted(&text), OLD_POSTROUTING);
    assert!(!text.contains("FLANNEL"), "{text}");
}

#[test]
fn rules_of_any_other_shape_stay() {
    let ruleset = ruleset(true, true);
    let signature = OLD_POSTROUTING[1];
    for rule in [
        "-A POSTROUTING -s 10.5.0.0/16 -d 10.9.0.0/16 -j RETURN",
        "-A POSTROUTING -s 10.5.86.0/24 ! -o docker0 -j MASQUERADE",
        "-A POSTROUTING -s 10.5.0.0/16 -o eth0 -j MASQUERADE",
        "-A POSTROUTING ! -s 10.5.0.0/16 -d 10.9.1.0/24 -j RETURN",
        "-A POSTROUTING -s 10.9.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        "-A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment mine -j RETURN",
    ] {
        let listed = Listed { parent: vec![signature.into(), rule.into()], ..Listed::default() };
        let text = restore(&ruleset, &ruleset.chains[0], &listed, &[]).unwrap();
        assert_eq!(deleted(&text), [signature], "{rule}");
    }
    for rule in ["-A FORWARD -s 10.5.0.0/16 -i docker0 -j ACCEPT", "-A FORWARD -s 10.9.0.0/16 -j ACCEPT"] {
        assert_eq!(deleted(&forward(&[rule]).unwrap().join("\n")), [""; 0], "{rule}");
    }
}

#[test]
fn what_an_operator_may_have_written_stays_without_ours_in_its_place() {
    let off = ruleset(false, false);
    let by_hand = ["-A FORWARD -s 10.5.0.0/16 -j ACCEPT", "-A FORWARD -d 10.5.0.0/16 -j ACCEPT"];
    let no_masquerade = "-A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN";
    let parent = |rules: &[&str]| Listed {
        parent: rules.iter().map(ToString::to_string).collect(),
        ..Listed::default()
    };

    assert_eq!(restore(&off, &off.chains[1], &parent(&by_hand), &[]), None);
    assert_eq!(restore(&off, &off.chains[0], &parent(&[no_masquerade]), &[]), None);
    assert_eq!(deleted(&forward(&by_hand).unwrap().join("\n")), by_hand);
}
