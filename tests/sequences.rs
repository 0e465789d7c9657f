//! Rung 3: what the kernel holds depends on the leases, not on the path that led there.
//!
//! Lists of cluster states are expanded into many histories: reversed, with an
//! empty cluster between, event by event, as snapshots, with every event
//! doubled. At each state the kernel in memory must equal a fresh plan, and a
//! second pass must have nothing to do.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeMap;

use flannel_core::lease::{Lease, Subnet};
use flannel_core::store::{LeaseEvent, Snapshot};
use flannel_core::view::{Applied, LeaseView};
use flannel_tests::build::{self, peer};
use flannel_tests::fake_network::FakeNetwork;
use flanneld::reconcile::Reconciler;
use proptest::prelude::*;

/// The leases of a cluster, our own (10.5.1.0/24) left out.
type Cluster = Vec<Lease>;

fn histories() -> Vec<Vec<Cluster>> {
    vec![
        // Peers come, change their MAC, their address, both, and go.
        vec![
            vec![peer(2, 2, 2)],
            vec![peer(2, 2, 2), peer(3, 3, 3)],
            vec![peer(2, 7, 2), peer(3, 3, 3)],
            vec![peer(2, 7, 8), peer(3, 3, 3)],
            vec![peer(2, 9, 9), peer(4, 4, 4)],
            vec![],
        ],
        // A MAC moves between subnets, two claim one MAC, two swap theirs.
        vec![
            vec![peer(2, 2, 2), peer(3, 3, 3)],
            vec![peer(2, 3, 2), peer(3, 3, 3)],
            vec![peer(2, 3, 2), peer(3, 2, 3)],
            vec![peer(3, 3, 3), peer(4, 3, 4), peer(5, 3, 5)],
            vec![peer(4, 3, 4), peer(5, 3, 5)],
            vec![peer(5, 3, 5)],
        ],
        // A subnet moves to another host; bad peers beside good ones; our own MAC claimed.
        vec![
            vec![peer(2, 2, 2), peer(3, 3, 3)],
            vec![peer(3, 2, 2), peer(2, 3, 3)],
            vec![peer(2, 1, 2), peer(3, 3, 3)],
            vec![peer(2, 2, 1), peer(3, 3, 3)],
            vec![
                build::lease(build::subnet(2), r#"{"PublicIP":"192.168.0.2","BackendType":"host-gw"}"#),
                peer(3, 3, 3),
            ],
        ],
    ]
}

fn expanded(history: &[Cluster]) -> Vec<Vec<Cluster>> {
    let reversed: Vec<Cluster> = history.iter().rev().cloned().collect();
    let with_empties = history.iter().flat_map(|cluster| [cluster.clone(), vec![]]).collect();
    let last_alone = history.last().cloned().into_iter().collect();
    let doubled = history.iter().flat_map(|cluster| [cluster.clone(), cluster.clone()]).collect();
    let ends = [history.first(), history.last()].into_iter().flatten().cloned().collect();
    vec![history.to_vec(), reversed, with_empties, last_alone, doubled, ends]
}

/// How a host hears of the next state.
#[derive(Clone, Copy, Debug)]
enum Hears {
    Events,
    EventsBackwards,
    EventsTwice,
    Snapshot,
}

fn events(from: &Cluster, to: &Cluster, hears: Hears) -> Vec<LeaseEvent> {
    let own = build::peer(1, 1, 1);
    if matches!(hears, Hears::Snapshot) {
        let leases = to.iter().cloned().chain([own]).collect();
        return vec![LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] })];
    }
    let map = |cluster: &Cluster| -> BTreeMap<Subnet, Lease> {
        cluster.iter().map(|lease| (lease.subnet, lease.clone())).collect()
    };
    let (from, to) = (map(from), map(to));
    let gone =
        from.keys().filter(|subnet| !to.contains_key(subnet)).map(|subnet| LeaseEvent::Removed(*subnet));
    let put =
        to.values().filter(|lease| from.get(&lease.subnet) != Some(lease)).cloned().map(LeaseEvent::Put);
    let mut events: Vec<LeaseEvent> = gone.chain(put).collect();
    match hears {
        Hears::EventsBackwards => events.reverse(),
        Hears::EventsTwice => events = events.into_iter().flat_map(|event| [event.clone(), event]).collect(),
        Hears::Events | Hears::Snapshot => {}
    }
    events
}

struct Host {
    network: FakeNetwork,
    reconciler: Reconciler<FakeNetwork>,
    view: LeaseView,
    config: flannel_core::network::NetworkConfig,
}

impl Host {
    async fn started(config: &str) -> Self {
        let config = build::config(config);
        let network = FakeNetwork::default();
        let (planner, claim) = build::planner(&config);
        let mut host = Self {
            reconciler: Reconciler::new(network.clone(), planner, claim),
            network,
            view: LeaseView::default(),
            config,
        };
        host.hear(events(&vec![], &vec![], Hears::Snapshot)).await;
        host
    }

    async fn hear(&mut self, events: Vec<LeaseEvent>) {
        for event in events {
            match self.view.apply(event) {
                Applied::Nothing => {}
                Applied::One(change) => {
                    let outcome = self.reconciler.patch(&change, &self.view).await.unwrap();
                    assert!(outcome.unwrap().report.in_sync());
                }
                Applied::Everything => {
                    assert!(self.reconciler.full(&self.view).await.unwrap().report.in_sync());
                }
            }
        }
    }

    async fn check(&mut self, context: &str) {
        let fresh = build::planner(&self.config).0.plan(&self.view).desired;
        assert_eq!(self.network.printed(), fresh.to_string(), "{context}");
        let before = self.network.kernel().taken.len();
        let again = self.reconciler.full(&self.view).await.unwrap();
        assert_eq!((again.report.applied, self.network.kernel().taken.len() - before), (0, 0), "{context}");
    }
}

#[tokio::test]
async fn the_kernel_depends_on_the_leases_and_not_on_their_history() {
    let direct = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
    let mut checkpoints = 0;
    for config in [build::VXLAN, build::HOST_GW, direct] {
        for history in histories().iter().flat_map(|history| expanded(history)) {
            for hears in [Hears::Events, Hears::EventsBackwards, Hears::EventsTwice, Hears::Snapshot] {
                let mut host = Host::started(config).await;
                let mut now = vec![];
                for (turn, next) in history.iter().enumerate() {
                    host.hear(events(&now, next, hears)).await;
                    host.check(&format!("{config}, {hears:?}, state {turn} of {history:#?}")).await;
                    now.clone_from(next);
                    checkpoints += 1;
                }
            }
        }
    }
    assert!(checkpoints > 500, "{checkpoints} checkpoints");
}

#[tokio::test]
async fn what_was_left_behind_by_an_earlier_run_goes_and_what_is_right_stays_untouched() {
    let mut host = Host::started(build::VXLAN).await;
    host.hear(events(&vec![], &vec![peer(2, 2, 2), peer(3, 3, 3)], Hears::Snapshot)).await;
    let network = host.network.clone();
    network.kernel().taken.clear();

    // A fresh process over the same kernel; one peer left and one came meanwhile.
    let config = build::config(build::VXLAN);
    let (planner, claim) = build::planner(&config);
    let mut second = Host {
        reconciler: Reconciler::new(network.clone(), planner, claim),
        view: LeaseView::default(),
        network,
        config,
    };
    second.hear(events(&vec![], &vec![peer(3, 3, 3), peer(4, 4, 4)], Hears::Snapshot)).await;

    second.check("after the restart").await;
    let taken: Vec<String> = second.network.kernel().taken.iter().map(ToString::to_string).collect();
    assert!(
        !taken.is_empty()
            && taken.iter().all(|step| !step.contains("10.5.3.0") && !step.contains(" link flannel")),
        "{taken:#?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_end_as_a_fresh_plan(
        history in proptest::collection::vec((2u8..7, 1u8..6, 1u8..7, 0u8..4), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut host = Host::started(build::VXLAN).await;
            for (number, mac, address, what) in history {
                let event = match what {
                    0 => LeaseEvent::Removed(build::subnet(number)),
                    _ => LeaseEvent::Put(peer(number, mac, address)),
                };
                host.hear(vec![event]).await;
                let fresh = build::planner(&host.config).0.plan(&host.view).desired;
                assert_eq!(host.network.printed(), fresh.to_string());
            }
            host.check("at the end").await;
        });
    }
}
