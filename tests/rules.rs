//! Rung 2 for the traffic rules: options in, the exact text out, in both dialects.
//!
//! Each directory under `rules/` is one claim: the options, and what stands
//! before if anything does. `UPDATE_CASES=1` rewrites the expected text; git
//! shows what changed.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fmt::Write;
use std::fs;
use std::path::Path;

use flannel_core::firewall::{Chain, Ruleset, Wanted, iptables, nftables, rules};
use serde_json::Value;

#[test]
fn every_case_writes_what_it_says() {
    let update = std::env::var_os("UPDATE_CASES").is_some();
    let mut differing = Vec::new();
    let mut count = 0;
    for case in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("rules")).unwrap() {
        let case = case.unwrap().path();
        let (written, expected) = (written(&case), case.join("expected.txt"));
        if update {
            fs::write(&expected, &written).unwrap();
        }
        let expected = fs::read_to_string(expected).unwrap_or_default();
        if expected != written {
            differing.push(format!("{}:\n--- expected\n{expected}--- written\n{written}", case.display()));
        }
        count += 1;
    }
    assert!(differing.is_empty(), "UPDATE_CASES=1 rewrites them\n{}", differing.join("\n"));
    assert!(count >= 8, "only {count} cases found");
}

fn written(case: &Path) -> String {
    let path = case.join("options.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let options: Value = serde_json::from_str(&text).unwrap();
    let rules = ruleset(&options);
    let before = options.get("before").map(ruleset);

    let words = rules.to_string();
    let mut text = format!("# in words\n{}", if words.is_empty() { "nothing\n" } else { &words });
    text += "\n# iptables-restore --noflush\n";
    for chain in &rules.chains {
        let stands = before.iter().flat_map(|before| &before.chains);
        let stands = stands.filter(|stands| stands.purpose == chain.purpose && !stands.rules.is_empty());
        let listed = stands.map(in_iptables).next().unwrap_or_default();
        text += &iptables::restore(&rules, chain, &listed, &[]).unwrap_or_else(|| "nothing\n".into());
    }
    let listed = before.map(|before| in_nftables(&before)).unwrap_or_default();
    let replaced = nftables::replace(&rules, &listed).unwrap_or_else(|| "nothing\n".into());
    write!(text, "\n# nft -f -\n{replaced}").unwrap();
    text
}

fn ruleset(options: &Value) -> Ruleset {
    let prefix = |value: &Value| value.as_str().unwrap().parse().unwrap();
    let is_on = |key: &str| options[key].as_bool().unwrap();
    let wanted = Wanted {
        masquerade: is_on("masquerade"),
        random_fully: is_on("random_fully"),
        forward: is_on("forward"),
    };
    let former = options["former"].as_array().into_iter().flatten().map(prefix).collect();
    rules(prefix(&options["network"]), prefix(&options["subnet"]), wanted, former)
}

/// A chain of these rules as iptables lists it.
fn in_iptables(chain: &Chain) -> iptables::Listed {
    iptables::Listed { exists: true, rules: chain.lines().collect(), parent: vec![chain.purpose.jump()] }
}

/// A table of these rules as nft lists it.
fn in_nftables(rules: &Ruleset) -> nftables::Listed {
    let chains = rules.chains.iter().filter(|chain| !chain.rules.is_empty());
    let chains = chains.map(|chain| nftables::ListedChain {
        purpose: chain.purpose,
        hooked: true,
        rules: chain.rules.iter().copied().map(Some).collect(),
    });
    nftables::Listed { exists: true, foreign: false, chains: chains.collect() }
}
