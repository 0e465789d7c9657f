//! What is said to an etcd and answered, as a seam.
//!
//! All that this crate asks of etcd passes here, in its own words: so the same
//! registry and the same watch run against a real cluster and against one in a
//! simulation that can fail at every turn.
//!
//! Any request may reach etcd more than once, or be carried out though its
//! answer is lost: whoever implements this repeats what had no answer.

use std::fmt;
use std::future::Future;

use flannel_core::store::StoreError;
use tokio::time::Instant;

/// Leases and keys of one etcd.
pub trait Kv: Send + Sync + 'static {
    /// How the events of a watch arrive.
    type Stream: KvStream;

    /// The keys of a range, linearizably unless a revision is named.
    fn range(&self, range: Range) -> impl Future<Output = Result<Page, Failure>> + Send;

    /// Compares, then writes or reads, all in one revision.
    fn txn(&self, txn: Txn) -> impl Future<Output = Result<Answer, Failure>> + Send;

    /// A new etcd lease with this id for so many seconds; `false` if there is one with this id.
    fn grant(&self, id: i64, ttl: i64) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Begins a new term of an etcd lease; `false` if it is gone.
    fn keep_alive(&self, id: i64) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// What an etcd lease was granted for, and how many keys hang on it; `None` if it is gone.
    fn term(&self, id: i64) -> impl Future<Output = Result<Option<Term>, Failure>> + Send;

    /// Ends an etcd lease and deletes the keys that hang on it; nothing if it is gone.
    fn revoke(&self, id: i64) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Opens a watch on the keys from `range.from` to `range.end`, beginning with
    /// `range.revision`, 0 for what comes next; a history that does not reach back
    /// so far is refused with [`Refusal::OUT_OF_RANGE`].
    fn watch(&self, range: Range) -> impl Future<Output = Result<Opened<Self::Stream>, Failure>> + Send;

    /// Gives all connections up, those of streams too.
    fn start_over(&self);

    /// When etcd has last said anything, be it "no"; `None` if it never has.
    fn heard(&self) -> Option<Instant>;

    /// Every endpoint, for an error that is about all of them.
    fn endpoints(&self) -> String;
}

/// The events of one watch. Where it ends, [`Kv::watch`] opens another one.
pub trait KvStream: Send + 'static {
    /// The next portion. After an error the stream is over.
    ///
    /// Must not be dropped half-way: events could be lost.
    fn next(&mut self) -> impl Future<Output = Result<Portion, Ended>> + Send;
}

/// A range of keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// The first key.
    pub from: Vec<u8>,
    /// The first key behind it; `None` for `from` alone.
    pub end: Option<Vec<u8>>,
    /// So many keys at most; 0 for all.
    pub limit: i64,
    /// As of that revision; 0 for now. One that is compacted is refused with
    /// [`Refusal::OUT_OF_RANGE`], and so is one that has not come yet.
    pub revision: i64,
}

/// A key as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
    /// The etcd lease that it hangs on, 0 for none.
    pub lease: i64,
    /// When it was created.
    pub created: i64,
    /// When it was last written.
    pub modified: i64,
}

/// A point in the history of one etcd cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// The cluster's id.
    pub cluster: u64,
    /// The term of its leader.
    pub term: u64,
    /// The revision of its store.
    pub revision: i64,
}

/// Part of a range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// In the order of keys.
    pub entries: Vec<Entry>,
    /// Whether the limit cut it.
    pub more: bool,
    /// When that was.
    pub moment: Moment,
}

/// A transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All of these must hold.
    pub when: Vec<Compare>,
    /// What is done then.
    pub then: Vec<Op>,
    /// Keys that are read whatever the outcome, after the writes if there are any.
    pub read: Vec<Vec<u8>>,
}

/// What must hold of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// It is not there.
    Absent(Vec<u8>),
    /// It was last written at that revision.
    Modified(Vec<u8>, i64),
}

/// A write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Key, value, and the etcd lease to hang it on, 0 for none. One that is
    /// gone has the whole transaction refused with [`Refusal::NOT_FOUND`].
    Put(Vec<u8>, Vec<u8>, i64),
    /// The key goes.
    Delete(Vec<u8>),
}

/// The answer to a transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Whether everything held and was written.
    pub succeeded: bool,
    /// The keys that were read, in the order asked for.
    pub found: Vec<Option<Entry>>,
    /// When that was.
    pub moment: Moment,
}

/// What an etcd lease was granted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// In seconds.
    pub granted: i64,
    /// How many keys hang on it.
    pub keys: usize,
}

/// A watch that is open.
#[derive(Debug)]
pub struct Opened<S> {
    /// Its events.
    pub stream: S,
    /// How far the history had come.
    pub moment: Moment,
}

/// Some events, in the order of revisions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Portion {
    /// What happened; none in a portion that only tells how far the history has come.
    pub events: Vec<Happened>,
    /// The history up to this revision has been told; `None` if that cannot be
    /// said, as while a watch catches up.
    pub up_to: Option<i64>,
    /// The term of the leader.
    pub term: u64,
}

/// What happened to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// It was written.
    Put(Entry),
    /// It was deleted at that revision.
    Deleted(Vec<u8>, i64),
}

/// Why a stream is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The history no longer reaches back to where it was.
    Compacted,
    /// Anything else, as a phrase.
    Broken(String),
}

/// Why a request came to nothing, however often it was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No endpoint answered.
    Away {
        /// All of them.
        endpoints: String,
        /// What each of them met last.
        words: String,
    },
    /// One of them said no.
    Refused(Refusal),
}

/// etcd's answer to a request that it will not carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The gRPC status.
    pub code: i32,
    /// etcd's own words.
    pub words: String,
}

impl Refusal {
    // The status codes of gRPC, https://grpc.io/docs/guides/status-codes/.
    /// No such etcd lease.
    pub const NOT_FOUND: i32 = 5;
    /// The user may not.
    pub const PERMISSION_DENIED: i32 = 7;
    /// There is an etcd lease with this id; also, nobody asks for a user.
    pub const FAILED_PRECONDITION: i32 = 9;
    /// A revision that is compacted, or has not come yet.
    pub const OUT_OF_RANGE: i32 = 11;
}

impl Failure {
    /// Whether it was refused with this code.
    pub(crate) fn is(&self, code: i32) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.code == code)
    }

    /// In the words of the seam above; `operation` is what was asked, with the key.
    pub(crate) fn of(self, operation: impl Into<String>) -> StoreError {
        match self {
            Self::Away { endpoints, words } => StoreError::Unreachable { endpoints, source: words.into() },
            Self::Refused(refusal) => {
                let words = format!("{}{}", refusal.words, refusal.remedy());
                StoreError::Refused { operation: operation.into(), source: words.into() }
            }
        }
    }
}

impl Refusal {
    /// What to do about it, where etcd's words do not say so.
    fn remedy(&self) -> &'static str {
        if self.words.contains("database space exceeded") {
            "; see etcdctl alarm list, then compact, defrag and alarm disarm"
        } else if self.code == Self::PERMISSION_DENIED {
            "; a role of this user has to grant it: etcdctl role grant-permission"
        } else {
            ""
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compacted => f.write_str("history compacted"),
            Self::Broken(words) => f.write_str(words),
        }
    }
}
