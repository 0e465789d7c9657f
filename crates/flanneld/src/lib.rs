//! The process: command line, start, the loop, files and signals.
//!
//! ```text
//!   args ──▶ startup ──▶ agent ⟲ reconcile
//!              config → underlay → backend → lease     events in, steps out
//! ```
//!
//! What should be is decided in `flannel-core`; making it so is the work of
//! `flannel-etcd` and `flannel-linux`; this crate asks.

pub mod agent;
pub mod args;
pub mod health;
pub mod lease;
pub mod notify;
pub mod reconcile;
pub mod shutdown;
pub mod startup;
pub mod state_dir;
pub mod subnet_file;
mod whole_file;
