//! What a history is known by, when a connection to it was broken.
//!
//! An etcd that was restored from a backup keeps its cluster id, and its revision
//! may have overtaken ours by the time we see it again. Then revisions that we
//! know have become others, and a watch that went on would never tell. So the
//! newest entry that we have seen is asked for as of the revision that we have
//! come to, and so is the newest deletion if it is newer. Nothing older needs to
//! be asked for: a backup that has the newest has all before it.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::kv::{Entry, Failure, Kv, Moment, Range, Refusal};

/// The newest of what was seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    put: Option<Print>,
    deleted: Option<(Vec<u8>, i64)>,
}

/// As much of an entry as it is recognised by.
#[derive(Clone, Debug)]
struct Print {
    key: Vec<u8>,
    modified: i64,
    rest: u64,
}

impl Print {
    fn of(entry: &Entry) -> Self {
        let mut hasher = DefaultHasher::new();
        (&entry.value, entry.lease, entry.created).hash(&mut hasher);
        Self { key: entry.key.clone(), modified: entry.modified, rest: hasher.finish() }
    }

    fn is(&self, entry: &Entry) -> bool {
        let Self { key, modified, rest } = Self::of(entry);
        self.key == key && self.modified == modified && self.rest == rest
    }
}

impl Trace {
    pub(crate) fn put(&mut self, entry: &Entry) {
        if self.put.as_ref().is_none_or(|put| put.modified <= entry.modified) {
            self.put = Some(Print::of(entry));
        }
        if self.deleted.as_ref().is_some_and(|(_, revision)| *revision < entry.modified) {
            self.deleted = None;
        }
    }

    pub(crate) fn deleted(&mut self, key: &[u8], revision: i64) {
        if self.put.as_ref().is_some_and(|put| put.key == key) {
            self.put = None;
        }
        self.deleted = Some((key.to_vec(), revision));
    }

    /// Whether the history there, as of `seen`, is the one of this trace; not if that cannot be told.
    pub(crate) async fn is_of<K: Kv>(&self, kv: &K, seen: Moment) -> Result<bool, Failure> {
        let Some(put) = &self.put else { return Ok(false) };
        let put_stands = match found(kv, &put.key, seen).await? {
            Some(entries) => matches!(entries.as_slice(), [entry] if put.is(entry)),
            None => false,
        };
        match &self.deleted {
            Some((key, _)) if put_stands => {
                Ok(found(kv, key, seen).await?.is_some_and(|entries| entries.is_empty()))
            }
            _ => Ok(put_stands),
        }
    }
}

/// What a key was at a revision; `None` if that is compacted, has not come, or is of another cluster.
async fn found<K: Kv>(kv: &K, key: &[u8], seen: Moment) -> Result<Option<Vec<Entry>>, Failure> {
    match kv.range(Range { from: key.to_vec(), revision: seen.revision, ..Range::default() }).await {
        Ok(page) => {
            let same = page.moment.cluster == seen.cluster && page.moment.term >= seen.term;
            Ok(same.then_some(page.entries))
        }
        Err(failure) if failure.is(Refusal::OUT_OF_RANGE) => Ok(None),
        Err(failure) => Err(failure),
    }
}
