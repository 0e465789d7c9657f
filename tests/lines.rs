//! Leases in an etcd whose answers are late or lost: the real store on a
//! simulated etcd, which can be made to do at will what a real one does rarely.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::sync::Arc;
use std::time::Duration;

use flannel_core::lease::{HeldLease, HostIdentity, Tenure};
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, StoreError};
use flannel_etcd::EtcdStore;
use flannel_tests::etcd::PREFIX;
use flannel_tests::leases::{config, host, key, machine, record_key, subnet};
use flannel_tests::sim_etcd::{Fate, SimClient, SimEtcd};
use tokio::time::{sleep, timeout};

const PROMPT: Fate = Fate::Answered(Duration::ZERO, Duration::ZERO);

fn store(client: &SimClient) -> EtcdStore<SimClient> {
    store_of(client, machine("a", "boot-1"))
}

fn store_of(client: &SimClient, host: HostIdentity) -> EtcdStore<SimClient> {
    EtcdStore::over(client.clone(), PREFIX, 10, Some(host))
}

/// The keys of all leases and records.
fn keys(etcd: &SimEtcd) -> Vec<String> {
    let keys = etcd.keys(PREFIX).into_iter();
    keys.map(|entry| String::from_utf8(entry.key).unwrap()).filter(|key| !key.ends_with("config")).collect()
}

/// We at address 1 with subnet 8, beside a neighbour at 2 with 7, who lives and answers.
struct Neighbours {
    etcd: SimEtcd,
    client: SimClient,
    held: HeldLease,
    neighbour: EtcdStore<SimClient>,
    theirs: HeldLease,
}

async fn neighbours() -> Neighbours {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let neighbour = store_of(&other, machine("b", "boot-1"));
    let theirs = neighbour.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();
    tokio::spawn(neighbour.hold(&theirs));
    let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    Neighbours { etcd, client, held, neighbour, theirs }
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_was_asked_for_without_an_answer_is_asked_for_again() {
    for _ in 0..20 {
        let etcd = SimEtcd::start();
        let client = etcd.client(1);
        let store = store(&client);
        // The list, the etcd lease, and then the transaction, which is carried out after half a minute.
        client.fates([PROMPT, PROMPT, Fate::Late(Duration::from_secs(30))]);
        let unanswered = store.acquire(&config(), &host(1), None).await;
        assert!(matches!(unanswered, Err(StoreError::Unreachable { .. })), "{unanswered:?}");

        let held = store.acquire(&config(), &host(1), None).await.unwrap();
        sleep(Duration::from_secs(60)).await;

        assert_eq!(store.list().await.unwrap().leases, [held.lease]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_comes_back_with_another_address_keeps_its_subnet() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let former = store(&client).acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();

    let held = store(&client).acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();

    assert_eq!((held.lease.subnet, held.handle), (subnet(7), former.handle));
    assert_eq!(keys(&etcd), [record_key(7), key(7)]);
}

#[tokio::test(start_paused = true)]
async fn a_former_subnet_that_is_another_host_s_now_is_left_to_it() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let theirs = store_of(&other, machine("b", "boot-1"));
    theirs.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();

    let held = store(&client).acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();

    assert_ne!(held.lease.subnet, subnet(7));
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_our_disk_that_has_our_former_subnet_keeps_it() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let copy = store_of(&other, machine("a", "boot-2"));
    let theirs = copy.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();
    let answering = tokio::spawn(copy.hold(&theirs));

    let held = store(&client).acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();

    assert_ne!(held.lease.subnet, subnet(7));
    copy.renew(&theirs).await.unwrap();
    assert!(!answering.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_taken_for_ours_is_given_back_if_it_is_ours_or_nobody_s() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    // As a write that came too late leaves it, one of the time before we booted, and one of
    // a host that is no more and had our address.
    let late = store(&client).acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let before = store_of(&client, machine("a", "boot-0"));
    before.acquire(&config(), &host(2), Some(subnet(8))).await.unwrap();
    let other = store_of(&client, machine("b", "boot-1"));
    other.acquire(&config(), &host(4), Some(subnet(6))).await.unwrap();
    let held = store(&client).acquire(&config(), &host(3), Some(subnet(9))).await.unwrap();
    let held = store(&client).publish(&held, &host(4)).await.unwrap();

    for stray in [6, 7, 8, 9, 10] {
        store(&client).give_back(&held, subnet(stray)).await.unwrap();
    }

    assert_eq!(keys(&etcd), [record_key(9), key(9)]);
    assert_ne!(late.handle, held.handle);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_certainly_ours_is_not_given_back() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    // A twin's that lives, a Go flanneld's, and that of a copy of our disk that lives.
    let twin = store_of(&other, machine("b", "boot-1"));
    let theirs = twin.acquire(&config(), &host(3), Some(subnet(7))).await.unwrap();
    let _twin = tokio::spawn(twin.hold(&theirs));
    etcd.put_leased(&key(8), host(3).to_json().as_bytes(), 8, 86_400);
    let copy = store_of(&other, machine("a", "boot-2"));
    let theirs = copy.acquire(&config(), &host(2), Some(subnet(9))).await.unwrap();
    let _answering = tokio::spawn(copy.hold(&theirs));
    let mut held = store(&client).acquire(&config(), &host(4), Some(subnet(10))).await.unwrap();
    held.lease.attrs = host(3);
    let before = keys(&etcd);

    for stray in [7, 8, 9] {
        store(&client).give_back(&held, subnet(stray)).await.unwrap();
    }

    assert_eq!(keys(&etcd), before);
    assert_eq!(held.lease.tenure, Tenure::Leased);
}

#[tokio::test(start_paused = true)]
async fn a_lease_whose_record_becomes_another_s_meanwhile_is_not_given_back() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    store(&client).acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let held = store(&client).acquire(&config(), &host(2), Some(subnet(8))).await.unwrap();
    let store = store(&client);
    // What stands there, and then the deletion.
    client.fates([PROMPT, Fate::Answered(Duration::from_secs(1), Duration::ZERO)]);
    let giving_back = tokio::spawn(async move { store.give_back(&held, subnet(7)).await });

    sleep(Duration::from_millis(500)).await;
    let theirs = r#"{"HostID":"b","BootID":"boot-1","Hostname":"b","PublicIP":"192.168.0.1"}"#;
    etcd.bend(&record_key(7), theirs.as_bytes());
    giving_back.await.unwrap().unwrap();

    assert_eq!(keys(&etcd), [record_key(7), record_key(8), key(7), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn nor_is_it_written_over() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let store = store(&client);
    let held = store.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    // The list, what stands there, the term, the renewal, and then the transaction.
    let late = Fate::Answered(Duration::from_secs(1), Duration::ZERO);
    client.fates([PROMPT, PROMPT, PROMPT, PROMPT, late]);
    let publishing = tokio::spawn(async move { store.publish(&held, &host(3)).await });

    sleep(Duration::from_millis(500)).await;
    let theirs = r#"{"HostID":"b","BootID":"boot-1","Hostname":"b","PublicIP":"192.168.0.1"}"#;
    etcd.bend(&record_key(7), theirs.as_bytes());
    let published = publishing.await.unwrap();

    assert!(matches!(published, Err(StoreError::Lost { .. })), "{published:?}");
    assert_eq!(etcd.keys(&record_key(7))[0].value, theirs.as_bytes());
}

#[tokio::test(start_paused = true)]
async fn a_question_that_goes_with_its_lease_is_no_answer() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let twin = store_of(&other, machine("b", "boot-1"));
    let theirs = twin.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let store = store(&client);
    let acquiring = tokio::spawn(async move { store.acquire(&config(), &host(1), None).await });

    sleep(Duration::from_secs(1)).await;
    assert_eq!(keys(&etcd).len(), 3, "it asks");
    etcd.revoke(theirs.handle);
    let held = acquiring.await.unwrap().unwrap();

    assert_eq!(keys(&etcd).len(), 2);
    assert_ne!(held.handle, theirs.handle);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_moves_to_the_address_of_one_that_lives_does_not_publish_it() {
    let Neighbours { client, held, theirs, .. } = neighbours().await;

    let refused = store(&client).publish(&held, &host(2)).await;

    assert!(matches!(&refused, Err(StoreError::Twin { subnet: theirs, .. }) if *theirs == subnet(7)));
    let leases = store(&client).list().await.unwrap().leases;
    assert!(leases.contains(&held.lease) && leases.contains(&theirs.lease), "{leases:?}");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_waits_for_another_address_keeps_its_lease_alive() {
    let Neighbours { client, held, neighbour, theirs, .. } = neighbours().await;

    for _ in 0..3 {
        sleep(Duration::from_secs(50_000)).await;
        neighbour.renew(&theirs).await.unwrap();
        store(&client).publish(&held, &host(2)).await.unwrap_err();
    }

    let leases = store(&client).list().await.unwrap().leases;
    assert!(leases.contains(&held.lease), "{leases:?}");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_moves_to_the_address_of_one_that_is_no_more_has_it_alone() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let gone = store_of(&client, machine("b", "boot-1"));
    let theirs = gone.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();
    let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();

    let held = store(&client).publish(&held, &host(2)).await.unwrap();

    assert_eq!(store(&client).list().await.unwrap().leases, [held.lease]);
    // The etcd lease is the other one's, who may use it again.
    assert!(etcd.leases().contains(&(theirs.handle, 0)), "{:?}", etcd.leases());
}

#[tokio::test(start_paused = true)]
async fn hosts_that_exchange_addresses_do_not_wait_for_each_other() {
    let etcd = SimEtcd::start();
    let mut hosts = vec![];
    for (number, id) in [(1, "a"), (2, "b"), (3, "c")] {
        let store = store_of(&etcd.client(number), machine(id, "boot-1"));
        let number = u8::try_from(number).unwrap();
        let held = store.acquire(&config(), &host(number), Some(subnet(number))).await.unwrap();
        tokio::spawn(store.hold(&held));
        hosts.push((store, held));
    }
    let before = hosts[0].0.list().await.unwrap();

    // Each wants the address of the next one.
    for (place, wanted) in [(0, 2), (1, 3)] {
        let (store, held) = &hosts[place];
        assert!(matches!(store.publish(held, &host(wanted)).await, Err(StoreError::Twin { .. })));
    }
    assert_eq!(hosts[0].0.list().await.unwrap(), before);
    for (place, wanted) in [(2, 1), (1, 3), (0, 2)] {
        let (store, held) = &hosts[place];
        store.publish(held, &host(wanted)).await.unwrap();
    }

    let leases = hosts[0].0.list().await.unwrap().leases;
    let addresses: Vec<_> = leases.iter().map(|lease| lease.attrs.public_ip).collect();
    assert_eq!(addresses, [2, 3, 1].map(|number| host(number).public_ip));
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_host_that_died_while_it_waited_for_another_address_goes_after_a_while() {
    let Neighbours { etcd, client, held, neighbour, theirs } = neighbours().await;
    store(&client).publish(&held, &host(2)).await.unwrap_err();

    let moved = neighbour.publish(&theirs, &host(1)).await.unwrap();
    for _ in 0..2 {
        neighbour.give_back(&moved, subnet(8)).await.unwrap();
    }
    let soon = keys(&etcd);
    sleep(Duration::from_secs(3600)).await;
    neighbour.give_back(&moved, subnet(8)).await.unwrap();

    assert_eq!(soon, [record_key(7), record_key(8), key(7), key(8)]);
    assert_eq!(keys(&etcd), [record_key(7), key(7)]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_vanishes_while_its_host_waits_for_another_address_is_back() {
    let Neighbours { etcd, client, held, .. } = neighbours().await;
    etcd.delete(&key(8));

    let refused = store(&client).publish(&held, &host(2)).await;

    assert!(matches!(refused, Err(StoreError::Twin { .. })), "{refused:?}");
    let leases = store(&client).list().await.unwrap().leases;
    assert!(leases.contains(&held.lease), "{leases:?}");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_starts_and_waits_for_another_address_keeps_its_lease_alive() {
    let Neighbours { client, held, neighbour, theirs, .. } = neighbours().await;

    for boot in ["boot-1", "boot-2", "boot-2"] {
        sleep(Duration::from_secs(50_000)).await;
        neighbour.renew(&theirs).await.unwrap();
        let restarted = store_of(&client, machine("a", boot));
        let refused = restarted.acquire(&config(), &host(2), Some(subnet(8))).await;
        assert!(matches!(refused, Err(StoreError::Twin { .. })), "{refused:?}");
    }

    let leases = store(&client).list().await.unwrap().leases;
    assert!(leases.contains(&held.lease), "{leases:?}");
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_a_disk_does_not_give_up_its_own_subnet_for_one_that_answers() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let original = store_of(&other, machine("a", "boot-1"));
    let theirs = original.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let _answering = tokio::spawn(original.hold(&theirs));
    let before = store_of(&client, machine("a", "boot-2"));
    let before = before.acquire(&config(), &host(2), Some(subnet(8))).await.unwrap();

    // As each boot of the copy begins.
    let copy = store_of(&client, machine("a", "boot-3"));
    let held = copy.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();

    assert_eq!((held.lease.subnet, held.handle), (subnet(8), before.handle));
    original.renew(&theirs).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reservation_of_a_host_that_does_not_answer_stays() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    etcd.put(&key(7), host(2).to_json().as_bytes());
    let record = r#"{"HostID":"b","BootID":"boot-1","Hostname":"b","PublicIP":"192.168.0.2"}"#;
    etcd.put(&record_key(7), record.as_bytes());
    let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();

    let held = store(&client).publish(&held, &host(2)).await.unwrap();
    store(&client).give_back(&held, subnet(7)).await.unwrap();

    assert_eq!(keys(&etcd), [record_key(7), record_key(8), key(7), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn a_subnet_is_not_taken_over_without_the_right_to_see_the_answer() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let twin = store_of(&other, machine("b", "boot-1"));
    let theirs = twin.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let _answering = tokio::spawn(twin.hold(&theirs));
    // The list, what stands there, the question, and then the watch for its answer.
    client.fates([PROMPT, PROMPT, PROMPT, Fate::Answered(Duration::from_secs(1), Duration::ZERO)]);
    let store = store(&client);
    let acquiring = tokio::spawn(async move { store.acquire(&config(), &host(1), None).await });

    sleep(Duration::from_millis(500)).await;
    client.keep_out_of(&format!("{PREFIX}/hosts/"));
    let refused = acquiring.await.unwrap();

    assert!(matches!(refused, Err(StoreError::Refused { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_has_slept_too_long_asks_whether_its_address_is_another_s_by_now() {
    let etcd = SimEtcd::start();
    let (client, other) = (etcd.client(1), etcd.client(2));
    let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    sleep(Duration::from_secs(100_000)).await;
    let neighbour = store_of(&other, machine("b", "boot-1"));
    let theirs = neighbour.acquire(&config(), &host(1), Some(subnet(7))).await.unwrap();
    let _answering = tokio::spawn(neighbour.hold(&theirs));

    let refused = store(&client).publish(&held, &host(1)).await;

    assert!(matches!(refused, Err(StoreError::Twin { .. })), "{refused:?}");
    assert_eq!(keys(&etcd), [record_key(7), key(7)]);
}

#[tokio::test(start_paused = true)]
async fn a_user_who_is_given_the_right_later_answers_from_the_next_renewal_on() {
    for reserved in [false, true] {
        let etcd = SimEtcd::start();
        let client = etcd.client(1);
        client.keep_out_of(&format!("{PREFIX}/hosts/"));
        if reserved {
            etcd.put(&key(8), host(1).to_json().as_bytes());
        }
        let store = store(&client);
        let held = store.acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
        let _answering = tokio::spawn(store.hold(&held));
        store.renew(&held).await.unwrap();
        sleep(Duration::from_secs(10)).await;
        assert_eq!(keys(&etcd), [key(8)]);

        client.let_in();
        store.renew(&held).await.unwrap();
        sleep(Duration::from_secs(10)).await;

        assert_eq!(keys(&etcd), [record_key(8), key(8)]);
        let other = store_of(&etcd.client(2), machine("b", "boot-1"));
        let refused = other.acquire(&config(), &host(1), None).await;
        assert!(matches!(refused, Err(StoreError::Twin { .. })), "{refused:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_another_host_gives_back_in_a_moment_is_not_lost() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let store = store(&client);
    let held = store.acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    let holding = tokio::spawn(store.hold(&held));
    sleep(Duration::from_secs(1)).await;

    let theirs = r#"{"HostID":"b","BootID":"boot-1","Hostname":"b","PublicIP":"192.168.0.2"}"#;
    etcd.bend(&record_key(8), theirs.as_bytes());
    sleep(Duration::from_secs(1)).await;
    etcd.delete(&record_key(8));
    sleep(Duration::from_secs(10)).await;

    assert!(!holding.is_finished());
    assert_eq!(keys(&etcd), [record_key(8), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn nor_is_one_given_back_while_it_is_published() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    let theirs = r#"{"HostID":"b","BootID":"boot-1","Hostname":"b","PublicIP":"192.168.0.2"}"#;
    etcd.bend(&record_key(8), theirs.as_bytes());
    let store = store(&client);
    let publishing = tokio::spawn(async move { store.publish(&held, &host(1)).await });

    sleep(Duration::from_secs(1)).await;
    etcd.delete(&record_key(8));
    let published = publishing.await.unwrap();

    assert_eq!(published.unwrap().lease.subnet, subnet(8));
    assert_eq!(keys(&etcd), [record_key(8), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_without_a_record_is_ours_if_it_names_where_we_are_by_now() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    etcd.bend(&key(8), host(2).to_json().as_bytes());
    etcd.delete(&record_key(8));
    let elsewhere = store(&client).publish(&held, &host(3)).await;
    assert!(matches!(&elsewhere, Err(StoreError::Lost { .. })), "{elsewhere:?}");

    let published = store(&client).publish(&held, &host(2)).await.unwrap();

    assert_eq!((published.lease.subnet, published.handle), (subnet(8), held.handle));
    assert_eq!(keys(&etcd), [record_key(8), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn a_former_subnet_with_our_record_goes_before_one_with_our_address() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let other = store_of(&client, machine("b", "boot-1"));
    other.acquire(&config(), &host(2), Some(subnet(7))).await.unwrap();
    let former = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();

    let held = store(&client).acquire(&config(), &host(2), Some(subnet(8))).await.unwrap();

    assert_eq!((held.lease.subnet, held.handle), (subnet(8), former.handle));
    assert_eq!(keys(&etcd), [record_key(8), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_somebody_deletes_is_back_at_once() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let store = store(&client);
    let held = store.acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    let _answering = tokio::spawn(store.hold(&held));
    sleep(Duration::from_secs(1)).await;

    etcd.delete(&record_key(8));
    sleep(Duration::from_secs(1)).await;

    assert_eq!(keys(&etcd), [record_key(8), key(8)]);
}

#[tokio::test(start_paused = true)]
async fn no_record_of_ours_comes_beside_the_lease_of_another() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let store = store(&client);
    let held = store.acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    let _answering = tokio::spawn(store.hold(&held));
    sleep(Duration::from_secs(1)).await;

    // As a Go flanneld has it, which knows no records.
    etcd.bend(&key(8), host(2).to_json().as_bytes());
    etcd.delete(&record_key(8));
    sleep(Duration::from_secs(10)).await;

    assert_eq!(keys(&etcd), [key(8)]);
}

#[tokio::test(start_paused = true)]
async fn what_was_written_without_an_answer_is_known_for_ours_though_its_record_is_gone() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let store = store(&client);
    let held = store.acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    // The list, what stands there, the term, the renewal, and then the transaction, whose answer is lost.
    let lost = Fate::AnswerLost(Duration::ZERO);
    client.fates([PROMPT, PROMPT, PROMPT, PROMPT, lost]);
    let unanswered = store.publish(&held, &host(2)).await;
    assert!(matches!(unanswered, Err(StoreError::Unreachable { .. })), "{unanswered:?}");
    assert_eq!(store.list().await.unwrap().leases[0].attrs, host(2));
    etcd.delete(&record_key(8));

    let held = store.publish(&held, &host(3)).await.unwrap();

    assert_eq!(store.list().await.unwrap().leases, [held.lease]);
}

#[tokio::test(start_paused = true)]
async fn a_user_who_may_do_nothing_for_a_while_does_not_do_without_records_later() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    let store = store(&client);
    let held = store.acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
    let holding = tokio::spawn(store.hold(&held));
    sleep(Duration::from_secs(1)).await;

    client.denied(true);
    etcd.break_streams();
    sleep(Duration::from_secs(100)).await;
    store.renew(&held).await.unwrap_err();
    let other = store_of(&etcd.client(2), machine("b", "boot-1"));
    other.acquire(&config(), &host(1), None).await.unwrap();
    client.denied(false);

    let lost = timeout(Duration::from_secs(10), holding).await.expect("it is noticed").unwrap();
    assert!(matches!(&lost, StoreError::Lost { subnet: ours, .. } if *ours == subnet(8)), "{lost}");
}

#[tokio::test(start_paused = true)]
async fn a_user_who_may_do_nothing_for_a_moment_goes_on_with_records() {
    // Until after the first request, and until before one that would be without records.
    for (refused, until) in [(false, 1500), (true, 2500)] {
        let etcd = SimEtcd::start();
        let client = etcd.client(1);
        let held = store(&client).acquire(&config(), &host(1), Some(subnet(8))).await.unwrap();
        let store = Arc::new(store(&client));
        let each_in_a_second = Fate::Answered(Duration::from_secs(1), Duration::ZERO);
        client.fates([each_in_a_second; 10]);
        client.denied(true);
        let publishing = tokio::spawn({
            let (store, held) = (store.clone(), held.clone());
            async move { store.publish(&held, &host(1)).await }
        });
        sleep(Duration::from_millis(until)).await;
        client.denied(false);
        assert_eq!(publishing.await.unwrap().is_err(), refused);
        etcd.delete(&record_key(8));

        store.publish(&held, &host(1)).await.unwrap();

        assert_eq!(keys(&etcd), [record_key(8), key(8)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_etcd_has_compacted_in_its_own_revision_is_not_missed() {
    let etcd = SimEtcd::start();
    etcd.put(&key(1), host(1).to_json().as_bytes());
    let client = etcd.client(1);
    let mut watch = store(&client).watch();
    assert!(matches!(watch.next().await, Ok(LeaseEvent::Snapshot(snapshot)) if snapshot.leases.len() == 1));
    let next = tokio::spawn(async move {
        loop {
            if let Ok(event) = watch.next().await {
                return event;
            }
        }
    });
    // Now the watch is open.
    sleep(Duration::from_secs(1)).await;

    client.cut(true);
    etcd.delete(&key(1));
    etcd.compact(0);
    sleep(Duration::from_secs(100)).await;
    client.cut(false);

    let event = timeout(Duration::from_secs(1000), next).await.expect("something is told").unwrap();
    assert!(matches!(&event, LeaseEvent::Snapshot(snapshot) if snapshot.leases.is_empty()), "{event:?}");
}
