//! The vocabulary of a flannel host, its plans, and the differences between
//! what should be and what is.
//!
//! The one rule of this crate: it touches nothing. No file, no socket, no
//! clock, no task, no `await`; the seams to the store and the kernel are
//! declared here and implemented elsewhere. So all that matters can be tested
//! with values.
//!
//! Read it in the order of the data:
//!
//! ```text
//!   network, lease, key      what the store holds, in flannel's bytes
//!   store, guard, view       how leases arrive, what is believed, and the leases now
//!   allocation, keeper       taking a subnet, and keeping it
//!   memory                   what is remembered while the store is away
//!   underlay                 the interface between the hosts
//!   backend, plan            leases → the state this host should hold
//!   state, claim, diff       that state, what of it is ours, the steps to it
//!   firewall, subnet_env     the rules and the file
//!   host                     the seam to the kernel
//!   json, shown, chain       reading as Go reads; what strangers wrote; what went wrong
//! ```
#![deny(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros)]

pub mod allocation;
pub mod backend;
pub mod chain;
pub mod claim;
pub mod diff;
pub mod firewall;
pub mod guard;
pub mod host;
pub mod json;
pub mod keeper;
pub mod key;
pub mod lease;
pub mod memory;
pub mod network;
pub mod plan;
pub mod shown;
pub mod state;
pub mod store;
pub mod subnet_env;
pub mod underlay;
pub mod view;
