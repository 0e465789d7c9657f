//! The events of a watch on a real etcd, as long as its connection lasts.
//!
//! A stream that says nothing is the usual case, and one that is dead says
//! nothing either. So a quiet one is asked now and then whether it lives.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Error as EtcdError, Event, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::watch::Receiver;
use tokio::time::timeout;

use crate::call::{Endpoints, Trouble};
use crate::cluster::{entry, moment};
use crate::kv::{Ended, Failure, Happened, KvStream, Opened, Portion, Range, Refusal};

/// How long a stream may say nothing before it is asked whether it lives. A
/// dead connection is found sooner, by HTTP/2 pings; this is for a live
/// connection to a member that has stopped serving.
const QUIET: Duration = Duration::from_secs(60);

/// How long the answer to that may take.
const ANSWER: Duration = Duration::from_secs(10);

/// What etcd says of the answer to a progress request, which is about all
/// watches of a stream at once.
const EVERY_WATCH: i64 = -1;

/// A watch on a real etcd.
pub struct ClusterStream {
    endpoints: Arc<Endpoints>,
    stream: WatchStream,
    /// Changes when all connections are given up.
    given_up: Receiver<usize>,
    /// The endpoint it comes from.
    place: usize,
}

/// Opens a watch on `range` from `range.revision` on.
pub(crate) async fn open(endpoints: &Arc<Endpoints>, range: Range) -> Result<Opened<ClusterStream>, Failure> {
    let given_up = endpoints.gives_up();
    let mut options =
        WatchOptions::new().with_start_revision(range.revision).with_progress_notify().with_fragment();
    if let Some(end) = range.end {
        options = options.with_range(end);
    }
    for first_try in [true, false] {
        let opened = endpoints.call_with_place(|mut clients| {
            let (from, options) = (range.from.clone(), options.clone());
            async move {
                let mut stream = clients.watch.watch(from, Some(options)).await?;
                let created = stream.message().await?;
                let closed = || EtcdError::WatchError("the watch was closed".into());
                Ok((stream, created.ok_or_else(closed)?))
            }
        });
        let ((stream, created), place) = opened.await?;
        let words = created.cancel_reason().to_owned();
        if created.compact_revision() > 0 {
            return Err(Failure::Refused(Refusal { code: Refusal::OUT_OF_RANGE, words }));
        }
        if !created.canceled() {
            let moment = moment(created.header());
            let stream = ClusterStream { endpoints: endpoints.clone(), stream, given_up, place };
            return Ok(Opened { stream, moment });
        }
        // A token that ran out comes to light here, in an answer rather than in an
        // error, and etcd 3.4 says no more of it than "permission denied".
        endpoints.forget(place);
        if !first_try || !endpoints.has_user() {
            // The words hold gRPC's name for the status, and are all there is.
            let denied = words.contains("PermissionDenied") || words.contains("permission denied");
            let code = if denied { Refusal::PERMISSION_DENIED } else { Refusal::FAILED_PRECONDITION };
            return Err(Failure::Refused(Refusal { code, words }));
        }
    }
    unreachable!("the second try returns")
}

impl KvStream for ClusterStream {
    async fn next(&mut self) -> Result<Portion, Ended> {
        let trouble = match self.receive().await {
            Ok(response) => match take(&response) {
                Ok(portion) => return Ok(portion),
                Err(Ended::Compacted) => return Err(Ended::Compacted),
                Err(Ended::Broken(words)) => Trouble::away(words),
            },
            Err(Trouble::Refused(refusal)) if refusal.code == Refusal::OUT_OF_RANGE => {
                return Err(Ended::Compacted);
            }
            Err(trouble) => trouble,
        };
        self.endpoints.leave(self.place, &trouble);
        Err(Ended::Broken(trouble.to_string()))
    }
}

impl ClusterStream {
    async fn receive(&mut self) -> Result<WatchResponse, Trouble> {
        let message = tokio::select! {
            // What the stream has had is not lost with it: the next one begins where this one was.
            Ok(()) = self.given_up.changed() => {
                return Err(Trouble::away("this host has another address"));
            }
            message = timeout(QUIET, self.stream.message()) => message,
        };
        let response = match message {
            Ok(response) => response,
            Err(_) => {
                self.stream.request_progress().await.map_err(Trouble::of)?;
                let silent = |_| Trouble::away("the watch has fallen silent");
                timeout(ANSWER, self.stream.message()).await.map_err(silent)?
            }
        };
        let response = response.map_err(Trouble::of)?.ok_or_else(|| Trouble::away("the watch was closed"))?;
        self.endpoints.hear();
        Ok(response)
    }
}

fn take(response: &WatchResponse) -> Result<Portion, Ended> {
    if response.compact_revision() > 0 {
        return Err(Ended::Compacted);
    }
    if response.canceled() {
        return Err(Ended::Broken(response.cancel_reason().into()));
    }
    let now = moment(response.header());
    let events: Vec<Happened> = response.events().iter().filter_map(happened).collect();
    // The header of a response with events may be ahead of them while the
    // watch catches up. So may the answer to a progress request, in etcd
    // before 3.4.25 and 3.5.8 (etcd-io/etcd#15220): a sign of life, no more.
    let is_progress =
        response.events().is_empty() && !response.created() && response.watch_id() != EVERY_WATCH;
    Ok(Portion { events, up_to: is_progress.then_some(now.revision), term: now.term })
}

fn happened(event: &Event) -> Option<Happened> {
    let kv = event.kv()?;
    Some(match event.event_type() {
        EventType::Put => Happened::Put(entry(kv.clone())),
        EventType::Delete => Happened::Deleted(kv.key().to_vec(), kv.mod_revision()),
    })
}
