//! Rung 1 again, for whatever reads what others wrote: the inputs that fuzzing kept, without a fuzzer.
//!
//! `scripts/fuzz` searches for more. One that broke a promise stays in its
//! directory under the name of what was wrong.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use flannel_tests::fuzz::{TARGETS, Target};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// How many inputs of that target were tried.
fn replay(name: &str) -> usize {
    let (_, target): (_, Target) = *TARGETS.iter().find(|(target, _)| *target == name).unwrap();
    let inputs: Vec<PathBuf> =
        fs::read_dir(corpus().join(name)).unwrap().map(|input| input.unwrap().path()).collect();
    let mut broken = Vec::new();
    for input in &inputs {
        let data = fs::read(input).unwrap();
        // What is broken was printed as it broke.
        if catch_unwind(AssertUnwindSafe(|| target(&data))).is_err() {
            broken.push(input.display().to_string());
        }
    }
    assert!(broken.is_empty(), "a promise is broken by {broken:#?}");
    inputs.len()
}

macro_rules! replays {
    ($($name:ident),+) => {
        $(#[test]
        fn $name() {
            assert!(replay(stringify!($name)) >= 10, "the corpus has gone");
        })+

        #[test]
        fn every_target_is_replayed_and_the_corpus_is_small() {
            let mut replayed = vec![$(stringify!($name)),+];
            let mut targets: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
            let directories = fs::read_dir(corpus()).unwrap().map(|directory| directory.unwrap());
            let mut kept: Vec<String> =
                directories.map(|directory| directory.file_name().into_string().unwrap()).collect();
            replayed.sort_unstable();
            targets.sort_unstable();
            kept.sort_unstable();
            assert_eq!(replayed, targets);
            assert_eq!(kept, targets);

            let inputs = targets.iter().flat_map(|name| fs::read_dir(corpus().join(name)).unwrap());
            let bytes: u64 = inputs.map(|input| input.unwrap().metadata().unwrap().len()).sum();
            assert!(bytes < 1_000_000, "{bytes} bytes: scripts/fuzz keep takes as few files as reach the same");
        }
    };
}

replays!(config, key, lease, sequence, subnet_env, state, flags);
