use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ipnetwork::IpNetwork;
use proptest::prelude::*;

use super::*;
use crate::allocation::{self, Choice};
use crate::backend;
use crate::claim::overlap;
use crate::lease::{LeaseAttrs, Tenure};
use crate::network::NetworkConfig;
use crate::state::{LinkName, MacAddr};
use crate::store::{LeaseEvent, Snapshot};
use crate::underlay::{RouteFact, Underlay};
use crate::view::Applied;

const VXLAN: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;

/// The lease on 10.16.0.0/24 and on; the lowest is our own.
fn lease(number: u32) -> Lease {
    let [_, a, b, c] = number.to_be_bytes();
    let first = std::net::Ipv4Addr::from_bits(u32::from_be_bytes([10, 16, 0, 0]) + (number << 8));
    let attrs = LeaseAttrs {
        public_ip: Some([172, 16, b, c].into()),
        public_ipv6: None,
        backend_type: "vxlan".into(),
        backend_data: Some(BackendData::Vtep { vni: Some(1), mac: MacAddr([0x0e, 0, 0, a, b, c]) }),
        backend_v6_data: None,
    };
    let subnet = Subnet::V4(format!("{first}/24").parse().unwrap());
    Lease { subnet, attrs, tenure: Tenure::Leased }
}

fn planner(mode: RouteMode) -> Planner {
    planner_of(VXLAN, lease(0), mode)
}

/// For the host 192.168.0.1, which is on a network with the hosts up to 192.168.0.127.
fn planner_of(config: &str, own: Lease, mode: RouteMode) -> Planner {
    let config = NetworkConfig::parse(config).unwrap();
    let link: LinkName = "eth0".parse().unwrap();
    let near: IpNetwork = "192.168.0.0/25".parse().unwrap();
    let underlay = Underlay {
        link,
        mtu: 1500,
        address: [192, 168, 0, 1].into(),
        public_ip: [192, 168, 0, 1].into(),
        public_ipv6: None,
        networks: vec![near],
        routes: vec![RouteFact { destination: near, gateway: None, link: Some(link) }],
    };
    let node = Node { pools: config.pools().copied().collect(), underlay, lease: own, mtu: None };
    Planner::new(backend::from_config(&config).unwrap().0, node, mode)
}

fn view(peers: usize) -> LeaseView {
    let mut view = LeaseView::default();
    let leases = (0..=u32::try_from(peers).unwrap()).map(lease).collect();
    view.apply(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }));
    view
}

fn nexthops(planner: &mut Planner, peers: usize) -> usize {
    let desired = planner.plan(&view(peers)).desired;
    assert_eq!(desired.routes.len(), peers);
    assert!(desired.routes.values().all(|route| route.nexthop.is_some() != desired.nexthops.is_empty()));
    desired.nexthops.len()
}

#[test]
fn many_peers_have_nexthop_objects_and_few_have_not() {
    let mut planner = planner(RouteMode::Auto);

    assert_eq!(nexthops(&mut planner, MANY_PEERS), 0);
    assert_eq!(nexthops(&mut planner, MANY_PEERS + 1), MANY_PEERS + 1);
    assert_eq!(nexthops(&mut planner, FEW_PEERS + 1), FEW_PEERS + 1, "a cluster that breathes");
    assert_eq!(nexthops(&mut planner, FEW_PEERS), 0);
    assert_eq!(nexthops(&mut planner, FEW_PEERS + 1), 0);
}

#[test]
fn what_is_asked_for_holds_at_any_number() {
    assert_eq!(nexthops(&mut planner(RouteMode::Nexthop), 2), 2);
    assert_eq!(nexthops(&mut planner(RouteMode::Plain), MANY_PEERS + 1), 0);
}

#[test]
fn a_kernel_without_nexthop_objects_gets_none() {
    let mut planner = planner(RouteMode::Nexthop);

    assert!(planner.set_able(false), "that is news");

    assert_eq!(nexthops(&mut planner, 2), 0);
    assert!(!planner.set_able(false));
}

#[test]
fn the_peer_that_makes_them_many_changes_the_plan_for_everybody() {
    let mut planner = planner(RouteMode::Auto);
    let mut view = view(MANY_PEERS);
    planner.plan(&view);
    let more = |number| LeaseEvent::Put(lease(u32::try_from(number).unwrap()));

    let Applied::One(change) = view.apply(more(MANY_PEERS + 1)) else { panic!("no change") };
    assert_eq!(planner.replan(&change, &view), None);

    planner.plan(&view);
    let Applied::One(change) = view.apply(more(MANY_PEERS + 2)) else { panic!("no change") };
    assert_eq!(planner.replan(&change, &view).unwrap().after.len(), 4);
}

const NETWORK: &str = "10.5.0.0/16";

/// Subnets that the config hands out, and what overlaps them.
const SUBNETS: [&str; 16] = [
    "10.5.2.0/24",
    "10.5.3.0/24",
    "10.5.4.0/24",
    "10.5.5.0/24",
    "10.5.6.0/24",
    "10.5.7.0/24",
    "10.5.2.0/23",
    "10.5.6.0/23",
    "10.5.4.0/22",
    "10.5.4.0/25",
    "10.5.5.128/25",
    "10.5.5.192/26",
    // Of both families.
    "10.5.3.0/24 fd05:0:0:3::/64",
    "10.5.4.0/23 fd05:0:0:4::/64",
    // Ours is in there, and something on the host bits.
    "10.5.0.0/21",
    "10.5.6.9/24",
];

fn subnet(text: &str) -> Subnet {
    match text.split_once(' ') {
        Some((v4, v6)) => Subnet::Dual(v4.parse().unwrap(), v6.parse().unwrap()),
        None => Subnet::V4(text.parse().unwrap()),
    }
}

/// How a peer publishes what it is.
#[derive(Clone, Copy, Debug)]
enum Form {
    Usual,
    /// With a member that we do not know.
    Newer,
    OtherBackend,
    /// A reservation.
    Reserved,
}

/// The lease of the host with that MAC at that address.
fn peer_as(kind: &str, of: &str, mac: u8, host: u8, form: Form) -> Lease {
    let kind = if matches!(form, Form::OtherBackend) { "ipip" } else { kind };
    let newer = if matches!(form, Form::Newer) { r#","New":1"# } else { "" };
    let data = match kind {
        "vxlan" => format!(r#","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{mac:02x}"{newer}}}"#),
        _ => String::new(),
    };
    let value = format!(r#"{{"PublicIP":"192.168.0.{host}","BackendType":"{kind}"{data}}}"#);
    let tenure = if matches!(form, Form::Reserved) { Tenure::Reserved } else { Tenure::Leased };
    Lease { subnet: subnet(of), attrs: LeaseAttrs::from_json(&value).unwrap(), tenure }
}

fn peer(of: &str, mac: u8, host: u8) -> Lease {
    peer_as("vxlan", of, mac, host, Form::Usual)
}

fn own() -> Lease {
    peer("10.5.1.0/24", 1, 1)
}

fn config(backend: &str) -> String {
    format!(r#"{{"Network":"{NETWORK}","Backend":{backend}}}"#)
}

fn vxlan() -> Planner {
    planner_of(&config(r#"{"Type":"vxlan"}"#), own(), RouteMode::Auto)
}

fn view_of(leases: &[Lease]) -> LeaseView {
    let mut view = LeaseView::default();
    view.apply(LeaseEvent::Snapshot(Snapshot { leases: leases.to_vec(), unreadable: vec![] }));
    view
}

/// What a host makes of some leases, in whichever order it hears of them: the
/// subnets it routes to, and what it skips.
fn outcome(leases: &[Lease]) -> (Vec<String>, Vec<String>) {
    let plan = vxlan().plan(&view_of(leases));
    let routes = plan.desired.routes.keys().map(|key| key.destination.to_string()).collect();
    (routes, plan.skipped.iter().map(|peer| format!("{}: {}", peer.subnet, peer.reason)).collect())
}

#[test]
fn half_the_network_takes_no_subnet_away() {
    let honest =
        ["10.5.130.0/24", "10.5.200.0/24"].map(|of| peer(of, of.as_bytes()[5] + 9, of.as_bytes()[5]));
    let wide = peer("10.5.128.0/17", 9, 9);

    let (routes, skipped) = outcome(&[honest.to_vec(), vec![wide]].concat());

    assert_eq!(routes, ["10.5.130.0/24", "10.5.200.0/24"]);
    assert_eq!(skipped, ["10.5.128.0/17: its subnet overlaps 10.5.130.0/24, which goes before it"]);
}

#[test]
fn of_two_that_the_config_does_not_hand_out_the_lower_goes_first() {
    let (routes, skipped) =
        outcome(&[peer("10.5.4.0/25", 2, 2), peer("10.5.4.0/23", 3, 3), peer("10.5.5.128/25", 4, 4)]);

    assert_eq!(routes, ["10.5.4.0/23"]);
    assert_eq!(
        skipped,
        [
            "10.5.4.0/25: its subnet overlaps 10.5.4.0/23, which goes before it",
            "10.5.5.128/25: its subnet overlaps 10.5.4.0/23, which goes before it",
        ]
    );
}

#[test]
fn what_a_hand_has_written_takes_nothing_from_a_host_that_keeps_its_lease_alive() {
    let hand = |of: &str, mac, host| peer_as("vxlan", of, mac, host, Form::Reserved);

    let (routes, skipped) =
        outcome(&[hand("10.5.3.0/24", 7, 2), hand("10.5.4.0/24", 2, 8), peer("10.5.9.0/24", 2, 2)]);

    assert_eq!(routes, ["10.5.9.0/24"]);
    assert_eq!(
        skipped,
        [
            "10.5.3.0/24: its public address 192.168.0.2 is that of 10.5.9.0/24",
            "10.5.4.0/24: its VtepMAC 0e:00:00:00:00:02 is that of 10.5.9.0/24",
        ]
    );
}

#[test]
fn of_an_ipv4_lease_and_the_ipv4_half_of_another_the_first_has_it() {
    let both = peer("10.5.3.0/24 fd05:0:0:3::/64", 2, 2);

    assert_eq!(outcome(std::slice::from_ref(&both)), (vec!["10.5.3.0/24".into()], vec![]));
    let (routes, skipped) = outcome(&[both, peer("10.5.3.0/24", 3, 3)]);
    assert_eq!(routes, ["10.5.3.0/24"]);
    assert_eq!(
        skipped,
        ["10.5.3.0/24 and fd05:0:0:3::/64: its subnet overlaps 10.5.3.0/24, which goes before it"]
    );
}

#[test]
fn of_two_with_one_public_address_the_lower_subnet_has_it() {
    let (routes, skipped) = outcome(&[peer("10.5.3.0/24", 3, 2), peer("10.5.2.0/24", 2, 2)]);

    assert_eq!(routes, ["10.5.2.0/24"]);
    assert_eq!(skipped, ["10.5.3.0/24: its public address 192.168.0.2 is that of 10.5.2.0/24"]);
}

#[test]
fn a_subnet_of_the_config_has_a_mac_before_a_lower_one_that_is_not() {
    let (routes, skipped) = outcome(&[peer("10.5.2.0/25", 2, 2), peer("10.5.3.0/24", 2, 3)]);

    assert_eq!(routes, ["10.5.3.0/24"]);
    assert_eq!(skipped, ["10.5.2.0/25: its VtepMAC 0e:00:00:00:00:02 is that of 10.5.3.0/24"]);
}

#[test]
fn a_host_that_has_moved_is_reached_under_both_its_subnets_until_one_goes() {
    let moved = [peer("10.5.2.0/24", 2, 2), peer("10.5.3.0/24", 2, 2)];
    let (mut planner, mut view) = (vxlan(), view_of(&moved));
    assert_eq!(outcome(&moved), (vec!["10.5.2.0/24".into(), "10.5.3.0/24".into()], vec![]));

    let mut desired = planner.plan(&view).desired;
    let Applied::One(change) = view.apply(LeaseEvent::Removed(moved[0].subnet)) else { panic!() };
    take(&mut desired, planner.replan(&change, &view).unwrap());

    assert_eq!(desired.fdb.len(), 1, "{desired}");
    assert_eq!(desired, vxlan().plan(&view).desired);
}

#[test]
fn one_that_is_skipped_claims_no_less_and_one_that_cannot_be_planned_nothing() {
    let (first, second, third) =
        (peer("10.5.2.0/24", 2, 2), peer("10.5.3.0/24", 2, 3), peer("10.5.4.0/24", 4, 3));

    let (routes, skipped) = outcome(&[first, second, third]);
    assert_eq!((routes, skipped.len()), (vec!["10.5.2.0/24".into()], 2));

    let unplanned = peer_as("vxlan", "10.5.2.0/24", 3, 3, Form::OtherBackend);
    let (routes, _) = outcome(&[unplanned, peer("10.5.3.0/24", 3, 3)]);
    assert_eq!(routes, ["10.5.3.0/24"]);
}

#[test]
fn whoever_is_skipped_and_gone_is_told_as_no_longer_left_out() {
    let leases = [peer("10.5.2.0/24", 2, 2), peer("10.5.3.0/24", 3, 2)];
    let (mut planner, mut view) = (vxlan(), view_of(&leases));
    planner.plan(&view);

    let Applied::One(change) = view.apply(LeaseEvent::Removed(leases[1].subnet)) else { panic!() };
    let patch = planner.replan(&change, &view).unwrap();

    assert_eq!(patch, Patch { planned: vec![leases[1].subnet], ..Patch::default() });
}

/// Counts what the planner asks of a backend.
struct Counting(Box<dyn Backend>, Arc<AtomicUsize>);

impl Backend for Counting {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }
    fn links(&self) -> Vec<LinkName> {
        self.0.links()
    }
    fn mtu(&self, node: &Node) -> u32 {
        self.0.mtu(node)
    }
    fn check(&self, underlay: &Underlay) -> Result<(), String> {
        self.0.check(underlay)
    }
    fn attributes(&self, underlay: &Underlay, observed: &HostState, random: MacAddr) -> LeaseAttrs {
        self.0.attributes(underlay, observed, random)
    }
    fn plan_node(&self, node: &Node) -> HostState {
        self.0.plan_node(node)
    }
    fn plan_peer(&self, node: &Node, peer: &Lease) -> Result<Vec<Object>, String> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.plan_peer(node, peer)
    }
}

#[test]
fn a_change_costs_the_planning_of_whom_it_touches_at_any_size() {
    let mut planner = planner(RouteMode::Plain);
    let asked = Arc::new(AtomicUsize::new(0));
    let (backend, _) = backend::from_config(&NetworkConfig::parse(VXLAN).unwrap()).unwrap();
    planner.backend = Box::new(Counting(backend, asked.clone()));
    let mut view = view(2000);
    planner.plan(&view);
    let mut costs = |event: LeaseEvent| {
        asked.store(0, Ordering::Relaxed);
        let Applied::One(change) = view.apply(event) else { panic!("no change") };
        let patch = planner.replan(&change, &view).unwrap();
        (asked.load(Ordering::Relaxed), patch.after.len(), patch.skipped.len())
    };
    let wide = peer("10.20.0.0/14", 99, 99);

    assert_eq!(costs(LeaseEvent::Put(lease(3000))), (1, 3, 0));
    assert_eq!(costs(LeaseEvent::Put(Lease { tenure: Tenure::Reserved, ..lease(3000) })), (2, 3, 0));
    assert_eq!(
        costs(LeaseEvent::Put(wide.clone())),
        (1, 0, 1),
        "a thousand subnets in there stay as they are"
    );
    assert_eq!(costs(LeaseEvent::Removed(wide.subnet)), (1, 0, 0));
    // Of two with one MAC the one that goes last is touched by the other.
    let thief = Lease {
        attrs: LeaseAttrs { public_ip: Some([172, 31, 0, 1].into()), ..lease(1001).attrs },
        ..lease(3001)
    };
    assert_eq!(costs(LeaseEvent::Put(thief)), (1, 0, 1));
    assert_eq!(costs(LeaseEvent::Removed(lease(1001).subnet)), (2, 3, 0));
}

/// Takes a patch as whoever holds the plan does.
fn take(desired: &mut HostState, patch: Patch) {
    patch.before.iter().for_each(|object| desired.remove(&object.key()));
    patch.after.into_iter().for_each(|object| desired.put(object));
}

/// Whether two planned peers cannot both be had: the rule, said once more and plainly.
fn disputes(one: &Lease, other: &Lease) -> bool {
    let overlapping = overlap(one.subnet.v4().unwrap().into(), other.subnet.v4().unwrap().into());
    let end =
        |lease: &Lease| (lease.attrs.backend_data.as_ref().and_then(BackendData::mac), lease.attrs.public_ip);
    let ((mac, ip), (others, others_ip)) = (end(one), end(other));
    overlapping
        || ((mac.is_some() && mac == others) != (ip == others_ip) && (mac.is_some() || others.is_some()))
}

fn goes_before(one: &Lease, other: &Lease) -> bool {
    let rank = |lease: &Lease| {
        (lease.subnet.v4().unwrap().prefix() != 24, lease.tenure == Tenure::Reserved, lease.subnet)
    };
    rank(one) < rank(other)
}

#[derive(Clone, Debug)]
enum Event {
    Put(&'static str, u8, u8, Form),
    Removed(&'static str),
}

fn event() -> impl Strategy<Value = Event> {
    let form = prop_oneof![6 => Just(Form::Usual), 1 => Just(Form::Newer), 1 => Just(Form::OtherBackend), 2 => Just(Form::Reserved)];
    prop_oneof![
        3 => (prop::sample::select(&SUBNETS), 2u8..6, 2u8..6, form).prop_map(|(of, mac, host, form)| {
            // Half of the hosts are on our own network.
            Event::Put(of, mac, if host % 2 == 0 { host } else { host + 200 }, form)
        }),
        1 => prop::sample::select(&SUBNETS).prop_map(Event::Removed),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn changes_one_by_one_come_to_the_plan_for_all(
        events in prop::collection::vec(event(), 1..40),
        (backend, kind) in prop::sample::select(&[
            (r#"{"Type":"vxlan"}"#, "vxlan"),
            (r#"{"Type":"vxlan","DirectRouting":true}"#, "vxlan"),
            (r#"{"Type":"host-gw"}"#, "host-gw"),
            (r#"{"Type":"alloc"}"#, "alloc"),
        ]),
        nexthops: bool,
    ) {
        let mode = if nexthops { RouteMode::Nexthop } else { RouteMode::Plain };
        let fresh = || planner_of(&config(backend), own(), mode);
        let (mut planner, mut view) = (fresh(), LeaseView::default());
        let mut desired = planner.plan(&view).desired;
        let mut skipped = BTreeMap::new();
        for event in events {
            let event = match event {
                Event::Put(of, mac, host, form) => LeaseEvent::Put(peer_as(kind, of, mac, host, form)),
                Event::Removed(of) => LeaseEvent::Removed(subnet(of)),
            };
            let Applied::One(change) = view.apply(event) else { continue };

            let patch = planner.replan(&change, &view).unwrap();
            skipped.retain(|subnet, _| !patch.planned.contains(subnet));
            skipped.extend(patch.skipped.iter().map(|peer| (peer.subnet, peer.reason.clone())));
            take(&mut desired, patch);

            let mut other = fresh();
            let plan = other.plan(&view);
            prop_assert_eq!(desired.to_string(), plan.desired.to_string());
            let reasons: BTreeMap<Subnet, String> =
                plan.skipped.into_iter().map(|peer| (peer.subnet, peer.reason)).collect();
            prop_assert_eq!(&skipped, &reasons);
            prop_assert_eq!(&planner.claims, &other.claims);
        }
    }

    #[test]
    fn who_has_it_is_who_goes_before_everybody_that_disputes_it(
        events in prop::collection::vec(event(), 1..25),
    ) {
        let mut view = LeaseView::default();
        for event in events {
            if let Event::Put(of, mac, host, form) = event {
                view.apply(LeaseEvent::Put(peer_as("vxlan", of, mac, host, form)));
            }
        }
        let mut planner = vxlan();
        let plan = planner.plan(&view);

        let planned: Vec<Lease> =
            view.peers(own().subnet).filter(|peer| planner.plan_peer(peer).is_ok()).collect();
        for peer in &planned {
            let beaten = planned.iter().any(|other| goes_before(other, peer) && disputes(other, peer));
            let skipped = plan.skipped.iter().any(|skipped| skipped.subnet == peer.subnet);
            prop_assert_eq!(beaten, skipped, "{} of {:#?}", peer.subnet, planned);
        }
    }

    #[test]
    fn a_host_that_joins_takes_nobody_s_subnet_away(
        others in prop::collection::vec((2u8..250, 18u8..28), 1..30),
        dice: u64,
    ) {
        let leases: Vec<Lease> = others.iter().zip(2..).map(|((third, length), host)| {
            let network: IpNetwork = format!("10.5.{third}.0/{length}").parse().unwrap();
            peer(&format!("{}/{length}", network.network()), host, host)
        }).collect();
        let config = NetworkConfig::parse(&config(r#"{"Type":"vxlan"}"#)).unwrap();
        let ours = Lease { subnet: subnet("10.5.254.0/24"), ..own() };
        let planner = || planner_of(&self::config(r#"{"Type":"vxlan"}"#), ours.clone(), RouteMode::Auto);
        let snapshot = Snapshot { leases: [leases.clone(), vec![ours.clone()]].concat(), unreadable: vec![] };

        let Choice::PickFrom(free) = allocation::choose(&config, &snapshot, &peer("10.5.2.0/24", 99, 99).attrs, None) else {
            return Ok(());
        };
        let joined = Lease { subnet: free.pick((dice, 0)), ..peer("10.5.2.0/24", 99, 99) };

        let skipped = |leases: &[Lease]| -> Vec<Subnet> {
            planner().plan(&view_of(leases)).skipped.iter().map(|peer| peer.subnet).collect()
        };
        prop_assert_eq!(skipped(&leases), skipped(&[leases.clone(), vec![joined]].concat()));
    }
}

#[test]
fn a_blackhole_for_our_subnet_is_planned_if_asked_for() {
    let view = LeaseView::default();

    let with = planner(RouteMode::Auto).with_blackhole(true).plan(&view).desired;
    let without = planner(RouteMode::Auto).plan(&view).desired;

    let own = planner(RouteMode::Auto).node().lease.subnet.networks().map(RouteKey::blackhole);
    assert_eq!(with.blackholes, own.collect());
    assert_eq!(without.blackholes, [].into());
}
