//! A small kernel in memory.
//!
//! It refuses what the real one refuses: entries on a device that is not there,
//! routes by a device that is down. It drops with a device what stands on it.
//! And it can be told to refuse more.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use flannel_core::claim::Claim;
use flannel_core::diff::{self, Step};
use flannel_core::firewall::Ruleset;
use flannel_core::host::{Changes, Ensured, Failure, Firewall, HostError, Network, Observed};
use flannel_core::state::{HostState, Key, LinkName, Nexthop, Object, Route};
use flannel_core::underlay::Facts;
use tokio::sync::{Notify, watch};

use crate::build;

type Refusal = Box<dyn FnMut(&Step) -> Option<String> + Send>;

/// What the kernel holds and how it behaves.
pub struct Kernel {
    /// Every object, ours and foreign.
    pub state: HostState,
    /// What it tells about interfaces.
    pub facts: Facts,
    /// Every step it took, in order.
    pub taken: Vec<Step>,
    /// How often it was read whole.
    pub observed: usize,
    /// Answers for the next observations: an error each.
    pub broken: VecDeque<String>,
    /// Whether it takes steps and never answers.
    pub silent: bool,
    refuse: Option<Refusal>,
    /// What it has told of and nobody has taken yet.
    told: Option<Changes>,
}

/// A handle on a kernel in memory.
#[derive(Clone)]
pub struct FakeNetwork {
    kernel: Arc<Mutex<Kernel>>,
    changes: watch::Sender<usize>,
    told: Arc<Notify>,
}

impl Default for FakeNetwork {
    fn default() -> Self {
        let kernel = Kernel {
            state: HostState::default(),
            facts: build::facts(),
            taken: vec![],
            observed: 0,
            broken: VecDeque::new(),
            silent: false,
            refuse: None,
            told: None,
        };
        let kernel = Arc::new(Mutex::new(kernel));
        Self { kernel, changes: watch::Sender::new(0), told: Arc::default() }
    }
}

impl FakeNetwork {
    /// The kernel, to look into or to meddle with.
    ///
    /// # Panics
    /// A test has panicked while it held the kernel.
    pub fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().expect("no test panics while it holds the kernel")
    }

    /// What the kernel holds, printed.
    pub fn printed(&self) -> String {
        self.kernel().state.to_string()
    }

    /// Somebody else changes an object, and the kernel tells of it.
    pub fn meddle(&self, key: Key, object: Option<Object>) {
        let mut kernel = self.kernel();
        if let (Key::Nexthop(id), None) = (&key, &object) {
            kernel.state.drop_nexthop(*id);
        }
        kernel.state.set(&key, object.clone());
        drop(kernel);
        self.tell(Changes::Objects([(key, object)].into()));
    }

    /// The kernel tells of something.
    pub fn tell(&self, changes: Changes) {
        match &mut self.kernel().told {
            Some(told) => told.merge(changes),
            nothing => *nothing = Some(changes),
        }
        self.told.notify_one();
    }

    /// Has the kernel refuse the steps for which `refuse` gives a reason.
    pub fn refuse(&self, refuse: impl FnMut(&Step) -> Option<String> + Send + 'static) {
        self.kernel().refuse = Some(Box::new(refuse));
    }

    /// Has the kernel refuse nothing out of the ordinary.
    pub fn refuse_nothing(&self) {
        self.kernel().refuse = None;
    }

    /// Resolves once the kernel holds something that `is_so`.
    ///
    /// # Panics
    /// Never: the sender lives as long as this handle.
    pub async fn until(&self, mut is_so: impl FnMut(&Kernel) -> bool) {
        let mut changes = self.changes.subscribe();
        changes.wait_for(|_| is_so(&self.kernel())).await.expect("the sender is ours");
    }

    fn news(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Kernel {
    fn take(&mut self, step: &Step) -> Result<(), String> {
        if let Some(reason) = self.refuse.as_mut().and_then(|refuse| refuse(step)) {
            return Err(reason);
        }
        let there = |link: &LinkName| self.state.links.contains_key(link) || link.as_str() == "eth0";
        let up = |link: &LinkName| self.state.links.get(link).is_none_or(|link| link.up);
        match step {
            Step::AddLink(name, _) if there(name) => return Err("File exists".into()),
            Step::AddAddress(link, _) | Step::PutFdb(link, ..) | Step::PutNeighbour(link, ..)
                if !there(link) =>
            {
                return Err("No such device".into());
            }
            Step::PutRoute(_, Route { link, .. }) | Step::PutNexthop(_, Nexthop { link, .. })
                if !there(link) =>
            {
                return Err("No such device".into());
            }
            Step::PutRoute(_, Route { link, .. }) | Step::PutNexthop(_, Nexthop { link, .. })
                if !up(link) =>
            {
                return Err("Network is down".into());
            }
            Step::PutRoute(_, Route { nexthop: Some(id), .. }) if !self.state.nexthops.contains_key(id) => {
                return Err("Invalid argument (Nexthop id does not exist)".into());
            }
            Step::PutRoute(_, route)
                if self.state.addresses.iter().any(|(_, own)| Some(own.ip()) == route.gateway) =>
            {
                return Err("Invalid argument (Nexthop has invalid gateway)".into());
            }
            Step::RemoveRoute(key, route) => {
                let exact = self.state.routes.get(key).is_some_and(|is| is.protocol == route.protocol);
                if !exact {
                    return Ok(());
                }
            }
            _ => {}
        }
        diff::take(&mut self.state, step);
        self.taken.push(step.clone());
        Ok(())
    }
}

impl Network for FakeNetwork {
    async fn observe(&mut self, claim: &Claim, _can_reach: Option<IpAddr>) -> Result<Observed, HostError> {
        let mut kernel = self.kernel();
        kernel.observed += 1;
        kernel.told = None;
        if let Some(reason) = kernel.broken.pop_front() {
            return Err(HostError::Broken { operation: "reading the kernel".into(), source: reason.into() });
        }
        let mut state = kernel.state.clone();
        claim.filter(&mut state);
        let facts = kernel.facts.clone();
        drop(kernel);
        self.news();
        Ok(Observed { state, facts })
    }

    async fn apply(&mut self, steps: Vec<Step>) -> Result<Vec<Failure>, HostError> {
        let mut failures = Vec::new();
        for step in steps {
            if let Err(reason) = self.kernel().take(&step) {
                failures.push(Failure { step, reason });
            }
        }
        let silent = self.kernel().silent;
        self.news();
        if silent {
            std::future::pending::<()>().await;
        }
        Ok(failures)
    }

    async fn changed(&mut self) -> Changes {
        loop {
            if let Some(changes) = self.kernel().told.take() {
                return changes;
            }
            self.told.notified().await;
        }
    }
}

/// Rules in memory: counts how often they were written.
#[derive(Clone, Default)]
pub struct FakeFirewall {
    /// The rules that stand, the number of writes, and an error to answer with.
    pub inner: Arc<Mutex<FakeRules>>,
}

/// What a [`FakeFirewall`] holds.
#[derive(Default)]
pub struct FakeRules {
    /// The rules that stand.
    pub rules: Option<Ruleset>,
    /// How often they were written.
    pub writes: usize,
    /// What to answer instead.
    pub broken: Option<String>,
}

impl Firewall for FakeFirewall {
    async fn ensure(&mut self, rules: &Ruleset) -> Result<Ensured, HostError> {
        let mut inner = self.inner.lock().expect("no test panics while it holds the rules");
        if let Some(reason) = &inner.broken {
            return Err(HostError::Broken {
                operation: "iptables-restore".into(),
                source: reason.clone().into(),
            });
        }
        if inner.rules.as_ref() == Some(rules) {
            return Ok(Ensured::Unchanged);
        }
        inner.rules = Some(rules.clone());
        inner.writes += 1;
        Ok(Ensured::Written)
    }
}
