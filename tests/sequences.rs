//! Rung 3: what the kernel holds depends on the leases, not on the path that led there.
//!
//! Lists of cluster states are expanded into many histories: reversed, with an
//! empty cluster between, event by event, as snapshots, with every event
//! doubled. At each state the kernel in memory must equal a fresh plan, and a
//! second pass must have nothing to do. Random histories add what others do to
//! the kernel, and look at every single step for where packets would go.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use flannel_core::diff::{self, Step};
use flannel_core::guard::Guard;
use flannel_core::host::{Changes, Network};
use flannel_core::lease::{Lease, Subnet};
use flannel_core::plan::RouteMode;
use flannel_core::state::{HostState, LinkKind, MacAddr, Nexthop, Object, Route};
use flannel_core::store::{LeaseEvent, Snapshot, Unreadable};
use flannel_core::underlay::Selection;
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
        // Subnets of other lengths around and inside, one of both families, one address claimed by two, a host that moves.
        vec![
            vec![lease(8, 2, 2), lease(12, 3, 3)],
            vec![lease(8, 2, 2), peer(5, 5, 5), lease(11, 3, 3)],
            vec![lease(8, 2, 2), lease(9, 4, 4), lease(11, 3, 3), lease(12, 5, 5)],
            vec![lease(9, 4, 4), lease(11, 3, 3), lease(12, 5, 5), lease(13, 6, 6), peer(3, 7, 7)],
            vec![lease(12, 5, 5), lease(13, 6, 6), peer(4, 7, 6), peer(6, 3, 3), peer(7, 3, 3)],
            vec![peer(4, 7, 6), peer(7, 3, 3)],
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
    /// What the kernel held before the steps of the last event.
    before: HostState,
}

impl Host {
    async fn started(config: &str) -> Self {
        let config = build::config(config);
        let network = FakeNetwork::default();
        let (planner, claim) = build::planner(&config);
        let mut host = Self {
            reconciler: Reconciler::new(network.clone(), planner, claim, Selection::default()),
            network,
            view: LeaseView::default(),
            config,
            before: HostState::default(),
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
                    assert!(self.reconciler.full(&self.view, true).await.unwrap().report.in_sync());
                }
            }
        }
    }

    async fn check(&mut self, context: &str) {
        let fresh = build::planner(&self.config).0.plan(&self.view).desired;
        assert_eq!(self.network.printed(), fresh.to_string(), "{context}");
        let before = self.network.kernel().taken.len();
        let again = self.reconciler.full(&self.view, true).await.unwrap();
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
        reconciler: Reconciler::new(network.clone(), planner, claim, Selection::default()),
        view: LeaseView::default(),
        network,
        config,
        before: HostState::default(),
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

/// Two hosts whose subnets begin at one address, as after a change of `SubnetLen`.
fn of_two_lengths() -> [Lease; 2] {
    let of =
        |prefix: &str, mac, host| Lease { subnet: Subnet::V4(prefix.parse().unwrap()), ..peer(4, mac, host) };
    [of("10.5.4.0/23", 5, 5), of("10.5.4.0/24", 4, 4)]
}

#[tokio::test]
async fn of_two_subnets_that_begin_at_one_address_that_of_the_config_stays_until_it_goes() {
    for mode in [RouteMode::Plain, RouteMode::Nexthop] {
        let mut host = Host::started(build::VXLAN).await;
        host.restart(mode).await;
        let [wide, narrow] = of_two_lengths();
        for lease in [&wide, &narrow] {
            host.hear(vec![LeaseEvent::Put(lease.clone())]).await;
        }
        assert!(host.network.printed().contains("route 10.5.4.0/24"));
        assert!(!host.network.printed().contains("route 10.5.4.0/23"));

        host.hear(vec![LeaseEvent::Removed(narrow.subnet)]).await;

        assert_eq!(host.network.printed(), host.plan(mode).to_string());
        assert!(host.network.printed().contains("route 10.5.4.0/23"));
        host.full(false).await;
    }
}

#[tokio::test]
async fn a_refused_change_that_is_taken_back_is_forgotten() {
    let mut host = Host::started(build::VXLAN).await;
    host.put(4, 4, 4).await;
    host.network.refuse(|step| matches!(step, Step::PutFdb(..)).then(|| "no".into()));

    for (address, refused) in [(9, 1), (4, 0)] {
        let Applied::One(change) = host.view.apply(LeaseEvent::Put(peer(4, 4, address))) else {
            panic!("no change")
        };
        host.reconciler.patch(&change, &host.view).await.unwrap().unwrap();
        assert_eq!(host.reconciler.refused(), refused);
    }
}

#[tokio::test]
async fn a_route_that_is_refused_once_as_its_device_is_made_anew_is_tried_again() {
    let mut host = Host::started(build::VXLAN).await;
    host.put(4, 4, 4).await;
    for link in host.network.kernel().state.links.values_mut() {
        let LinkKind::Vxlan(vxlan) = &mut link.kind else { panic!("no VXLAN device") };
        vxlan.port = 4789;
    }
    host.network.refuse(|step| matches!(step, Step::PutRoute(..)).then(|| "no".into()));
    host.reconciler.full(&host.view, false).await.unwrap();
    host.network.refuse_nothing();
    assert_eq!(host.reconciler.refused(), 1);

    assert_eq!(host.reconciler.retry().await.unwrap().report.applied, 1);

    assert_eq!(host.network.printed(), host.plan(RouteMode::Plain).to_string());
}

/// Something that happens to a host.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A host has this subnet, with that MAC and address.
    Put(u8, u8, u8),
    Leave(u8),
    /// Two hosts are given each other's MAC.
    SwapMacs(u8, u8),
    /// Two hosts are given each other's subnet.
    SwapSubnets(u8, u8),
    /// The history was compacted: nobody has said what changed meanwhile.
    Missed(u8, u8, u8),
    /// The kernel refuses to make anything for that subnet while it is put, and does so later.
    Refused(u8, u8, u8),
    /// Somebody deletes the object at that place, and the kernel tells of it, or not.
    Delete(usize, bool),
    /// Somebody bends the object at that place, and the kernel tells of it, or not.
    Bend(usize, bool),
    /// Somebody deletes the device.
    DeleteDevice,
    /// A new process over the same kernel, with routes of the other form.
    Restart,
    Audit,
}

/// Subnets by number: those that the config hands out, and others that overlap them.
fn subnet(number: u8) -> Subnet {
    let odd = match number {
        0..8 => return build::subnet(number),
        8 => "10.5.4.0/22",
        9 => "10.5.2.0/23",
        10 => "10.5.6.0/23",
        11 => "10.5.4.0/25",
        12 => "10.5.5.128/25",
        _ => {
            let v6 = "fd05:0:0:3::/64".parse().unwrap();
            return Subnet::Dual("10.5.3.0/24".parse().unwrap(), v6);
        }
    };
    Subnet::V4(odd.parse().unwrap())
}

/// The lease on the subnet of that number.
fn lease(number: u8, mac: u8, host: u8) -> Lease {
    Lease { subnet: subnet(number), ..peer(number, mac, host) }
}

/// Somewhere in each part of the network that some subnet has for itself.
fn places() -> impl Iterator<Item = Ipv4Addr> {
    (2..8).flat_map(|third| [1, 129].map(|last| Ipv4Addr::new(10, 5, third, last)))
}

impl Event {
    fn is_about(self, place: Ipv4Addr) -> bool {
        match self {
            Self::Put(number, ..)
            | Self::Leave(number)
            | Self::Missed(number, ..)
            | Self::Refused(number, ..) => subnet(number).v4().unwrap().contains(place),
            Self::SwapMacs(..) | Self::SwapSubnets(..) => false,
            Self::Delete(..) | Self::Bend(..) | Self::DeleteDevice | Self::Restart | Self::Audit => false,
        }
    }
}

fn event() -> impl Strategy<Value = Event> {
    // Every fourth subnet is an odd one.
    let number = || (0u8..24).prop_map(|n| if n < 18 { 2 + n % 6 } else { n - 10 });
    // Two hosts of three have their own MAC and address; others lay claim to any.
    let put = || {
        (number(), 0u8..18, 1u8..8)
            .prop_map(|(number, mac, host)| (number, if mac < 6 { mac + 1 } else { host }, host))
    };
    prop_oneof![
        6 => put().prop_map(|(number, mac, host)| Event::Put(number, mac, host)),
        3 => number().prop_map(Event::Leave),
        1 => (2u8..8, 2u8..8).prop_map(|(one, other)| Event::SwapMacs(one, other)),
        1 => (2u8..8, 2u8..8).prop_map(|(one, other)| Event::SwapSubnets(one, other)),
        2 => put().prop_map(|(number, mac, host)| Event::Missed(number, mac, host)),
        2 => put().prop_map(|(number, mac, host)| Event::Refused(number, mac, host)),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(place, told)| Event::Delete(place, told)),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(place, told)| Event::Bend(place, told)),
        1 => Just(Event::DeleteDevice),
        1 => Just(Event::Restart),
        1 => Just(Event::Audit),
    ]
}

/// The host that packets to a place are sent to: route, neighbour, forwarding entry.
fn reached(state: &HostState, place: Ipv4Addr) -> Option<IpAddr> {
    let to = state.routes.iter().filter(|(key, _)| key.destination.contains(place.into()));
    let (_, route) = to.max_by_key(|(key, _)| key.destination.prefix())?;
    let gateway = route.gateway?;
    if route
        .nexthop
        .is_some_and(|id| state.nexthops.get(&id).and_then(|nexthop| nexthop.gateway) != Some(gateway))
    {
        return None;
    }
    let mac = state.neighbours.get(&(route.link, gateway))?;
    state.fdb.get(&(route.link, *mac)).copied()
}

/// The objects that peers have in a kernel.
fn objects(state: &HostState) -> Vec<Object> {
    let neighbours = state.neighbours.iter().map(|((link, ip), mac)| Object::Neighbour(*link, *ip, *mac));
    let fdb = state.fdb.iter().map(|((link, mac), remote)| Object::Fdb(*link, *mac, *remote));
    let nexthops = state.nexthops.iter().map(|(id, nexthop)| Object::Nexthop(*id, *nexthop));
    let routes = state.routes.iter().map(|(key, route)| Object::Route(*key, *route));
    neighbours.chain(fdb).chain(nexthops).chain(routes).collect()
}

/// The object, leading elsewhere.
fn bent(object: Object) -> Object {
    let elsewhere = IpAddr::from([192, 168, 0, 66]);
    match object {
        Object::Neighbour(link, ip, _) => Object::Neighbour(link, ip, MacAddr([0x0e, 0, 0, 0, 0, 6])),
        Object::Fdb(link, mac, _) => Object::Fdb(link, mac, elsewhere),
        Object::Nexthop(id, nexthop) => Object::Nexthop(id, Nexthop { gateway: Some(elsewhere), ..nexthop }),
        Object::Route(key, route) => {
            Object::Route(key, Route { gateway: Some(elsewhere), nexthop: None, ..route })
        }
        other => other,
    }
}

impl Host {
    fn plan(&self, mode: RouteMode) -> HostState {
        build::planner_in(&self.config, mode).0.plan(&self.view).desired
    }

    async fn full(&mut self, replan: bool) {
        assert!(self.reconciler.full(&self.view, replan).await.unwrap().report.in_sync());
    }

    /// A new process that finds the kernel as the last one left it.
    async fn restart(&mut self, mode: RouteMode) {
        let (planner, claim) = build::planner_in(&self.config, mode);
        self.reconciler = Reconciler::new(self.network.clone(), planner, claim, Selection::default());
        self.full(true).await;
    }

    async fn put(&mut self, number: u8, mac: u8, host: u8) {
        self.hear(vec![LeaseEvent::Put(lease(number, mac, host))]).await;
    }

    /// MAC and address that the lease on a subnet names.
    fn lease(&self, number: u8) -> Option<(u8, u8)> {
        let attrs = self.view.get(&subnet(number))?.attrs;
        Some((attrs.backend_data?.mac()?.0[5], attrs.public_ip?.octets()[3]))
    }

    /// The events of which one consists.
    fn parts(&self, event: Event) -> Vec<Event> {
        let (Event::SwapMacs(one, other) | Event::SwapSubnets(one, other)) = event else {
            return vec![event];
        };
        let (Some(is), Some(others)) = (self.lease(one), self.lease(other)) else { return vec![] };
        let (now, others_now) = match event {
            Event::SwapMacs(..) => ((others.0, is.1), (is.0, others.1)),
            _ => (others, is),
        };
        vec![Event::Put(one, now.0, now.1), Event::Put(other, others_now.0, others_now.1)]
    }

    async fn meddle(&mut self, place: usize, told: bool, with: impl Fn(Object) -> Option<Object>) {
        let all = objects(&self.network.kernel().state);
        if all.is_empty() {
            return;
        }
        let object = all[place % all.len()].clone();
        self.network.meddle(object.key(), with(object));
        self.before = self.network.kernel().state.clone();
        if !told {
            // Nobody hears of it but the audit.
            return self.full(false).await;
        }
        match self.network.changed().await {
            Changes::Objects(objects) => {
                let outcome = self.reconciler.repair(objects).await.unwrap().unwrap();
                assert!(outcome.report.in_sync());
            }
            Changes::Everything(_) => self.full(false).await,
        }
    }

    async fn live(&mut self, event: Event, mode: &mut RouteMode) {
        match event {
            Event::Put(number, mac, host) => self.put(number, mac, host).await,
            Event::Leave(number) => self.hear(vec![LeaseEvent::Removed(subnet(number))]).await,
            Event::SwapMacs(..) | Event::SwapSubnets(..) => unreachable!("these consist of others"),
            Event::Missed(number, mac, host) => {
                self.view.apply(LeaseEvent::Put(lease(number, mac, host)));
                self.full(true).await;
            }
            Event::Refused(number, mac, host) => {
                let words = subnet(number).v4().unwrap().ip().to_string();
                self.network.refuse(move |step| {
                    let refused = step.leaves().is_some() && step.to_string().contains(&words);
                    refused.then(|| "Invalid argument".into())
                });
                if let Applied::One(change) = self.view.apply(LeaseEvent::Put(lease(number, mac, host))) {
                    self.reconciler.patch(&change, &self.view).await.unwrap().unwrap();
                }
                self.network.refuse_nothing();
                assert!(self.reconciler.retry().await.unwrap().report.in_sync());
                assert_eq!(self.reconciler.refused(), 0);
            }
            Event::Delete(place, told) => self.meddle(place, told, |_| None).await,
            Event::Bend(place, told) => self.meddle(place, told, |object| Some(bent(object))).await,
            Event::DeleteDevice => {
                self.network.kernel().state.drop_link(build::link("flannel.1"));
                self.before = self.network.kernel().state.clone();
                self.full(false).await;
            }
            Event::Restart => {
                *mode = if *mode == RouteMode::Plain { RouteMode::Nexthop } else { RouteMode::Plain };
                self.restart(*mode).await;
            }
            Event::Audit => self.full(false).await,
        }
    }

    /// No step may send a subnet's packets to a third host, and none may lose those of a subnet to which nothing happens.
    fn check_each_step(&self, event: Event, planned: &HostState, now: &HostState) {
        let mut state = self.before.clone();
        let steps = self.network.kernel().taken.clone();
        let all = |state: &HostState| -> Vec<_> { places().map(|place| reached(state, place)).collect() };
        let (was, should, shall) = (all(&self.before), all(planned), all(now));
        for step in &steps {
            diff::take(&mut state, step);
            for (place, ((&was, &should), &shall)) in places().zip(was.iter().zip(&should).zip(&shall)) {
                let is = reached(&state, place);
                assert!(
                    is.is_none() || is == was || is == should || is == shall,
                    "{place} went to {is:?} after {step}, one of {steps:#?}"
                );
                if was == shall && should == shall && !event.is_about(place) {
                    assert_eq!(is, shall, "{place} was lost by {step}, one of {steps:#?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_end_as_a_fresh_plan_and_mislead_no_packet(
        history in proptest::collection::vec(event(), 1..25),
        nexthops in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut mode = if nexthops { RouteMode::Nexthop } else { RouteMode::Plain };
            let mut host = Host::started(build::VXLAN).await;
            host.restart(mode).await;
            for event in history {
                for event in host.parts(event) {
                    let planned = host.plan(mode);
                    host.network.kernel().taken.clear();
                    host.before = host.network.kernel().state.clone();
                    host.live(event, &mut mode).await;

                    let now = host.plan(mode);
                    assert_eq!(host.network.printed(), now.to_string(), "{event:?}");
                    host.check_each_step(event, &planned, &now);
                }
            }
            host.network.kernel().taken.clear();
            host.full(true).await;
            assert_eq!(host.network.kernel().taken, []);
        });
    }
}

/// How long who vanishes is held here.
const GRACE: Duration = Duration::from_secs(60);

/// Something that happens to a store, or between it and us.
#[derive(Clone, Debug)]
enum Turn {
    /// A host has this subnet, with that MAC and address.
    Put(u8, u8),
    Remove(u8),
    /// These go in one stroke, all of them if there are none; perhaps our own too.
    RemoveTogether(Vec<u8>),
    Junk(u8),
    /// The history is compacted: what was not heard is lost, and a list comes.
    Relist,
    /// So much of what happened comes to our ears.
    Hear(usize),
    /// Seconds pass, and if somebody is held for long enough the store is asked.
    Wait(u64),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        8 => (2u8..16, 0u8..8).prop_map(|(number, other)| Turn::Put(number, if other < 2 { other + 2 } else { number })),
        2 => (2u8..16).prop_map(Turn::Remove),
        2 => proptest::collection::vec(1u8..16, 0..15).prop_map(Turn::RemoveTogether),
        1 => (2u8..16).prop_map(Turn::Junk),
        2 => Just(Turn::Relist),
        8 => (1usize..20).prop_map(Turn::Hear),
        4 => (1u64..50).prop_map(Turn::Wait),
    ]
}

/// A store, and a host that hears of it by way of the guard.
struct World {
    store: BTreeMap<Subnet, Lease>,
    unheard: VecDeque<LeaseEvent>,
    /// What the host would know without a guard.
    heard: BTreeMap<Subnet, Lease>,
    /// Since when it would not know of somebody any more.
    lost: BTreeMap<Subnet, Instant>,
    guard: Guard,
    host: Host,
    now: Instant,
}

impl World {
    async fn new() -> Self {
        let own = peer(1, 1, 1);
        let store = BTreeMap::from([(own.subnet, own)]);
        Self {
            heard: store.clone(),
            store,
            unheard: VecDeque::new(),
            lost: BTreeMap::new(),
            guard: Guard::new(GRACE),
            host: Host::started(build::VXLAN).await,
            now: Instant::now(),
        }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { leases: self.store.values().cloned().collect(), unreadable: vec![] }
    }

    async fn live(&mut self, turn: Turn) {
        match turn {
            Turn::Put(number, host) => {
                let lease = peer(number, host, host);
                self.store.insert(lease.subnet, lease.clone());
                self.unheard.push_back(LeaseEvent::Put(lease));
            }
            Turn::Remove(number) => {
                self.store.remove(&build::subnet(number));
                self.unheard.push_back(LeaseEvent::Removed(build::subnet(number)));
            }
            Turn::RemoveTogether(numbers) => {
                let numbers = if numbers.is_empty() { (1..16).collect() } else { numbers };
                let subnets: Vec<Subnet> = numbers.into_iter().map(build::subnet).collect();
                self.store.retain(|subnet, _| !subnets.contains(subnet));
                self.unheard.push_back(LeaseEvent::RemovedTogether(subnets));
            }
            Turn::Junk(number) => {
                let subnet = build::subnet(number);
                self.store.remove(&subnet);
                let key = Unreadable { key: String::new(), subnet: Some(subnet), reason: "junk".into() };
                self.unheard.push_back(LeaseEvent::Unreadable(key));
            }
            Turn::Relist => {
                self.unheard.clear();
                self.unheard.push_back(LeaseEvent::Snapshot(self.snapshot()));
            }
            Turn::Hear(count) => {
                for _ in 0..count.min(self.unheard.len()) {
                    self.hear().await;
                }
            }
            Turn::Wait(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.ask().await;
            }
        }
    }

    async fn hear(&mut self) {
        let Some(event) = self.unheard.pop_front() else { return };
        let (before, had) = (self.heard.clone(), self.host.view.clone());
        let mut alone = None;
        match event.clone() {
            LeaseEvent::Snapshot(list) => {
                self.heard = list.leases.into_iter().map(|lease| (lease.subnet, lease)).collect();
            }
            LeaseEvent::Put(lease) => drop(self.heard.insert(lease.subnet, lease)),
            LeaseEvent::Removed(subnet) => alone = Some(subnet),
            LeaseEvent::Unreadable(key) => alone = key.subnet,
            LeaseEvent::RemovedTogether(subnets) => self.heard.retain(|subnet, _| !subnets.contains(subnet)),
            LeaseEvent::Resumed => {}
        }
        alone.iter().for_each(|subnet| drop(self.heard.remove(subnet)));
        for subnet in before.keys().filter(|subnet| !self.heard.contains_key(subnet)) {
            self.lost.insert(*subnet, self.now);
        }
        self.lost.retain(|subnet, _| !self.heard.contains_key(subnet));
        let admitted = self.guard.admit(event.clone(), &self.host.view, build::subnet(1), self.now);
        self.host.hear(admitted.events).await;

        // Who is gone was deleted alone, has another subnet by what this event says, or is one of few.
        let lives_elsewhere = |gone: &Lease| {
            self.heard.values().any(|lease| {
                lease.attrs.public_ip == gone.attrs.public_ip
                    || lease.attrs.backend_data == gone.attrs.backend_data
            })
        };
        let gone = had.peers(build::subnet(1)).filter(|lease| {
            self.host.view.get(&lease.subnet).is_none()
                && alone != Some(lease.subnet)
                && !lives_elsewhere(lease)
        });
        let gone = gone.count();
        assert!(gone <= 3 || gone * 4 <= had.count_peers(build::subnet(1)), "{gone} go with {event:?}");
        self.check().await;
    }

    async fn ask(&mut self) {
        if self.guard.due().is_none_or(|due| self.now < due) {
            return;
        }
        let event = self.guard.confirm(&self.snapshot(), self.now);
        for subnet in event.iter().flat_map(|event| match event {
            LeaseEvent::RemovedTogether(subnets) => subnets.clone(),
            other => panic!("{other:?}"),
        }) {
            assert!(!self.store.contains_key(&subnet), "{subnet} is there");
            assert!(self.lost[&subnet] + GRACE <= self.now, "{subnet} was given up early");
        }
        self.host.hear(event.into_iter().collect()).await;
        self.check().await;
    }

    /// The view has what was heard, and who is held on top of that; the kernel has what the view has.
    async fn check(&mut self) {
        for number in 1..16 {
            let subnet = build::subnet(number);
            let (is, heard) = (self.host.view.get(&subnet), self.heard.get(&subnet).cloned());
            match self.guard.holds(&subnet) {
                true => assert!(heard.is_none() && is.is_some() && number != 1, "{subnet} is held"),
                false => assert_eq!(is, heard),
            }
        }
        assert_eq!(self.guard.due().is_none(), self.guard.count() == 0);
        assert_eq!(self.host.network.printed(), self.host.plan(RouteMode::Plain).to_string());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_store_says_few_go_early_and_all_go_in_the_end(
        history in proptest::collection::vec(turn(), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new().await;
            for number in 2..14 {
                world.live(Turn::Put(number, number)).await;
            }
            for turn in history {
                world.live(turn).await;
            }

            world.live(Turn::Hear(usize::MAX)).await;
            for _ in 0..2 {
                world.live(Turn::Wait(GRACE.as_secs())).await;
            }

            assert_eq!(world.guard.count(), 0);
            let view = world.host.view.peers(build::subnet(250)).collect::<Vec<Lease>>();
            assert_eq!(view, world.store.values().cloned().collect::<Vec<Lease>>());
            world.host.check("in the end").await;
        });
    }
}
