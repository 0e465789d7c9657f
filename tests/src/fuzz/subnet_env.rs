//! The environment file of an earlier run.

use flannel_core::lease::Subnet;
use flannel_core::subnet_env::{FormerEnv, SubnetEnv};
use ipnetwork::IpNetwork;

use super::shown;

/// The file that dockerd's start reads, as somebody may have left it.
///
/// # Panics
/// A flaw that is not one clean line; a file of our own that does not say again what it was written from.
pub fn subnet_env(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(former) = text.parse::<FormerEnv>();
    for flaw in &former.flaws {
        shown(flaw, 200);
    }
    for network in former.networks.iter().copied().chain(former.subnet.iter().flat_map(Subnet::networks)) {
        assert_eq!(network.ip(), network.network(), "host bits");
    }
    // A subnet without room for a host is nobody's.
    let Some(subnet) = former.subnet.filter(|subnet| subnet.networks().all(has_hosts)) else { return };
    let of = |subnet: IpNetwork| {
        former.networks.iter().copied().find(|network| network.is_ipv4() == subnet.is_ipv4())
    };
    let networks = subnet.networks().filter_map(of).collect();
    let mtu = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let env = SubnetEnv { networks, subnet, mtu, masquerade: data.len().is_multiple_of(2) };

    let Ok(again) = env.to_string().parse::<FormerEnv>();

    assert_eq!((again.subnet, again.networks, again.flaws), (Some(subnet), env.networks.clone(), vec![]));
    // What a shell makes of it is for whoever sources it: names and plain words.
    for line in env.to_string().lines() {
        let (name, value) = line.split_once('=').expect("a name and a value");
        assert!(name.bytes().all(|byte| byte.is_ascii_uppercase() || b"_46".contains(&byte)), "{line}");
        assert!(value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".:/".contains(&byte)), "{line}");
    }
}

fn has_hosts(network: IpNetwork) -> bool {
    network.prefix() <= if network.is_ipv4() { 30 } else { 126 }
}
