//! What must hold of everything that reads what others wrote, whatever they wrote.
//!
//! Each function takes any bytes and panics where its promise is broken. The
//! fuzz targets under `tests/fuzz` search for such bytes; `tests/fuzz_corpus.rs`
//! replays the kept ones, with no more than a stable compiler.

use flannel_core::backend;
use flannel_core::key::{parse_subnet_key, subnet_key};
use flannel_core::network::{ConfigError, NetworkConfig, Pool, first_host};
use ipnetwork::IpNetwork;

mod cluster;
mod flags;
mod state;
mod subnet_env;

pub use cluster::{lease, sequence};
pub use flags::flags;
pub use state::state;
pub use subnet_env::subnet_env;

/// Takes any bytes; panics where a promise is broken.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also that of its directory under `tests/fuzz/corpus`.
pub const TARGETS: [(&str, Target); 7] = [
    ("config", config),
    ("key", key),
    ("lease", lease),
    ("sequence", sequence),
    ("subnet_env", subnet_env),
    ("state", state),
    ("flags", flags),
];

/// The value of `<prefix>/config`.
///
/// # Panics
/// An error that is not one clean line with a key in it; a pool that leases out
/// what it should not; a backend that cannot plan for its own node.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let config = match NetworkConfig::parse(text).and_then(NetworkConfig::supported) {
        Ok(config) => config,
        Err(error) => return refused(&error),
    };
    for pool in config.pools() {
        leases_out_what_is_inside(pool);
    }
    let unknown = match backend::from_config(&config) {
        Ok((_, unknown)) => unknown,
        Err(error) => return refused(&error),
    };
    for key in config.unknown.iter().chain(&unknown) {
        shown(key, 100);
    }
    cluster::plans_a_node(&config);
}

/// The last part of the key of a lease.
///
/// # Panics
/// A name that reads as a subnet of another name.
pub fn key(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(subnet) = parse_subnet_key(text) else { return };
    assert_eq!(subnet_key(&subnet), text);
    assert!(subnet.networks().count() > 0, "{text}");
    shown(&subnet.to_string(), 100);
}

fn refused(error: &ConfigError) {
    const KEYS: [&str; 13] = [
        "the value",
        "EnableIPv4",
        "EnableIPv6",
        "EnableNFTables",
        "Network",
        "SubnetLen",
        "SubnetMin",
        "SubnetMax",
        "IPv6Network",
        "IPv6SubnetLen",
        "IPv6SubnetMin",
        "IPv6SubnetMax",
        "Backend",
    ];
    let words = error.to_string();
    shown(&words, 400);
    assert!(KEYS.iter().any(|key| words.starts_with(key)), "{words} names no key");
}

fn leases_out_what_is_inside(pool: &Pool) {
    let Pool { network, subnet_len, min, max } = *pool;
    assert_eq!(network.ip(), network.network(), "{pool:?} has host bits");
    let capacity = pool.capacity();
    for index in [0, capacity / 2, capacity - 1] {
        let subnet = pool.subnet(index).expect("the index is below the capacity");
        assert!(contains(network, subnet) && subnet.prefix() == subnet_len, "{subnet} of {pool:?}");
        assert!(
            subnet.ip() == subnet.network() && (min..=max).contains(&subnet.ip()),
            "{subnet} of {pool:?}"
        );
        assert!(contains(subnet, first_host(subnet)), "{subnet} of {pool:?}");
        assert!(pool.leases_out(subnet), "{subnet} of {pool:?}");
        assert_eq!(pool.overlapped_by(subnet), Some((index, index)), "{subnet} of {pool:?}");
    }
    assert_eq!(pool.subnet(capacity), None, "{pool:?}");
    assert_eq!(pool.overlapped_by(network), Some((0, capacity - 1)), "{pool:?}");
}

/// Whether all of `inner` is in `outer`.
fn contains(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.contains(inner.network()) && outer.contains(inner.broadcast())
}

/// Checks words that end up in a log: one line, no longer than it must be, and
/// nothing in it that a terminal would obey.
fn shown(words: &str, most: usize) {
    assert!(!words.chars().any(char::is_control), "{words:?} is not one clean line");
    assert!(words.chars().count() <= most, "{words:?} has {} characters", words.chars().count());
    assert!(!words.is_empty(), "no words at all");
}
