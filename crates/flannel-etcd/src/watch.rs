//! Everybody's leases, from a list to a stream of changes, for ever.
//!
//! ```text
//!   Empty ──list──▶ Listed ──open──▶ Watching ──▶ events
//!     ▲                               │   ▲ │
//!     │                    broken off ▼   │ │
//!     ├── not the same ◀── Broken ──proof─┘ │
//!     └── history compacted ◀───────────────┘
//! ```
//!
//! The watch begins at the revision after the list's, so nothing falls between
//! the two. The list is that by which our own lease was taken, if it is the first.
//! It goes on at the revision of the last event handed out and passes over what it
//! has had of it: etcd may cut one large revision into fragments, and only an event
//! of a later revision shows that one is over. And it goes on only where the
//! history is still the one that we know.
//!
//! While there is no stream nothing is said of it, for there is another one in a
//! moment most of the time; but not for longer than anybody may be left in the
//! belief that the leases are watched.

use std::collections::{BTreeSet, VecDeque};
use std::mem::{Discriminant, discriminant, replace};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use backon::ExponentialBackoff;
use flannel_core::lease::Subnet;
use flannel_core::store::{LeaseEvent, LeaseWatch, StoreError};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info};

use crate::call::{STEADY, delays};
use crate::cluster::Cluster;
use crate::codec::Layout;
use crate::connect::SILENCE;
use crate::kv::{Ended, Failure, Happened, Kv, KvStream, Moment, Opened, Portion, Range, Refusal};
use crate::registry::Registry;
use crate::trace::Trace;

/// How long etcd may say nothing until that is told, if nobody watches.
const UNTOLD: Duration = Duration::from_secs(9);

/// The watch of one etcd prefix.
pub struct EtcdWatch<K: Kv = Cluster> {
    registry: Arc<Registry<K>>,
    state: State<K::Stream>,
    queue: VecDeque<LeaseEvent>,
    delays: ExponentialBackoff,
    /// To be slept before the next attempt.
    delay: Option<Duration>,
    /// When the caller is to know that there is no stream, unless etcd says something.
    tell: Option<Instant>,
    /// The kind of error that the caller knows of.
    reported: Option<Discriminant<StoreError>>,
}

enum State<S> {
    Empty,
    Listed(Position),
    /// A stream has ended, or could not be opened: what is there now may be something else.
    Broken(Position),
    Watching(Box<Watching<S>>),
}

/// How much of the history has been handed out.
#[derive(Clone, Debug)]
struct Position {
    /// The cluster and its term; the revision is the one to go on at.
    moment: Moment,
    /// The keys of that revision that have been handed out already.
    delivered: BTreeSet<Vec<u8>>,
    /// What the history is known by.
    trace: Trace,
}

struct Watching<S> {
    stream: S,
    opened: Instant,
    position: Position,
}

impl<K: Kv> EtcdWatch<K> {
    pub(crate) fn new(registry: Arc<Registry<K>>) -> Self {
        let mut queue = VecDeque::new();
        let mut state = State::Empty;
        if let Some(listing) = registry.first.take() {
            queue.push_back(LeaseEvent::Snapshot(listing.snapshot));
            state = State::Listed(Position::after(listing.moment, listing.trace));
        }
        Self { registry, state, queue, delays: delays(), delay: None, tell: None, reported: None }
    }

    /// One move of the machine; events come to lie in the queue.
    async fn step(&mut self) -> Result<(), StoreError> {
        let tell = self.tell();
        if let Some(delay) = self.delay.take() {
            sleep(delay).await;
        }
        // Dropped during one of the awaits below, the machine is left Empty and lists again.
        self.state = match replace(&mut self.state, State::Empty) {
            State::Empty => {
                let listing = in_time(tell, &self.registry.kv, self.registry.list()).await?;
                self.queue.push_back(LeaseEvent::Snapshot(listing.snapshot));
                State::Listed(Position::after(listing.moment, listing.trace))
            }
            State::Listed(position) => self.open(position, false, tell).await?,
            State::Broken(position) => self.open(position, true, tell).await?,
            State::Watching(mut watching) => match watching.stream.next().await {
                Ok(portion) => {
                    watching.take(portion, &self.registry.layout, &mut self.queue);
                    State::Watching(watching)
                }
                Err(Ended::Compacted) => self.outdated("history compacted"),
                Err(Ended::Broken(reason)) => {
                    debug!(reason, "the watch has ended");
                    // It may have been dead for as long as that takes to notice.
                    self.tell = Some(Instant::now() + UNTOLD.saturating_sub(SILENCE));
                    if watching.opened.elapsed() > STEADY {
                        self.delays = delays();
                    }
                    self.delay = self.delays.next();
                    State::Broken(watching.position)
                }
            },
        };
        Ok(())
    }

    async fn open(
        &mut self,
        position: Position,
        broken: bool,
        tell: Option<Instant>,
    ) -> Result<State<K::Stream>, StoreError> {
        match in_time(tell, &self.registry.kv, open(&self.registry, &position, broken)).await {
            Ok(Some(stream)) => {
                Ok(State::Watching(Box::new(Watching { stream, opened: Instant::now(), position })))
            }
            Ok(None) => Ok(self.outdated("the history does not go on where we were")),
            Err(error) => {
                self.state = State::Broken(position);
                Err(error)
            }
        }
    }

    /// When the move that comes is to end, if there is no stream and the caller does not know.
    fn tell(&mut self) -> Option<Instant> {
        let is_untold = self.reported.is_none() && !matches!(self.state, State::Watching(_));
        is_untold.then(|| *self.tell.get_or_insert_with(|| Instant::now() + UNTOLD))
    }

    fn outdated(&mut self, reason: &'static str) -> State<K::Stream> {
        info!(reason, "listing all leases again");
        self.delay = self.delays.next();
        State::Empty
    }
}

impl<K: Kv> LeaseWatch for EtcdWatch<K> {
    async fn next(&mut self) -> Result<LeaseEvent, StoreError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                // The caller may take its time.
                self.tell = None;
                return Ok(event);
            }
            match self.step().await {
                Ok(()) => {
                    // A list alone is not health: it may be read where watching is not allowed.
                    if matches!(self.state, State::Watching(_)) {
                        self.tell = None;
                        if !self.queue.is_empty() {
                            self.delays = delays();
                        }
                        if self.reported.take().is_some() {
                            info!("the leases can be watched again");
                            self.queue.push_back(LeaseEvent::Resumed);
                        }
                    }
                }
                Err(error) => {
                    self.delay = self.delays.next();
                    let kind = discriminant(&error);
                    if self.reported.replace(kind) != Some(kind) {
                        return Err(error);
                    }
                    debug!(%error, "still not watching the leases");
                }
            }
        }
    }
}

/// What `work` comes to, or an error at `tell` if etcd has said nothing for too long by then.
async fn in_time<K: Kv, T>(
    tell: Option<Instant>,
    kv: &K,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let Some(mut tell) = tell else { return work.await };
    let mut work = pin!(work);
    loop {
        if let Ok(answer) = timeout_at(tell, &mut work).await {
            return answer;
        }
        match kv.heard() {
            Some(heard) if heard + UNTOLD > tell => tell = heard + UNTOLD,
            _ => break,
        }
    }
    let source = format!("nothing heard for {} s", UNTOLD.as_secs());
    Err(StoreError::Unreachable { endpoints: kv.endpoints(), source: source.into() })
}

/// Opens the stream at `position`; `None` if that is not in this history.
async fn open<K: Kv>(
    registry: &Registry<K>,
    position: &Position,
    broken: bool,
) -> Result<Option<K::Stream>, StoreError> {
    let range = Range { revision: position.moment.revision, ..registry.layout.all_leases() };
    let failed = |failure: Failure| failure.of(format!("watching {}", registry.layout.leases()));
    let Opened { stream, moment } = match registry.kv.watch(range).await {
        Err(failure) if failure.is(Refusal::OUT_OF_RANGE) => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    // A member that lags behind says less than it will know: only a proof tells it from another history.
    let continues =
        !broken && position.continues(moment) || position.is_proved(&registry.kv).await.map_err(failed)?;
    Ok(continues.then_some(stream))
}

impl Position {
    fn after(moment: Moment, trace: Trace) -> Self {
        let moment = Moment { revision: moment.revision + 1, ..moment };
        Self { moment, delivered: BTreeSet::new(), trace }
    }

    /// The last moment that we know.
    fn seen(&self) -> Moment {
        let revision = self.moment.revision - i64::from(self.delivered.is_empty());
        Moment { revision, ..self.moment }
    }

    /// Whether a member whose history has come to `now` may be one that we have
    /// seen up to this position. An etcd that was wiped is not.
    fn continues(&self, now: Moment) -> bool {
        let seen = self.seen();
        now.cluster == seen.cluster && now.term >= seen.term && now.revision >= seen.revision
    }

    /// Whether the history there is the one that we have seen, beyond doubt.
    async fn is_proved<K: Kv>(&self, kv: &K) -> Result<bool, Failure> {
        self.trace.is_of(kv, self.seen()).await
    }

    /// Takes note of an event; `false` if it has been handed out before.
    fn pass(&mut self, revision: i64, key: &[u8]) -> bool {
        if revision > self.moment.revision {
            self.moment.revision = revision;
            self.delivered.clear();
        }
        revision == self.moment.revision && self.delivered.insert(key.to_vec())
    }

    /// Takes note that everything up to `revision` has been handed out.
    fn reached(&mut self, revision: i64) {
        if revision >= self.moment.revision {
            self.moment.revision = revision + 1;
            self.delivered.clear();
        }
    }
}

impl<S> Watching<S> {
    fn take(&mut self, portion: Portion, layout: &Layout, queue: &mut VecDeque<LeaseEvent>) {
        self.position.moment.term = self.position.moment.term.max(portion.term);
        let mut removed = (0, Vec::new());
        for event in &portion.events {
            let (key, revision) = match event {
                Happened::Put(entry) => (&entry.key, entry.modified),
                Happened::Deleted(key, revision) => (key, *revision),
            };
            if !self.position.pass(revision, key) {
                continue;
            }
            match event {
                Happened::Put(entry) => self.position.trace.put(entry),
                Happened::Deleted(key, revision) => self.position.trace.deleted(key, *revision),
            }
            // No revision touches a key twice, so within one the order is of no matter.
            if removed.0 != revision {
                queue.extend(removal(removed.1));
                removed = (revision, Vec::new());
            }
            match decoded(event, layout) {
                Some(LeaseEvent::Removed(subnet)) => removed.1.push(subnet),
                told => queue.extend(told),
            }
        }
        queue.extend(removal(removed.1));
        if let Some(revision) = portion.up_to {
            self.position.reached(revision);
        }
    }
}

/// What is told of the leases that went in one revision.
fn removal(subnets: Vec<Subnet>) -> Option<LeaseEvent> {
    match *subnets.as_slice() {
        [] => None,
        [subnet] => Some(LeaseEvent::Removed(subnet)),
        _ => Some(LeaseEvent::RemovedTogether(subnets)),
    }
}

fn decoded(event: &Happened, layout: &Layout) -> Option<LeaseEvent> {
    match event {
        Happened::Put(entry) => Some(match layout.decode(entry) {
            Ok(lease) => LeaseEvent::Put(lease),
            Err(unreadable) => LeaseEvent::Unreadable(unreadable),
        }),
        // A key that was no subnet has never been anything to anybody.
        Happened::Deleted(key, _) => layout.subnet(key).map(LeaseEvent::Removed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(revision: i64) -> Position {
        Position::after(Moment { cluster: 7, term: 2, revision }, Trace::default())
    }

    #[test]
    fn after_a_list_the_watch_begins_at_the_next_revision() {
        assert_eq!(at(10).moment.revision, 11);
    }

    #[test]
    fn an_event_that_comes_again_is_passed_over() {
        let mut position = at(10);

        assert!(position.pass(12, b"a"));
        assert!(!position.pass(12, b"a"));
        assert!(position.pass(12, b"b"));
        assert!(!position.pass(11, b"c"));
    }

    #[test]
    fn a_revision_that_may_be_cut_short_is_asked_for_again() {
        let mut position = at(10);

        position.pass(12, b"a");

        assert_eq!(position.moment.revision, 12);
    }

    #[test]
    fn progress_moves_the_position_on_but_never_back() {
        let mut position = at(10);

        position.reached(20);
        position.reached(15);

        assert_eq!(position.moment.revision, 21);
    }

    #[test]
    fn an_etcd_that_was_wiped_is_not_the_same_history() {
        let position = at(10);
        let now = |cluster, term, revision| position.continues(Moment { cluster, term, revision });

        assert!(now(7, 2, 10));
        assert!(now(7, 3, 12));
        assert!(!now(8, 2, 12), "another cluster");
        assert!(!now(7, 1, 12), "an earlier term");
        assert!(!now(7, 2, 9), "an earlier revision");
    }
}
