//! Who holds a subnet: hosts told apart by more than their address, on a real etcd.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::lease::{HeldLease, HostIdentity, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseEvent, LeaseStore, StoreError};
use flannel_etcd::{EtcdStore, Settings};
use flannel_tests::etcd::{PREFIX, Raw, Wire};
use flannel_tests::etcd_or_pass;
use flannel_tests::leases::{
    DAY, asks_key, at, config, host, host_with_mac, key, machine, next, plain_store, put_lease, put_subnet,
    record_key, snapshot, store, store_of, subnet,
};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

/// As long as a holder has to answer, and a little more.
const ASKED: std::ops::Range<Duration> = Duration::from_secs(3)..Duration::from_secs(5);

/// Takes 10.5.7.0/24 as 192.168.0.1, whatever else is free.
async fn take_seven(store: &EtcdStore) -> Result<HeldLease, StoreError> {
    store.acquire(&config(), &host(1), Some(subnet(7))).await
}

fn stand_by(store: &EtcdStore, held: &HeldLease) -> JoinHandle<StoreError> {
    tokio::spawn(store.hold(held))
}

/// Resolves once an ask is put there by hand and answered.
async fn is_answered(raw: &Raw) {
    raw.put(&asks_key(7), r#"{"HostID":"x","BootID":"x"}"#, 0).await;
    let answered = async {
        while raw.get(&asks_key(7)).await.is_some() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(20), answered).await.expect("the question is answered");
}

/// The keys that were written, in order, after `revision`.
async fn last_writes(raw: &Raw) -> (i64, i64) {
    let revision = |stored: Option<flannel_tests::etcd::Stored>| stored.map_or(0, |stored| stored.revision);
    (revision(raw.get(&key(7)).await), revision(raw.get(&record_key(7)).await))
}

// ── the record ──────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_record_of_the_host_is_written_with_the_lease_and_hangs_on_the_same_etcd_lease() {
    let etcd = etcd_or_pass!();

    take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();

    let raw = etcd.raw().await;
    let (lease, record) = (raw.get(&key(7)).await.unwrap(), raw.get(&record_key(7)).await.unwrap());
    assert_eq!(
        record.value,
        r#"{"HostID":"a","BootID":"boot-1","Hostname":"host-a","PublicIP":"192.168.0.1"}"#
    );
    assert_eq!((record.lease, record.revision), (lease.lease, lease.revision));
}

#[tokio::test]
async fn a_cold_start_takes_as_many_requests_with_a_record_as_without() {
    let etcd = etcd_or_pass!();
    etcd.raw().await.put(&format!("{PREFIX}/config"), r#"{"Network":"10.5.0.0/16"}"#, 0).await;
    let before = etcd.requests().await;

    let store = store_of(&etcd, "a", "boot-1").await;
    let config = store.network_config().await.unwrap();
    store.acquire(&config, &host(1), None).await.unwrap();

    assert_eq!(etcd.requests().await - before, 4, "config, list, etcd lease, transaction");
}

#[tokio::test]
async fn twenty_restarts_on_one_boot_write_nothing() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let first = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();
    let before = last_writes(&raw).await;

    for _ in 0..20 {
        let again = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();
        assert_eq!((again.lease, again.handle), (first.lease.clone(), first.handle));
    }

    assert_eq!(last_writes(&raw).await, before);
    assert_eq!(raw.leases().await, [first.handle]);
}

#[tokio::test]
async fn a_lease_without_a_record_is_adopted_at_once_and_gets_one_without_being_written() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    plain_store(&etcd).await.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let before = raw.get(&key(7)).await;

    let held = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();

    assert_eq!(raw.get(&key(7)).await, before);
    assert_eq!(raw.get(&record_key(7)).await.unwrap().lease, held.handle);
}

#[tokio::test]
async fn a_record_that_vanished_is_put_back_by_renewing_and_the_lease_is_not_written() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&store).await.unwrap();
    let (lease, record) = (raw.get(&key(7)).await, raw.get(&record_key(7)).await.unwrap());
    raw.delete(&record_key(7)).await;

    store.renew(&held).await.unwrap();

    let again = raw.get(&record_key(7)).await.unwrap();
    assert_eq!((again.value, again.lease), (record.value, record.lease));
    assert_eq!(raw.get(&key(7)).await, lease);
}

#[tokio::test]
async fn the_record_of_a_reservation_stays_as_long_as_that() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    raw.put(&key(7), r#"{"PublicIP":"192.168.0.1"}"#, 0).await;

    let held = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();

    assert_eq!(held.lease.tenure, Tenure::Reserved);
    assert_eq!(raw.get(&record_key(7)).await.unwrap().lease, 0);
}

#[tokio::test]
async fn a_lease_that_becomes_a_reservation_takes_its_record_along() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&store).await.unwrap();
    raw.put(&key(7), &host(1).to_json(), 0).await;

    store.renew(&held).await.unwrap();

    assert_eq!(raw.get(&record_key(7)).await.unwrap().lease, 0);
}

#[tokio::test]
async fn a_lease_that_is_given_back_takes_its_record_along() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    take_seven(&store).await.unwrap();
    let other = NetworkConfig::parse(r#"{"Network":"10.6.0.0/16"}"#).unwrap();

    store.acquire(&other, &host(1), None).await.unwrap();

    assert_eq!((raw.get(&key(7)).await, raw.get(&record_key(7)).await), (None, None));
}

#[tokio::test]
async fn records_and_questions_are_no_leases() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    take_seven(&store).await.unwrap();
    let mut watch = store.watch();

    let first = snapshot(&mut watch).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(7));
    raw.put(&asks_key(7), "?", 0).await;
    raw.put(&record_key(8), "?", 0).await;
    raw.put(&key(9), &host(9).to_json(), 0).await;

    assert!(first.unreadable.is_empty(), "{first:?}");
    assert_eq!(put_subnet(&mut watch).await, subnet(9));
    assert!(store.list().await.unwrap().unreadable.is_empty());
}

// ── the etcd lease ──────────────────────────────────────────────────────────

#[tokio::test]
async fn an_etcd_lease_that_a_crash_left_without_a_key_is_used_again() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let first = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();

    for _ in 0..20 {
        // As between the grant and the transaction.
        raw.delete(&key(7)).await;
        raw.delete(&record_key(7)).await;
        let again = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();
        assert_eq!(again.handle, first.handle);
    }

    assert_eq!(raw.leases().await, [first.handle]);
    assert_eq!(raw.get(&key(7)).await.unwrap().lease, first.handle);
}

#[tokio::test]
async fn another_host_another_address_and_another_prefix_have_etcd_leases_of_their_own() {
    let etcd = etcd_or_pass!();
    let elsewhere =
        Settings { prefix: "/elsewhere".into(), host: Some(machine("a", "boot-1")), ..etcd.settings() };

    let held = [
        store_of(&etcd, "a", "boot-1").await.acquire(&config(), &host(1), None).await.unwrap(),
        store_of(&etcd, "a", "boot-1").await.acquire(&config(), &host(2), None).await.unwrap(),
        store_of(&etcd, "b", "boot-1").await.acquire(&config(), &host(3), None).await.unwrap(),
        store(&elsewhere).await.acquire(&config(), &host(1), None).await.unwrap(),
    ];

    let handles: std::collections::BTreeSet<i64> = held.iter().map(|held| held.handle).collect();
    assert_eq!(handles.len(), 4);
    assert!(handles.iter().all(|handle| *handle > 0));
}

#[tokio::test]
async fn two_leases_of_one_host_share_an_etcd_lease_and_giving_one_back_leaves_the_other() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    let first = take_seven(&store).await.unwrap();
    let other = NetworkConfig::parse(r#"{"Network":"10.6.0.0/16"}"#).unwrap();

    let second = store.acquire(&other, &host(1), None).await.unwrap();

    assert_eq!(second.handle, first.handle);
    assert_eq!(raw.get(&key(7)).await, None);
    store.renew(&second).await.unwrap();
}

#[tokio::test]
async fn an_etcd_lease_with_our_id_and_another_term_is_not_ours() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    let first = take_seven(&store).await.unwrap();
    raw.revoke(first.handle).await;
    raw.grant_as(first.handle, 600).await;

    let again = take_seven(&store).await.unwrap();

    assert_ne!(again.handle, first.handle);
    assert_eq!(raw.granted_ttl(again.handle).await, DAY);
}

// ── taking over ─────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_rebooted_or_reinstalled_host_has_its_subnet_again_after_three_seconds_and_peers_see_nothing() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let first = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();
    let before = raw.get(&key(7)).await;

    for (id, boot) in [("a", "boot-2"), ("reinstalled", "boot-3")] {
        let started = Instant::now();
        let held = take_seven(&store_of(&etcd, id, boot).await).await.unwrap();

        assert!(ASKED.contains(&started.elapsed()), "{:?}", started.elapsed());
        assert_eq!((held.lease.subnet, held.handle), (subnet(7), first.handle));
        let record = raw.get(&record_key(7)).await.unwrap();
        assert!(record.value.contains(boot) && record.lease == held.handle, "{record:?}");
        assert_eq!(raw.get(&asks_key(7)).await, None);
    }

    assert_eq!(raw.get(&key(7)).await, before);
    assert_eq!(raw.leases().await, [first.handle]);
}

#[tokio::test]
async fn a_twin_that_lives_is_named_at_once_and_keeps_everything() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let incumbent = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&incumbent).await.unwrap();
    let holding = stand_by(&incumbent, &held);
    let before = (raw.get(&key(7)).await, raw.get(&record_key(7)).await);

    for (id, boot) in [("b", "boot-2"), ("a", "boot-2")] {
        let started = Instant::now();
        let error = take_seven(&store_of(&etcd, id, boot).await).await.unwrap_err();

        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        assert_eq!(
            chain(&error),
            format!(
                "host-a (host id a) at 192.168.0.1 holds 10.5.7.0/24 with the public address of host-{id} (host id \
                 {id}) at 192.168.0.1, and answers: give one of the two another address (--public-ip, --iface); if \
                 one is a copy of the other's disk, remove host-id from its --state-dir"
            )
        );
    }

    assert_eq!((raw.get(&key(7)).await, raw.get(&record_key(7)).await), before);
    assert_eq!(raw.get(&asks_key(7)).await, None);
    assert_eq!(raw.leases().await, [held.handle]);
    assert!(!holding.is_finished());
}

#[tokio::test]
async fn a_copy_of_a_disk_with_another_address_takes_another_subnet_at_once() {
    let etcd = etcd_or_pass!();
    let original = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&original).await.unwrap();
    let holding = stand_by(&original, &held);
    let started = Instant::now();

    let copy =
        store_of(&etcd, "a", "boot-2").await.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();

    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_ne!(copy.lease.subnet, held.lease.subnet);
    assert_ne!(copy.handle, held.handle);
    original.renew(&held).await.unwrap();
    assert!(!holding.is_finished());
}

#[tokio::test]
async fn of_two_that_ask_for_a_dead_hosts_subnet_one_gets_it_and_the_other_is_told() {
    let etcd = etcd_or_pass!();
    take_seven(&store_of(&etcd, "dead", "boot-1").await).await.unwrap();
    let mut newcomers = JoinSet::new();

    for id in ["b", "c"] {
        let store = store_of(&etcd, id, "boot-2").await;
        newcomers.spawn(async move {
            let held = take_seven(&store).await?;
            Ok::<_, StoreError>((held.lease.subnet, stand_by(&store, &held)))
        });
    }

    let (mut won, mut told) = (0, 0);
    let mut holding = Vec::new();
    while let Some(outcome) = newcomers.join_next().await {
        match outcome.unwrap() {
            Ok((held, task)) => {
                assert_eq!(held, subnet(7));
                holding.push(task);
                won += 1;
            }
            Err(error) => {
                assert!(matches!(error, StoreError::Twin { .. }), "{error:?}");
                told += 1;
            }
        }
    }
    assert_eq!((won, told), (1, 1));
}

#[tokio::test]
async fn a_question_that_was_left_behind_is_as_good_as_ones_own() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    take_seven(&store_of(&etcd, "dead", "boot-1").await).await.unwrap();
    raw.put(&asks_key(7), "from a host that is dead, too", 0).await;

    let held = take_seven(&store_of(&etcd, "b", "boot-2").await).await.unwrap();

    assert_eq!(held.lease.subnet, subnet(7));
    assert_eq!(raw.get(&asks_key(7)).await, None);
}

#[tokio::test]
async fn a_subnet_without_a_lease_is_free_whatever_its_record_says() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let first = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&first).await.unwrap();
    raw.delete(&key(7)).await;
    let started = Instant::now();

    let taken =
        store_of(&etcd, "b", "boot-2").await.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();

    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(taken.lease.subnet, subnet(7));
    let lost = chain(&first.publish(&held, &held.lease.attrs).await.unwrap_err());
    assert_eq!(lost, "the lease on 10.5.7.0/24 belongs to host-b (host id b) at 192.168.0.2 now");
}

#[tokio::test]
async fn a_record_that_is_none_or_of_another_etcd_lease_says_nothing() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let theirs = r#"{"HostID":"b","BootID":"boot-2","Hostname":"host-b","PublicIP":"192.168.0.2"}"#;
    let lease = put_lease(&raw, 7, &host(1), DAY).await;

    for (value, lease) in [("junk", lease), (theirs, 0)] {
        raw.put(&record_key(7), value, lease).await;
        let started = Instant::now();
        let held = take_seven(&store_of(&etcd, "a", "boot-1").await).await.unwrap();

        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        assert_eq!(held.lease.subnet, subnet(7));
        assert!(raw.get(&record_key(7)).await.unwrap().value.contains(r#""HostID":"a""#));
    }
}

// ── losing it ───────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_sleeper_finds_that_its_subnet_went_to_another_and_overwrites_nothing() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let sleeper = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&sleeper).await.unwrap();
    let holding = stand_by(&sleeper, &held);
    raw.revoke(held.handle).await;
    let other = store_of(&etcd, "b", "boot-2").await;
    other.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();
    let before = (raw.get(&key(7)).await, raw.get(&record_key(7)).await);

    let errors = [
        sleeper.renew(&held).await.unwrap_err(),
        sleeper.publish(&held, &held.lease.attrs).await.unwrap_err(),
        timeout(Duration::from_secs(5), holding).await.expect("it is told").unwrap(),
    ];

    for error in errors {
        assert_eq!(
            chain(&error),
            "the lease on 10.5.7.0/24 belongs to host-b (host id b) at 192.168.0.2 now"
        );
    }
    assert_eq!((raw.get(&key(7)).await, raw.get(&record_key(7)).await), before);
}

#[tokio::test]
async fn a_host_that_did_not_answer_in_time_has_lost_its_subnet_to_its_twin() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let a = Settings { host: Some(machine("a", "boot-1")), ..at(&[&wire.endpoint()]) };
    let sleeper = store(&a).await;
    let held = take_seven(&sleeper).await.unwrap();
    let holding = stand_by(&sleeper, &held);
    is_answered(&raw).await;

    wire.cut();
    let taken = store_of(&etcd, "b", "boot-2").await;
    take_seven(&taken).await.unwrap();
    wire.mend();

    let lost = timeout(Duration::from_secs(20), holding).await.expect("it is told").unwrap();
    let words = "the lease on 10.5.7.0/24 belongs to host-b (host id b) at 192.168.0.1 now";
    assert_eq!(chain(&lost), words);
    assert_eq!(chain(&sleeper.renew(&held).await.unwrap_err()), words);
    assert_eq!(
        chain(&sleeper.publish(&held, &host_with_mac(1, "0e:00:00:00:00:07")).await.unwrap_err()),
        words
    );
    taken.renew(&held).await.unwrap();
}

#[tokio::test]
async fn a_question_is_answered_that_came_while_the_watch_was_broken_and_its_history_compacted() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let holder = store(&Settings { host: Some(machine("a", "boot-1")), ..at(&[&wire.endpoint()]) }).await;
    let held = take_seven(&holder).await.unwrap();
    let holding = stand_by(&holder, &held);
    is_answered(&raw).await;

    wire.cut();
    raw.put(&asks_key(7), "?", 0).await;
    let last = raw.put("/elsewhere", "", 0).await;
    raw.compact(last).await;
    wire.mend();

    let answered = async {
        while raw.get(&asks_key(7)).await.is_some() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(20), answered).await.expect("the question is answered");
    is_answered(&raw).await;
    assert!(!holding.is_finished());
}

#[tokio::test]
async fn a_record_that_is_deleted_or_rewritten_by_its_holder_is_not_lost() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&store).await.unwrap();
    let holding = stand_by(&store, &held);
    is_answered(&raw).await;

    raw.delete(&record_key(7)).await;
    raw.delete(&key(7)).await;
    store.publish(&held, &held.lease.attrs).await.unwrap();

    is_answered(&raw).await;
    assert!(!holding.is_finished());
}

// ── permissions ─────────────────────────────────────────────────────────────

fn as_flannel(etcd: &flannel_tests::etcd::Etcd, host: HostIdentity) -> Settings {
    Settings { host: Some(host), ..etcd.settings_for("flannel", "hunter2") }
}

#[tokio::test]
async fn a_user_with_flannels_permissions_goes_without_records_and_can_do_all_that_is_needed() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let root = etcd.raw_as_root().await;
    let store = store(&as_flannel(&etcd, machine("a", "boot-1"))).await;

    let held = take_seven(&store).await.unwrap();
    let holding = stand_by(&store, &held);
    store.renew(&held).await.unwrap();
    root.delete(&key(7)).await;
    let again = store.publish(&held, &held.lease.attrs).await.unwrap();

    assert_eq!((again.lease.clone(), again.handle), (held.lease, held.handle));
    assert_eq!(root.get(&record_key(7)).await, None);
    let restarted = flannel_tests::leases::store(&as_flannel(&etcd, machine("a", "boot-2"))).await;
    assert_eq!(take_seven(&restarted).await.unwrap().lease, again.lease);
    let next = timeout(Duration::from_secs(2), restarted.hold(&again)).await;
    assert!(next.is_err() && !holding.is_finished(), "there is nothing to hold, and nothing is lost");
}

#[tokio::test]
async fn a_user_who_may_write_records_is_told_from_his_twin() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    etcd.allow_records().await;
    let first = store(&as_flannel(&etcd, machine("a", "boot-1"))).await;
    let held = take_seven(&first).await.unwrap();
    let _holding = stand_by(&first, &held);

    let error = take_seven(&store(&as_flannel(&etcd, machine("b", "boot-2"))).await).await.unwrap_err();

    assert!(matches!(error, StoreError::Twin { .. }), "{error:?}");
}

#[tokio::test]
async fn questions_wake_no_peer() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let incumbent = store_of(&etcd, "a", "boot-1").await;
    let held = take_seven(&incumbent).await.unwrap();
    let _holding = stand_by(&incumbent, &held);
    let mut watch = plain_store(&etcd).await.watch();
    assert_eq!(snapshot(&mut watch).await.leases.len(), 1);

    take_seven(&store_of(&etcd, "b", "boot-2").await).await.unwrap_err();

    raw.put(&key(9), &host(9).to_json(), 0).await;
    assert!(matches!(next(&mut watch).await, LeaseEvent::Put(lease) if lease.subnet == subnet(9)));
}
