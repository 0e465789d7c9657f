//! Users, passwords, tokens and certificates that change while the store is at work, on a real etcd.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::path::PathBuf;
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, StoreError};
use flannel_etcd::{EtcdStore, EtcdWatch, Settings};
use flannel_tests::etcd::{Etcd, Kind, PREFIX, Raw, Wire};
use flannel_tests::leases::{
    config, host, key, key_of, next, plain_store, put_subnet, snapshot, store, subnet,
};
use flannel_tests::{certificates_or_pass, etcd_or_pass};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// As long as credentials are not shown again once they were refused, and a little more.
const PAUSE: Duration = Duration::from_secs(6);

/// A lease on 10.5.1.0/24, and a watch that has nothing more to tell.
async fn at_work(store: &EtcdStore) -> (flannel_core::lease::HeldLease, EtcdWatch) {
    let held = store.acquire(&config(), &host(1), Some(subnet(1))).await.unwrap();
    let mut watch = store.watch();
    snapshot(&mut watch).await;
    assert_eq!(put_subnet(&mut watch).await, held.lease.subnet);
    (held, watch)
}

/// Puts a lease by hand and awaits that and nothing else.
async fn is_told(watch: &mut EtcdWatch, root: &Raw, third: u8) {
    root.put(&key(third), &host(third).to_json(), 0).await;
    let event = next(watch).await;
    assert!(matches!(&event, LeaseEvent::Put(lease) if lease.subnet == subnet(third)), "{event:?}");
}

/// The same across a break of the connection.
async fn is_told_after_a_break(watch: &mut EtcdWatch, wire: &Wire, root: &Raw, third: u8) {
    wire.cut();
    root.put(&key(third), &host(third).to_json(), 0).await;
    wire.mend();
    let event = next(watch).await;
    assert!(matches!(&event, LeaseEvent::Put(lease) if lease.subnet == subnet(third)), "{event:?}");
}

struct PasswordFile {
    _directory: TempDir,
    path: PathBuf,
}

impl PasswordFile {
    fn holding(password: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let file = Self { _directory: directory, path };
        file.write(password);
        file
    }

    fn write(&self, password: &str) {
        std::fs::write(&self.path, format!("{password}\n")).unwrap();
    }

    fn settings(&self, etcd: &Etcd) -> Settings {
        Settings {
            username: Some("flannel".into()),
            password_file: Some(self.path.clone()),
            ..etcd.settings()
        }
    }
}

// ── users ───────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_user_with_flannels_permissions_can_do_all_that_is_needed() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let root = etcd.raw_as_root().await;
    root.put(&format!("{PREFIX}/config"), r#"{"Network":"10.5.0.0/16"}"#, 0).await;
    let store = store(&etcd.settings_for("flannel", "hunter2")).await;

    let config = store.network_config().await.unwrap();
    let held = store.acquire(&config, &host(1), None).await.unwrap();
    let mut watch = store.watch();
    assert_eq!(snapshot(&mut watch).await.leases.len(), 1);
    assert_eq!(put_subnet(&mut watch).await, held.lease.subnet);
    store.renew(&held).await.unwrap();
    root.delete(&key_of(&held)).await;
    assert_eq!(next(&mut watch).await, LeaseEvent::Removed(held.lease.subnet));

    assert_eq!(store.publish(&held, &held.lease.attrs).await.unwrap().lease, held.lease);
}

#[tokio::test]
async fn a_wrong_password_is_refused_in_etcds_words_and_not_shown() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let store = store(&etcd.settings_for("flannel", "correct horse")).await;

    let error = store.network_config().await.unwrap_err();

    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    let shown = format!("{} {error:?}", chain(&error));
    assert!(
        shown.contains("reading /coreos.com/network/config refused: etcdserver: authentication failed"),
        "{shown}"
    );
    assert!(!shown.contains("correct horse"), "{shown}");
}

#[tokio::test]
async fn what_a_user_may_not_do_is_refused_with_the_key() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let settings = Settings { prefix: "/not/ours".into(), ..etcd.settings_for("flannel", "hunter2") };
    let store = store(&settings).await;

    let read = chain(&store.network_config().await.unwrap_err());
    let watched = chain(&store.watch().next().await.unwrap_err());

    let denied = "refused: etcdserver: permission denied; a role of this user has to grant it: etcdctl role grant-permission";
    assert_eq!(read, format!("reading /not/ours/config {denied}"));
    assert_eq!(watched, format!("listing /not/ours/subnets/ {denied}"));
}

#[tokio::test]
async fn no_user_where_one_is_asked_for_is_refused() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;

    let error = chain(&plain_store(&etcd).await.network_config().await.unwrap_err());

    assert!(error.contains("refused: etcdserver: user name is empty"), "{error}");
}

#[tokio::test]
async fn a_user_where_none_is_asked_for_is_no_fault_even_when_that_changes() {
    let etcd = etcd_or_pass!();
    let store = store(&etcd.settings_for("flannel", "hunter2")).await;

    let held = store.acquire(&config(), &host(1), None).await.unwrap();
    etcd.switch_users_on("flannel", "hunter2").await;

    store.renew(&held).await.unwrap();
    store.publish(&held, &held.lease.attrs).await.unwrap();
}

#[tokio::test]
async fn a_token_that_ran_out_is_renewed_by_a_watch_and_by_a_request() {
    let etcd = etcd_or_pass!(Kind::plain().flag("--auth-token-ttl=2"));
    etcd.switch_users_on("flannel", "hunter2").await;
    let store = store(&etcd.settings_for("flannel", "hunter2")).await;
    let held = store.acquire(&config(), &host(1), Some(subnet(1))).await.unwrap();
    let mut watch = store.watch();
    snapshot(&mut watch).await;
    assert_eq!(put_subnet(&mut watch).await, held.lease.subnet);

    // Using a token prolongs it, so there is nothing to ask that would tell.
    sleep(Duration::from_secs(5)).await;
    // The watch is opened only now, with the old token, and nobody hears of that.
    etcd.raw_as_root().await.put(&key(250), &host(250).to_json(), 0).await;
    assert!(matches!(next(&mut watch).await, LeaseEvent::Put(lease) if lease.subnet == subnet(250)));

    sleep(Duration::from_secs(5)).await;
    store.renew(&held).await.unwrap();
}

// ── what changes ────────────────────────────────────────────────────────────

#[tokio::test]
async fn tokens_that_last_five_seconds_are_never_heard_of() {
    let etcd = etcd_or_pass!(Kind::plain().flag("--auth-token-ttl=5"));
    etcd.switch_users_on("flannel", "hunter2").await;
    let root = etcd.raw_as_root().await;
    let settings = etcd.settings_for("flannel", "hunter2");
    let (seldom, often) = (store(&settings).await, store(&settings).await);
    let (held, mut watch) = at_work(&seldom).await;
    let (mut renewed, started) = (Instant::now(), Instant::now());

    let mut third = 2;
    while started.elapsed() < Duration::from_secs(20) {
        is_told(&mut watch, &root, third).await;
        often.renew(&held).await.unwrap();
        // The token of this one has run out each time.
        if renewed.elapsed() > Duration::from_millis(6500) {
            seldom.renew(&held).await.unwrap();
            renewed = Instant::now();
        }
        third = third % 200 + 2;
        sleep(Duration::from_millis(200)).await;
    }

    assert!(matches!(seldom.watch().next().await, Ok(LeaseEvent::Snapshot(_))));
}

#[tokio::test]
async fn a_password_that_is_changed_in_etcd_and_then_in_its_file_costs_no_event() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let root = etcd.raw_as_root().await;
    let file = PasswordFile::holding("hunter2");
    let wire = Wire::to(&etcd).await;
    let store = store(&Settings { endpoints: vec![wire.endpoint()], ..file.settings(&etcd) }).await;
    let (held, mut watch) = at_work(&store).await;

    root.change_password("flannel", "hunter3").await;
    let between = chain(&store.renew(&held).await.unwrap_err());
    is_told(&mut watch, &root, 2).await;
    file.write("hunter3");
    let changed = Instant::now();
    while store.renew(&held).await.is_err() {
        assert!(changed.elapsed() < PAUSE, "it is taken up");
        sleep(Duration::from_millis(50)).await;
    }
    is_told(&mut watch, &root, 3).await;
    is_told_after_a_break(&mut watch, &wire, &root, 4).await;

    assert!(between.ends_with("authentication failed, invalid user ID or password"), "{between}");
}

#[tokio::test]
async fn users_that_are_asked_for_from_now_on_cost_no_event() {
    let etcd = etcd_or_pass!();
    let wire = Wire::to(&etcd).await;
    let settings = etcd.settings_for("flannel", "hunter2");
    let store = store(&Settings { endpoints: vec![wire.endpoint()], ..settings }).await;
    let (held, mut watch) = at_work(&store).await;

    etcd.switch_users_on("flannel", "hunter2").await;
    let root = etcd.raw_as_root().await;
    is_told(&mut watch, &root, 2).await;
    store.renew(&held).await.unwrap();
    is_told_after_a_break(&mut watch, &wire, &root, 3).await;
}

#[tokio::test]
async fn a_password_file_that_is_away_is_named_and_taken_up_when_it_is_back() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let file = PasswordFile::holding("hunter2");
    let store = store(&file.settings(&etcd)).await;
    std::fs::remove_file(&file.path).unwrap();

    let error = chain(&store.list().await.unwrap_err());
    file.write("hunter2");

    let named = format!("--etcd-password-file {}: No such file", file.path.display());
    assert!(error.contains(&named), "{error}");
    store.list().await.unwrap();
}

#[tokio::test]
async fn a_certificate_and_a_ca_that_are_replaced_one_after_the_other_cost_no_event() {
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let certificates = certificates_or_pass!(directory);
    let renewed = certificates_or_pass!(elsewhere);
    let mut etcd = etcd_or_pass!(Kind::tls(&certificates));
    let store = store(&Settings { ca_file: Some(certificates.ca.clone()), ..etcd.settings() }).await;
    let (held, mut watch) = at_work(&store).await;
    let read = |path: &PathBuf| std::fs::read_to_string(path).unwrap();
    let both = read(&certificates.ca) + &read(&renewed.ca);

    let server = [
        (read(&renewed.server_cert), &certificates.server_cert),
        (read(&renewed.server_key), &certificates.server_key),
    ];
    let steps = [vec![(both, &certificates.ca)], server.into(), vec![(read(&renewed.ca), &certificates.ca)]];
    for (number, step) in (2..).zip(steps) {
        for (text, path) in step {
            std::fs::write(path, text).unwrap();
        }
        etcd.kill();
        etcd.start_again().await;

        store.renew(&held).await.unwrap();
        store
            .publish(&held, &flannel_tests::leases::host_with_mac(1, &format!("0e:00:00:00:00:0{number}")))
            .await
            .unwrap();
        // That it was away may be told, and nothing else.
        assert_eq!(put_subnet(&mut watch).await, subnet(1));
    }
}

// ── what is wrong ───────────────────────────────────────────────────────────

#[tokio::test]
async fn a_wrong_password_is_shown_once_in_five_seconds_by_all_together_and_mended_without_a_restart() {
    let etcd = etcd_or_pass!();
    etcd.switch_users_on("flannel", "hunter2").await;
    let root = etcd.raw_as_root().await;
    let (one, other) = (Wire::to(&etcd).await, Wire::to(&etcd).await);
    let endpoints = vec![one.endpoint(), other.endpoint()];
    let store = store(&Settings { endpoints, ..etcd.settings_for("flannel", "hunter3") }).await;
    let refusal = chain(&store.list().await.unwrap_err());
    let (before, started) = (etcd.authentications().await, Instant::now());

    let watching = tokio::spawn({
        let mut watch = store.watch();
        async move {
            let mut told = Vec::new();
            loop {
                match watch.next().await {
                    Ok(event) => return (told, event),
                    Err(error) => told.push(chain(&error)),
                }
            }
        }
    });
    let mut calls = 0;
    while started.elapsed() < Duration::from_secs(12) {
        assert_eq!(chain(&store.list().await.unwrap_err()), refusal);
        calls += 1;
        sleep(Duration::from_millis(20)).await;
    }
    let tries = etcd.authentications().await - before;
    root.change_password("flannel", "hunter3").await;
    let (told, event) =
        timeout(Duration::from_secs(15), watching).await.expect("the watch recovers").unwrap();

    assert!(calls > 200, "the others do not wait: {calls}");
    assert!((1..=2).contains(&tries), "{tries} tries in 12 s");
    assert_eq!(told, [refusal]);
    assert!(matches!(event, LeaseEvent::Snapshot(_)));
    store.list().await.unwrap();
}

// ── certificates ────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_renewed_certificate_is_taken_up_without_a_restart() {
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let certificates = certificates_or_pass!(directory);
    let mut etcd = etcd_or_pass!(Kind::tls(&certificates));
    let store = store(&Settings { ca_file: Some(certificates.ca.clone()), ..etcd.settings() }).await;
    let held = store.acquire(&config(), &host(1), None).await.unwrap();

    let renewed = certificates_or_pass!(elsewhere);
    etcd.kill();
    for (new, old) in [
        (renewed.ca, certificates.ca),
        (renewed.server_cert, certificates.server_cert),
        (renewed.server_key, certificates.server_key),
    ] {
        std::fs::copy(new, old).unwrap();
    }
    etcd.start_again().await;

    store.renew(&held).await.unwrap();
}
