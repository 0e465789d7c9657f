//! What one etcd keeps: keys, revisions, leases, history. Told the time, never asking for it.
//!
//! Beside the history that its clients can ask for, which a compaction cuts and
//! a restore forgets, there is the record of all that ever happened, for whoever
//! checks it afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use flannel_etcd::kv::{Answer, Compare, Entry, Happened, Moment, Op, Page, Range, Refusal, Term, Txn};

const INVALID_ARGUMENT: i32 = 3;
const RESOURCE_EXHAUSTED: i32 = 8;

/// Who did something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum By {
    /// The client with that number.
    Client(usize),
    /// The end of an etcd lease.
    Expiry,
    /// A person or a program that is no agent.
    Hand,
}

/// Something that happened, whatever became of the history since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Since the beginning.
    pub at: Duration,
    /// Whose doing it was.
    pub by: By,
    /// What it was.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A key was written; its revision is in the entry.
    Put(Entry),
    /// A key was deleted at that revision.
    Deleted(Vec<u8>, i64),
    /// An etcd lease was granted.
    Granted(i64),
    /// An etcd lease ended.
    Ended(i64),
    /// Another data directory: these are the keys from now on.
    Replaced(Moment, BTreeMap<Vec<u8>, Entry>),
    /// The history up to there was forgotten.
    Compacted(i64),
    /// Something beside the store, in words.
    Said(String),
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12.3}  ", self.at.as_secs_f64())?;
        match self.by {
            By::Client(number) => write!(f, "client {number}  ")?,
            By::Expiry => f.write_str("expiry    ")?,
            By::Hand => f.write_str("          ")?,
        }
        let text = String::from_utf8_lossy;
        match &self.what {
            What::Put(entry) => write!(
                f,
                "{} put {} = {} on {:x}",
                entry.modified,
                text(&entry.key),
                text(&entry.value),
                entry.lease
            ),
            What::Deleted(key, revision) => write!(f, "{revision} delete {}", text(key)),
            What::Granted(id) => write!(f, "grant {id:x}"),
            What::Ended(id) => write!(f, "end {id:x}"),
            What::Replaced(Moment { cluster, term, revision }, keys) => {
                let keys: Vec<_> = keys.keys().map(|key| text(key)).collect();
                write!(f, "now cluster {cluster} term {term} revision {revision} with {}", keys.join(" "))
            }
            What::Compacted(revision) => write!(f, "compacted to {revision}"),
            What::Said(words) => f.write_str(words),
        }
    }
}

/// An etcd lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    ttl: Duration,
    ends: Duration,
    keys: BTreeSet<Vec<u8>>,
}

/// A data directory as it was.
#[derive(Clone)]
pub(super) struct Saved {
    keys: BTreeMap<Vec<u8>, Entry>,
    leases: BTreeMap<i64, Lease>,
    log: Vec<(Duration, Happened)>,
    compacted: i64,
    moment: Moment,
}

/// The store.
pub(super) struct World {
    pub(super) moment: Moment,
    pub(super) keys: BTreeMap<Vec<u8>, Entry>,
    pub(super) leases: BTreeMap<i64, Lease>,
    /// What happened in this data directory, with the time of each change.
    pub(super) log: Vec<(Duration, Happened)>,
    /// The history that clients can ask for begins there.
    pub(super) compacted: i64,
    /// How often the data directory was replaced.
    pub(super) replaced: usize,
    /// Whether the disk is full.
    pub(super) no_space: bool,
    pub(super) record: Vec<Record>,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            moment: Moment { cluster: 1, term: 2, revision: 1 },
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            log: vec![],
            compacted: 0,
            replaced: 0,
            no_space: false,
            record: vec![],
        }
    }

    pub(super) fn note(&mut self, at: Duration, by: By, what: What) {
        self.record.push(Record { at, by, what });
    }

    pub(super) fn range(&self, range: &Range) -> Result<Page, Refusal> {
        let now;
        let keys = if range.revision == 0 || range.revision == self.moment.revision {
            &self.keys
        } else {
            self.reaches(range.revision)?;
            if range.revision > self.moment.revision {
                return Err(refused(
                    Refusal::OUT_OF_RANGE,
                    "etcdserver: mvcc: required revision is a future revision",
                ));
            }
            now = self.keys_at(range.revision);
            &now
        };
        let inside = keys.range(range.from.clone()..).map(|(_, entry)| entry);
        let inside = inside.take_while(|entry| is_in(range, &entry.key));
        let mut entries: Vec<Entry> = inside.cloned().collect();
        let limit = usize::try_from(range.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let more = entries.len() > limit;
        entries.truncate(limit);
        Ok(Page { entries, more, moment: self.moment })
    }

    pub(super) fn txn(&mut self, at: Duration, by: By, txn: &Txn) -> Result<Answer, Refusal> {
        let puts = || {
            txn.then.iter().filter_map(|op| match op {
                Op::Put(key, _, lease) => Some((key, *lease)),
                Op::Delete(_) => None,
            })
        };
        if self.no_space && puts().next().is_some() {
            return Err(no_space());
        }
        let mut written: BTreeSet<&Vec<u8>> = txn.then.iter().filter_map(deleted).collect();
        if !puts().all(|(key, _)| written.insert(key)) {
            return Err(refused(INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request"));
        }
        let succeeded = txn.when.iter().all(|compare| match compare {
            Compare::Absent(key) => !self.keys.contains_key(key),
            Compare::Modified(key, revision) => {
                self.keys.get(key).map_or(0, |entry| entry.modified) == *revision
            }
        });
        if succeeded {
            if puts().any(|(_, lease)| lease != 0 && !self.leases.contains_key(&lease)) {
                return Err(refused(Refusal::NOT_FOUND, "etcdserver: requested lease not found"));
            }
            self.write(at, by, &txn.then);
        }
        let found = txn.read.iter().map(|key| self.keys.get(key).cloned()).collect();
        Ok(Answer { succeeded, found, moment: self.moment })
    }

    /// Writes all of it in one revision, if it changes anything at all.
    pub(super) fn write(&mut self, at: Duration, by: By, ops: &[Op]) {
        let revision = self.moment.revision + 1;
        for op in ops {
            match op {
                Op::Put(key, value, lease) => self.put(at, by, revision, key, value, *lease),
                Op::Delete(key) => self.delete(at, by, revision, key),
            }
        }
    }

    fn put(&mut self, at: Duration, by: By, revision: i64, key: &[u8], value: &[u8], lease: i64) {
        self.moment.revision = revision;
        let former = self.keys.get(key);
        let created = former.map_or(revision, |former| former.created);
        if let Some(former) = former.and_then(|former| self.leases.get_mut(&former.lease)) {
            former.keys.remove(key);
        }
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys.insert(key.to_vec());
        }
        let entry = Entry { key: key.to_vec(), value: value.to_vec(), lease, created, modified: revision };
        self.keys.insert(key.to_vec(), entry.clone());
        self.log.push((at, Happened::Put(entry.clone())));
        self.note(at, by, What::Put(entry));
    }

    fn delete(&mut self, at: Duration, by: By, revision: i64, key: &[u8]) {
        let Some(former) = self.keys.remove(key) else { return };
        self.moment.revision = revision;
        if let Some(lease) = self.leases.get_mut(&former.lease) {
            lease.keys.remove(key);
        }
        self.log.push((at, Happened::Deleted(key.to_vec(), revision)));
        self.note(at, by, What::Deleted(key.to_vec(), revision));
    }

    pub(super) fn grant(&mut self, at: Duration, by: By, id: i64, ttl: i64) -> Result<bool, Refusal> {
        if self.no_space {
            return Err(no_space());
        }
        if self.leases.contains_key(&id) {
            return Ok(false);
        }
        let ttl = Duration::from_secs(ttl.unsigned_abs());
        self.leases.insert(id, Lease { ttl, ends: at + ttl, keys: BTreeSet::new() });
        self.note(at, by, What::Granted(id));
        Ok(true)
    }

    pub(super) fn keep_alive(&mut self, at: Duration, id: i64) -> bool {
        let Some(lease) = self.leases.get_mut(&id) else { return false };
        lease.ends = at + lease.ttl;
        true
    }

    pub(super) fn term(&self, id: i64) -> Option<Term> {
        let lease = self.leases.get(&id)?;
        Some(Term { granted: lease.ttl.as_secs().cast_signed(), keys: lease.keys.len() })
    }

    pub(super) fn revoke(&mut self, at: Duration, by: By, id: i64) {
        let Some(lease) = self.leases.remove(&id) else { return };
        let gone: Vec<Op> = lease.keys.into_iter().map(Op::Delete).collect();
        self.write(at, by, &gone);
        self.note(at, by, What::Ended(id));
    }

    /// When the next etcd lease ends.
    pub(super) fn next_end(&self) -> Option<Duration> {
        self.leases.values().map(|lease| lease.ends).min()
    }

    /// Ends the etcd leases that have run out, each in a revision of its own.
    pub(super) fn expire(&mut self, at: Duration) {
        let mut over: Vec<(Duration, i64)> =
            self.leases.iter().map(|(id, lease)| (lease.ends, *id)).filter(|(ends, _)| *ends <= at).collect();
        over.sort_unstable();
        over.into_iter().for_each(|(_, id)| self.revoke(at, By::Expiry, id));
    }

    /// Another leader: a later term, in which every etcd lease begins anew.
    pub(super) fn elect(&mut self, at: Duration) {
        self.moment.term += 1;
        self.leases.values_mut().for_each(|lease| lease.ends = at + lease.ttl);
    }

    /// Forgets the history before `revision`.
    pub(super) fn compact(&mut self, at: Duration, revision: i64) {
        if revision > self.compacted && revision <= self.moment.revision {
            self.compacted = revision;
            self.note(at, By::Hand, What::Compacted(revision));
        }
    }

    /// The data directory as it is.
    pub(super) fn saved(&self) -> Saved {
        Saved {
            keys: self.keys.clone(),
            leases: self.leases.clone(),
            log: self.log.clone(),
            compacted: self.compacted,
            moment: self.moment,
        }
    }

    /// An empty data directory.
    pub(super) fn wipe(&mut self, at: Duration) {
        let cluster = self.moment.cluster + 1;
        let empty = Saved { moment: Moment { cluster, term: 2, revision: 1 }, ..World::new().saved() };
        self.restore(at, empty);
    }

    /// An earlier data directory, under the cluster and the term that it names.
    pub(super) fn restore(&mut self, at: Duration, saved: Saved) {
        let Saved { keys, leases, log, compacted, moment } = saved;
        (self.keys, self.leases, self.log, self.compacted, self.moment) =
            (keys, leases, log, compacted, moment);
        self.leases.values_mut().for_each(|lease| lease.ends = at + lease.ttl);
        self.replaced += 1;
        self.note(at, By::Hand, What::Replaced(self.moment, self.keys.clone()));
    }

    /// How far it had come by then.
    pub(super) fn revision_at(&self, at: Duration) -> i64 {
        match self.log.iter().find(|(later, _)| *later > at) {
            Some((_, happened)) => revision_of(happened) - 1,
            None => self.moment.revision,
        }
    }

    /// Refuses a revision to which the history does not reach back.
    pub(super) fn reaches(&self, revision: i64) -> Result<(), Refusal> {
        if revision < self.compacted {
            return Err(refused(
                Refusal::OUT_OF_RANGE,
                "etcdserver: mvcc: required revision has been compacted",
            ));
        }
        Ok(())
    }

    fn keys_at(&self, revision: i64) -> BTreeMap<Vec<u8>, Entry> {
        let mut keys = BTreeMap::new();
        for (_, happened) in self.log.iter().filter(|(_, happened)| revision_of(happened) <= revision) {
            match happened {
                Happened::Put(entry) => drop(keys.insert(entry.key.clone(), entry.clone())),
                Happened::Deleted(key, _) => drop(keys.remove(key)),
            }
        }
        keys
    }
}

impl Saved {
    pub(super) fn under(self, cluster: u64, term: u64) -> Self {
        Self { moment: Moment { cluster, term, ..self.moment }, ..self }
    }
}

/// The revision of a change.
pub(super) fn revision_of(happened: &Happened) -> i64 {
    match happened {
        Happened::Put(entry) => entry.modified,
        Happened::Deleted(_, revision) => *revision,
    }
}

/// Whether a range has that key.
pub(super) fn is_in(range: &Range, key: &[u8]) -> bool {
    match &range.end {
        None => key == range.from,
        Some(end) => key >= range.from.as_slice() && key < end.as_slice(),
    }
}

/// Every key that a transaction is about.
pub(super) fn touched(txn: &Txn) -> Vec<&Vec<u8>> {
    let compared = txn.when.iter().map(|compare| match compare {
        Compare::Absent(key) | Compare::Modified(key, _) => key,
    });
    let written = txn.then.iter().map(|op| match op {
        Op::Put(key, ..) | Op::Delete(key) => key,
    });
    compared.chain(written).chain(&txn.read).collect()
}

fn deleted(op: &Op) -> Option<&Vec<u8>> {
    match op {
        Op::Delete(key) => Some(key),
        Op::Put(..) => None,
    }
}

pub(super) fn refused(code: i32, words: &str) -> Refusal {
    Refusal { code, words: words.into() }
}

pub(super) fn denied() -> Refusal {
    refused(Refusal::PERMISSION_DENIED, "etcdserver: permission denied")
}

fn no_space() -> Refusal {
    refused(RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
}
