//! The few switches under `/proc/sys` that matter to us.
//!
//! `/proc/sys/net` shows the network namespace of the thread that looks.

use std::fs;
use std::io;
use std::path::Path;

use flannel_core::state::LinkName;

const BRIDGE_CALLS_IPTABLES: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// Tells a device not to configure itself from what routers announce on it.
pub(crate) fn refuse_router_advertisements(link: LinkName) -> io::Result<()> {
    fs::write(format!("/proc/sys/net/ipv6/conf/{link}/accept_ra"), "0")
}

/// What to do if packets between containers on one bridge would not pass
/// iptables; `None` if all is well.
///
/// Without it, a packet to a service address that is answered from the same
/// bridge comes back with a source that nobody asked.
pub fn bridge_netfilter_remedy() -> Option<&'static str> {
    match fs::read_to_string(BRIDGE_CALLS_IPTABLES) {
        Ok(value) if value.trim() != "0" => None,
        Ok(_) => Some("sysctl -w net.bridge.bridge-nf-call-iptables=1"),
        Err(_) if Path::new(BRIDGE_CALLS_IPTABLES).exists() => None,
        Err(_) => Some("modprobe br_netfilter"),
    }
}
