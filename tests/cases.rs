//! Rung 2: config, leases and node in, the whole desired state out, as text.
//!
//! Each directory under `cases/` is one claim. `UPDATE_CASES=1` rewrites the
//! expected text; git shows what changed.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fmt::Write;
use std::fs;
use std::path::Path;

use flannel_core::backend::{self, Node};
use flannel_core::key::parse_subnet_key;
use flannel_core::lease::{Lease, LeaseAttrs, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::plan::{Planner, RouteMode};
use flannel_core::state::{HostState, MacAddr};
use flannel_core::store::{LeaseEvent, Snapshot};
use flannel_core::underlay::{RouteFact, Underlay};
use flannel_core::view::LeaseView;
use flannel_tests::build::link;
use serde_json::Value;

#[test]
fn every_case_plans_what_it_says() {
    let update = std::env::var_os("UPDATE_CASES").is_some();
    let mut differing = Vec::new();
    let mut count = 0;
    for case in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("cases")).unwrap() {
        let case = case.unwrap().path();
        let (planned, expected) = (planned(&case), case.join("expected.txt"));
        if update {
            fs::write(&expected, &planned).unwrap();
        }
        let expected = fs::read_to_string(expected).unwrap_or_default();
        if expected != planned {
            differing.push(format!("{}:\n--- expected\n{expected}--- planned\n{planned}", case.display()));
        }
        count += 1;
    }
    assert!(differing.is_empty(), "UPDATE_CASES=1 rewrites them\n{}", differing.join("\n"));
    assert!(count >= 10, "only {count} cases found");
}

fn planned(case: &Path) -> String {
    let read = |name: &str| {
        let path = case.join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let config = match NetworkConfig::parse(&read("network.json")).and_then(NetworkConfig::supported) {
        Ok(config) => config,
        Err(error) => return format!("refused: {error}\n"),
    };
    let (backend, unknown) = match backend::from_config(&config) {
        Ok(backend) => backend,
        Err(error) => return format!("refused: {error}\n"),
    };
    let mut text = String::new();
    for key in config.unknown.iter().chain(&unknown) {
        writeln!(text, "unknown key {key}").unwrap();
    }

    let host: Value = serde_json::from_str(&read("node.json")).unwrap();
    let mode = match host["route_mode"].as_str() {
        Some("nexthop") => RouteMode::Nexthop,
        _ => RouteMode::Auto,
    };
    let underlay = underlay(&host);
    if let Err(reason) = backend.check(&underlay) {
        return format!("{text}refused: {reason}\n");
    }
    let random = MacAddr([0x0e, 0, 0, 0, 0, 1]);
    let attrs = backend.attributes(&underlay, &HostState::default(), random);
    writeln!(text, "publish {}", attrs.to_json()).unwrap();

    let leases: Value = serde_json::from_str(&read("leases.json")).unwrap();
    let mut snapshot = Snapshot::default();
    for (key, value) in leases.as_object().unwrap() {
        let subnet = parse_subnet_key(key).unwrap_or_else(|| panic!("{key} is no subnet"));
        let attrs = LeaseAttrs::from_json(&value.to_string()).unwrap();
        snapshot.leases.push(Lease { subnet, attrs, tenure: Tenure::Leased });
    }
    let own = Lease { subnet: parse_subnet_key("10.5.1.0-24").unwrap(), attrs, tenure: Tenure::Leased };
    let mut view = LeaseView::default();
    view.apply(LeaseEvent::Snapshot(snapshot));
    let node = Node { pools: config.pools().copied().collect(), underlay, lease: own, mtu: None };
    writeln!(text, "mtu {}", backend.mtu(&node)).unwrap();
    let plan = Planner::new(backend, node, mode).plan(&view);
    write!(text, "{}", plan.desired).unwrap();
    for peer in plan.skipped {
        writeln!(text, "skip {}: {}", peer.subnet, peer.reason).unwrap();
    }
    text
}

fn underlay(node: &Value) -> Underlay {
    let text = |key: &str| node[key].as_str();
    let address = text("address").unwrap_or("192.168.0.1");
    let route = |route: &Value| RouteFact {
        destination: route["to"].as_str().unwrap().parse().unwrap(),
        gateway: route["via"].as_str().map(|via| via.parse().unwrap()),
        link: Some(link(route["dev"].as_str().unwrap_or("eth0"))),
    };
    let networks = match node["networks"].as_array() {
        Some(networks) => networks.iter().map(|network| network.as_str().unwrap().parse().unwrap()).collect(),
        None => vec!["192.168.0.0/24".parse().unwrap()],
    };
    Underlay {
        link: link("eth0"),
        mtu: node["mtu"].as_u64().unwrap_or(1500).try_into().unwrap(),
        address: address.parse().unwrap(),
        public_ip: text("public_ip").unwrap_or(address).parse().unwrap(),
        public_ipv6: None,
        networks,
        routes: node["routes"]
            .as_array()
            .map(|routes| routes.iter().map(route).collect())
            .unwrap_or_default(),
    }
}
