//! Links, neighbours, forwarding entries, routes and traffic rules of a Linux
//! host: the seams of `flannel_core::host`, implemented.
//!
//! ```text
//!   LinuxNetwork        netlink    what stands, what others change, and the steps to what should
//!   LinuxFirewall       iptables   the rules, read as text and restored whole
//!                       or nft     the rules, read as JSON and replaced whole
//! ```
//!
//! All of it wants `CAP_NET_ADMIN`; iptables-legacy wants `CAP_NET_RAW` too and
//! a lock file that it may write. Everything is done in the network namespace of
//! the thread that made the [`LinuxNetwork`]: its own thread is started from
//! there and stays there, and it alone speaks rtnetlink and writes `/proc/sys/net`.
//! The firewall asks nf_tables one question, where it would start a program, and
//! listens to what it tells.
//!
//! Interface indexes do not leave this crate.

pub mod firewall;
mod interfaces;
mod names;
mod netlink;
mod network;
pub mod sysctl;

pub use firewall::LinuxFirewall;
pub use firewall::iptables::{Family, IptablesFirewall};
pub use firewall::nftables::NftablesFirewall;
pub use network::LinuxNetwork;
