//! Everybody's leases, from a list to a stream of changes, for ever.
//!
//! ```text
//!   Empty ──list──▶ Listed ──open──▶ Watching ──▶ events
//!     ▲               ▲                 │ │
//!     │               └── broken off ◀──┘ │
//!     └── history compacted, another etcd ┘
//! ```
//!
//! The watch begins at the revision after the list's, so nothing falls between
//! the two. The list is that by which our own lease was taken, if it is the first. It goes on at the revision of the last event handed out and passes
//! over what it has had of it: etcd may cut one large revision into fragments,
//! and only an event of a later revision shows that one is over.

use std::collections::{BTreeSet, VecDeque};
use std::mem::{Discriminant, discriminant, replace};
use std::sync::Arc;
use std::time::Duration;

use backon::ExponentialBackoff;
use etcd_client::{Event, EventType, WatchOptions, WatchResponse, WatchStream};
use flannel_core::store::{LeaseEvent, LeaseWatch, StoreError};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use crate::call::{Failure, OUT_OF_RANGE, Trouble, delays};
use crate::codec::Layout;
use crate::registry::{Moment, Registry};

/// How long a stream may say nothing before it is asked whether it lives. A
/// dead connection is found sooner, by HTTP/2 pings; this is for a live
/// connection to a member that has stopped serving.
const QUIET: Duration = Duration::from_secs(60);

/// How long the answer to that may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A stream that has lasted that long was a good one.
const STEADY: Duration = Duration::from_secs(5);

/// What etcd says of the answer to a progress request, which is about all
/// watches of a stream at once.
const EVERY_WATCH: i64 = -1;

/// The watch of one etcd prefix.
pub struct EtcdWatch {
    registry: Arc<Registry>,
    state: State,
    queue: VecDeque<LeaseEvent>,
    delays: ExponentialBackoff,
    /// To be slept before the next attempt.
    delay: Option<Duration>,
    /// The kind of error that the caller knows of.
    reported: Option<Discriminant<StoreError>>,
}

enum State {
    Empty,
    Listed(Position),
    Watching(Box<Watching>),
}

/// How much of the history has been handed out.
#[derive(Clone, Debug)]
struct Position {
    /// The cluster and its term; the revision is the one to go on at.
    moment: Moment,
    /// The keys of that revision that have been handed out already.
    delivered: BTreeSet<Vec<u8>>,
}

struct Watching {
    stream: WatchStream,
    /// Changes when all connections are given up.
    given_up: Receiver<usize>,
    /// The endpoint it comes from.
    place: usize,
    opened: Instant,
    position: Position,
}

/// What became of a stream.
enum Fate {
    GoesOn,
    Broken(Trouble),
    /// What we know is not where this history goes on.
    Outdated(&'static str),
}

impl EtcdWatch {
    pub(crate) fn new(registry: Arc<Registry>) -> Self {
        let mut queue = VecDeque::new();
        let mut state = State::Empty;
        if let Some(listing) = registry.first.take() {
            queue.push_back(LeaseEvent::Snapshot(listing.snapshot));
            state = State::Listed(Position::after(listing.moment));
        }
        Self { registry, state, queue, delays: delays(), delay: None, reported: None }
    }

    /// One move of the machine; events come to lie in the queue.
    async fn step(&mut self) -> Result<(), StoreError> {
        if let Some(delay) = self.delay.take() {
            sleep(delay).await;
        }
        // Dropped during one of the awaits below, the machine is left Empty and lists again.
        self.state = match replace(&mut self.state, State::Empty) {
            State::Empty => {
                let listing = self.registry.list().await?;
                self.queue.push_back(LeaseEvent::Snapshot(listing.snapshot));
                State::Listed(Position::after(listing.moment))
            }
            State::Listed(position) => {
                let given_up = self.registry.cluster.gives_up();
                match self.open(&position).await {
                    Ok(Some((stream, place))) => {
                        let opened = Instant::now();
                        State::Watching(Box::new(Watching { stream, given_up, place, opened, position }))
                    }
                    Ok(None) => self.outdated("the history does not go on where we were"),
                    Err(error) => {
                        self.state = State::Listed(position);
                        return Err(error);
                    }
                }
            }
            State::Watching(mut watching) => {
                match watching.receive(&self.registry.layout, &mut self.queue).await {
                    Fate::GoesOn => State::Watching(watching),
                    Fate::Outdated(reason) => self.outdated(reason),
                    Fate::Broken(trouble) => {
                        self.registry.cluster.leave(watching.place, &trouble);
                        if watching.opened.elapsed() > STEADY {
                            self.delays = delays();
                        }
                        self.delay = self.delays.next();
                        State::Listed(watching.position)
                    }
                }
            }
        };
        Ok(())
    }

    fn outdated(&mut self, reason: &'static str) -> State {
        info!(reason, "listing all leases again");
        self.delay = self.delays.next();
        State::Empty
    }

    /// Opens the stream at `position`; `None` if that is not in this history.
    async fn open(&self, position: &Position) -> Result<Option<(WatchStream, usize)>, StoreError> {
        let (registry, moment) = (&self.registry, position.moment);
        let options = WatchOptions::new()
            .with_range(registry.layout.leases_end())
            .with_start_revision(moment.revision)
            .with_progress_notify()
            .with_fragment();
        let operation = || format!("watching {}", registry.layout.leases());
        for first_try in [true, false] {
            let opened = registry
                .cluster
                .call_with_place(|mut clients| {
                    let options = options.clone();
                    async move {
                        let mut stream = clients.watch.watch(registry.layout.leases(), Some(options)).await?;
                        let created = stream.message().await?;
                        Ok((stream, created))
                    }
                })
                .await;
            let ((stream, created), place) = match opened {
                Err(Failure::Refused(refusal)) if refusal.code == OUT_OF_RANGE => {
                    return Ok(None);
                }
                opened => opened.map_err(|failure| failure.of(operation()))?,
            };
            let Some(created) =
                created.filter(|created| !created.canceled() || created.compact_revision() == 0)
            else {
                return Ok(None);
            };
            if !created.canceled() {
                return Ok(position.continues(Moment::of(created.header())).then_some((stream, place)));
            }
            // A token that ran out comes to light here, in an answer rather than
            // as the error on which etcd-client would fetch a new one.
            registry.cluster.forget(place);
            if !first_try || !registry.cluster.has_user() {
                let source = created.cancel_reason().to_owned().into();
                return Err(StoreError::Refused { operation: operation(), source });
            }
        }
        unreachable!("the second try returns")
    }

    fn settled(&mut self) {
        if self.reported.take().is_some() {
            info!("the leases can be watched again");
        }
    }
}

impl LeaseWatch for EtcdWatch {
    async fn next(&mut self) -> Result<LeaseEvent, StoreError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Ok(event);
            }
            match self.step().await {
                Ok(()) => {
                    // A list alone is not health: it may be read where watching is not allowed.
                    if matches!(self.state, State::Watching(_)) {
                        self.settled();
                        if !self.queue.is_empty() {
                            self.delays = delays();
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

impl Position {
    fn after(moment: Moment) -> Self {
        let moment = Moment { revision: moment.revision + 1, ..moment };
        Self { moment, delivered: BTreeSet::new() }
    }

    /// Whether a member whose history has come to `now` is one that we have
    /// seen up to this position. An etcd that was wiped or restored is not.
    fn continues(&self, now: Moment) -> bool {
        let seen = self.moment.revision - i64::from(self.delivered.is_empty());
        now.cluster == self.moment.cluster && now.term >= self.moment.term && now.revision >= seen
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

impl Watching {
    async fn receive(&mut self, layout: &Layout, queue: &mut VecDeque<LeaseEvent>) -> Fate {
        let message = tokio::select! {
            // What the stream has had is not lost with it: the next one begins at the position.
            Ok(()) = self.given_up.changed() => {
                return Fate::Broken(Trouble::away("this host has another address"));
            }
            message = timeout(QUIET, self.stream.message()) => message,
        };
        let response = match message {
            Ok(response) => response,
            Err(_) => {
                if let Err(error) = self.stream.request_progress().await {
                    return Fate::Broken(Trouble::of(error));
                }
                match timeout(ANSWER, self.stream.message()).await {
                    Ok(response) => response,
                    Err(_) => return Fate::Broken(Trouble::away("the watch has fallen silent")),
                }
            }
        };
        match response {
            Ok(Some(response)) => self.take(&response, layout, queue),
            Ok(None) => Fate::Broken(Trouble::away("the watch was closed")),
            Err(error) => match Trouble::of(error) {
                Trouble::Refused(refusal) if refusal.code == OUT_OF_RANGE => {
                    Fate::Outdated("history compacted")
                }
                trouble => Fate::Broken(trouble),
            },
        }
    }

    fn take(&mut self, response: &WatchResponse, layout: &Layout, queue: &mut VecDeque<LeaseEvent>) -> Fate {
        if response.compact_revision() > 0 {
            return Fate::Outdated("history compacted");
        }
        if response.canceled() {
            return Fate::Broken(Trouble::away(response.cancel_reason()));
        }
        let now = Moment::of(response.header());
        self.position.moment.term = self.position.moment.term.max(now.term);
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            if self.position.pass(kv.mod_revision(), kv.key()) {
                queue.extend(decoded(event, layout));
            }
        }
        // The header of a response with events may be ahead of them while the
        // watch catches up. So may the answer to a progress request, in etcd
        // before 3.4.25 and 3.5.8 (etcd-io/etcd#15220): a sign of life, no more.
        if response.events().is_empty() && !response.created() && response.watch_id() != EVERY_WATCH {
            self.position.reached(now.revision);
        }
        Fate::GoesOn
    }
}

fn decoded(event: &Event, layout: &Layout) -> Option<LeaseEvent> {
    let kv = event.kv()?;
    match event.event_type() {
        EventType::Put => Some(match layout.decode(kv) {
            Ok(lease) => LeaseEvent::Put(lease),
            Err(unreadable) => LeaseEvent::Unreadable(unreadable),
        }),
        // A key that was no subnet has never been anything to anybody.
        EventType::Delete => layout.subnet(kv.key()).map(LeaseEvent::Removed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(revision: i64) -> Position {
        Position::after(Moment { cluster: 7, term: 2, revision })
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
    fn an_etcd_that_was_wiped_or_restored_is_not_the_same_history() {
        let position = at(10);
        let now = |cluster, term, revision| position.continues(Moment { cluster, term, revision });

        assert!(now(7, 2, 10));
        assert!(now(7, 3, 12));
        assert!(!now(8, 2, 12), "another cluster");
        assert!(!now(7, 1, 12), "an earlier term");
        assert!(!now(7, 2, 9), "an earlier revision");
    }
}
