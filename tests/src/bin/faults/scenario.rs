//! The scenarios, by number, and what is told of each.

use std::time::Duration;

use crate::check::Bounds;
use crate::record::Records;
use crate::world::{Form, World};
use crate::{etcd_faults, host_faults, owner_faults, store_faults};

/// What a scenario has shown, before the records are checked.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// What was not as it should be.
    pub(crate) broken: Vec<String>,
    /// The longest that anything took to be right everywhere.
    pub(crate) converged: Option<Duration>,
    /// Figures, and what was left out.
    pub(crate) notes: Vec<String>,
    pub(crate) bounds: Bounds,
}

impl Shown {
    pub(crate) fn note(&mut self, words: impl Into<String>) {
        self.notes.push(words.into());
    }

    /// Keeps the longest.
    pub(crate) fn took(&mut self, time: Duration) {
        self.converged = self.converged.max(Some(time));
    }

    /// Takes in how long it took until all was right; whether it came to be in time.
    pub(crate) fn within(
        &mut self,
        world: &mut World,
        what: &str,
        limit: Duration,
        found: Result<Duration, String>,
    ) {
        match found {
            Ok(time) => {
                self.took(time);
                world.claim(time <= limit, || format!("{what}: {time:.1?}, {limit:?} are allowed"));
            }
            Err(error) => world.claim(false, || format!("{what}: {error}")),
        }
    }

    /// Ends the scenario.
    pub(crate) fn end(mut self, world: World) -> Self {
        self.broken = world.finish();
        self
    }
}

pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) run: fn(Records, Form) -> Shown,
}

const fn scenario(name: &'static str, about: &'static str, run: fn(Records, Form) -> Shown) -> Scenario {
    Scenario { name, about, run }
}

/// All of them, in the order of the table.
pub(crate) const ALL: &[Scenario] = &[
    scenario("E-1", "the leader killed again and again under churn", etcd_faults::leader_killed),
    scenario("E-2", "an endpoint whose packets vanish", etcd_faults::black_hole),
    scenario("E-3", "poisoned data", store_faults::poison),
    scenario("E-4", "all members away", etcd_faults::all_away),
    scenario("E-5", "reboot while etcd is away", owner_faults::reboot_without_etcd),
    scenario("E-6a", "etcd out of space", etcd_faults::out_of_space),
    scenario("E-6b", "a leader whose disk takes two seconds", etcd_faults::slow_disk),
    scenario("E-6c", "a member that fell behind", etcd_faults::stale_member),
    scenario("E-7", "users on, tokens of five seconds, another password", etcd_faults::credentials),
    scenario("E-8", "history compacted while a host was cut off", store_faults::compacted_while_cut_off),
    scenario("E-9a", "all leases deleted by mistake", store_faults::all_deleted),
    scenario("E-9b", "etcd wiped and set up anew", store_faults::wiped),
    scenario("E-9c", "an old snapshot restored, same cluster", store_faults::restored_same),
    scenario("E-9d", "an old snapshot restored, another cluster", store_faults::restored_other),
    scenario("E-10", "a stampede on too few subnets", owner_faults::stampede),
    scenario("E-11", "a sleeper whose subnet went to another", owner_faults::sleeper),
    scenario("E-12a", "twins: one public address", owner_faults::twins_by_address),
    scenario("E-12b", "twins: a cloned disk", owner_faults::twins_by_disk),
    scenario("E-13", "an agent stopped for a while", owner_faults::suspended),
    scenario("E-14", "the device abused", host_faults::device_abused),
    scenario("E-15", "a third of all entries deleted, again and again", host_faults::entries_deleted),
    scenario("E-21", "another address between the hosts, and a link that flaps", host_faults::address_moved),
];
