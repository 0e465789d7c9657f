//! Which host it is that holds a subnet: fencing.
//!
//! A public address does not tell two hosts apart: there are copied disks, and
//! addresses given twice. So beside each lease of ours stands a record of the
//! host, on the same etcd lease and written in the same transaction:
//!
//! ```text
//!   <prefix>/subnets/10.5.2.0-24      {"PublicIP":…}             flannel's, read by all
//!   <prefix>/hosts/10.5.2.0-24        {"HostID":…,"BootID":…}    ours
//!   <prefix>/hosts/10.5.2.0-24/asks   {"HostID":…,"BootID":…}    "are you alive?"
//! ```
//!
//! A record of this very machine is ours at once. One of another machine with
//! our address, or of this one before it booted, may be nobody's any more, and
//! its holder, if it lives, watches it:
//!
//! ```text
//!   newcomer ── puts asks ──▶ holder deletes asks ──▶ two hosts, one address: Twin
//!                        └──▶ 3 s, and asks is as it was ──▶ the lease is taken over
//! ```
//!
//! Whoever comes to an address with a subnet of its own asks the same of a lease
//! elsewhere that names this address, and deletes it if nobody answers, unless it is
//! a reservation. If somebody does, the newcomer's record tells where it is, though
//! its lease may not yet; so those who exchange addresses see that the other one has
//! left, and do not wait for each other.
//!
//! The last word has the transaction that takes over, which compares all three
//! keys; what is watched meanwhile only makes the answer come sooner. A key
//! without a record, or with one on another etcd lease, was written by a Go
//! flanneld, and there the address has to do. So it has where a user may not
//! touch `hosts/`.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use flannel_core::json::Object;
use flannel_core::lease::{HostIdentity, Lease, LeaseAttrs, RawJson, Subnet};
use flannel_core::shown::shown;
use flannel_core::store::StoreError;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use crate::call::{STEADY, delays};
use crate::codec::attributes;
use crate::kv::{Answer, Compare, Entry, Failure, Happened, Kv, KvStream, Op, Range, Refusal, Txn};
use crate::registry::{Registry, Standing, unchanged};

/// How long a holder has to answer. One that lives answers in milliseconds; one
/// that is away from etcd for longer has an address that somebody else has, too.
const ANSWER: Duration = Duration::from_secs(3);

/// Askers that have been named already; anybody may write there, without end.
const NAMED: usize = 100;

/// Who holds a lease, as the record beside it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) host: HostIdentity,
    address: String,
}

/// Whom a record names.
pub(crate) enum Recorded {
    /// There is none for this lease.
    Nobody,
    Us,
    /// Another machine, or this one before it booted.
    Them(Record),
}

impl Record {
    pub(crate) fn of(host: &HostIdentity, attrs: &LeaseAttrs) -> Self {
        Self { host: host.clone(), address: Self::address(attrs) }
    }

    fn address(attrs: &LeaseAttrs) -> String {
        let v4 = attrs.public_ip.map(|address| address.to_string());
        let v6 = || attrs.public_ipv6.map(|address| address.to_string());
        v4.or_else(v6).unwrap_or_default()
    }

    pub(crate) fn to_json(&self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Value<'a> {
            #[serde(rename = "HostID")]
            host: &'a str,
            #[serde(rename = "BootID")]
            boot: &'a str,
            hostname: &'a str,
            #[serde(rename = "PublicIP")]
            address: &'a str,
        }
        let Self { host: HostIdentity { id, boot, name }, address } = self;
        RawJson::of(&Value { host: id, boot, hostname: name, address }).as_str().into()
    }

    /// `None` if it is not a record: then it says nothing.
    fn read(entry: &Entry) -> Option<Self> {
        let value = Object::parse("", std::str::from_utf8(&entry.value).ok()?).ok()?;
        let text = |key: &str| Some(value.text(key).ok()?.unwrap_or_default());
        // Anybody may have written this, and it is going to be shown.
        let shown = |text: String| if text.is_empty() { text } else { shown(&text) };
        let id = text("HostID").filter(|id| !id.is_empty())?;
        let host = HostIdentity { id: shown(id), boot: text("BootID")?, name: shown(text("Hostname")?) };
        Some(Self { host, address: shown(text("PublicIP")?) })
    }

    /// Whether it says that its host is elsewhere than a host with `attrs`: one that waits for
    /// another address has its lease name the former one meanwhile.
    pub(crate) fn is_elsewhere(&self, attrs: &LeaseAttrs) -> bool {
        !self.address.is_empty() && self.address != Self::address(attrs)
    }

    /// The host, for people.
    pub(crate) fn words(&self) -> String {
        format!("{} at {}", self.host, self.address)
    }
}

impl<K: Kv> Registry<K> {
    /// Who we are, as long as there are records.
    pub(crate) fn fenced(&self) -> Option<&HostIdentity> {
        self.host.as_ref().filter(|_| !self.unfenced.load(Ordering::Relaxed))
    }

    /// Does a transaction that is built for a host with records, or without them
    /// if the user may not touch them.
    pub(crate) async fn fenced_txn(
        &self,
        build: impl Fn(Option<&HostIdentity>) -> Txn,
    ) -> Result<Answer, Failure> {
        let Some(host) = self.fenced() else { return self.kv.txn(build(None)).await };
        for _ in 0..2 {
            match self.kv.txn(build(Some(host))).await {
                Err(failure) if failure.is(Refusal::PERMISSION_DENIED) => {}
                answer => return answer,
            }
            // A user who may not touch anything just now is told so here, and it is not about records.
            self.kv.range(Range { from: self.layout.config().into(), ..Range::default() }).await?;
        }
        let answer = self.kv.txn(build(None)).await?;
        self.unfence();
        Ok(answer)
    }

    /// There are no records for us until the next renewal.
    fn unfence(&self) {
        self.unfenced.store(true, Ordering::Relaxed);
        if self.host.is_some() && !self.said_unfenced.swap(true, Ordering::Relaxed) {
            let hosts = self.layout.hosts();
            warn!(
                "etcd does not let this user write below {hosts}, so another host with our address would not be \
                 noticed; to allow it: etcdctl role grant-permission ROLE --prefix=true readwrite {hosts}"
            );
        }
    }

    /// Forgets that there are no records for us: the permission may have been given since.
    pub(crate) fn fence_again(&self) {
        if self.unfenced.swap(false, Ordering::Relaxed) {
            self.fence_again.notify_waiters();
        }
    }

    /// Whom the record at a subnet names, if it is about the lease that stands there.
    pub(crate) fn recorded(&self, standing: &Standing) -> Recorded {
        let record = standing.key.as_ref().zip(standing.record.as_ref());
        let record = record.filter(|(key, record)| key.lease == record.lease);
        match self.fenced().zip(record.and_then(|(_, record)| Record::read(record))) {
            None => Recorded::Nobody,
            Some((host, record)) if record.host.is_same_machine(host) => Recorded::Us,
            Some((_, record)) => Recorded::Them(record),
        }
    }

    /// Puts our record beside a lease of ours that has none, as one that a Go
    /// flanneld or an older version took. It is put back with the next renewal
    /// if not now, so what goes wrong is not worth a word.
    pub(crate) async fn keep_record(&self, subnet: &Subnet, attrs: &LeaseAttrs, standing: &Standing) {
        let Some((host, key)) = self.fenced().zip(standing.key.as_ref()) else { return };
        let value = Record::of(host, attrs).to_json();
        let is_there = |record: &Entry| record.value == value.as_bytes() && record.lease == key.lease;
        let is_ours = attributes(&key.value).is_ok_and(|theirs| theirs.same_host(attrs));
        if standing.record.as_ref().is_some_and(is_there) || !is_ours {
            return;
        }
        let record = self.layout.record(subnet);
        let written = self.kv.txn(Txn {
            when: vec![
                unchanged(&self.layout.lease(subnet), &standing.key),
                unchanged(&record, &standing.record),
            ],
            then: vec![Op::Put(record.into(), value.into(), key.lease)],
            read: vec![],
        });
        let written = written.await;
        debug!(%subnet, ?written, "put our record back");
    }

    /// Whether a record is of this host, before it booted or on a copy of its disk.
    pub(crate) fn is_our_id(&self, them: &Record) -> bool {
        self.host.as_ref().is_some_and(|host| host.id == them.host.id)
    }

    /// Asks the holder of a subnet whether it lives, and waits for as long as it
    /// may take to answer; the revision of the question, or `None` if something
    /// else has happened there.
    pub(crate) async fn ask(
        &self,
        subnet: Subnet,
        standing: &Standing,
        them: &Record,
        attrs: &LeaseAttrs,
    ) -> Result<Option<i64>, StoreError> {
        let Some(host) = self.fenced() else { return Ok(None) };
        let (key, record) = (self.layout.lease(&subnet), self.layout.record(&subnet));
        let asks = self.layout.asks(&subnet);
        // It ends with what it is about.
        let lease = standing.record.as_ref().map_or(0, |record| record.lease);
        let put = Op::Put(asks.clone().into(), Record::of(host, attrs).to_json().into(), lease);
        let txn = Txn {
            when: vec![
                unchanged(&key, &standing.key),
                unchanged(&record, &standing.record),
                Compare::Absent(asks.clone().into()),
            ],
            then: vec![put],
            read: vec![key.into(), record.into(), asks.clone().into()],
        };
        let answer = match self.kv.txn(txn).await {
            Err(failure) if failure.is(Refusal::NOT_FOUND) => return Ok(None),
            answer => answer.map_err(|failure| failure.of(format!("asking by {asks}")))?,
        };
        let (since, now) = (answer.moment.revision, Standing::of(answer));
        // A question that somebody else has asked, or we before a crash, is as good as ours.
        let Some(question) = now.asks.as_ref().filter(|_| now.is_held_as(standing)) else {
            return Ok(None);
        };
        let holder = them.words();
        // Two hosts may stay at one address for days.
        let last = self.asked.lock().unwrap_or_else(PoisonError::into_inner).replace(holder.clone());
        if last.as_ref() != Some(&holder) {
            info!(%subnet, holder, "asking whether the host lives that has our address, or our id");
        }
        let answered = timeout(ANSWER, self.stirred(&subnet, since)).await.is_ok();
        debug!(%subnet, holder, answered, "asked");
        Ok(Some(question.modified))
    }

    /// Resolves when something happens to the record of `subnet`, or to a question there, after `since`.
    async fn stirred(&self, subnet: &Subnet, since: i64) {
        let keys = self.layout.record_keys(subnet);
        if let Ok(opened) =
            self.kv.watch(Range { revision: since + 1, ..self.layout.around_record(subnet) }).await
        {
            let mut stream = opened.stream;
            while let Ok(portion) = stream.next().await {
                if portion.events.iter().any(|event| concerns(event, &keys)) {
                    return;
                }
            }
        }
        // Whoever waits has a limit, and looks for itself when it is over.
        std::future::pending().await
    }

    /// Resolves when the other host that has our subnet has done something about it, or after a
    /// while: in a store that was restored it may find one too many of its own.
    pub(crate) async fn given_back(&self, subnet: &Subnet, standing: &Standing) {
        let given_back = timeout(ANSWER, self.stirred(subnet, standing.moment.revision)).await.is_ok();
        debug!(%subnet, given_back, "another host has our subnet");
    }

    /// The holder that answered, for whoever asked.
    pub(crate) fn twin(&self, subnet: Subnet, them: &Record, attrs: &LeaseAttrs) -> StoreError {
        let us = self.host.as_ref().map(|host| Record::of(host, attrs).words()).unwrap_or_default();
        StoreError::Twin { subnet, us, them: them.words() }
    }

    /// Answers whoever asks for the holder of a lease, until that is somebody else.
    pub(crate) async fn hold(self: Arc<Self>, lease: Lease) -> StoreError {
        let subnet = lease.subnet;
        let mut named = BTreeSet::new();
        let mut delays = delays();
        loop {
            let mut again = pin!(self.fence_again.notified());
            again.as_mut().enable();
            if self.fenced().is_none() {
                again.await;
            }
            let began = Instant::now();
            match self.hold_while_connected(&lease, &mut named).await {
                Ok(Some(holder)) => return StoreError::Lost { subnet, holder: Some(holder) },
                Ok(None) if began.elapsed() > STEADY => delays = crate::call::delays(),
                Ok(None) => {}
                Err(failure) => debug!(?failure, %subnet, "nobody can ask us just now"),
            }
            sleep(delays.next().unwrap_or(ANSWER)).await;
        }
    }

    /// The same until the connection breaks; who holds it then, if somebody else does.
    async fn hold_while_connected(
        &self,
        lease: &Lease,
        named: &mut BTreeSet<String>,
    ) -> Result<Option<String>, Failure> {
        let subnet = lease.subnet;
        let keys = self.layout.record_keys(&subnet);
        let mut standing = self.standing(&subnet).await?;
        let since = Range { revision: standing.moment.revision + 1, ..self.layout.around_record(&subnet) };
        let (mut stream, mut patient) = (None, true);
        loop {
            if standing.record.is_none() {
                // Without one whoever has our address is taken for us.
                self.keep_record(&subnet, &lease.attrs, &standing).await;
            }
            // Looked at before the watch is open, so that a question is answered that was asked meanwhile.
            if let Some(holder) = self.look(subnet, &standing, named).await? {
                if !std::mem::take(&mut patient) {
                    return Ok(Some(holder));
                }
                self.given_back(&subnet, &standing).await;
                standing = self.standing(&subnet).await?;
                continue;
            }
            let stream = match &mut stream {
                Some(stream) => stream,
                None => stream.insert(self.kv.watch(since.clone()).await?.stream),
            };
            loop {
                let Ok(portion) = stream.next().await else { return Ok(None) };
                if portion.events.iter().any(|event| concerns(event, &keys)) {
                    break;
                }
            }
            standing = self.standing(&subnet).await?;
        }
    }

    /// Answers a question about a record of ours; tells who holds the subnet if somebody else does.
    async fn look(
        &self,
        subnet: Subnet,
        standing: &Standing,
        named: &mut BTreeSet<String>,
    ) -> Result<Option<String>, Failure> {
        match self.recorded(standing) {
            Recorded::Nobody => return Ok(None),
            Recorded::Us => {}
            Recorded::Them(them) => return Ok(Some(them.words())),
        }
        let Some(question) = &standing.asks else { return Ok(None) };
        let (record, asks) = (self.layout.record(&subnet), self.layout.asks(&subnet));
        let txn = Txn {
            when: vec![
                unchanged(&record, &standing.record),
                Compare::Modified(asks.clone().into(), question.modified),
            ],
            then: vec![Op::Delete(asks.into())],
            read: vec![],
        };
        if !self.kv.txn(txn).await?.succeeded {
            return Ok(None);
        }
        let asker = Record::read(question).map_or_else(|| "somebody".into(), |asker| asker.words());
        if named.len() < NAMED && named.insert(asker.clone()) {
            warn!(
                %subnet, asker,
                "another host wants our address or our subnet: it has our public address, or a copy of our disk; told it \
                 that we live"
            );
        }
        Ok(None)
    }
}

fn concerns(event: &Happened, keys: &[Vec<u8>; 2]) -> bool {
    match event {
        Happened::Put(Entry { key, .. }) | Happened::Deleted(key, _) => keys.contains(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let host = HostIdentity { id: "0a1b".into(), boot: "b-1".into(), name: "alpha".into() };
        Record { host, address: "192.168.0.1".into() }
    }

    fn entry(value: &str) -> Entry {
        Entry { key: vec![], value: value.into(), lease: 7, created: 1, modified: 1 }
    }

    #[test]
    fn a_record_is_written_and_reads_back_equal() {
        let json = record().to_json();

        assert_eq!(json, r#"{"HostID":"0a1b","BootID":"b-1","Hostname":"alpha","PublicIP":"192.168.0.1"}"#);
        assert_eq!(Record::read(&entry(&json)), Some(record()));
    }

    #[test]
    fn what_is_no_record_says_nothing() {
        for value in
            ["", "{}", "[]", "junk", r#"{"HostID":""}"#, r#"{"HostID":7}"#, r#"{"HostID":"a","BootID":1}"#]
        {
            assert_eq!(Record::read(&entry(value)), None, "{value}");
        }
    }

    #[test]
    fn what_somebody_wrote_there_is_shown_without_control_characters_and_not_without_end() {
        let value = format!(r#"{{"HostID":"a","Hostname":"\u001b[2J\n{}"}}"#, "x".repeat(1000));

        let words = Record::read(&entry(&value)).unwrap().words();

        assert!(words.starts_with(r"\u{1b}[2J\nxxx") && words.len() < 100, "{words}");
    }
}
