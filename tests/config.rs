//! The samples under `config/` are true: each network config is one that we take, and the environment file is the
//! command line's own list.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fs;
use std::path::{Path, PathBuf};

use flannel_core::backend;
use flannel_core::network::NetworkConfig;
use flanneld::args::Request;

fn config() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config")
}

#[test]
fn every_sample_of_a_network_config_is_taken_without_a_warning() {
    let mut count = 0;
    for sample in fs::read_dir(config().join("network")).unwrap() {
        let sample = sample.unwrap().path();
        let text = fs::read_to_string(&sample).unwrap();

        let config = NetworkConfig::parse(&text).and_then(NetworkConfig::supported);
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", sample.display()));
        let (_, unknown) =
            backend::from_config(&config).unwrap_or_else(|error| panic!("{}: {error}", sample.display()));

        assert!(
            config.unknown.is_empty() && unknown.is_empty(),
            "{}: {:?} {unknown:?}",
            sample.display(),
            config.unknown
        );
        count += 1;
    }
    assert!(count >= 3, "only {count} samples");
}

#[test]
fn the_environment_file_lists_every_variable_with_its_default() {
    let text = fs::read_to_string(config().join("flanneld.env")).unwrap();
    let mut listed: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| line.trim_start_matches('#').split_once('='))
        .filter(|(name, _)| name.starts_with("FLANNELD_"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    // What only Kubernetes mode has is no business of this file.
    let kubernetes = ["NET_CONFIG_PATH", "SET_NODE_NETWORK_UNAVAILABLE"];
    let is_kubernetes =
        |name: &str| name.contains("KUBE") || kubernetes.contains(&&name["FLANNELD_".len()..]);
    let mut known: Vec<(String, String)> =
        Request::variables().into_iter().filter(|(name, _)| !is_kubernetes(name)).collect();

    listed.sort();
    known.sort();

    assert_eq!(listed, known);
}
