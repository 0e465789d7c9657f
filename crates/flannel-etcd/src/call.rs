//! One request to one of several endpoints: deadlines, moving on, trying again.
//!
//! etcd-client spreads requests over its endpoints but repeats none of them, so
//! with one endpoint of two away every other request fails. Here each endpoint
//! has clients of its own and one endpoint is the current one:
//!
//! ```text
//!   attempt at the current one ──▶ answer           it stays current
//!        │
//!        └▶ none within 5 s, refused, broken ──▶ the next endpoint, at once
//!               └▶ all have been tried ──▶ a delay, again, until 3 s are over
//! ```
//!
//! So every request that passes here may reach etcd more than once, and is made
//! such that this does no harm.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use etcd_client::Error as EtcdError;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use crate::connect::{Clients, Dial};
use crate::gate::Gate;
use crate::kv::{Failure, Refusal};

/// How long one endpoint has for one answer.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(5);

/// How long a request is tried again once every endpoint has failed it: the
/// time of an election with etcd's usual settings, and then some.
const PATIENCE: Duration = Duration::from_secs(3);

/// A stream that has lasted that long was a good one: the delays begin anew.
pub(crate) const STEADY: Duration = Duration::from_secs(5);

// The status codes of gRPC, https://grpc.io/docs/guides/status-codes/.
const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;
const DEADLINE_EXCEEDED: i32 = 4;
const RESOURCE_EXHAUSTED: i32 = 8;
const INTERNAL: i32 = 13;
const UNAVAILABLE: i32 = 14;

/// Why one attempt came to nothing.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    /// No answer; another endpoint or a later moment may have one.
    Away {
        /// What was met.
        words: String,
        /// Whether the connection is to blame rather than the member behind it.
        connection: bool,
    },
    /// An answer: no.
    Refused(Refusal),
}

impl Trouble {
    pub(crate) fn away(words: impl Into<String>) -> Self {
        Self::Away { words: words.into(), connection: true }
    }

    pub(crate) fn of(error: EtcdError) -> Self {
        let status = match error {
            EtcdError::GRpcStatus(status) => status,
            EtcdError::TransportError(error) => return Self::away(innermost(&error)),
            other => return Self::away(other.to_string()),
        };
        let (code, words) = (status.code() as i32, status.message());
        let said_by_etcd =
            ["etcdserver", "auth:", "lease", "mvcc"].iter().any(|start| words.starts_with(start));
        let away = match code {
            UNAVAILABLE | DEADLINE_EXCEEDED => true,
            CANCELLED | UNKNOWN | INTERNAL => !said_by_etcd,
            RESOURCE_EXHAUSTED => words.contains("too many requests"),
            _ => false,
        };
        match away {
            true if said_by_etcd => Self::Away { words: words.into(), connection: false },
            true => Self::away(status.source().map_or_else(|| words.into(), innermost)),
            false => Self::Refused(Refusal { code, words: words.into() }),
        }
    }

    /// Whether etcd itself has said so.
    fn is_answer(&self) -> bool {
        !matches!(self, Self::Away { connection: true, .. })
    }

    /// Whether new credentials may turn this into an answer: the token ran out,
    /// or users and roles were changed or switched on since it was given.
    fn wants_a_new_token(&self) -> bool {
        const WORDS: [&str; 3] =
            ["user name is empty", "revision of auth store is old", "invalid auth token"];
        matches!(self, Self::Refused(refusal) if WORDS.iter().any(|words| refusal.words.contains(words)))
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away { words, .. } | Self::Refused(Refusal { words, .. }) => f.write_str(words),
        }
    }
}

/// The cause behind "transport error", which is all that the outermost says.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// The delays between attempts. The jitter adds up to as much again, so that
/// none is longer than 5 s.
pub(crate) fn delays() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(2500))
        .with_jitter()
        .without_max_times()
        .build()
}

/// Several endpoints that are one store.
pub(crate) struct Endpoints {
    dial: Dial,
    gate: Gate,
    /// The clients of each endpoint, once there has been a use for them.
    clients: Vec<Mutex<Option<Clients>>>,
    current: AtomicUsize,
    /// When etcd has last said anything.
    heard: Mutex<Option<Instant>>,
    /// How often all connections have been given up at once.
    started_over: watch::Sender<usize>,
}

impl Endpoints {
    pub(crate) fn new(dial: Dial) -> Self {
        let clients = dial.endpoints().iter().map(|_| Mutex::new(None)).collect();
        Self {
            dial,
            gate: Gate::default(),
            clients,
            current: AtomicUsize::new(0),
            heard: Mutex::default(),
            started_over: watch::Sender::new(0),
        }
    }

    /// Gives all connections up, those of watches too.
    pub(crate) fn start_over(&self) {
        (0..self.clients.len()).for_each(|place| self.forget(place));
        self.started_over.send_modify(|count| *count += 1);
    }

    /// Tells whoever holds a stream that it is given up.
    pub(crate) fn gives_up(&self) -> watch::Receiver<usize> {
        self.started_over.subscribe()
    }

    /// Takes note that etcd has said something.
    pub(crate) fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// When it last has.
    pub(crate) fn heard(&self) -> Option<Instant> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_user(&self) -> bool {
        self.dial.has_user()
    }

    /// All of them, for an error that is about all of them.
    pub(crate) fn names(&self) -> String {
        self.dial.endpoints().join(", ")
    }

    /// Asks until there is an answer or patience ends.
    pub(crate) async fn call<T, F>(&self, request: impl Fn(Clients) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        self.call_with_place(request).await.map(|(answer, _)| answer)
    }

    /// The same, and which endpoint it was that answered.
    pub(crate) async fn call_with_place<T, F>(
        &self,
        request: impl Fn(Clients) -> F,
    ) -> Result<(T, usize), Failure>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let started = Instant::now();
        let endpoints = self.dial.endpoints();
        let mut met = vec![String::new(); endpoints.len()];
        let mut delays = delays();
        loop {
            let first = self.current.load(Ordering::Relaxed);
            for step in 0..endpoints.len() {
                let place = (first + step) % endpoints.len();
                let answer = self.attempt(place, &request).await;
                if answer.as_ref().err().is_none_or(Trouble::is_answer) {
                    self.hear();
                }
                match answer {
                    Ok(answer) => {
                        self.current.store(place, Ordering::Relaxed);
                        return Ok((answer, place));
                    }
                    Err(Trouble::Refused(refusal)) => return Err(Failure::Refused(refusal)),
                    Err(trouble) => {
                        self.leave(place, &trouble);
                        if let Some(met) = met.get_mut(place) {
                            *met = format!("{trouble}{}", self.dial.hint(&trouble.to_string()));
                        }
                    }
                }
            }
            let delay = delays.next().unwrap_or(PATIENCE);
            if started.elapsed() + delay > PATIENCE {
                let words = match met.as_slice() {
                    [alone] => alone.clone(),
                    _ => endpoints
                        .iter()
                        .zip(&met)
                        .map(|(name, met)| format!("{name}: {met}"))
                        .collect::<Vec<_>>()
                        .join("; "),
                };
                return Err(Failure::Away { endpoints: self.names(), words });
            }
            sleep(delay).await;
        }
    }

    /// Makes the next endpoint the current one, unless somebody else has left
    /// this one already; a broken connection is not used again.
    pub(crate) fn leave(&self, place: usize, trouble: &Trouble) {
        let next = (place + 1) % self.clients.len();
        let _ = self.current.compare_exchange(place, next, Ordering::Relaxed, Ordering::Relaxed);
        if matches!(trouble, Trouble::Away { connection: true, .. } | Trouble::Refused(_)) {
            self.forget(place);
        }
        debug!(endpoint = self.dial.endpoints().get(place), reason = %trouble, "leaving an endpoint");
    }

    /// The next use of this endpoint connects and authenticates anew.
    pub(crate) fn forget(&self, place: usize) {
        self.slot(place).take();
    }

    /// The same, unless somebody has authenticated anew meanwhile.
    fn forget_token(&self, place: usize, outdated: &Arc<()>) {
        let mut slot = self.slot(place);
        if slot.as_ref().is_some_and(|clients| Arc::ptr_eq(&clients.token, outdated)) {
            slot.take();
        }
    }

    async fn attempt<T, F>(&self, place: usize, request: &impl Fn(Clients) -> F) -> Result<T, Trouble>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let answer = timeout(ATTEMPT, async {
            let clients = self.clients(place).await?;
            let outdated = clients.token.clone();
            match request(clients).await.map_err(Trouble::of) {
                Err(trouble) if trouble.wants_a_new_token() && self.dial.has_user() => {
                    self.forget_token(place, &outdated);
                    request(self.clients(place).await?).await.map_err(Trouble::of)
                }
                answer => answer,
            }
        });
        let silence = || Trouble::away(format!("no answer within {} s", ATTEMPT.as_secs()));
        answer.await.unwrap_or_else(|_| Err(silence()))
    }

    async fn clients(&self, place: usize) -> Result<Clients, Trouble> {
        let ready = self.slot(place).clone();
        if let Some(clients) = ready {
            return Ok(clients);
        }
        // Two may connect at the same time; the later one stays, the other is used once.
        let endpoint = self.dial.endpoints().get(place).expect("there are as many slots as endpoints");
        self.gate.pass(Instant::now()).map_err(Trouble::Refused)?;
        let connected = self.dial.connect(endpoint).await;
        match &connected {
            Ok(_) => self.gate.open(),
            // Nothing is asked for yet but a token.
            Err(Trouble::Refused(refusal)) => self.gate.close(refusal.clone(), Instant::now()),
            Err(Trouble::Away { .. }) => {}
        }
        let clients = connected?;
        *self.slot(place) = Some(clients.clone());
        Ok(clients)
    }

    fn slot(&self, place: usize) -> std::sync::MutexGuard<'_, Option<Clients>> {
        let slot = self.clients.get(place).expect("a place is an index of an endpoint");
        slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
