//! Rung 4: the loop, on a store and a kernel in memory, with the clock in hand.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flannel_core::diff::Step;
use flannel_core::firewall::Wanted;
use flannel_core::host::Changes;
use flannel_core::lease::{Expiry, HeldLease, Lease, Tenure};
use flannel_core::memory::Memory;
use flannel_core::state::{Key, RouteKey};
use flannel_core::store::{LeaseEvent, Unreadable};
use flannel_core::underlay::{Interface, InterfaceAddress, Selection};
use flannel_tests::build::{self, peer, subnet};
use flannel_tests::fake_network::{FakeFirewall, FakeNetwork};
use flannel_tests::memory_store::{MemoryStore, TERM};
use flanneld::agent::{Agent, Ended, Options, Parts};
use flanneld::health::{Aspect, Status};
use flanneld::reconcile::Reconciler;
use flanneld::state_dir::StateDir;
use flanneld::subnet_file::SubnetFile;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);

/// A running agent and all it touches. Its own lease is 10.5.1.0/24.
struct Host {
    store: MemoryStore,
    network: FakeNetwork,
    firewall: FakeFirewall,
    status: watch::Receiver<Status>,
    directory: tempfile::TempDir,
    announced: Arc<AtomicUsize>,
    stop: CancellationToken,
    agent: JoinHandle<Ended>,
}

impl Host {
    fn start(store: MemoryStore, network: FakeNetwork, firewall: FakeFirewall) -> Self {
        Self::start_holding(store, network, firewall, peer(1, 1, 1))
    }

    fn start_holding(store: MemoryStore, network: FakeNetwork, firewall: FakeFirewall, own: Lease) -> Self {
        Self::start_guarded(store, network, firewall, own, MINUTE)
    }

    fn start_guarded(
        store: MemoryStore,
        network: FakeNetwork,
        firewall: FakeFirewall,
        own: Lease,
        removal_grace: Duration,
    ) -> Self {
        store.inner().leases.insert(own.subnet, own.clone());
        Self::start_with(store, network, firewall, own, removal_grace, None)
    }

    /// With `recalled`, the agent begins with what it remembers.
    fn start_with(
        store: MemoryStore,
        network: FakeNetwork,
        firewall: FakeFirewall,
        own: Lease,
        removal_grace: Duration,
        recalled: Option<Vec<Lease>>,
    ) -> Self {
        let config = build::config(build::VXLAN);
        let (planner, claim) = build::planner(&config);
        let directory = tempfile::tempdir().unwrap();
        let (status, seen) = watch::channel(Status::default());
        let announced = Arc::new(AtomicUsize::new(0));
        let count = announced.clone();
        let expiry = match own.tenure {
            Tenure::Leased => Expiry::At((Instant::now() + TERM).into_std()),
            Tenure::Reserved => Expiry::Never,
        };
        let parts = Parts {
            store: Arc::new(store.clone()),
            reconciler: Reconciler::new(network.clone(), planner, claim, Selection::default()),
            config,
            held: HeldLease { lease: own, expiry, handle: 7 },
            file: SubnetFile::new(directory.path().join("flannel/subnet.env")),
            options: Options {
                wanted: Wanted { masquerade: false, random_fully: true, forward: true },
                former: vec![],
                rules_interval: Duration::from_secs(5),
                audit_interval: MINUTE,
                renew_margin: 60 * MINUTE,
                removal_grace,
            },
            status,
            on_ready: Some(Box::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            })),
            state: Some(StateDir::new(directory.path().join("state"), "/net")),
            recalled,
        };
        let stop = CancellationToken::new();
        let agent = tokio::spawn(Agent::new(parts, firewall.clone()).run(stop.clone()));
        Self { store, network, firewall, status: seen, directory, announced, stop, agent }
    }

    /// A host in sync with the peers 2 and 3.
    async fn in_sync() -> Self {
        let store = MemoryStore::holding([peer(2, 2, 2), peer(3, 3, 3)]);
        let mut host = Self::start(store, FakeNetwork::default(), FakeFirewall::default());
        host.ready().await;
        host
    }

    /// A host in sync with the peers 2 to 51, that holds those that vanish for so long.
    async fn among_fifty(removal_grace: Duration) -> Self {
        let store = MemoryStore::holding(fifty().map(|number| peer(number, number, number)));
        let (network, firewall) = (FakeNetwork::default(), FakeFirewall::default());
        let mut host = Self::start_guarded(store, network, firewall, peer(1, 1, 1), removal_grace);
        host.ready().await;
        host.taken();
        host
    }

    /// Waits until the status has a flaw with these words, or none if there are none.
    async fn until_flawed(&mut self, words: &str) {
        let is_so = |status: &Status| {
            let flaws = status.flaws().join("; ");
            if words.is_empty() { flaws.is_empty() } else { flaws.contains(words) }
        };
        self.status.wait_for(is_so).await.unwrap();
    }

    /// How many peers have a route.
    fn routes(&self) -> usize {
        self.network.kernel().state.routes.len()
    }

    async fn until_routes(&self, number: usize) {
        self.network.until(|kernel| kernel.state.routes.len() == number).await;
    }

    async fn ready(&mut self) {
        self.status.wait_for(|status| status.pending().is_empty()).await.unwrap();
    }

    async fn not_ready(&mut self) -> String {
        let status = self.status.wait_for(|status| !status.pending().is_empty()).await.unwrap();
        status.pending().join("; ")
    }

    fn file(&self) -> Option<String> {
        std::fs::read_to_string(self.directory.path().join("flannel/subnet.env")).ok()
    }

    /// What the agent has written down.
    fn remembered(&self) -> Option<Memory> {
        StateDir::new(self.directory.path().join("state"), "/net").recall()
    }

    fn holds(&self, words: &str) -> bool {
        self.network.printed().contains(words)
    }

    async fn until_holding(&self, words: &str) {
        self.network.until(|kernel| kernel.state.to_string().contains(words)).await;
    }

    fn taken(&self) -> Vec<Step> {
        std::mem::take(&mut self.network.kernel().taken)
    }
}

fn fifty() -> std::ops::RangeInclusive<u8> {
    2..=51
}

#[tokio::test(start_paused = true)]
async fn the_first_pass_builds_device_and_peers_then_the_file_then_readiness() {
    let host = Host::in_sync().await;

    assert!(host.holds("route 10.5.2.0/24") && host.holds("route 10.5.3.0/24"));
    assert_eq!(
        host.file().unwrap(),
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    );
    assert_eq!(host.announced.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_before_a_snapshot_was_seen() {
    let store = MemoryStore::holding([peer(2, 2, 2)]);
    store.inner().away = true;
    let mut host = Host::start(store, FakeNetwork::default(), FakeFirewall::default());

    tokio::time::sleep(10 * MINUTE).await;

    assert!(host.taken().is_empty() && host.network.kernel().observed == 0);
    assert_eq!(host.file(), None);
    host.store.inner().away = false;
    host.store.relist();
    host.ready().await;
}

#[tokio::test(start_paused = true)]
async fn one_peer_s_change_is_applied_without_reading_the_kernel_again() {
    let host = Host::in_sync().await;
    let observed = host.network.kernel().observed;
    host.taken();

    host.store.put(peer(4, 4, 4));
    host.until_holding("route 10.5.4.0/24").await;
    host.store.put(peer(2, 2, 9));
    host.until_holding("dst 192.168.0.9").await;
    host.store.remove(subnet(3));
    host.network.until(|kernel| !kernel.state.to_string().contains("0e:00:00:00:00:03")).await;

    assert_eq!(host.network.kernel().observed, observed);
    assert_eq!(host.taken().len(), 3 + 1 + 3);
}

#[tokio::test(start_paused = true)]
async fn an_audit_repairs_what_somebody_took_away_and_nothing_else() {
    let host = Host::in_sync().await;
    host.taken();
    host.network.kernel().state.routes.pop_first();

    host.until_holding("route 10.5.2.0/24").await;

    assert_eq!(host.taken().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_device_that_somebody_deleted_comes_back_with_its_mac_and_all_peers() {
    let host = Host::in_sync().await;
    let before = host.network.printed();
    host.network.kernel().state.drop_link(build::link("flannel.1"));

    host.until_holding("route 10.5.3.0/24").await;

    assert_eq!(host.network.printed(), before);
}

#[tokio::test(start_paused = true)]
async fn a_refused_step_does_not_hold_up_the_others_or_the_file_and_is_tried_again() {
    let network = FakeNetwork::default();
    network
        .refuse(|step| step.to_string().starts_with("put route 10.5.2.0").then(|| "Invalid argument".into()));
    let store = MemoryStore::holding([peer(2, 2, 2), peer(3, 3, 3)]);
    let mut host = Host::start(store, network, FakeFirewall::default());

    host.until_holding("route 10.5.3.0/24").await;
    host.status.wait_for(|status| status.file == Aspect::Good).await.unwrap();
    let words = host.not_ready().await;
    assert!(words.contains("put route 10.5.2.0/24") && words.contains("Invalid argument"), "{words}");
    host.network.refuse_nothing();

    host.ready().await;
    assert!(host.holds("route 10.5.2.0/24"));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_cannot_be_made_holds_back_the_file() {
    let network = FakeNetwork::default();
    network.refuse(|step| matches!(step, Step::AddLink(..)).then(|| "File exists".into()));
    let mut host = Host::start(MemoryStore::default(), network, FakeFirewall::default());

    tokio::time::sleep(MINUTE).await;
    assert_eq!(host.file(), None);
    host.network.refuse_nothing();

    host.ready().await;
    assert!(host.file().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_cannot_be_read_is_not_taken_for_an_empty_one() {
    let mut host = Host::in_sync().await;
    host.taken();
    let before = host.network.printed();
    host.network.kernel().broken.extend(["no buffer space".into(), "no buffer space".into()]);
    host.store.relist();

    let words = host.not_ready().await;

    assert!(words.contains("no buffer space"), "{words}");
    host.ready().await;
    assert_eq!((host.network.printed(), host.taken().len()), (before, 0));
}

#[tokio::test(start_paused = true)]
async fn what_a_snapshot_told_while_the_kernel_could_not_be_read_is_not_forgotten() {
    let host = Host::in_sync().await;
    host.network.kernel().broken.push_back("no buffer space".into());
    host.store.inner().leases.insert(subnet(4), peer(4, 4, 4));

    host.store.relist();

    let held = host.until_holding("route 10.5.4.0/24");
    tokio::time::timeout(10 * MINUTE, held).await.expect("it was forgotten");
}

#[tokio::test(start_paused = true)]
async fn the_lease_is_renewed_every_hour_and_a_minute_after_a_failure() {
    let host = Host::in_sync().await;

    host.store.until(|store| store.renewals == 3).await;
    let third = Instant::now();
    host.store.inner().away = true;
    tokio::time::sleep(60 * MINUTE + MINUTE / 2).await;
    host.store.inner().away = false;
    host.store.until(|store| store.renewals == 4).await;

    let waited = third.elapsed();
    assert!(waited >= 61 * MINUTE && waited < 62 * MINUTE, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_reservation_is_looked_at_every_hour_and_put_right_as_often_as_a_lease() {
    let own = Lease { tenure: Tenure::Reserved, ..peer(1, 1, 1) };
    let bent = Lease { tenure: Tenure::Reserved, ..peer(1, 0x77, 1) };
    let mut host = Host::start_holding(
        MemoryStore::default(),
        FakeNetwork::default(),
        FakeFirewall::default(),
        own.clone(),
    );
    host.ready().await;

    for _ in 0..10 {
        host.store.put(bent.clone());
        host.store.until(|store| store.leases[&subnet(1)] == own).await;
        tokio::time::sleep(61 * MINUTE).await;
        host.ready().await;
    }

    assert!(host.store.inner().writes == 10 && host.store.inner().renewals >= 8);
}

#[tokio::test(start_paused = true)]
async fn a_lease_made_a_reservation_while_running_has_no_end() {
    let mut host = Host::in_sync().await;
    host.store.put(Lease { tenure: Tenure::Reserved, ..peer(1, 1, 1) });
    host.store.until(|store| store.renewals == 1).await;
    host.ready().await;

    host.store.inner().away = true;
    tokio::time::sleep(100 * 60 * MINUTE).await;

    host.ready().await;
}

#[tokio::test(start_paused = true)]
async fn our_lease_comes_back_under_the_same_subnet_and_the_kernel_does_not_move() {
    let host = Host::in_sync().await;
    host.taken();

    host.store.remove(subnet(1));
    host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
    tokio::time::sleep(2 * MINUTE).await;

    assert_eq!(host.taken(), []);
}

#[tokio::test(start_paused = true)]
async fn our_lease_comes_back_after_a_snapshot_without_it() {
    let host = Host::in_sync().await;
    host.store.inner().leases.remove(&subnet(1));

    host.store.relist();

    host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_somebody_else_holds_now_is_left_for_another_one() {
    let mut host = Host::in_sync().await;
    let theirs = peer(1, 9, 9);

    host.store.put(theirs.clone());
    host.until_holding("address 10.5.4.0/32").await;
    host.ready().await;

    host.until_holding("route 10.5.1.0/24 via 10.5.1.0").await;
    assert_eq!(host.store.inner().leases[&subnet(1)], theirs);
    assert!(!host.holds("address 10.5.1.0/32"));
    assert!(host.file().unwrap().contains("FLANNEL_SUBNET=10.5.4.1/24"));
    assert_eq!(host.announced.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_shows_somebody_else_on_our_subnet_moves_us() {
    let host = Host::in_sync().await;
    host.store.inner().leases.insert(subnet(1), peer(1, 9, 9));

    host.store.relist();

    host.until_holding("address 10.5.4.0/32").await;
}

#[tokio::test(start_paused = true)]
async fn a_move_has_no_step_refused() {
    let host = Host::in_sync().await;
    host.store.put(peer(1, 9, 9));

    host.until_holding("route 10.5.1.0/24 via 10.5.1.0").await;

    assert_eq!(host.status.borrow().host, Aspect::Good);
}

#[tokio::test(start_paused = true)]
async fn a_bridge_that_is_left_on_a_lost_subnet_keeps_us_unready_until_it_moves() {
    let mut host = Host::in_sync().await;
    let bridge = |network: &str| Interface {
        name: build::link("docker0"),
        mtu: 1450,
        addresses: vec![InterfaceAddress {
            network: network.parse().unwrap(),
            permanent: true,
            temporary: false,
            deprecated: false,
        }],
    };
    host.network.kernel().facts.interfaces.push(bridge("10.5.1.1/24"));
    host.store.put(peer(1, 9, 9));
    host.status.wait_for(|status| status.bridge != Aspect::Good).await.unwrap();

    let words = host.not_ready().await;
    assert!(words.contains("docker0 still has 10.5.1.0/24"), "{words}");
    host.network.kernel().facts.interfaces[1] = bridge("10.5.4.1/24");

    host.ready().await;
}

#[tokio::test(start_paused = true)]
async fn what_happens_to_our_lease_while_it_is_being_renewed_is_not_forgotten() {
    for taken in [false, true] {
        let host = Host::in_sync().await;
        host.store.inner().delay = Duration::from_secs(3);
        host.store.until(|store| store.renewals == 1).await;

        if taken {
            host.store.put(peer(1, 9, 9));
            host.until_holding("address 10.5.4.0/32").await;
        } else {
            host.store.remove(subnet(1));
            host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_vanishes_again_while_it_is_put_back_is_put_back_again() {
    let mut host = Host::in_sync().await;
    host.store.inner().delay = Duration::from_secs(3);

    for _ in 0..2 {
        host.store.remove(subnet(1));
        host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
    }

    host.ready().await;
    assert!(host.store.inner().leases.contains_key(&subnet(1)));
}

#[tokio::test(start_paused = true)]
async fn what_happens_to_our_lease_while_an_answer_about_it_is_on_its_way_is_not_forgotten() {
    let host = Host::in_sync().await;
    host.store.inner().delay = Duration::from_secs(3);

    host.store.remove(subnet(1));
    host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
    // It has been put back, and is taken before we hear so.
    tokio::time::sleep(Duration::from_secs(1)).await;
    host.store.put(peer(1, 9, 9));

    let moved = host.until_holding("address 10.5.4.0/32");
    tokio::time::timeout(MINUTE, moved).await.expect("it was overlooked");
}

#[tokio::test(start_paused = true)]
async fn a_second_lease_of_ours_is_given_back_and_nobody_else_s() {
    let host = Host::in_sync().await;
    host.store.inner().ours = vec![subnet(4), subnet(5)];
    let stands = |host: &Host, number| host.store.inner().leases.contains_key(&subnet(number));

    // With our address, with our MAC, with both and yet not ours, and with neither.
    for (number, mac, address) in [(4, 4, 1), (5, 1, 5), (6, 1, 1), (7, 7, 7)] {
        host.store.put(peer(number, mac, address));
    }
    tokio::time::sleep(MINUTE).await;

    assert_eq!([4, 5, 6, 7].map(|number| stands(&host, number)), [false, false, true, true]);
    assert!(stands(&host, 1));
}

#[tokio::test(start_paused = true)]
async fn a_second_lease_of_ours_keeps_no_renewal_waiting_while_the_store_is_away() {
    let host = Host::in_sync().await;
    host.store.inner().ours = vec![subnet(4)];
    host.store.inner().away = true;
    host.store.put(peer(4, 4, 1));
    tokio::time::sleep(59 * MINUTE).await;
    host.store.inner().away = false;

    host.store.until(|store| store.renewals > 0).await;
    host.store.until(|store| !store.leases.contains_key(&subnet(4))).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_has_run_out_or_cannot_be_put_back_is_not_called_ready() {
    let mut renewing = Host::in_sync().await;
    renewing.store.inner().away = true;
    let mut restoring = Host::in_sync().await;
    restoring.store.inner().away = true;
    restoring.store.remove(subnet(1));

    tokio::time::sleep(26 * 60 * MINUTE).await;

    assert!(renewing.not_ready().await.contains("our lease has run out"));
    assert!(restoring.not_ready().await.contains("our lease vanished"));
    for host in [&mut renewing, &mut restoring] {
        host.store.inner().away = false;
        host.ready().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_of_our_lease_that_somebody_changed_is_put_right_but_not_for_ever() {
    let mut host = Host::in_sync().await;
    let bent = peer(1, 0x77, 1);

    for _ in 0..3 {
        host.store.put(bent.clone());
        host.store.until(|store| store.leases[&subnet(1)] == peer(1, 1, 1)).await;
    }
    host.ready().await;

    // Somebody who writes it each time we do.
    let (store, spoiler) = (host.store.clone(), bent.clone());
    tokio::spawn(async move {
        loop {
            store.until(|store| store.leases[&subnet(1)] != spoiler).await;
            store.put(spoiler.clone());
        }
    });
    let words = host.not_ready().await;
    tokio::time::sleep(10 * MINUTE).await;
    assert!(host.not_ready().await.contains("somebody keeps writing"), "{words}");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_somebody_keeps_giving_another_address_is_put_right_but_not_for_ever() {
    let mut host = Host::in_sync().await;
    let bent = Lease { attrs: peer(1, 1, 9).attrs, ..peer(1, 1, 1) };
    host.store.inner().ours.push(subnet(1));
    let writes = host.store.inner().writes;

    let (store, spoiler) = (host.store.clone(), bent.clone());
    store.put(spoiler.clone());
    tokio::spawn(async move {
        loop {
            store.until(|store| store.leases[&subnet(1)] != spoiler).await;
            store.put(spoiler.clone());
        }
    });
    host.status
        .wait_for(|status| status.pending().join("; ").contains("somebody keeps writing"))
        .await
        .unwrap();
    tokio::time::sleep(10 * MINUTE).await;

    // And after a minute, two and four of silence.
    assert_eq!(host.store.inner().writes, writes + 3 + 3);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_somebody_kept_writing_to_is_put_right_once_they_are_quiet() {
    let mut host = Host::in_sync().await;
    for mac in 0..4 {
        host.store.put(peer(1, 0x70 + mac, 1));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(host.not_ready().await.contains("somebody keeps writing"));
    let began = Instant::now();

    host.ready().await;

    assert!(began.elapsed() < 2 * MINUTE, "{:?}", began.elapsed());
    assert_eq!(host.store.inner().leases[&subnet(1)], peer(1, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_becomes_a_lease_is_kept_alive() {
    let own = Lease { tenure: Tenure::Reserved, ..peer(1, 1, 1) };
    let mut host =
        Host::start_holding(MemoryStore::default(), FakeNetwork::default(), FakeFirewall::default(), own);
    host.ready().await;

    host.store.put(peer(1, 1, 1));

    host.store.until(|store| store.renewals > 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_leaves_the_kernel_as_it_is() {
    let host = Host::in_sync().await;
    host.taken();
    host.store.inner().away = true;
    host.store.fail_watches();

    tokio::time::sleep(30 * 60 * MINUTE).await;

    assert_eq!(host.taken(), []);
    host.store.inner().away = false;
    host.store.inner().leases.insert(subnet(4), peer(4, 4, 4));
    host.store.relist();
    host.until_holding("route 10.5.4.0/24").await;
}

#[tokio::test(start_paused = true)]
async fn a_key_that_cannot_be_read_harms_only_itself() {
    let host = Host::in_sync().await;
    let unreadable = |key: &str, subnet| Unreadable { key: key.into(), subnet, reason: "junk".into() };

    host.store.tell(LeaseEvent::Unreadable(unreadable("/subnets/junk", None)));
    host.store.tell(LeaseEvent::Unreadable(unreadable("/subnets/10.5.2.0-24", Some(subnet(2)))));
    host.network.until(|kernel| !kernel.state.to_string().contains("10.5.2.0")).await;

    assert!(host.holds("route 10.5.3.0/24"));
}

#[tokio::test(start_paused = true)]
async fn stopping_changes_nothing() {
    let host = Host::in_sync().await;
    let (kernel, file) = (host.network.printed(), host.file());
    host.taken();

    host.stop.cancel();
    host.agent.await.unwrap();

    assert_eq!((host.network.printed(), host.network.kernel().taken.len()), (kernel, 0));
    assert!(host.store.inner().leases.contains_key(&subnet(1)));
    assert_eq!(std::fs::read_to_string(host.directory.path().join("flannel/subnet.env")).ok(), file);
}

#[tokio::test(start_paused = true)]
async fn stopping_does_not_wait_for_a_pass_under_way() {
    let host = Host::in_sync().await;
    host.network.kernel().silent = true;
    host.store.put(peer(4, 4, 4));
    host.until_holding("route 10.5.4.0/24").await;

    host.stop.cancel();

    tokio::time::timeout(Duration::from_secs(1), host.agent).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_file_that_cannot_be_written_holds_back_readiness_until_it_can() {
    let store = MemoryStore::default();
    let mut host = Host::start(store, FakeNetwork::default(), FakeFirewall::default());
    let in_the_way = host.directory.path().join("flannel");
    std::fs::write(&in_the_way, "a file where the directory should be").unwrap();

    let status = host.status.wait_for(|status| status.host == Aspect::Good).await.unwrap().clone();
    assert_ne!(status.file, Aspect::Good);
    assert_eq!(host.announced.load(Ordering::SeqCst), 0);
    std::fs::remove_file(in_the_way).unwrap();

    host.ready().await;
    assert_eq!(host.announced.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn rules_that_cannot_be_written_are_named_in_readiness_while_the_rest_goes_on() {
    let firewall = FakeFirewall::default();
    firewall.inner.lock().unwrap().broken = Some("the lock is held".into());
    let mut host = Host::start(MemoryStore::holding([peer(2, 2, 2)]), FakeNetwork::default(), firewall);

    host.status.wait_for(|status| status.file == Aspect::Good).await.unwrap();
    let words = host.not_ready().await;
    assert!(words.contains("firewall pending") && words.contains("the lock is held"), "{words}");
    host.firewall.inner.lock().unwrap().broken = None;

    host.ready().await;
}

#[tokio::test(start_paused = true)]
async fn rules_that_somebody_took_away_come_back_with_the_next_check() {
    let host = Host::in_sync().await;
    host.firewall.inner.lock().unwrap().rules = None;

    tokio::time::sleep(Duration::from_secs(6)).await;

    let inner = host.firewall.inner.lock().unwrap();
    assert!(inner.rules.is_some() && inner.writes == 2);
}

// A store that says that everybody is gone.

#[tokio::test(start_paused = true)]
async fn a_deleted_range_takes_nothing_from_the_kernel_and_our_own_key_is_back_at_once() {
    let mut host = Host::among_fifty(MINUTE).await;
    let began = Instant::now();

    host.store.remove_all();
    host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
    host.until_flawed("holding 50 peers that vanished from etcd at once").await;
    host.ready().await;

    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    tokio::time::sleep(MINUTE - Duration::from_secs(1)).await;
    assert_eq!((host.taken(), host.routes()), (vec![], 50));

    // One after the other, whoever is still there puts its own key back.
    fifty().for_each(|number| host.store.put(peer(number, number, number)));
    host.until_flawed("").await;
    tokio::time::sleep(5 * MINUTE).await;
    assert_eq!(host.taken(), []);
    assert_eq!(host.store.inner().lists, 0, "there is nothing to ask about any more");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_without_anybody_takes_nothing_from_the_kernel_and_one_with_all_ends_it() {
    let mut host = Host::among_fifty(MINUTE).await;
    let leases = std::mem::take(&mut host.store.inner().leases);

    host.store.relist();
    host.until_flawed("holding 50 peers").await;
    host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
    host.store.relist();
    host.store.inner().leases.extend(leases);
    host.store.relist();
    host.until_flawed("").await;
    tokio::time::sleep(5 * MINUTE).await;

    assert_eq!((host.taken(), host.routes()), (vec![], 50));
}

#[tokio::test(start_paused = true)]
async fn those_whom_a_list_after_the_grace_still_lacks_go_in_one_pass() {
    let mut host = Host::among_fifty(MINUTE).await;
    host.store.remove_all();
    host.until_flawed("holding 50 peers").await;
    for number in [7, 8] {
        host.store.put(peer(number, number, number));
    }
    host.until_flawed("holding 48 peers").await;
    let (began, looks) = (Instant::now(), host.network.kernel().observed);

    host.until_routes(2).await;

    let waited = began.elapsed();
    assert!(MINUTE <= waited && waited < MINUTE + Duration::from_secs(1), "{waited:?}");
    host.until_flawed("").await;
    // The audit is due at that moment too.
    assert!((1..=2).contains(&(host.network.kernel().observed - looks)));
    assert!(host.holds("route 10.5.7.0/24") && host.holds("route 10.5.8.0/24"));
    assert!(host.store.inner().leases.contains_key(&subnet(1)));
    assert_eq!(host.store.inner().lists, 1);
}

#[tokio::test(start_paused = true)]
async fn while_the_store_does_not_answer_they_are_held_on() {
    let mut host = Host::among_fifty(MINUTE).await;
    host.store.remove_all();
    host.store.until(|store| store.leases.contains_key(&subnet(1))).await;
    host.store.inner().away = true;

    host.until_flawed("it cannot be asked whether they are gone: no answer from memory").await;
    let lists = host.store.inner().lists;
    tokio::time::sleep(60 * MINUTE).await;

    assert_eq!((host.taken(), host.routes()), (vec![], 50));
    let lists = host.store.inner().lists - lists;
    assert!((700..3000).contains(&lists), "asked {lists} times in an hour");
    host.store.inner().away = false;
    host.until_routes(0).await;
    host.until_flawed("").await;
}

#[tokio::test(start_paused = true)]
async fn whom_the_list_has_is_held_until_the_watch_says_so_too() {
    let mut host = Host::among_fifty(MINUTE).await;
    let leases = host.store.inner().leases.clone();
    host.store.remove_all();
    host.until_flawed("holding 50 peers").await;
    // They are back, and the watch is behind.
    host.store.inner().leases = leases;

    tokio::time::sleep(10 * MINUTE).await;

    assert_eq!((host.taken(), host.routes()), (vec![], 50));
    assert!((9..=10).contains(&host.store.inner().lists), "{}", host.store.inner().lists);
    host.store.relist();
    host.until_flawed("").await;
}

#[tokio::test(start_paused = true)]
async fn a_few_that_vanish_at_once_go_at_once() {
    let host = Host::among_fifty(MINUTE).await;
    let began = Instant::now();

    host.store.remove_together([subnet(2), subnet(3), subnet(4)]);
    host.until_routes(47).await;

    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(host.status.borrow().flaws(), Vec::<&str>::new());
}

#[tokio::test(start_paused = true)]
async fn without_a_grace_everybody_goes_at_once() {
    let host = Host::among_fifty(Duration::ZERO).await;
    let began = Instant::now();

    host.store.remove_all();
    host.until_routes(0).await;

    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(host.store.inner().lists, 0);
}

#[tokio::test(start_paused = true)]
async fn those_who_are_held_are_kept_in_step_like_everybody() {
    let mut host = Host::among_fifty(60 * MINUTE).await;
    let before = host.network.printed();
    host.store.remove_all();
    host.until_flawed("holding 50 peers").await;

    // Somebody deletes a route, and the kernel tells of it; then without a word; then the device.
    host.network.meddle(Key::Route(RouteKey::to("10.5.2.0/24".parse().unwrap())), None);
    host.until_routes(50).await;
    host.network.kernel().state.routes.pop_first();
    host.until_routes(50).await;
    host.network.kernel().state.drop_link(build::link("flannel.1"));
    host.until_routes(50).await;
    assert_eq!(host.network.printed(), before);

    // A peer joins, another one leaves by itself, and the history is compacted.
    host.store.put(peer(100, 100, 100));
    host.until_routes(51).await;
    host.store.relist();
    host.store.remove(subnet(100));
    host.until_routes(50).await;
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(host.network.printed(), before);
}

#[tokio::test(start_paused = true)]
async fn a_held_host_that_comes_back_with_another_subnet_is_reached_there_at_once() {
    let mut host = Host::among_fifty(MINUTE).await;
    host.store.remove_all();
    host.until_flawed("holding 50 peers").await;

    host.store.put(peer(100, 2, 2));
    host.until_holding("route 10.5.100.0/24").await;

    assert!(!host.holds("route 10.5.2.0/24"));
    host.until_flawed("holding 49 peers").await;
}

#[tokio::test(start_paused = true)]
async fn a_held_subnet_that_becomes_ours_is_ours_for_good() {
    let mut host = Host::among_fifty(MINUTE).await;
    host.store.remove_together(fifty().map(subnet));
    host.until_flawed("holding 50 peers").await;

    // Somebody else has ours now, and this store gives out the lowest that is free; nobody tells us that it did.
    host.store.put(peer(1, 99, 99));
    host.store.fall_silent();
    host.until_holding("address 10.5.2.0/32").await;
    host.until_flawed("holding 49 peers").await;
    host.until_routes(1).await;
    tokio::time::sleep(5 * MINUTE).await;

    assert!(host.holds("address 10.5.2.0/32") && host.holds("route 10.5.1.0/24"));
    assert_eq!(host.store.inner().leases[&subnet(2)].attrs.public_ip, peer(1, 1, 1).attrs.public_ip);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_watched_is_told_of_and_leaves_the_host_ready() {
    for back in [LeaseEvent::Resumed, LeaseEvent::Put(peer(4, 4, 4))] {
        let mut host = Host::in_sync().await;

        host.store.fail_watches();
        host.until_flawed("etcd: no answer from memory").await;
        assert_eq!(host.status.borrow().pending(), Vec::<&str>::new());
        assert!(host.status.borrow().flaws()[0].ends_with("; the kernel stays as it is"));
        host.store.tell(back);

        host.until_flawed("").await;
    }
}

// What the kernel tells.

#[tokio::test(start_paused = true)]
async fn what_somebody_touched_is_put_right_without_a_look_at_the_rest() {
    let host = Host::in_sync().await;
    let looks = host.network.kernel().observed;
    let route = Key::Route(RouteKey::to("10.5.2.0/24".parse().unwrap()));
    host.taken();

    host.network.meddle(route, None);
    host.until_holding("route 10.5.2.0/24").await;

    assert_eq!(host.taken().len(), 1);
    assert_eq!(host.network.kernel().observed, looks);
}

#[tokio::test(start_paused = true)]
async fn words_without_end_lead_to_a_bounded_number_of_looks() {
    let host = Host::in_sync().await;
    let looks = host.network.kernel().observed;

    for _ in 0..1000 {
        host.network.tell(Changes::Everything("again".into()));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    let looks = host.network.kernel().observed - looks;
    assert!((2..=25).contains(&looks), "{looks} looks in a second");
}

#[tokio::test(start_paused = true)]
async fn a_refused_peer_is_tried_again_alone_and_ever_more_slowly() {
    let mut host = Host::in_sync().await;
    let attempts = Arc::new(AtomicUsize::new(0));
    let count = attempts.clone();
    host.network.refuse(move |step| {
        let refused = step.to_string().contains("put route 10.5.4.0/24");
        refused.then(|| {
            count.fetch_add(1, Ordering::SeqCst);
            "Invalid argument".to_owned()
        })
    });
    host.taken();
    let looks = host.network.kernel().observed;

    host.store.put(peer(4, 4, 4));
    let said = host.not_ready().await;
    host.store.put(peer(5, 5, 5));
    host.until_holding("route 10.5.5.0/24").await;
    tokio::time::sleep(Duration::from_secs(30)).await;

    assert!(said.contains("put route 10.5.4.0/24") && said.contains("Invalid argument"), "{said}");
    let attempts = attempts.load(Ordering::SeqCst);
    assert!((5..=25).contains(&attempts), "{attempts} attempts in 30 s");
    assert_eq!(host.taken().len(), 2 + 3, "the others' objects are written once");
    assert_eq!(host.network.kernel().observed, looks, "nothing else is looked at");
    assert!(!host.status.borrow().pending().is_empty());

    host.network.refuse_nothing();
    host.ready().await;
    assert!(host.holds("route 10.5.4.0/24"));
}

#[tokio::test(start_paused = true)]
async fn a_refused_peer_that_leaves_is_forgotten() {
    let mut host = Host::in_sync().await;
    host.network.refuse(|step| step.to_string().contains("put route 10.5.4.0/24").then(|| "no".into()));
    host.store.put(peer(4, 4, 4));
    host.not_ready().await;

    host.store.remove(subnet(4));

    host.ready().await;
    assert!(!host.holds("10.5.4.0"));
}

// Where the host stands.

/// Gives the host's interface another address and another MTU, and tells of it.
fn move_to(network: &FakeNetwork, address: &str, mtu: u32) {
    let mut kernel = network.kernel();
    let eth0 = &mut kernel.facts.interfaces[0];
    eth0.mtu = mtu;
    eth0.addresses[0].network = address.parse().unwrap();
    drop(kernel);
    network.tell(Changes::Everything("the addresses of eth0 were changed".into()));
}

fn published(leases: &flannel_tests::memory_store::Leases) -> String {
    leases.leases[&subnet(1)].attrs.public_ip.unwrap().to_string()
}

#[tokio::test(start_paused = true)]
async fn another_address_is_published_with_one_write_and_the_device_sends_from_it() {
    let mut host = Host::in_sync().await;

    move_to(&host.network, "192.168.0.77/24", 1500);
    host.store.until(|leases| published(leases) == "192.168.0.77").await;
    host.ready().await;
    tokio::time::sleep(2 * MINUTE).await;

    assert!(host.holds("local 192.168.0.77"));
    assert!(host.holds("address 0e:00:00:00:00:01"), "the MAC stays");
    assert!(host.holds("route 10.5.2.0/24"));
    assert_eq!(host.store.inner().writes, 1);
    assert!(host.file().unwrap().contains("FLANNEL_SUBNET=10.5.1.1/24"));
}

#[tokio::test(start_paused = true)]
async fn another_address_is_published_once_the_store_is_back() {
    let mut host = Host::in_sync().await;
    host.store.inner().away = true;

    move_to(&host.network, "192.168.0.77/24", 1500);
    host.until_holding("local 192.168.0.77").await;
    assert!(host.not_ready().await.contains("is not where its lease says"));
    move_to(&host.network, "192.168.0.78/24", 1500);
    host.until_holding("local 192.168.0.78").await;
    host.store.inner().away = false;

    host.store.until(|leases| published(leases) == "192.168.0.78").await;
    host.ready().await;
}

#[tokio::test(start_paused = true)]
async fn another_mtu_is_written_to_the_file() {
    let mut host = Host::in_sync().await;

    move_to(&host.network, "192.168.0.1/24", 1400);
    host.until_holding("mtu 1350").await;
    while !host.file().unwrap().contains("FLANNEL_MTU=1350") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    host.ready().await;
    assert_eq!(host.store.inner().writes, 0, "peers need not know");
}

#[tokio::test(start_paused = true)]
async fn without_an_interface_everything_stays_and_the_host_is_not_ready() {
    let mut host = Host::in_sync().await;
    let before = host.network.printed();
    let interfaces = std::mem::take(&mut host.network.kernel().facts.interfaces);

    host.network.tell(Changes::Everything("eth0 is gone".into()));

    assert!(host.not_ready().await.contains("no interface fits"));
    assert_eq!(host.network.printed(), before);

    host.network.kernel().facts.interfaces = interfaces;
    host.network.tell(Changes::Everything("eth0 has come".into()));
    host.ready().await;
    assert_eq!(host.store.inner().writes, 0);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_comes_back_while_the_store_is_away_is_never_published() {
    let mut host = Host::in_sync().await;
    host.store.inner().away = true;
    move_to(&host.network, "192.168.0.77/24", 1500);
    host.until_holding("local 192.168.0.77").await;
    move_to(&host.network, "192.168.0.1/24", 1500);
    host.until_holding("local 192.168.0.1 ").await;

    host.store.inner().away = false;
    host.ready().await;
    tokio::time::sleep(MINUTE).await;

    assert_eq!(host.store.inner().writes, 0);
}

#[tokio::test(start_paused = true)]
async fn a_late_word_of_our_own_earlier_write_is_no_stranger_s() {
    let mut host = Host::in_sync().await;
    let former = host.store.inner().leases[&subnet(1)].clone();
    move_to(&host.network, "192.168.0.77/24", 1500);
    host.store.until(|leases| published(leases) == "192.168.0.77").await;
    host.ready().await;

    host.store.tell(LeaseEvent::Put(former));
    tokio::time::sleep(Duration::from_secs(1)).await;

    assert_eq!(host.status.borrow().pending(), Vec::<&str>::new());
    assert_eq!(host.store.inner().writes, 1);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_stands_alone_is_moved_to_only_after_a_while() {
    let mut host = Host::in_sync().await;

    // The address of a virtual router is all that is left, and then our own is back.
    move_to(&host.network, "192.168.0.66/32", 1500);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(host.not_ready().await.contains("eth0 has lost 192.168.0.1; 192.168.0.66 is left"));
    move_to(&host.network, "192.168.0.1/24", 1500);
    host.ready().await;
    assert_eq!(host.store.inner().writes, 0);

    // It is all that is left for good.
    move_to(&host.network, "192.168.0.66/32", 1500);
    let began = Instant::now();
    host.store.until(|leases| published(leases) == "192.168.0.66").await;
    assert!(began.elapsed() < Duration::from_secs(3));
}

// Somebody else who wants it otherwise.

#[tokio::test(start_paused = true)]
async fn what_somebody_changes_again_and_again_is_told_and_put_right_once_a_second() {
    let mut host = Host::in_sync().await;
    let route = Key::Route(RouteKey::to("10.5.2.0/24".parse().unwrap()));

    for _ in 0..100 {
        host.network.meddle(route, None);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let said = host.not_ready().await;
    assert!(said.contains("somebody keeps changing what is ours, as in: put route 10.5.2.0/24"), "{said}");

    host.taken();
    for _ in 0..100 {
        host.network.meddle(route, None);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let taken = host.taken().len();
    assert!((9..=12).contains(&taken), "{taken} repairs in ten seconds");

    host.ready().await;
    assert!(host.holds("route 10.5.2.0/24"));
}

#[tokio::test(start_paused = true)]
async fn one_refused_peer_among_many_is_told_and_leaves_the_host_ready() {
    let store = MemoryStore::holding((2..12).map(|number| peer(number, number, number)));
    let network = FakeNetwork::default();
    network
        .refuse(|step| step.to_string().contains("put route 10.5.4.0/24").then(|| "Invalid argument".into()));

    let mut host = Host::start(store, network, FakeFirewall::default());
    host.ready().await;

    let flaws = host.status.borrow().flaws().join("; ");
    assert!(flaws.contains("put route 10.5.4.0/24") && flaws.contains("Invalid argument"), "{flaws}");
    assert!(host.file().is_some());

    host.network.refuse_nothing();
    host.status.wait_for(|status| status.flaws().is_empty()).await.unwrap();
    assert!(host.holds("route 10.5.4.0/24"));
}

/// How many peers it remembers, once it is at least so many.
async fn until_remembered(host: &Host, peers: usize) -> Memory {
    loop {
        if let Some(memory) = host.remembered().filter(|memory| memory.peers.len() >= peers) {
            return memory;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_known_of_the_cluster_is_written_down() {
    let host = Host::in_sync().await;

    let memory = until_remembered(&host, 2).await;

    assert_eq!((memory.own, memory.handle), (peer(1, 1, 1), 7));
    assert_eq!(memory.peers, [peer(2, 2, 2), peer(3, 3, 3)]);
    assert_eq!(&*memory.config, build::VXLAN);
    assert!(memory.expires.unwrap() - memory.written > 86_000);
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_changes_all_the_time_is_written_down_now_and_then() {
    let host = Host::in_sync().await;
    until_remembered(&host, 2).await;
    let mut writes = 0;
    let mut last = host.remembered();

    for round in 0..600 {
        host.store.put(peer(9, 9, u8::try_from(round % 200 + 2).unwrap()));
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = host.remembered();
        writes += usize::from(now != last);
        last = now;
    }

    assert!((5..=11).contains(&writes), "{writes} writes in 5 minutes");
}

#[tokio::test(start_paused = true)]
async fn a_stop_writes_down_what_is_not_written_yet() {
    let host = Host::in_sync().await;
    until_remembered(&host, 2).await;
    host.store.put(peer(4, 4, 4));
    host.until_holding("route 10.5.4.0/24").await;
    assert_eq!(host.remembered().unwrap().peers.len(), 2);

    host.stop.cancel();
    let Host { agent, directory, .. } = host;

    assert_eq!(agent.await.unwrap(), Ended::Stopped);
    let state = StateDir::new(directory.path().join("state"), "/net");
    assert_eq!(state.recall().unwrap().peers.len(), 3);
}

/// A host that boots while the store is away and remembers the peers 2 and 3.
fn booted(store: &MemoryStore) -> Host {
    store.inner().away = true;
    let recalled = Some(vec![peer(2, 2, 2), peer(3, 3, 3)]);
    let (network, firewall) = (FakeNetwork::default(), FakeFirewall::default());
    Host::start_with(store.clone(), network, firewall, peer(1, 1, 1), MINUTE, recalled)
}

#[tokio::test(start_paused = true)]
async fn what_is_remembered_is_gone_by_until_the_store_answers() {
    let store = MemoryStore::holding([peer(1, 1, 1), peer(3, 3, 9)]);
    let mut host = booted(&store);

    host.until_holding("route 10.5.3.0/24").await;
    let file = async {
        while host.file().is_none() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::time::timeout(MINUTE, file).await.unwrap();
    assert!(host.holds("route 10.5.2.0/24"));
    let pending = host.status.borrow().pending().join("; ");
    assert!(pending.contains("going by what this host remembers"), "{pending}");

    host.store.inner().away = false;
    host.store.relist();
    host.ready().await;
    host.until_holding("dst 192.168.0.9").await;
    assert!(!host.holds("route 10.5.2.0/24"));
    assert_eq!(host.store.inner().writes, 0);
}

#[tokio::test(start_paused = true)]
async fn where_there_is_no_config_for_us_there_is_nobody_s_lease_for_us_either() {
    // As under a prefix with a letter too few.
    let store = MemoryStore::default();
    store.inner().bare = true;
    let host = booted(&store);
    host.until_holding("route 10.5.3.0/24").await;

    host.store.inner().away = false;
    host.store.relist();
    tokio::time::sleep(10 * MINUTE).await;

    assert!(host.holds("route 10.5.2.0/24") && host.holds("route 10.5.3.0/24"));
    assert_eq!(host.store.inner().writes, 0);
}

#[tokio::test(start_paused = true)]
async fn a_subnet_file_that_somebody_removed_or_changed_is_put_back() {
    let host = Host::in_sync().await;
    let file = host.file().unwrap();
    let path = host.directory.path().join("flannel/subnet.env");

    for spoil in [None, Some("FLANNEL_SUBNET=10.9.9.1/24\n")] {
        match spoil {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        tokio::time::sleep(2 * MINUTE).await;
        assert_eq!(host.file().as_ref(), Some(&file));
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_has_heard_since_the_last_note_stays() {
    // Peer 3 has moved and peer 4 has come after the last note, peer 2's route was lost meanwhile.
    let host = Host::in_sync().await;
    host.store.put(peer(3, 3, 9));
    host.store.put(peer(4, 4, 4));
    host.until_holding("route 10.5.4.0/24").await;
    host.stop.cancel();
    host.agent.await.unwrap();
    let kept = host.network.printed();
    host.network.kernel().state.routes.remove(&RouteKey::to("10.5.2.0/24".parse().unwrap()));
    let store = MemoryStore::default();
    store.inner().away = true;
    let recalled = Some(vec![peer(2, 2, 2), peer(3, 3, 3)]);

    let network = host.network.clone();
    let mut again =
        Host::start_with(store, network, FakeFirewall::default(), peer(1, 1, 1), MINUTE, recalled);
    again.until_holding("route 10.5.2.0/24").await;
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(again.network.printed(), kept);

    // And then the truth wins.
    again.store.inner().away = false;
    again.store.put(peer(5, 5, 5));
    again.store.relist();
    again.ready().await;
    assert!(again.holds("route 10.5.5.0/24") && !again.holds("route 10.5.4.0/24"));
}

#[tokio::test(start_paused = true)]
async fn a_remembered_subnet_that_went_to_somebody_else_is_left() {
    let store = MemoryStore::holding([peer(1, 7, 7)]);
    let mut host = booted(&store);
    host.until_holding("route 10.5.3.0/24").await;

    host.store.inner().away = false;
    host.store.relist();

    host.ready().await;
    assert!(host.file().unwrap().contains("FLANNEL_SUBNET=10.5.2.1/24"), "{:?}", host.file());
    assert!(host.holds("route 10.5.1.0/24"));
    assert_eq!(host.store.inner().leases[&subnet(1)], peer(1, 7, 7));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_host_took_over_is_left() {
    let mut host = Host::in_sync().await;
    host.store.inner().leases.insert(subnet(1), peer(1, 7, 7));

    host.store.take_over(subnet(1), "host-b");

    host.until_holding("address 10.5.4.0/32").await;
    host.ready().await;
    assert!(host.file().unwrap().contains("FLANNEL_SUBNET=10.5.4.1/24"), "{:?}", host.file());
    assert_eq!(host.store.inner().leases[&subnet(1)], peer(1, 7, 7));
}
