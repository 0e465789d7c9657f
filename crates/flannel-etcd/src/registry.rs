//! The requests, each one thing said to etcd and its answer.
//!
//! Any of them may reach etcd twice (see `call`), so each is made to bear it:
//! an etcd lease is granted under an id of our choosing, and a transaction that
//! finds its own work already done counts as done.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use flannel_core::lease::{HostIdentity, Lease, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{Snapshot, StoreError};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::codec::Layout;
use crate::hosts::Record;
use crate::kv::{Answer, Compare, Entry, Failure, Kv, Moment, Op, Range, Refusal, Term, Txn};
use crate::lease::Said;
use crate::trace::Trace;

/// The term of a lease in seconds, flannel's 24 hours.
pub(crate) const TERM: i64 = 86_400;

/// A larger page is no faster, a smaller one is slower: etcd counts the rest of
/// the range for every page.
pub(crate) const PAGE: i64 = 10_000;

/// How often a list is begun again because its revision was compacted before
/// the last page was read.
const LISTS: usize = 5;

/// How often an etcd lease that is there and then is not is asked for again.
const GRANTS: usize = 3;

/// What flannel keeps under one prefix of one etcd.
pub(crate) struct Registry<K> {
    pub(crate) kv: K,
    pub(crate) layout: Layout,
    pub(crate) page: i64,
    /// Who we are, if other hosts with our address are to be told from us.
    pub(crate) host: Option<HostIdentity>,
    /// Whether that cannot be done for want of a permission, as far as we know since the last renewal.
    pub(crate) unfenced: AtomicBool,
    /// Whether that has been said.
    pub(crate) said_unfenced: AtomicBool,
    /// It may be that it can be done again.
    pub(crate) fence_again: Notify,
    /// What the first watch begins with.
    pub(crate) first: First,
    /// What we have sent to be written and had no answer to, the last one last: any of it may
    /// stand there yet, later than we would wait.
    pub(crate) unanswered: Mutex<Vec<(Subnet, LeaseAttrs)>>,
    /// The holder that was asked last whether it lives, in the words of the log.
    pub(crate) asked: Mutex<Option<String>>,
    /// A lease whose holder has left our address without being able to say so, and since when we know.
    pub(crate) left: Mutex<Option<(Subnet, Instant)>>,
}

/// The listing that a lease was taken by, for the first watch to go on from:
/// with many hosts starting at once, each list less counts.
#[derive(Default)]
pub(crate) struct First {
    watched: AtomicBool,
    listing: Mutex<Option<Listing>>,
}

impl First {
    /// Keeps a listing if there is no watch yet, with our own lease in it, which came later.
    pub(crate) fn keep(&self, mut listing: Listing, own: &Lease) {
        if !self.watched.load(Ordering::Acquire) {
            listing.snapshot.leases.retain(|lease| lease.subnet != own.subnet);
            listing.snapshot.unreadable.retain(|key| key.subnet != Some(own.subnet));
            listing.snapshot.leases.push(own.clone());
            *self.listing.lock().unwrap_or_else(PoisonError::into_inner) = Some(listing);
        }
    }

    /// The listing, for the first who asks.
    pub(crate) fn take(&self) -> Option<Listing> {
        self.watched.store(true, Ordering::Release);
        self.listing.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// All leases, and when that was.
pub(crate) struct Listing {
    pub(crate) snapshot: Snapshot,
    pub(crate) moment: Moment,
    /// What this history is known by.
    pub(crate) trace: Trace,
}

/// What stands at a subnet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Standing {
    /// The lease.
    pub(crate) key: Option<Entry>,
    /// The record of the host that holds it.
    pub(crate) record: Option<Entry>,
    /// Another host's question whether that one lives.
    pub(crate) asks: Option<Entry>,
    /// When that was.
    pub(crate) moment: Moment,
}

impl Standing {
    pub(crate) fn of(answer: Answer) -> Self {
        let mut found = answer.found.into_iter();
        let mut next = || found.next().flatten();
        Self { key: next(), record: next(), asks: next(), moment: answer.moment }
    }

    /// What has become of a write over `then` that was not carried out.
    fn after(&self, question: Option<i64>, then: &Self) -> Written {
        let answered = question.is_some() && self.asks.is_none() && self.is_held_as(then);
        if answered { Written::Answered } else { Written::Not }
    }

    /// Whether lease and record have not been written since `then`.
    pub(crate) fn is_held_as(&self, then: &Self) -> bool {
        let modified = |entry: &Option<Entry>| entry.as_ref().map(|entry| entry.modified);
        modified(&self.key) == modified(&then.key) && modified(&self.record) == modified(&then.record)
    }
}

/// That `key` is as it was found.
pub(crate) fn unchanged(key: &str, found: &Option<Entry>) -> Compare {
    match found {
        Some(entry) => Compare::Modified(key.into(), entry.modified),
        None => Compare::Absent(key.into()),
    }
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    Done,
    /// Something else stands there.
    Not,
    /// Nothing else stands there, and whoever holds it has answered our question.
    Answered,
}

impl<K: Kv> Registry<K> {
    pub(crate) async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let key = self.layout.config();
        let found = self.read(key).await?.ok_or_else(|| StoreError::NoConfig { key: key.into() })?;
        // Go reads bytes that are no UTF-8 as U+FFFD.
        NetworkConfig::parse(&String::from_utf8_lossy(&found.value))
            .map_err(|source| StoreError::BadConfig { key: key.into(), source })
    }

    /// All leases at one revision, however many pages that takes.
    pub(crate) async fn list(&self) -> Result<Listing, StoreError> {
        for _ in 0..LISTS {
            match self.list_once().await {
                Err(failure) if failure.is(Refusal::OUT_OF_RANGE) => {}
                answer => {
                    return answer.map_err(|failure| failure.of(format!("listing {}", self.layout.leases())));
                }
            }
        }
        Err(StoreError::Unreachable {
            endpoints: self.kv.endpoints(),
            source: "the history is compacted faster than the leases can be listed".into(),
        })
    }

    async fn list_once(&self) -> Result<Listing, Failure> {
        let mut snapshot = Snapshot::default();
        let mut moment: Option<Moment> = None;
        let mut trace = Trace::default();
        let mut range = Range { limit: self.page, ..self.layout.all_leases() };
        loop {
            let page = self.kv.range(range.clone()).await?;
            let moment = *moment.get_or_insert(page.moment);
            for entry in &page.entries {
                trace.put(entry);
                match self.layout.decode(entry) {
                    Ok(lease) => snapshot.leases.push(lease),
                    Err(unreadable) => snapshot.unreadable.push(unreadable),
                }
            }
            match page.entries.into_iter().last() {
                Some(last) if page.more => {
                    range.from = last.key;
                    range.from.push(0);
                    range.revision = moment.revision;
                }
                _ => return Ok(Listing { snapshot, moment, trace }),
            }
        }
    }

    async fn read(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let page = self.kv.range(Range { from: key.into(), ..Range::default() }).await;
        let page = page.map_err(|failure| failure.of(format!("reading {key}")))?;
        Ok(page.entries.into_iter().next())
    }

    /// What stands at a subnet now.
    pub(crate) async fn read_standing(&self, subnet: &Subnet) -> Result<Standing, StoreError> {
        let standing = self.standing(subnet).await;
        standing.map_err(|failure| failure.of(format!("reading {}", self.layout.lease(subnet))))
    }

    pub(crate) async fn standing(&self, subnet: &Subnet) -> Result<Standing, Failure> {
        let read = |host: Option<&HostIdentity>| self.layout.keys_of(subnet, host.is_some());
        self.fenced_txn(|host| Txn { read: read(host), ..Txn::default() }).await.map(Standing::of)
    }

    /// Whether a question that we asked is not answered yet, and nothing else has happened.
    pub(crate) async fn is_unanswered(
        &self,
        subnet: Subnet,
        then: &Standing,
        question: i64,
    ) -> Result<bool, StoreError> {
        let now = self.read_standing(&subnet).await?;
        let stands = now.asks.as_ref().is_some_and(|asks| asks.modified == question);
        Ok(stands && now.is_held_as(then))
    }

    /// Publishes what we say on a subnet, with our record beside it, all of it hanging on `handle`, and
    /// over nothing but what stood there. Nothing is written that is right already.
    pub(crate) async fn write(
        &self,
        subnet: &Subnet,
        said: Said<'_>,
        handle: i64,
        over: &Standing,
        question: Option<i64>,
    ) -> Result<Written, StoreError> {
        let (key, record) = (self.layout.lease(subnet), self.layout.record(subnet));
        let value = said.attrs.to_json();
        let our_record = |host: &HostIdentity| Record::of(host, said.place).to_json();
        let is = |entry: &Option<Entry>, value: &str| {
            entry.as_ref().is_some_and(|entry| entry.value == value.as_bytes() && entry.lease == handle)
        };
        let stands = |standing: &Standing, host: Option<&HostIdentity>| {
            is(&standing.key, &value) && host.is_none_or(|host| is(&standing.record, &our_record(host)))
        };
        if question.is_none() && stands(over, self.fenced()) {
            return Ok(Written::Done);
        }
        let answer = self.txn_after(question, |host| {
            let mut txn = Txn { read: self.layout.keys_of(subnet, host.is_some()), ..Txn::default() };
            txn.when.push(unchanged(&key, &over.key));
            if !is(&over.key, &value) {
                txn.then.push(Op::Put(key.clone().into(), value.clone().into(), handle));
            }
            let Some(host) = host else { return txn };
            // A record without a key is nobody's.
            if over.key.is_some() {
                txn.when.push(unchanged(&record, &over.record));
            }
            if !is(&over.record, &our_record(host)) {
                txn.then.push(Op::Put(record.clone().into(), our_record(host).into(), handle));
            }
            if let Some(revision) = question {
                let asks = self.layout.asks(subnet);
                txn.when.push(Compare::Modified(asks.clone().into(), revision));
                txn.then.push(Op::Delete(asks.into()));
            }
            txn
        });
        let answer = match answer.await {
            // The etcd lease ran out meanwhile: as much a lost race as any other.
            Err(failure) if failure.is(Refusal::NOT_FOUND) => return Ok(Written::Not),
            answer => answer.map_err(|failure| failure.of(format!("writing {key}")))?,
        };
        let (succeeded, now) = (answer.succeeded, Standing::of(answer));
        // An earlier attempt may have been carried out though its answer was lost.
        if succeeded || stands(&now, self.fenced()) {
            return Ok(Written::Done);
        }
        Ok(now.after(question, over))
    }

    /// Deletes a lease and its record, if they are still as they were found and a question that we
    /// asked is not answered. Of a reservation only the question goes.
    pub(crate) async fn delete(
        &self,
        subnet: &Subnet,
        found: &Standing,
        question: Option<i64>,
    ) -> Result<Written, StoreError> {
        let (key, record) = (self.layout.lease(subnet), self.layout.record(subnet));
        let is_leased = found.key.as_ref().is_some_and(|found| found.lease != 0);
        let answer = self.txn_after(question, |host| {
            let mut txn = Txn { read: self.layout.keys_of(subnet, host.is_some()), ..Txn::default() };
            txn.when.push(unchanged(&key, &found.key));
            if is_leased {
                txn.then.push(Op::Delete(key.clone().into()));
            }
            if host.is_some() && found.record.is_some() {
                txn.when.push(unchanged(&record, &found.record));
                if is_leased {
                    txn.then.push(Op::Delete(record.clone().into()));
                }
            }
            if let (Some(_), Some(revision)) = (host, question) {
                let asks = self.layout.asks(subnet);
                txn.when.push(Compare::Modified(asks.clone().into(), revision));
                txn.then.push(Op::Delete(asks.into()));
            }
            txn
        });
        let answer = answer.await.map_err(|failure| failure.of(format!("deleting {key}")))?;
        let (succeeded, now) = (answer.succeeded, Standing::of(answer));
        // An earlier attempt may have been carried out though its answer was lost.
        if succeeded || now.key.is_none() {
            return Ok(Written::Done);
        }
        Ok(now.after(question, found))
    }

    /// Does a transaction that may hang on a question: then not without records, or it would be
    /// carried out whether there was an answer or not.
    async fn txn_after(
        &self,
        question: Option<i64>,
        build: impl Fn(Option<&HostIdentity>) -> Txn,
    ) -> Result<Answer, Failure> {
        match question {
            Some(_) => self.kv.txn(build(self.host.as_ref())).await,
            None => self.fenced_txn(build).await,
        }
    }

    /// An etcd lease of one term for this host. Its id is the same each time, so
    /// that one which a crash left without a key is found again.
    pub(crate) async fn grant(&self, attrs: &LeaseAttrs) -> Result<i64, StoreError> {
        let grant = async |id| {
            self.kv.grant(id, TERM).await.map_err(|failure| failure.of(format!("granting etcd lease {id:x}")))
        };
        if let Some(id) = self.own_id(attrs) {
            for _ in 0..GRANTS {
                if grant(id).await? {
                    return Ok(id);
                }
                match self.granted_term(id).await? {
                    Some(TERM) if self.keep_alive(id).await? => return Ok(id),
                    // It has ended meanwhile.
                    Some(TERM) | None => {}
                    // Then it is not ours.
                    Some(_) => break,
                }
            }
        }
        let id = fastrand::i64(1..);
        // Nobody else draws the same 63 bits: one that is there already is an earlier attempt of ours.
        grant(id).await?;
        Ok(id)
    }

    /// The id of the etcd lease of this host at its address. The hash may be
    /// another one with another release of Rust; what the former one left then
    /// runs out within a day.
    fn own_id(&self, attrs: &LeaseAttrs) -> Option<i64> {
        let host = self.host.as_ref()?;
        let mut hasher = DefaultHasher::new();
        (&host.id, attrs.public_ip, attrs.public_ipv6, self.layout.config()).hash(&mut hasher);
        let id = i64::try_from(hasher.finish() >> 1).expect("63 bits are no more than i64 has");
        Some(id.max(1))
    }

    /// Begins a new term of an etcd lease; `false` if it is gone.
    pub(crate) async fn keep_alive(&self, id: i64) -> Result<bool, StoreError> {
        let kept = self.kv.keep_alive(id).await;
        kept.map_err(|failure| failure.of(format!("keeping etcd lease {id:x} alive")))
    }

    /// The term an etcd lease was granted for; `None` if it is gone.
    pub(crate) async fn granted_term(&self, id: i64) -> Result<Option<i64>, StoreError> {
        let term = self.kv.term(id).await;
        let term = term.map_err(|failure| failure.of(format!("asking for the term of etcd lease {id:x}")))?;
        Ok(term.map(|term| term.granted))
    }

    /// Ends an etcd lease if no key hangs on it, since they would go with it.
    /// A lease that stays costs etcd a little until it runs out, so whatever
    /// goes wrong here is not worth a word to the caller.
    ///
    /// Our own one, that of the host with `attrs`, stays: it is used again, and a
    /// request that reaches etcd late, by a member that was stopped, would take
    /// the key along that hangs on it by then.
    pub(crate) async fn revoke_if_bare(&self, id: i64, attrs: &LeaseAttrs) {
        if self.own_id(attrs) != Some(id) && matches!(self.kv.term(id).await, Ok(Some(Term { keys: 0, .. })))
        {
            let revoked = self.kv.revoke(id).await;
            tracing::debug!(id = format!("{id:x}"), done = revoked.is_ok(), "revoked an etcd lease");
        }
    }
}
