//! Rung 7, the walk-through: two hosts, two real dockerds started from `subnet.env`, a container on each.
//!
//! `scripts/demo` does the walking and stops at the first thing that is not as it should be; here what it shows is read
//! again, line by line.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::path::Path;
use std::process::Command;

use flannel_tests::lab::flanneld;

fn demo(backend: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo");
    let output =
        Command::new(script).args(["--backend", backend]).env("FLANNELD", flanneld()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

/// The value of `name` on the first host.
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(&format!("{name}=")))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// The subnet of the first host, and that of the second, without their last bytes.
fn subnets(text: &str) -> [String; 2] {
    let lines: Vec<&str> =
        text.lines().filter_map(|line| line.trim().strip_prefix("FLANNEL_SUBNET=")).collect();
    [0, 1].map(|host: usize| lines[host].strip_suffix(".1/24").unwrap().to_owned())
}

fn has(text: &str, words: &[&str]) {
    assert!(
        text.lines().any(|line| words.iter().all(|word| line.contains(word))),
        "no line with {words:?} in\n{text}"
    );
}

#[test]
fn containers_of_two_dockerds_reach_each_other_over_vxlan() {
    let text = demo("vxlan");

    let [ours, theirs] = subnets(&text);
    assert_eq!(value(&text, "FLANNEL_NETWORK"), "10.5.0.0/16");
    assert_eq!(value(&text, "FLANNEL_MTU"), "1450");
    assert_eq!(value(&text, "FLANNEL_IPMASQ"), "true");
    has(&text, &[&format!("inet {ours}.0/32"), "flannel.1"]);
    has(&text, &[&format!("{theirs}.0/24 via {theirs}.0 dev flannel.1"), "onlink"]);
    has(&text, &[&format!("{theirs}.0 lladdr"), "PERMANENT"]);
    has(&text, &["dst 192.0.2.2 self permanent"]);
    has(&text, &[&format!("/coreos.com/network/subnets/{ours}.0-24")]);
    has(
        &text,
        &[
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""#,
        ],
    );
    has(&text, &[&format!("--bip={ours}.1/24"), "--mtu=1450"]);
    has(&text, &["ttl=62"]);
    has(&text, &["1 ", &format!("{ours}.1 ")]);
    has(&text, &["2 ", &format!("{theirs}.0 ")]);
}

#[test]
fn containers_of_two_dockerds_reach_each_other_over_plain_routes() {
    let text = demo("host-gw");

    let [ours, theirs] = subnets(&text);
    assert_eq!(value(&text, "FLANNEL_MTU"), "1500");
    has(&text, &[&format!("{theirs}.0/24 via 192.0.2.2 dev eth0")]);
    has(&text, &[&format!("--bip={ours}.1/24"), "--mtu=1500"]);
    has(&text, &["ttl=62"]);
    assert!(!text.contains("flannel.1"), "{text}");
}
