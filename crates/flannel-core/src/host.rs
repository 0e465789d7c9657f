//! The seam to the kernel: what it holds, and how it is changed.
//!
//! The futures are declared for others to await; nothing here does.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::net::IpAddr;

use thiserror::Error;

use crate::claim::Claim;
use crate::diff::Step;
use crate::firewall::Ruleset;
use crate::state::{HostState, Key, Object};
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

/// What the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// All that is ours.
    pub state: HostState,
    /// What the choice of the underlay needs to know.
    pub facts: Facts,
}

/// What somebody else has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changes {
    /// These objects: what stands there now, if it is ours.
    Objects(BTreeMap<Key, Option<Object>>),
    /// More than can be told object by object, and why: a device, the way to the
    /// other hosts, or the kernel's word was lost.
    Everything(String),
}

impl Changes {
    /// So many objects and more are everything: reading all is cheaper by then.
    const MOST: usize = 2000;

    /// Takes in what was heard later.
    pub fn merge(&mut self, later: Changes) {
        match (&mut *self, later) {
            (Self::Everything(_), _) => {}
            (Self::Objects(objects), Self::Objects(later)) => {
                objects.extend(later);
                if objects.len() > Self::MOST {
                    *self = Self::Everything(format!("more than {} objects were changed", Self::MOST));
                }
            }
            (Self::Objects(_), everything) => *self = everything,
        }
    }
}

/// Links, addresses, neighbours, forwarding entries, nexthop objects and routes of this host.
pub trait Network: Send + 'static {
    /// All that the claim owns, read from the kernel, and the facts; with
    /// `can_reach`, also the route the kernel would take to that address. From
    /// now on changes of what the claim owns are told.
    fn observe(
        &mut self,
        claim: &Claim,
        can_reach: Option<IpAddr>,
    ) -> impl Future<Output = Result<Observed, HostError>> + Send;

    /// Takes the steps in their order; one refused step does not stop the others.
    /// The failures come in the order of the steps.
    fn apply(&mut self, steps: Vec<Step>) -> impl Future<Output = Result<Vec<Failure>, HostError>> + Send;

    /// Waits until somebody else has changed something since the last
    /// observation and the last call. Safe to drop at any moment.
    fn changed(&mut self) -> impl Future<Output = Changes> + Send;
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

    /// What is wrong beside rules that stand, as the last call of `ensure` has found it.
    fn trouble(&self) -> Option<HostError> {
        None
    }

    /// Waits until somebody else may have changed them since the last call of
    /// `ensure`, as far as the kernel tells. Safe to drop at any moment.
    fn changed(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::NexthopId;

    fn object(number: u32) -> Changes {
        let id = NexthopId(number.try_into().unwrap());
        Changes::Objects([(Key::Nexthop(id), None)].into())
    }

    #[test]
    fn what_is_heard_of_one_object_later_is_what_counts() {
        let (link, address) = ("flannel.1".parse().unwrap(), "10.5.1.0/32".parse().unwrap());
        let there = [(Key::Address(link, address), Some(Object::Address(link, address)))];
        let gone = [(Key::Address(link, address), None)];
        let mut changes = Changes::Objects(there.into());

        changes.merge(Changes::Objects(gone.clone().into()));

        assert_eq!(changes, Changes::Objects(gone.into()));
    }

    #[test]
    fn everything_takes_in_whatever_comes() {
        let mut changes = object(1);

        changes.merge(Changes::Everything("a device".into()));
        changes.merge(object(2));

        assert_eq!(changes, Changes::Everything("a device".into()));
    }

    #[test]
    fn many_objects_are_everything() {
        let mut changes = object(1);

        for number in 2..=2001 {
            changes.merge(object(number));
        }

        assert_eq!(changes, Changes::Everything("more than 2000 objects were changed".into()));
    }
}
