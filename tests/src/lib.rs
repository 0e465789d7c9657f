//! The bench that the test targets stand on: a store in memory, a small kernel
//! in memory, and real parts to start and stop.

pub mod build;
pub mod dockerd;
pub mod etcd;
pub mod fake_network;
pub mod firewalld;
pub mod fuzz;
pub mod lab;
pub mod leases;
pub mod log;
pub mod memory_store;
pub mod netns;
pub mod packets;
pub mod sim;
pub mod sim_etcd;
pub mod tracer;

use std::io::Write;

/// Whether a tool is on this machine. A test without its tool says so and is
/// passed over; with `REQUIRE_ALL=1` it fails instead.
///
/// # Panics
/// If the tool is missing and `REQUIRE_ALL=1`.
pub fn need(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|directory| directory.join(tool).is_file()) {
        return true;
    }
    pass_over(&format!("{tool} is not installed"))
}

/// Says why a test is passed over, or fails it with `REQUIRE_ALL=1`; never true.
///
/// # Panics
/// If `REQUIRE_ALL=1`.
pub fn pass_over(reason: &str) -> bool {
    assert!(std::env::var("REQUIRE_ALL").as_deref() != Ok("1"), "{reason}, and REQUIRE_ALL=1");
    announce(reason);
    false
}

/// Says aloud that a test is passed over.
pub fn announce(reason: &str) {
    say(&format!("PASSED OVER: {reason}"));
}

/// Says aloud what a test has found out, like a time.
pub fn say(words: &str) {
    // The test harness keeps what is printed by macros to itself.
    drop(writeln!(std::io::stderr(), "{words}"));
}
