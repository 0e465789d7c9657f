//! The engines that make the traffic rules stand.

pub mod iptables;
