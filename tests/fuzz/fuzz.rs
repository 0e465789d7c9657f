//! One program for all targets: `FUZZ_TARGET` names the one to search with.

#![no_main]

use std::sync::LazyLock;

use flannel_tests::fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    let (_, target) = found.unwrap_or_else(|| panic!("FUZZ_TARGET is {name:?}: there is no such target"));
    *target
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
