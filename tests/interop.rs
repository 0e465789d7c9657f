//! Rung 8: one cluster of Go flanneld and ours, and a host that goes from one to the other and back.
//!
//! `GO_FLANNELD` names the other daemon. Without it this rung is passed over,
//! in so many words: it is the only one that may be.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::path::PathBuf;

use flannel_tests::announce;
use flannel_tests::lab::{Host, Lab, Process, until};

const PREFIX: &str = "/coreos.com/network";

fn go_flanneld() -> Option<PathBuf> {
    let path = std::env::var_os("GO_FLANNELD").map(PathBuf::from);
    if path.is_none() {
        // The one tool that no package brings: even where nothing else may be missing, this may.
        announce("no Go flanneld; GO_FLANNELD names one");
    }
    path
}

fn theirs(host: &Host, program: &std::path::Path) -> Process {
    host.daemon(program, "go", &host.subnet_file(), &["--iface=eth0"])
}

#[test]
fn a_mixed_cluster_meshes() {
    let Some(program) = go_flanneld() else { return };
    for backend in ["vxlan", "host-gw"] {
        let lab = Lab::new(4);
        lab.put_config(PREFIX, &format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{backend}"}}}}"#));
        let hosts: Vec<Host> = (1..=4).map(|number| lab.host(number)).collect();
        let _daemons = [
            theirs(&hosts[0], &program),
            hosts[1].agent(&[]),
            theirs(&hosts[2], &program),
            hosts[3].agent(&[]),
        ];

        let subnets: Vec<String> = hosts.iter().map(Host::subnet).collect();
        for (host, subnet) in hosts.iter().zip(&subnets) {
            host.bridge(subnet);
            until("every host has a route to every other", || host.routes() == 3);
        }

        for (from, host) in subnets.iter().zip(&hosts) {
            for to in subnets.iter().filter(|to| *to != from) {
                let (lost, ping) = host.ping(from, to, 3, &[]).lost();
                assert_eq!(lost, 0, "{backend}, {from} to {to}: {ping}");
            }
        }
    }
}

#[test]
fn a_host_goes_from_theirs_to_ours_and_back_without_losing_a_packet_or_its_subnet() {
    let Some(program) = go_flanneld() else { return };
    for (backend, flags) in [("vxlan", &[][..]), ("vxlan", &["--route-mode=nexthop"]), ("host-gw", &[])] {
        let lab = Lab::new(2);
        lab.put_config(PREFIX, &format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{backend}"}}}}"#));
        let (host, other) = (lab.host(1), lab.host(2));
        let _other = theirs(&other, &program);
        let mut daemon = theirs(&host, &program);
        let (subnet, far) = (host.subnet(), other.subnet());
        host.bridge(&subnet);
        other.bridge(&far);
        until("both have routes", || host.routes() == 1 && other.routes() == 1);
        let lease = lab.leases(PREFIX);

        let running = host.ping(&subnet, &far, 300, &[]);
        daemon.kill();
        std::fs::remove_file(host.subnet_file()).unwrap();
        let mut daemon = host.agent(flags);
        assert_eq!(host.subnet(), subnet);
        assert_eq!(lab.leases(PREFIX), lease);
        let routes = host.run(&["ip", "-d", "route", "show", &format!("{far}.0/24")]);
        until("the route is ours", || host.run(&["ip", "-N", "-d", "route"]).contains("proto 76"));
        assert_eq!(host.routes(), 1, "{routes}");

        daemon.kill();
        std::fs::remove_file(host.subnet_file()).unwrap();
        let mut daemon = theirs(&host, &program);
        assert_eq!(host.subnet(), subnet);
        // With host-gw it takes a route that stands for its own, mark and all.
        if backend == "vxlan" {
            until("the route is theirs", || !host.run(&["ip", "-N", "-d", "route"]).contains("proto 76"));
        }

        // And once more to ours, with plain routes: nothing that theirs does not know is left.
        daemon.kill();
        std::fs::remove_file(host.subnet_file()).unwrap();
        let daemon = host.agent(&[]);
        assert_eq!(host.subnet(), subnet);
        assert_eq!(host.run(&["ip", "nexthop"]), "");
        let (lost, running) = running.lost();

        assert_eq!(lost, 0, "{backend}, {flags:?}: {running}");
        assert_eq!(lab.leases(PREFIX), lease);
        assert_eq!(host.routes(), 1);
        drop(daemon);
    }
}
