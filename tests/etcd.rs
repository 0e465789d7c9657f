//! The store against a real etcd: what it writes, what it survives, what it sees.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::key::subnet_key;
use flannel_core::lease::{BackendData, Expiry, HeldLease, LeaseAttrs, RawJson, Subnet, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, Snapshot, StoreError};
use flannel_core::view::LeaseView;
use flannel_etcd::{EtcdStore, EtcdWatch, Settings};
use flannel_tests::etcd::{Etcd, Kind, PREFIX, Raw, Stored, Wire, black_hole, nobody};
use flannel_tests::leases::{
    DAY, MOVED, address, at, config, config_of, host, host_with_mac, key, key_of, next, next_after_errors,
    nowhere, plain_store, put_lease, put_subnet, snapshot, store, subnet,
};
use flannel_tests::{certificates_or_pass, etcd_or_pass};
use tokio::time::{Instant, sleep, timeout};

// ── what is written ─────────────────────────────────────────────────────────

#[tokio::test]
async fn key_and_value_are_flannels_byte_for_byte() {
    let etcd = etcd_or_pass!();

    plain_store(&etcd).await.acquire(&config(), &host(1), Some(subnet(86))).await.unwrap();

    let stored = etcd.raw().await.get("/coreos.com/network/subnets/10.5.86.0-24").await.unwrap();
    assert_eq!(
        stored.value,
        r#"{"PublicIP":"192.168.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"36:8a:ca:4c:79:ec"}}"#
    );
}

#[tokio::test]
async fn a_lease_hangs_on_an_etcd_lease_of_a_day() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;

    let held = plain_store(&etcd).await.acquire(&config(), &host(1), None).await.unwrap();

    assert_eq!(raw.get(&key_of(&held)).await.unwrap().lease, held.handle);
    assert_eq!(raw.granted_ttl(held.handle).await, DAY);
    let Expiry::At(end) = held.expiry else { panic!("a lease ends") };
    let left = end.saturating_duration_since(std::time::Instant::now()).as_secs();
    assert!((86_300..=86_400).contains(&left), "{left}");
}

#[tokio::test]
async fn a_dual_stack_lease_has_both_networks_in_its_key() {
    let etcd = etcd_or_pass!();
    let text = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd05::/48"}"#;
    let attrs = LeaseAttrs { public_ipv6: Some("fd77::1".parse().unwrap()), ..host(1) };

    let held =
        plain_store(&etcd).await.acquire(&NetworkConfig::parse(text).unwrap(), &attrs, None).await.unwrap();

    assert!(key_of(&held).contains("-24&fd05:"), "{}", key_of(&held));
    assert_eq!(etcd.raw().await.get(&key_of(&held)).await.unwrap().value, attrs.to_json());
}

#[tokio::test]
async fn twenty_restarts_write_nothing_and_leave_one_etcd_lease() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let first = plain_store(&etcd).await.acquire(&config(), &host(1), None).await.unwrap();
    let before = raw.get(&key_of(&first)).await;

    for _ in 0..20 {
        let again = plain_store(&etcd).await.acquire(&config(), &host(1), None).await.unwrap();
        assert_eq!((again.lease.subnet, again.handle), (first.lease.subnet, first.handle));
    }

    assert_eq!(raw.get(&key_of(&first)).await, before);
    assert_eq!(raw.leases().await, [first.handle]);
}

#[tokio::test]
async fn a_new_mac_is_written_on_the_same_etcd_lease() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let first = plain_store(&etcd).await.acquire(&config(), &host(1), None).await.unwrap();

    let changed = host_with_mac(1, "0e:00:00:00:00:07");
    let again = plain_store(&etcd).await.acquire(&config(), &changed, None).await.unwrap();

    let stored = raw.get(&key_of(&first)).await.unwrap();
    assert_eq!(again.lease.subnet, first.lease.subnet);
    assert_eq!((stored.value, stored.lease), (changed.to_json(), first.handle));
    assert_eq!(raw.leases().await, [first.handle]);
}

#[tokio::test]
async fn a_cold_start_takes_five_requests() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    raw.put(&format!("{PREFIX}/config"), r#"{"Network":"10.5.0.0/16"}"#, 0).await;
    put_lease(&raw, 9, &host(9), DAY).await;
    let before = etcd.requests().await;

    let store = plain_store(&etcd).await;
    let config = store.network_config().await.unwrap();
    store.acquire(&config, &host(1), None).await.unwrap();
    let mut watch = store.watch();
    snapshot(&mut watch).await;
    let waiting = tokio::spawn(async move { next(&mut watch).await });
    while etcd.requests().await < before + 5 {
        sleep(Duration::from_millis(10)).await;
    }

    raw.put(&key(9), "so that the watch is known to be open", 0).await;
    waiting.await.unwrap();
    // One of these is the put above.
    assert_eq!(etcd.requests().await - before - 1, 5);
}

#[tokio::test]
async fn the_first_watch_goes_on_from_the_list_that_the_lease_was_taken_by() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    put_lease(&raw, 8, &host(8), DAY).await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), Some(subnet(5))).await.unwrap();
    put_lease(&raw, 9, &host(9), DAY).await;
    raw.delete(&key(8)).await;

    let mut watch = store.watch();

    let mut subnets: Vec<Subnet> =
        snapshot(&mut watch).await.leases.iter().map(|lease| lease.subnet).collect();
    subnets.sort();
    assert_eq!(subnets, [subnet(5), subnet(8)]);
    assert_eq!(put_subnet(&mut watch).await, held.lease.subnet);
    assert_eq!(put_subnet(&mut watch).await, subnet(9));
    assert_eq!(next(&mut watch).await, LeaseEvent::Removed(subnet(8)));
    // Another watch begins with a list of its own.
    assert_eq!(snapshot(&mut store.watch()).await.leases.len(), 2);
}

// ── which subnet ────────────────────────────────────────────────────────────

#[tokio::test]
async fn the_subnet_we_had_before_is_preferred() {
    let etcd = etcd_or_pass!();

    let held = plain_store(&etcd).await.acquire(&config(), &host(1), Some(subnet(77))).await.unwrap();

    assert_eq!(held.lease.subnet, subnet(77));
}

#[tokio::test]
async fn the_subnet_we_had_before_is_not_taken_from_another_host() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    put_lease(&raw, 77, &host(2), DAY).await;
    let before = raw.get(&key(77)).await;

    let held = plain_store(&etcd).await.acquire(&config(), &host(1), Some(subnet(77))).await.unwrap();

    assert_ne!(held.lease.subnet, subnet(77));
    assert_eq!(raw.get(&key(77)).await, before);
}

#[tokio::test]
async fn sixty_hosts_at_once_take_sixty_of_sixty_one_subnets() {
    let etcd = etcd_or_pass!();
    let config = config_of(61);
    let mut hosts = tokio::task::JoinSet::new();

    for number in 1..=60 {
        let (store, config) = (plain_store(&etcd).await, config.clone());
        hosts.spawn(async move { store.acquire(&config, &host(number), None).await });
    }

    let held: Vec<HeldLease> = hosts.join_all().await.into_iter().map(Result::unwrap).collect();
    let subnets: BTreeSet<Subnet> = held.iter().map(|held| held.lease.subnet).collect();
    assert_eq!(subnets.len(), 60);
    let mut granted = etcd.raw().await.leases().await;
    let mut handles: Vec<i64> = held.iter().map(|held| held.handle).collect();
    granted.sort_unstable();
    handles.sort_unstable();
    assert_eq!(granted, handles, "no etcd lease is left over");
}

#[tokio::test]
async fn of_ten_hosts_that_ask_for_one_subnet_one_gets_it_and_none_fails() {
    let etcd = etcd_or_pass!();
    let mut hosts = tokio::task::JoinSet::new();

    for number in 1..=10 {
        let store = plain_store(&etcd).await;
        hosts.spawn(async move { store.acquire(&config(), &host(number), Some(subnet(5))).await });
    }

    let held = hosts.join_all().await.into_iter().map(|held| held.unwrap().lease.subnet);
    let held: Vec<Subnet> = held.collect();
    assert_eq!(held.iter().filter(|held| **held == subnet(5)).count(), 1, "{held:?}");
    assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), 10, "{held:?}");
}

#[tokio::test]
async fn a_full_range_says_what_to_change_and_leaves_no_etcd_lease() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    raw.put(&key(1), &host(2).to_json(), 0).await;
    raw.put(&key(2), &host(3).to_json(), 0).await;

    let error = plain_store(&etcd).await.acquire(&config_of(2), &host(1), None).await.unwrap_err();

    assert_eq!(
        error.to_string(),
        "no free /24 left in 10.5.0.0/16 (2 leased); a larger Network, a larger SubnetLen or a wider \
         SubnetMin..SubnetMax in /coreos.com/network/config makes room"
    );
    assert!(raw.leases().await.is_empty());
}

// ── reservations and foreign leases ─────────────────────────────────────────

#[tokio::test]
async fn a_reservation_is_taken_over_and_stays_one() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    raw.put(&key(7), r#"{"PublicIP":"192.168.0.1"}"#, 0).await;
    let store = plain_store(&etcd).await;

    let held = store.acquire(&config(), &host(1), None).await.unwrap();
    assert_eq!((held.lease.subnet, held.lease.tenure), (subnet(7), Tenure::Reserved));
    assert_eq!((held.expiry, held.handle), (Expiry::Never, 0));
    assert_eq!(store.renew(&held).await.unwrap(), Expiry::Never);
    let again = store.acquire(&config(), &host(1), None).await.unwrap();

    let stored = raw.get(&key(7)).await.unwrap();
    assert_eq!(again, held);
    assert_eq!((stored.value, stored.lease), (host(1).to_json(), 0));
    assert!(raw.leases().await.is_empty());
}

#[tokio::test]
async fn a_lease_that_becomes_a_reservation_is_never_leased_again() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();
    raw.put(&key_of(&held), &host(1).to_json(), 0).await;

    assert_eq!(store.renew(&held).await.unwrap(), Expiry::Never);
    assert_eq!(store.renew(&held).await.unwrap(), Expiry::Never);
    assert_eq!(store.publish(&held, &held.lease.attrs).await.unwrap().expiry, Expiry::Never);

    assert_eq!(raw.get(&key_of(&held)).await.unwrap().lease, 0);
    assert!(raw.leases().await.is_empty());
}

#[tokio::test]
async fn a_lease_of_another_term_is_superseded_and_its_etcd_lease_revoked() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    put_lease(&raw, 7, &host(1), 600).await;

    let held = plain_store(&etcd).await.acquire(&config(), &host(1), None).await.unwrap();

    assert_eq!(held.lease.subnet, subnet(7));
    assert_eq!(raw.get(&key(7)).await.unwrap().lease, held.handle);
    assert_eq!(raw.leases().await, [held.handle]);
}

#[tokio::test]
async fn a_superseded_etcd_lease_with_other_keys_stays() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let shared = put_lease(&raw, 7, &host(1), 600).await;
    raw.put("/somebody/else", "needs it", shared).await;

    plain_store(&etcd).await.acquire(&config(), &host(1), None).await.unwrap();

    assert_eq!(raw.get("/somebody/else").await.unwrap().lease, shared);
}

// ── keeping it ──────────────────────────────────────────────────────────────

#[tokio::test]
async fn peers_see_nothing_of_a_renewal() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), Some(subnet(5))).await.unwrap();
    let mut watch = store.watch();
    snapshot(&mut watch).await;
    // The list is older than our own lease, so that is told once more.
    assert_eq!(put_subnet(&mut watch).await, held.lease.subnet);

    for _ in 0..3 {
        assert!(matches!(store.renew(&held).await.unwrap(), Expiry::At(_)));
    }

    raw.put(&key(9), &host(9).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(9), "the first event is not about a renewal");
}

#[tokio::test]
async fn a_deleted_key_is_lost_and_restored_on_the_same_etcd_lease() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();
    raw.delete(&key_of(&held)).await;

    let lost = store.renew(&held).await.unwrap_err();
    let restored = store.publish(&held, &held.lease.attrs).await.unwrap();

    assert!(
        matches!(lost, StoreError::Lost { subnet, holder: None } if subnet == held.lease.subnet),
        "{lost:?}"
    );
    assert_eq!(restored.lease, held.lease);
    let stored = raw.get(&key_of(&held)).await.unwrap();
    assert_eq!((stored.value, stored.lease), (host(1).to_json(), held.handle));
    assert_eq!(raw.leases().await, [held.handle]);
}

#[tokio::test]
async fn a_lease_that_ran_out_is_lost_and_restored_on_a_new_etcd_lease() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();
    raw.revoke(held.handle).await;

    let lost = store.renew(&held).await.unwrap_err();
    let restored = store.publish(&held, &held.lease.attrs).await.unwrap();

    assert!(matches!(lost, StoreError::Lost { holder: None, .. }), "{lost:?}");
    assert_eq!(restored.lease, held.lease);
    assert_ne!(restored.handle, held.handle);
    assert_eq!(raw.get(&key_of(&held)).await.unwrap().lease, restored.handle);
}

#[tokio::test]
async fn a_subnet_that_another_host_took_is_lost_to_it_and_left_alone() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    raw.revoke(held.handle).await;
    put_lease(&raw, 7, &host(2), DAY).await;
    let before = raw.get(&key(7)).await;

    for error in
        [store.renew(&held).await.unwrap_err(), store.publish(&held, &held.lease.attrs).await.unwrap_err()]
    {
        assert!(
            matches!(&error, StoreError::Lost { holder, .. } if *holder == Some(address(2).to_string())),
            "{error:?}"
        );
    }

    assert_eq!(raw.get(&key(7)).await, before);
}

#[tokio::test]
async fn our_own_lease_under_another_etcd_lease_is_adopted_by_restoring() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let theirs = put_lease(&raw, 7, &host(1), DAY).await;

    let lost = store.renew(&held).await.unwrap_err();
    let restored = store.publish(&held, &held.lease.attrs).await.unwrap();

    assert!(matches!(lost, StoreError::Lost { holder: None, .. }), "{lost:?}");
    assert_eq!(restored.handle, theirs);
}

#[tokio::test]
async fn junk_on_our_own_key_is_reported_and_left_alone() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    raw.put(&key(7), "junk", 0).await;

    let error = chain(&store.publish(&held, &held.lease.attrs).await.unwrap_err());

    assert!(error.starts_with(&format!("keeping {} refused: somebody has written", key(7))), "{error}");
    assert_eq!(raw.get(&key(7)).await.unwrap().value, "junk");
}

#[tokio::test]
async fn a_lease_of_ours_that_the_config_no_longer_allows_is_given_back() {
    let etcd = etcd_or_pass!();
    let (store, raw) = (plain_store(&etcd).await, etcd.raw().await);
    let former = NetworkConfig::parse(r#"{"Network":"10.6.0.0/16"}"#).unwrap();
    let ours = store.acquire(&former, &host(1), None).await.unwrap();
    let theirs = store.acquire(&former, &host(2), None).await.unwrap();

    let held = store.acquire(&config(), &host(1), Some(ours.lease.subnet)).await.unwrap();

    let standing = |lease: &HeldLease| format!("{PREFIX}/subnets/{}", subnet_key(&lease.lease.subnet));
    assert!(raw.get(&standing(&held)).await.is_some());
    assert!(raw.get(&standing(&ours)).await.is_none());
    assert!(raw.get(&standing(&theirs)).await.is_some());
}

// ── the config ──────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_config_that_is_missing_or_wrong_is_named_by_its_key() {
    let etcd = etcd_or_pass!();
    let store = plain_store(&etcd).await;

    let missing = chain(&store.network_config().await.unwrap_err());
    etcd.raw().await.put(&format!("{PREFIX}/config"), r#"{"Network":"10.5.0.0/16","SubnetLen":31}"#, 0).await;
    let wrong = chain(&store.network_config().await.unwrap_err());

    assert!(missing.starts_with("no network config at /coreos.com/network/config; write one"), "{missing}");
    assert!(wrong.starts_with("network config at /coreos.com/network/config: SubnetLen is 31"), "{wrong}");
}

// ── the watch ───────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_watch_tells_what_appears_changes_goes_and_cannot_be_read() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let mut watch = plain_store(&etcd).await.watch();
    assert_eq!(snapshot(&mut watch).await, Snapshot::default());

    raw.put(&key(1), &host(1).to_json(), 0).await;
    put_lease(&raw, 1, &host(2), DAY).await;
    raw.put(&key(2), "{", 0).await;
    raw.put(&format!("{PREFIX}/subnets/junk"), "x", 0).await;
    raw.delete(&format!("{PREFIX}/subnets/junk")).await;
    raw.put(&format!("{PREFIX}/subnets-elsewhere"), "x", 0).await;
    raw.delete(&key(1)).await;

    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(match next(&mut watch).await {
            LeaseEvent::Put(lease) => {
                format!("put {} {:?} {:?}", lease.subnet, lease.attrs.public_ip.unwrap(), lease.tenure)
            }
            LeaseEvent::Unreadable(key) => format!("unreadable {} {}", key.key, key.subnet.is_some()),
            other @ (LeaseEvent::RemovedTogether(_) | LeaseEvent::Resumed) => panic!("{other:?}"),
            LeaseEvent::Removed(subnet) => format!("removed {subnet}"),
            LeaseEvent::Snapshot(_) => "snapshot".into(),
        });
    }
    assert_eq!(
        seen,
        [
            "put 10.5.1.0/24 192.168.0.1 Reserved",
            "put 10.5.1.0/24 192.168.0.2 Leased",
            "unreadable /coreos.com/network/subnets/10.5.2.0-24 true",
            "unreadable /coreos.com/network/subnets/junk false",
            "removed 10.5.1.0/24",
        ]
    );
}

#[tokio::test]
async fn a_snapshot_has_what_can_be_read_and_names_what_cannot() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    raw.put(&key(1), &host(1).to_json(), 0).await;
    raw.put(&key(2), r#"{"PublicIP":"nowhere"}"#, 0).await;
    raw.put(&format!("{PREFIX}/subnets/junk"), "x", 0).await;

    let snapshot = snapshot(&mut plain_store(&etcd).await.watch()).await;

    assert_eq!(snapshot.leases.iter().map(|lease| lease.subnet).collect::<Vec<_>>(), [subnet(1)]);
    let unreadable: Vec<String> = snapshot
        .unreadable
        .iter()
        .map(|key| format!("{} {:?}: {}", key.key, key.subnet.map(|subnet| subnet.to_string()), key.reason))
        .collect();
    assert_eq!(
        unreadable,
        [
            r#"/coreos.com/network/subnets/10.5.2.0-24 Some("10.5.2.0/24"): PublicIP is "nowhere": must be an IPv4 address"#,
            "/coreos.com/network/subnets/junk None: its name is not a subnet",
        ]
    );
}

#[tokio::test]
async fn nothing_falls_between_the_list_and_the_watch() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let store = plain_store(&etcd).await;
    let churn = tokio::spawn({
        let raw = raw.clone();
        async move {
            for round in 0..600_u32 {
                let third = (round % 40) as u8 + 1;
                if round % 7 == 3 {
                    raw.delete(&key(third)).await;
                } else {
                    raw.put(&key(third), &host((round % 250) as u8).to_json(), 0).await;
                }
            }
            raw.put(&key(200), &host(200).to_json(), 0).await;
        }
    });

    for _ in 0..5 {
        let (mut watch, mut view) = (store.watch(), LeaseView::default());
        while view.get(&subnet(200)).is_none() {
            view.apply(next(&mut watch).await);
            if view.count_peers(nowhere()) == 40 && !churn.is_finished() {
                break;
            }
        }
    }
    let (mut watch, mut view) = (store.watch(), LeaseView::default());
    while view.get(&subnet(200)).is_none() {
        view.apply(next(&mut watch).await);
    }
    churn.await.unwrap();

    let truth = snapshot(&mut store.watch()).await;
    assert_eq!(view.count_peers(nowhere()), truth.leases.len());
    for lease in truth.leases {
        assert_eq!(view.get(&lease.subnet), Some(lease));
    }
}

#[tokio::test]
async fn what_happens_before_the_stream_is_open_is_told() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let mut watch = plain_store(&etcd).await.watch();
    snapshot(&mut watch).await;

    // The stream is opened by the next call of next().
    for third in 1..=3 {
        raw.put(&key(third), &host(third).to_json(), 0).await;
    }

    for third in 1..=3 {
        assert_eq!(put_subnet(&mut watch).await, subnet(third));
    }
}

#[tokio::test]
async fn a_watch_survives_a_crash_of_etcd_and_tells_what_changed_meanwhile() {
    let mut etcd = etcd_or_pass!();
    let wire = Wire::to(&etcd).await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    etcd.raw().await.put(&key(1), &host(1).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(1));

    wire.cut();
    etcd.kill();
    etcd.start_again().await;
    etcd.raw().await.put(&key(2), &host(2).to_json(), 0).await;
    etcd.raw().await.delete(&key(1)).await;
    wire.mend();

    assert_eq!(put_subnet(&mut watch).await, subnet(2));
    assert_eq!(next(&mut watch).await, LeaseEvent::Removed(subnet(1)));
}

#[tokio::test]
async fn an_outage_is_reported_once() {
    let mut etcd = etcd_or_pass!();
    let mut watch = plain_store(&etcd).await.watch();
    snapshot(&mut watch).await;
    etcd.kill();

    let error = watch.next().await.unwrap_err();
    // Were there a second one, it would come within a few seconds: a round of attempts and a delay.
    let silence = timeout(Duration::from_secs(12), watch.next()).await;

    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    assert!(silence.is_err(), "{silence:?}");
}

#[tokio::test]
async fn a_compaction_while_cut_off_brings_a_snapshot() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    raw.put(&key(1), &host(1).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(1));

    wire.cut();
    raw.delete(&key(1)).await;
    raw.put(&key(2), &host(2).to_json(), 0).await;
    let last = raw.put(&key(2), &host(3).to_json(), 0).await;
    raw.compact(last).await;
    wire.mend();

    let LeaseEvent::Snapshot(snapshot) = next_after_errors(&mut watch).await else { panic!("a snapshot") };
    assert_eq!(snapshot.leases.len(), 1);
    assert_eq!(snapshot.leases[0].attrs, host(3));
}

#[tokio::test]
async fn a_wiped_etcd_brings_a_snapshot() {
    let mut etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    for third in 1..=5 {
        raw.put(&key(third), &host(third).to_json(), 0).await;
    }
    let mut watch = plain_store(&etcd).await.watch();
    assert_eq!(snapshot(&mut watch).await.leases.len(), 5);
    raw.put(&key(6), &host(6).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(6));

    etcd.kill();
    etcd.wipe();
    etcd.start_again().await;

    let event = next_after_errors(&mut watch).await;
    assert_eq!(event, LeaseEvent::Snapshot(Snapshot::default()));
}

/// A watch that has seen keys 1 and 2, then a backup, then what `since` does,
/// which `seen` tells; and all that is undone by going back to the backup. By the
/// time the watch is let back, the revision is further on than it was.
async fn restored(
    since: impl AsyncFnOnce(&Raw) -> i64,
    seen: impl FnOnce(&LeaseEvent) -> bool,
) -> Option<(Etcd, Wire, EtcdWatch)> {
    let mut etcd = Etcd::start().await?;
    let wire = Wire::to(&etcd).await;
    let raw = etcd.raw().await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    for third in 1..=2 {
        raw.put(&key(third), &host(third).to_json(), 0).await;
        assert_eq!(put_subnet(&mut watch).await, subnet(third));
    }
    let backup = etcd.back_up()?;
    since(&raw).await;
    let event = next(&mut watch).await;
    assert!(seen(&event), "{event:?}");
    let before = raw.moment().await;

    wire.cut();
    etcd.kill();
    etcd.restore(&backup);
    etcd.start_again().await;
    let raw = etcd.raw().await;
    let restored = raw.moment().await;
    assert!(restored.0 == before.0 && restored.1 < before.1, "{restored:?} follows {before:?}");
    while raw.put("/elsewhere", "", 0).await < before.1 + 10 {}
    wire.mend();
    Some((etcd, wire, watch))
}

fn subnets(event: LeaseEvent) -> Vec<Subnet> {
    match event {
        LeaseEvent::Snapshot(snapshot) => snapshot.leases.iter().map(|lease| lease.subnet).collect(),
        other => panic!("{other:?} is no snapshot"),
    }
}

#[tokio::test]
async fn a_lease_that_a_restored_backup_does_not_have_is_not_believed_any_longer() {
    let since = async |raw: &Raw| raw.put(&key(3), &host(3).to_json(), 0).await;
    let seen = |event: &LeaseEvent| matches!(event, LeaseEvent::Put(_));
    let Some((_etcd, _wire, mut watch)) = restored(since, seen).await else { return };

    assert_eq!(subnets(next_after_errors(&mut watch).await), [subnet(1), subnet(2)]);
}

#[tokio::test]
async fn a_lease_that_a_restored_backup_has_again_is_told() {
    let since = async |raw: &Raw| raw.delete(&key(1)).await;
    let seen = |event: &LeaseEvent| matches!(event, LeaseEvent::Removed(_));
    let Some((_etcd, _wire, mut watch)) = restored(since, seen).await else { return };

    assert_eq!(subnets(next_after_errors(&mut watch).await), [subnet(1), subnet(2)]);
}

#[tokio::test]
async fn a_lease_that_a_restored_backup_has_otherwise_is_told() {
    let since = async |raw: &Raw| raw.put(&key(1), &host(9).to_json(), 0).await;
    let seen = |event: &LeaseEvent| matches!(event, LeaseEvent::Put(_));
    let Some((_etcd, _wire, mut watch)) = restored(since, seen).await else { return };

    assert_eq!(subnets(next_after_errors(&mut watch).await), [subnet(1), subnet(2)]);
}

#[tokio::test]
async fn going_on_after_a_break_takes_two_requests_and_no_list() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    raw.put(&key(1), &host(1).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(1));
    wire.cut();
    watch.next().await.unwrap_err();
    let before = etcd.requests().await;

    wire.mend();

    assert_eq!(next(&mut watch).await, LeaseEvent::Resumed);
    assert_eq!(etcd.requests().await - before, 2, "a watch, and one key");
}

#[tokio::test]
async fn events_are_not_told_twice_when_a_watch_is_reopened() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    raw.put_together([1, 2, 3].map(|third| (key(third), host(third).to_json()))).await;
    for third in 1..=3 {
        assert_eq!(put_subnet(&mut watch).await, subnet(third));
    }

    wire.cut();
    raw.put(&key(4), &host(4).to_json(), 0).await;
    wire.mend();

    assert_eq!(put_subnet(&mut watch).await, subnet(4));
}

#[tokio::test]
async fn leases_that_go_in_one_stroke_are_told_together_and_others_one_by_one() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let mut watch = plain_store(&etcd).await.watch();
    snapshot(&mut watch).await;

    // The stream is opened only later, so all of this comes in one portion.
    raw.put_together((1..=6).map(|third| (key(third), host(third).to_json()))).await;
    raw.delete(&key(1)).await;
    raw.delete(&key(2)).await;
    raw.delete_range(&key(3), &key(6)).await;
    raw.put(&key(3), &host(3).to_json(), 0).await;
    raw.delete_range(PREFIX, &format!("{PREFIX}0")).await;

    for third in 1..=6 {
        assert_eq!(put_subnet(&mut watch).await, subnet(third));
    }
    let together = |thirds: &[u8]| LeaseEvent::RemovedTogether(thirds.iter().copied().map(subnet).collect());
    assert_eq!(next(&mut watch).await, LeaseEvent::Removed(subnet(1)));
    assert_eq!(next(&mut watch).await, LeaseEvent::Removed(subnet(2)));
    assert_eq!(next(&mut watch).await, together(&[3, 4, 5]));
    assert_eq!(put_subnet(&mut watch).await, subnet(3));
    assert_eq!(next(&mut watch).await, together(&[3, 6]));
}

#[tokio::test]
async fn after_an_error_that_was_told_a_watch_says_that_it_goes_on() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    raw.put(&key(1), &host(1).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(1));

    wire.cut();
    watch.next().await.unwrap_err();
    raw.put(&key(2), &host(2).to_json(), 0).await;
    wire.mend();

    assert_eq!(next(&mut watch).await, LeaseEvent::Resumed);
    assert!(matches!(next(&mut watch).await, LeaseEvent::Put(lease) if lease.subnet == subnet(2)));
}

#[tokio::test]
async fn after_an_error_that_a_snapshot_mends_the_snapshot_comes_first() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let wire = Wire::to(&etcd).await;
    let mut watch = store(&at(&[&wire.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    raw.put(&key(1), &host(1).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(1));

    wire.cut();
    watch.next().await.unwrap_err();
    raw.delete(&key(1)).await;
    let last = raw.put(&key(2), &host(2).to_json(), 0).await;
    raw.compact(last).await;
    wire.mend();

    assert_eq!(snapshot(&mut watch).await.leases.len(), 1);
    assert_eq!(next(&mut watch).await, LeaseEvent::Resumed);
}

// ── many leases ─────────────────────────────────────────────────────────────

/// A lease each for `count` hosts, from 10.0.0.0/24 on.
fn many(count: u32) -> impl Iterator<Item = (String, String)> {
    let value = |index: u32| {
        let attrs = LeaseAttrs {
            public_ip: Some((0xac10_0000 + index).into()),
            backend_data: Some(BackendData::Json(RawJson::of(&"a string about as long as VNI and MAC"))),
            ..host(1)
        };
        attrs.to_json()
    };
    (0..count).map(move |index| {
        let network = Ipv4Addr::from(0x0a00_0000 + (index << 8));
        (format!("{PREFIX}/subnets/{network}-24"), value(index))
    })
}

fn large() -> Kind {
    Kind::plain().flag("--max-txn-ops=30000").flag("--max-request-bytes=33554432")
}

#[tokio::test]
async fn a_list_of_many_pages_is_whole() {
    let etcd = etcd_or_pass!(large());
    etcd.raw().await.put_together(many(50)).await;

    for page in [1, 7, 49, 50, 51] {
        let store = EtcdStore::with_page_size(&etcd.settings(), page).await.unwrap();
        let leases = snapshot(&mut store.watch()).await.leases;
        assert_eq!(
            leases.iter().map(|lease| lease.subnet).collect::<BTreeSet<_>>().len(),
            50,
            "pages of {page}"
        );
        assert_eq!(leases.len(), 50, "pages of {page}");
    }
}

#[tokio::test]
async fn all_pages_are_of_one_moment() {
    let etcd = etcd_or_pass!(large());
    let raw = etcd.raw().await;
    raw.put_together(many(200)).await;
    let store = EtcdStore::with_page_size(&etcd.settings(), 1).await.unwrap();
    // One lease moves to and fro between the first and the last place: at any
    // moment there is exactly one of the two.
    let (first, last) = (format!("{PREFIX}/subnets/1.0.0.0-24"), format!("{PREFIX}/subnets/99.0.0.0-24"));
    let value = host(1).to_json();
    raw.put(&first, &value, 0).await;
    let mover = tokio::spawn({
        let raw = raw.clone();
        async move {
            use etcd_client::{Txn, TxnOp};
            let mut places = [first, last];
            loop {
                let ops = [
                    TxnOp::delete(places[0].as_str(), None),
                    TxnOp::put(places[1].as_str(), value.as_str(), None),
                ];
                raw.0.kv_client().txn(Txn::new().and_then(ops)).await.unwrap();
                places.reverse();
            }
        }
    });

    for _ in 0..5 {
        assert_eq!(snapshot(&mut store.watch()).await.leases.len(), 201);
    }
    mover.abort();
}

#[tokio::test]
async fn more_leases_than_fit_four_mebibytes_are_listed_whole() {
    let etcd = etcd_or_pass!(large());
    let raw = etcd.raw().await;
    raw.put_together(many(25_000)).await;

    for page in [10_000, 100_000] {
        let store = EtcdStore::with_page_size(&etcd.settings(), page).await.unwrap();
        assert_eq!(snapshot(&mut store.watch()).await.leases.len(), 25_000, "pages of {page}");
    }
}

#[tokio::test]
async fn a_revision_of_more_than_four_mebibytes_is_watched_whole() {
    let etcd = etcd_or_pass!(large());
    let mut watch = plain_store(&etcd).await.watch();
    snapshot(&mut watch).await;

    etcd.raw().await.put_together(many(25_000)).await;

    let mut seen = BTreeSet::new();
    for _ in 0..25_000 {
        assert!(seen.insert(put_subnet(&mut watch).await));
    }
}

// ── several endpoints ───────────────────────────────────────────────────────

#[tokio::test]
async fn an_endpoint_that_refuses_is_passed_over() {
    let etcd = etcd_or_pass!();
    let store = store(&at(&[&nobody(), &etcd.endpoint()])).await;
    let started = Instant::now();

    store.acquire(&config(), &host(1), None).await.unwrap();
    snapshot(&mut store.watch()).await;

    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn an_endpoint_that_never_answers_is_passed_over() {
    let etcd = etcd_or_pass!();
    let store = store(&at(&[&black_hole().await, &black_hole().await, &etcd.endpoint()])).await;
    let started = Instant::now();

    store.acquire(&config(), &host(1), None).await.unwrap();

    assert!(started.elapsed() < MOVED, "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_watch_leaves_an_endpoint_that_falls_silent() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    let (one, other) = (Wire::to(&etcd).await, Wire::to(&etcd).await);
    let mut watch = store(&at(&[&one.endpoint(), &other.endpoint()])).await.watch();
    snapshot(&mut watch).await;
    raw.put(&key(1), &host(1).to_json(), 0).await;
    assert_eq!(put_subnet(&mut watch).await, subnet(1));

    one.silence();
    let started = Instant::now();
    raw.put(&key(2), &host(2).to_json(), 0).await;

    assert_eq!(put_subnet(&mut watch).await, subnet(2));
    assert!(started.elapsed() < MOVED, "{:?}", started.elapsed());
}

#[tokio::test]
async fn requests_leave_an_endpoint_that_falls_silent_and_find_it_mended() {
    let etcd = etcd_or_pass!();
    let (one, other) = (Wire::to(&etcd).await, Wire::to(&etcd).await);
    let store = store(&at(&[&one.endpoint(), &other.endpoint()])).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();

    for (broken, working) in [(&one, &other), (&other, &one)] {
        working.mend();
        broken.silence();
        let started = Instant::now();
        store.renew(&held).await.unwrap();
        assert!(started.elapsed() < MOVED, "{:?}", started.elapsed());
    }
}

#[tokio::test]
async fn a_frozen_etcd_is_unreachable_and_then_reachable_again() {
    let etcd = etcd_or_pass!();
    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();

    etcd.freeze();
    let error = chain(&store.renew(&held).await.unwrap_err());
    etcd.thaw();

    assert_eq!(error, format!("no answer from {}: no answer within 5 s", etcd.endpoint()));
    store.renew(&held).await.unwrap();
}

#[tokio::test]
async fn when_nobody_answers_every_endpoint_is_named_with_its_trouble() {
    let (one, other) = (nobody(), nobody());
    let store = store(&at(&[&one, &other])).await;
    let started = Instant::now();

    let error = chain(&store.network_config().await.unwrap_err());

    assert!(error.starts_with(&format!("no answer from {one}, {other}: {one}: ")), "{error}");
    assert_eq!(error.matches("Connection refused").count(), 2, "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

// ── TLS ─────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_ca_file_alone_is_enough_for_tls() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = certificates_or_pass!(directory);
    let etcd = etcd_or_pass!(Kind::tls(&certificates));

    let store = store(&Settings { ca_file: Some(certificates.ca), ..etcd.settings() }).await;

    store.acquire(&config(), &host(1), None).await.unwrap();
}

#[tokio::test]
async fn an_etcd_that_asks_for_a_certificate_gets_it_and_an_endpoint_without_a_scheme_is_https() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = certificates_or_pass!(directory);
    let etcd = etcd_or_pass!(Kind::tls(&certificates).asking_clients());
    let with_ca = Settings {
        ca_file: Some(certificates.ca.clone()),
        endpoints: vec![etcd.address().to_string()],
        ..etcd.settings()
    };

    let with_certificate = Settings {
        cert_file: Some(certificates.client_cert.clone()),
        key_file: Some(certificates.client_key.clone()),
        ..with_ca.clone()
    };

    store(&with_certificate).await.acquire(&config(), &host(1), None).await.unwrap();
    let refused = chain(&store(&with_ca).await.network_config().await.unwrap_err());
    assert!(refused.contains("it may ask for a certificate: --etcd-certfile"), "{refused}");
}

#[tokio::test]
async fn without_a_ca_file_the_systems_roots_decide_and_do_not_know_our_ca() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = certificates_or_pass!(directory);
    let etcd = etcd_or_pass!(Kind::tls(&certificates));

    let error = chain(&store(&etcd.settings()).await.network_config().await.unwrap_err());

    let words = "invalid peer certificate: UnknownIssuer (none of the system's CAs knows it: --etcd-cafile)";
    let expected = format!("no answer from {}: {words}", etcd.endpoint());
    assert_eq!(error, expected);
}

#[tokio::test]
async fn a_wrong_ca_is_said_to_be_one() {
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let certificates = certificates_or_pass!(directory);
    let others = certificates_or_pass!(elsewhere);
    let etcd = etcd_or_pass!(Kind::tls(&certificates));

    let store = store(&Settings { ca_file: Some(others.ca), ..etcd.settings() }).await;

    let error = chain(&store.network_config().await.unwrap_err());
    assert!(error.contains("invalid peer certificate"), "{error}");
    assert!(error.ends_with("(its certificate is not of the CA in --etcd-cafile)"), "{error}");
}

#[tokio::test]
async fn http_where_https_is_spoken_and_the_other_way_round_is_asked_about() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = certificates_or_pass!(directory);
    let (secure, plain) = (etcd_or_pass!(Kind::tls(&certificates)), etcd_or_pass!());
    let other = |endpoint: &str, to| Settings {
        ca_file: Some(certificates.ca.clone()),
        ..at(&[&format!("{to}://{}", endpoint.split_once("://").unwrap().1)])
    };

    for (settings, spoken) in
        [(other(&secure.endpoint(), "http"), "https"), (other(&plain.endpoint(), "https"), "http")]
    {
        let error = chain(&store(&settings).await.network_config().await.unwrap_err());
        assert!(error.contains(&format!("is it {spoken} that is spoken there?")), "{error}");
    }
}

#[tokio::test]
async fn a_certificate_with_the_key_of_another_is_named_with_both_flags() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = certificates_or_pass!(directory);
    let settings = Settings {
        cert_file: Some(certificates.client_cert),
        key_file: Some(certificates.server_key),
        ca_file: Some(certificates.ca),
        ..at(&["https://127.0.0.1:1"])
    };

    let error = EtcdStore::connect(&settings).await.err().unwrap().to_string();

    assert!(error.starts_with("--etcd-certfile ") && error.contains(" with --etcd-keyfile "), "{error}");
}

#[tokio::test]
async fn a_ca_file_of_garbage_is_named_with_its_flag() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    std::fs::write(&file, "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n").unwrap();
    let settings = Settings { ca_file: Some(file.clone()), ..at(&["https://127.0.0.1:1"]) };

    let error = EtcdStore::connect(&settings).await.err().unwrap().to_string();

    assert!(error.starts_with(&format!("--etcd-cafile {}: ", file.display())), "{error}");
}

#[tokio::test]
async fn http_with_certificates_is_plaintext() {
    let directory = tempfile::tempdir().unwrap();
    let certificates = certificates_or_pass!(directory);
    let etcd = etcd_or_pass!();

    let store = store(&Settings { ca_file: Some(certificates.ca), ..etcd.settings() }).await;

    store.acquire(&config(), &host(1), None).await.unwrap();
}

#[tokio::test]
async fn the_store_gives_a_key_back_as_it_found_it() {
    let etcd = etcd_or_pass!();
    let raw = etcd.raw().await;
    raw.put(&key(9), r#"{"PublicIP":"192.168.0.9","Unknown":{"kept":true}}"#, 0).await;
    let before: Option<Stored> = raw.get(&key(9)).await;

    let store = plain_store(&etcd).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();
    store.renew(&held).await.unwrap();

    assert_eq!(raw.get(&key(9)).await, before);
}
