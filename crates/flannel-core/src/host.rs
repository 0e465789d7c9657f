//! The seam to the kernel: what it holds, and how it is changed.
//!
//! The futures are declared for others to await; nothing here does.

use std::error::Error;
use std::future::Future;
use std::net::IpAddr;

use thiserror::Error;

use crate::claim::Claim;
use crate::diff::Step;
use crate::firewall::Ruleset;
use crate::state::HostState;
use crate::underlay::Facts;

/// Why the kernel, or a program that speaks to it, did not do what it was asked.
#[derive(Debug, Error)]
pub enum HostError {
    /// The way to the kernel is broken as a whole. Trying again may help.
    #[error("{operation}")]
    Broken {
        /// What was attempted.
        operation: String,
        /// What was met.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A program or kernel feature is not there. It helps to install it.
    #[error("{missing} is not there: {remedy}")]
    Missing {
        /// The program or feature.
        missing: String,
        /// What to do about it.
        remedy: String,
    },
}

/// A step that the kernel refused, and its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The step.
    pub step: Step,
    /// The kernel's reason, with what it may mean: `File exists (another …)`.
    pub reason: String,
}

/// What a reconcile did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Steps that the kernel took.
    pub applied: usize,
    /// Steps that it refused.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Whether the kernel now holds what it should.
    pub fn in_sync(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Links, addresses, neighbours, forwarding entries and routes of this host.
pub trait Network: Send + 'static {
    /// What the choice of the underlay needs to know. `can_reach` asks for the
    /// route the kernel would take to that address.
    fn facts(&mut self, can_reach: Option<IpAddr>) -> impl Future<Output = Result<Facts, HostError>> + Send;

    /// All that the claim owns, read from the kernel.
    fn observe(&mut self, claim: &Claim) -> impl Future<Output = Result<HostState, HostError>> + Send;

    /// Takes the steps in their order; one refused step does not stop the others.
    fn apply(&mut self, steps: Vec<Step>) -> impl Future<Output = Result<Vec<Failure>, HostError>> + Send;
}

/// Whether a rule set stood already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ensured {
    /// Nothing was written.
    Unchanged,
    /// It was written anew.
    Written,
}

/// The traffic rules of this host.
pub trait Firewall: Send + 'static {
    /// Makes the rules stand as given; writes nothing if they do.
    fn ensure(&mut self, rules: &Ruleset) -> impl Future<Output = Result<Ensured, HostError>> + Send;
}
