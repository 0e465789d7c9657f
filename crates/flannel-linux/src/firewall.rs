//! The engines that make the traffic rules stand.

mod generation;
pub mod iptables;
