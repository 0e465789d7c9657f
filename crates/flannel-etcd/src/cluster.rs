//! A real etcd cluster behind the seam: our words into etcd-client's and back.

use std::sync::Arc;

use etcd_client::{
    Compare as EtcdCompare, CompareOp, Error as EtcdError, GetOptions, KeyValue, LeaseGrantOptions,
    LeaseTimeToLiveOptions, PutOptions, ResponseHeader, Txn as EtcdTxn, TxnOp, TxnOpResponse,
};
use tokio::time::Instant;

use crate::call::Endpoints;
use crate::connect::{Dial, Settings, SettingsError};
use crate::kv::{Answer, Compare, Entry, Failure, Kv, Moment, Op, Opened, Page, Range, Refusal, Term, Txn};
use crate::stream::{self, ClusterStream};

/// An etcd cluster, reached by one of several endpoints.
#[derive(Clone)]
pub struct Cluster(Arc<Endpoints>);

impl Cluster {
    /// Checks the settings; nothing is sent yet.
    ///
    /// # Errors
    /// A setting that cannot work, named by its flag.
    #[doc(hidden)]
    pub async fn connect(settings: &Settings) -> Result<Self, SettingsError> {
        Ok(Self::new(Dial::new(settings).await?))
    }

    pub(crate) fn new(dial: Dial) -> Self {
        Self(Arc::new(Endpoints::new(dial)))
    }
}

impl Kv for Cluster {
    type Stream = ClusterStream;

    async fn range(&self, range: Range) -> Result<Page, Failure> {
        let Range { from, end, limit, revision } = range;
        let mut options = GetOptions::new().with_limit(limit).with_revision(revision);
        if let Some(end) = end {
            options = options.with_range(end);
        }
        let answer = self.0.call(|mut clients| {
            let (from, options) = (from.clone(), options.clone());
            async move { clients.kv.get(from, Some(options)).await }
        });
        let mut answer = answer.await?;
        Ok(Page {
            more: answer.more(),
            moment: moment(answer.header()),
            entries: answer.take_kvs().into_iter().map(entry).collect(),
        })
    }

    async fn txn(&self, Txn { when, then, read }: Txn) -> Result<Answer, Failure> {
        let when: Vec<EtcdCompare> = when
            .into_iter()
            .map(|compare| match compare {
                Compare::Absent(key) => EtcdCompare::create_revision(key, CompareOp::Equal, 0),
                Compare::Modified(key, revision) => {
                    EtcdCompare::mod_revision(key, CompareOp::Equal, revision)
                }
            })
            .collect();
        let then = then.into_iter().map(|op| match op {
            Op::Put(key, value, lease) => TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease))),
            Op::Delete(key) => TxnOp::delete(key, None),
        });
        let reads: Vec<TxnOp> = read.into_iter().map(|key| TxnOp::get(key, None)).collect();
        let then: Vec<TxnOp> = then.chain(reads.iter().cloned()).collect();
        let transaction = EtcdTxn::new().when(when).and_then(then).or_else(reads);
        let answer = self.0.call(|mut clients| {
            let transaction = transaction.clone();
            async move { clients.kv.txn(transaction).await }
        });
        let answer = answer.await?;
        let reads = answer.op_responses().into_iter().filter_map(|answer| match answer {
            TxnOpResponse::Get(get) => Some(get),
            _ => None,
        });
        Ok(Answer {
            succeeded: answer.succeeded(),
            found: reads.map(|mut get| get.take_kvs().pop().map(entry)).collect(),
            moment: moment(answer.header()),
        })
    }

    async fn grant(&self, id: i64, ttl: i64) -> Result<bool, Failure> {
        let granted = self.0.call(|mut clients| async move {
            clients.lease.grant(ttl, Some(LeaseGrantOptions::new().with_id(id))).await
        });
        found(granted.await, Refusal::FAILED_PRECONDITION).map(|granted| granted.is_some())
    }

    async fn keep_alive(&self, id: i64) -> Result<bool, Failure> {
        let kept = self.0.call(|mut clients| async move {
            match clients.lease.keep_alive(id).await {
                Ok(_) => Ok(true),
                Err(EtcdError::LeaseKeepAliveError(words)) if words == "lease not found" => Ok(false),
                Err(error) => Err(error),
            }
        });
        found(kept.await, Refusal::NOT_FOUND).map(|kept| kept.unwrap_or(false))
    }

    async fn term(&self, id: i64) -> Result<Option<Term>, Failure> {
        let keys = LeaseTimeToLiveOptions::new().with_keys();
        let answer = self.0.call(|mut clients| {
            let keys = keys.clone();
            async move { clients.lease.time_to_live(id, Some(keys)).await }
        });
        let answer = found(answer.await, Refusal::NOT_FOUND)?;
        Ok(answer
            .filter(|answer| answer.ttl() > 0)
            .map(|answer| Term { granted: answer.granted_ttl(), keys: answer.keys().len() }))
    }

    async fn revoke(&self, id: i64) -> Result<(), Failure> {
        let revoked = self.0.call(|mut clients| async move { clients.lease.revoke(id).await });
        found(revoked.await, Refusal::NOT_FOUND).map(drop)
    }

    async fn watch(&self, range: Range) -> Result<Opened<ClusterStream>, Failure> {
        stream::open(&self.0, range).await
    }

    fn start_over(&self) {
        self.0.start_over();
    }

    fn heard(&self) -> Option<Instant> {
        self.0.heard()
    }

    fn endpoints(&self) -> String {
        self.0.names()
    }
}

/// The answer, or `None` if it was refused with this code, which says as much as an answer.
fn found<T>(answer: Result<T, Failure>, code: i32) -> Result<Option<T>, Failure> {
    match answer {
        Err(failure) if failure.is(code) => Ok(None),
        answer => answer.map(Some),
    }
}

pub(crate) fn moment(header: Option<&ResponseHeader>) -> Moment {
    header.map_or_else(Moment::default, |header| Moment {
        cluster: header.cluster_id(),
        term: header.raft_term(),
        revision: header.revision(),
    })
}

pub(crate) fn entry(kv: KeyValue) -> Entry {
    let (lease, created, modified) = (kv.lease(), kv.create_revision(), kv.mod_revision());
    let (key, value) = kv.into_key_value();
    Entry { key, value, lease, created, modified }
}
