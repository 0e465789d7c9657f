//! An etcd in memory, behind the seam, on tokio's clock: with leases that run
//! out, a history that can be compacted, and lines to its clients that fail.
//!
//! ```text
//!   EtcdStore ─▶ SimClient ─▶ line ─▶ world ─▶ record
//!   EtcdWatch ◀─ SimStream ◀─ (dice) (store)   (all that ever happened)
//! ```
//!
//! What a line does is decided by dice of its own, thrown from a seed. So with
//! the same requests at the same times, all that happens is the same.

use std::fmt::Write;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use flannel_etcd::kv::{Answer, Entry, Failure, Kv, Moment, Op, Opened, Page, Range, Refusal, Term, Txn};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

mod line;
mod stream;
mod world;

pub use line::{Fate, Weather};
pub use stream::SimStream;
pub use world::{By, Record, What};

use line::Line;
use world::{Saved, World, denied};

/// How long the real thing waits for one answer, and how long it tries again.
const ATTEMPT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(3);

const NO_LEADER: &str = "etcdserver: no leader";

/// A handle on the etcd.
#[derive(Clone)]
pub struct SimEtcd {
    inner: Arc<Inner>,
}

struct Inner {
    began: Instant,
    state: Mutex<State>,
    /// Something has changed: a key, a line.
    news: Notify,
    /// An etcd lease may end earlier than the one that was waited for.
    earlier: Notify,
}

struct State {
    world: World,
    lines: Vec<Line>,
    /// Whether the members are down: then no time passes for leases.
    down: bool,
    saved: Option<Saved>,
}

impl SimEtcd {
    /// An empty one, which lasts as long as the runtime that it is started in.
    pub fn start() -> Self {
        let state = State { world: World::new(), lines: vec![], down: false, saved: None };
        let inner = Arc::new(Inner {
            began: Instant::now(),
            state: Mutex::new(state),
            news: Notify::new(),
            earlier: Notify::new(),
        });
        let etcd = Self { inner };
        tokio::spawn(end_leases(etcd.clone()));
        etcd
    }

    /// A client with dice of its own.
    pub fn client(&self, seed: u64) -> SimClient {
        let mut state = self.state();
        state.lines.push(Line::new(seed));
        SimClient { etcd: self.clone(), number: state.lines.len() - 1 }
    }

    /// All that has happened.
    pub fn record(&self) -> Vec<Record> {
        self.state().world.record.clone()
    }

    /// Looks at what has happened since there were `seen` records.
    pub fn read_record<T>(&self, seen: usize, read: impl FnOnce(&[Record]) -> T) -> T {
        read(self.state().world.record.get(seen..).unwrap_or_default())
    }

    /// The last so many records, printed.
    pub fn printed(&self, last: usize) -> String {
        let state = self.state();
        let record = &state.world.record;
        let mut text = String::new();
        for line in record.iter().skip(record.len().saturating_sub(last)) {
            writeln!(text, "{line}").expect("a string takes everything");
        }
        text
    }

    /// Writes into the record what happened beside the store.
    pub fn say(&self, by: By, words: impl Into<String>) {
        let at = self.now();
        self.state().world.note(at, by, What::Said(words.into()));
    }

    /// The keys that begin with `prefix`, as they are.
    pub fn keys(&self, prefix: &str) -> Vec<Entry> {
        let state = self.state();
        let keys = state.world.keys.values();
        keys.filter(|entry| entry.key.starts_with(prefix.as_bytes())).cloned().collect()
    }

    /// The ids of all etcd leases, each with how many keys hang on it.
    pub fn leases(&self) -> Vec<(i64, usize)> {
        let state = self.state();
        let ids = state.world.leases.keys();
        ids.filter_map(|id| Some((*id, state.world.term(*id)?.keys))).collect()
    }

    /// How far it has come.
    pub fn moment(&self) -> Moment {
        self.state().world.moment
    }

    /// Since the beginning.
    pub fn now(&self) -> Duration {
        self.inner.began.elapsed()
    }

    // What a hand does.

    /// Somebody writes so often elsewhere.
    pub fn busy(&self, revisions: i64) {
        self.change(|world, _| world.moment.revision += revisions);
    }

    /// Writes a key, on no etcd lease.
    pub fn put(&self, key: &str, value: &[u8]) {
        self.change(|world, at| world.write(at, By::Hand, &[Op::Put(key.into(), value.into(), 0)]));
    }

    /// Writes a key on an etcd lease of its own, under an id that nobody else has.
    pub fn put_leased(&self, key: &str, value: &[u8], id: i64, ttl: i64) {
        self.change(|world, at| {
            // Refused for want of space, nothing is written.
            if world.grant(at, By::Hand, id, ttl).is_ok() {
                world.write(at, By::Hand, &[Op::Put(key.into(), value.into(), id)]);
            }
        });
        self.inner.earlier.notify_one();
    }

    /// Writes another value under a key, and leaves it on its etcd lease.
    pub fn bend(&self, key: &str, value: &[u8]) {
        self.change(|world, at| {
            if let Some(lease) = world.keys.get(key.as_bytes()).map(|entry| entry.lease) {
                world.write(at, By::Hand, &[Op::Put(key.into(), value.into(), lease)]);
            }
        });
    }

    /// Deletes all keys that begin with `prefix`, in one revision.
    pub fn delete(&self, prefix: &str) {
        self.change(|world, at| {
            let keys = world.keys.keys().filter(|key| key.starts_with(prefix.as_bytes()));
            let gone: Vec<Op> = keys.cloned().map(Op::Delete).collect();
            world.write(at, By::Hand, &gone);
        });
    }

    /// Ends an etcd lease.
    pub fn revoke(&self, id: i64) {
        self.change(|world, at| world.revoke(at, By::Hand, id));
    }

    /// Forgets the history but for the last so many revisions.
    pub fn compact(&self, but: i64) {
        self.change(|world, at| world.compact(at, world.moment.revision - but));
    }

    /// Another leader.
    pub fn elect(&self) {
        self.change(World::elect);
        self.inner.earlier.notify_one();
    }

    /// Keeps the data directory as it is, for a restore.
    pub fn save(&self) {
        let mut state = self.state();
        state.saved = Some(state.world.saved());
    }

    /// An empty data directory, under another cluster id; all streams end.
    pub fn wipe(&self) {
        self.change(World::wipe);
        self.break_streams();
    }

    /// The data directory that was kept, if one was, under its cluster id or
    /// another one, so many terms on; all streams end.
    pub fn restore(&self, same_cluster: bool, terms: u64) {
        let Some(saved) = self.state().saved.clone() else { return };
        self.change(|world, at| {
            let Moment { cluster, term, .. } = world.moment;
            let cluster = if same_cluster { cluster } else { cluster + 1 };
            world.restore(at, saved.under(cluster, term + terms));
        });
        self.break_streams();
        self.inner.earlier.notify_one();
    }

    /// Whether nothing is wrong with it.
    pub fn is_well(&self) -> bool {
        let state = self.state();
        !state.down && !state.world.no_space
    }

    // What fails.

    /// The members are down, or up again; meanwhile no etcd lease runs out.
    pub fn down(&self, down: bool) {
        let was = std::mem::replace(&mut self.state().down, down);
        if was && !down {
            self.elect();
        }
        if down {
            self.break_streams();
        }
        self.inner.news.notify_waiters();
        self.inner.earlier.notify_one();
    }

    /// The disk is full, or has room again.
    pub fn no_space(&self, full: bool) {
        self.state().world.no_space = full;
    }

    /// Ends the streams of all clients.
    pub fn break_streams(&self) {
        self.state().lines.iter_mut().for_each(|line| line.epoch += 1);
        self.inner.news.notify_waiters();
    }

    fn change(&self, change: impl FnOnce(&mut World, Duration)) {
        let at = self.now();
        change(&mut self.state().world, at);
        self.inner.news.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().expect("nobody panics while holding the simulated etcd")
    }
}

/// Ends etcd leases as they run out.
async fn end_leases(etcd: SimEtcd) {
    loop {
        let next = {
            let state = etcd.state();
            state.world.next_end().filter(|_| !state.down).map(|end| etcd.inner.began + end)
        };
        tokio::select! {
            biased;
            () = etcd.inner.earlier.notified() => {}
            () = until(next) => etcd.change(|world, at| world.expire(at)),
        }
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// One client of it.
#[derive(Clone)]
pub struct SimClient {
    etcd: SimEtcd,
    number: usize,
}

impl SimClient {
    /// Its number, by which the record names it.
    pub fn number(&self) -> usize {
        self.number
    }

    /// How its line behaves from now on.
    pub fn weather(&self, weather: Weather) {
        self.with_line(|line| line.weather = weather);
    }

    /// Whether nothing is wrong with its line.
    pub fn is_fair(&self) -> bool {
        self.with_line(|line| line.is_fair())
    }

    /// What becomes of its next requests.
    pub fn fates(&self, fates: impl IntoIterator<Item = Fate>) {
        self.with_line(|line| line.fates.extend(fates));
    }

    /// Nothing gets through any more, or does again.
    pub fn cut(&self, cut: bool) {
        self.with_line(|line| line.cut = cut);
    }

    /// The host stands still, or goes on.
    pub fn still(&self, still: bool) {
        self.with_line(|line| line.still = still);
    }

    /// The member that serves its watches is so far behind.
    pub fn lag(&self, lag: Duration) {
        self.with_line(|line| line.lag = lag);
    }

    /// This user may not touch the keys that begin so.
    pub fn keep_out_of(&self, prefix: &str) {
        self.with_line(|line| line.forbidden = Some(prefix.into()));
    }

    /// This user may touch all keys again.
    pub fn let_in(&self) {
        self.with_line(|line| line.forbidden = None);
    }

    fn may(&self, keys: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Result<(), Refusal> {
        let forbidden = self.with_line(|line| line.forbidden.clone());
        let is_forbidden =
            |key: &[u8]| forbidden.as_ref().is_some_and(|prefix: &Vec<u8>| key.starts_with(prefix));
        match keys.into_iter().any(|key| is_forbidden(key.as_ref())) {
            true => Err(denied()),
            false => Ok(()),
        }
    }

    /// etcd refuses whatever this user asks, or no longer.
    pub fn denied(&self, denied: bool) {
        self.with_line(|line| line.denied = denied);
    }

    /// Nothing is wrong with its line any more.
    pub fn make_fair(&self) {
        self.with_line(|line| {
            let (dice, epoch, heard) = (line.dice.clone(), line.epoch, line.heard);
            let forbidden = line.forbidden.take();
            *line = Line { dice, epoch, heard, forbidden, ..Line::new(0) };
        });
    }

    fn with_line<T>(&self, with: impl FnOnce(&mut Line) -> T) -> T {
        let answer = with(self.line(&mut self.etcd.state()));
        self.etcd.inner.news.notify_waiters();
        answer
    }

    fn line<'a>(&self, state: &'a mut State) -> &'a mut Line {
        state.lines.get_mut(self.number).expect("there are as many lines as clients")
    }

    fn hear(&self) {
        self.line(&mut self.etcd.state()).heard = Some(Instant::now());
    }

    fn by(&self) -> By {
        By::Client(self.number)
    }

    async fn call<T>(
        &self,
        request: impl Fn(&mut World, Duration) -> Result<T, Refusal> + Clone + Send + Sync + 'static,
    ) -> Result<T, Failure>
    where
        T: Send + 'static,
    {
        let started = Instant::now();
        let mut wait = Duration::from_millis(100);
        loop {
            let words = match self.attempt(&request).await {
                Ok(answer) => {
                    self.hear();
                    return answer.map_err(Failure::Refused);
                }
                Err(NO_LEADER) => {
                    self.hear();
                    NO_LEADER
                }
                Err(words) => words,
            };
            if started.elapsed() + wait > PATIENCE {
                return Err(Failure::Away { endpoints: self.endpoints(), words: words.into() });
            }
            sleep(wait).await;
            wait *= 2;
        }
    }

    /// One request, and what it meets on its way.
    async fn attempt<T>(
        &self,
        request: &(impl Fn(&mut World, Duration) -> Result<T, Refusal> + Clone + Send + Sync + 'static),
    ) -> Result<Result<T, Refusal>, &'static str>
    where
        T: Send + 'static,
    {
        const SILENCE: &str = "no answer within 5 s";
        let begun = Instant::now();
        self.goes_on().await;
        let (fate, refuses, cut) = {
            let mut state = self.etcd.state();
            let down = state.down;
            let line = self.line(&mut state);
            // A member that is down says so, one behind a broken switch does not.
            (line.fate(), down && line.dice.bool(), line.cut)
        };
        if refuses && !cut {
            return Err("connection refused");
        }
        let silence = async || {
            sleep_until(begun + ATTEMPT).await;
            self.goes_on().await;
            Err(SILENCE)
        };
        match fate {
            Fate::NoLeader => Err(NO_LEADER),
            Fate::Lost => silence().await,
            Fate::Answered(there, back) => {
                sleep(there).await;
                self.goes_on().await;
                let Some(answer) = self.carry_out(request) else { return silence().await };
                sleep(back).await;
                self.goes_on().await;
                match self.is_reachable() {
                    true => Ok(answer),
                    false => silence().await,
                }
            }
            Fate::AnswerLost(there) => {
                sleep(there).await;
                self.carry_out(request);
                silence().await
            }
            Fate::Late(after) => {
                let (client, request) = (self.clone(), request.clone());
                let replaced = self.etcd.state().world.replaced;
                tokio::spawn(async move {
                    sleep(after).await;
                    // With the data directory goes what it was still to be told.
                    if client.etcd.state().world.replaced == replaced {
                        client.carry_out(&request);
                    }
                });
                silence().await
            }
        }
    }

    /// What etcd makes of a request; `None` if it does not get there.
    fn carry_out<T>(
        &self,
        request: &impl Fn(&mut World, Duration) -> Result<T, Refusal>,
    ) -> Option<Result<T, Refusal>> {
        if !self.is_reachable() {
            return None;
        }
        let at = self.etcd.now();
        let answer = {
            let mut state = self.etcd.state();
            if self.line(&mut state).denied { Err(denied()) } else { request(&mut state.world, at) }
        };
        self.etcd.inner.news.notify_waiters();
        Some(answer)
    }

    fn is_reachable(&self) -> bool {
        let mut state = self.etcd.state();
        !state.down && !self.line(&mut state).cut
    }

    /// Waits while the host stands still.
    async fn goes_on(&self) {
        loop {
            let mut news = std::pin::pin!(self.etcd.inner.news.notified());
            news.as_mut().enable();
            if !self.line(&mut self.etcd.state()).still {
                return;
            }
            news.await;
        }
    }
}

impl Kv for SimClient {
    type Stream = SimStream;

    fn range(&self, range: Range) -> impl Future<Output = Result<Page, Failure>> + Send {
        let may = self.may([&range.from]);
        self.call(move |world, _| {
            may.clone()?;
            world.range(&range)
        })
    }

    fn txn(&self, txn: Txn) -> impl Future<Output = Result<Answer, Failure>> + Send {
        let by = self.by();
        let may = self.may(world::touched(&txn));
        self.call(move |world, at| {
            may.clone()?;
            world.txn(at, by, &txn)
        })
    }

    async fn grant(&self, id: i64, ttl: i64) -> Result<bool, Failure> {
        let by = self.by();
        let granted = self.call(move |world, at| world.grant(at, by, id, ttl)).await;
        self.etcd.inner.earlier.notify_one();
        granted
    }

    fn keep_alive(&self, id: i64) -> impl Future<Output = Result<bool, Failure>> + Send {
        self.call(move |world, at| Ok(world.keep_alive(at, id)))
    }

    fn term(&self, id: i64) -> impl Future<Output = Result<Option<Term>, Failure>> + Send {
        self.call(move |world, _| Ok(world.term(id)))
    }

    fn revoke(&self, id: i64) -> impl Future<Output = Result<(), Failure>> + Send {
        let by = self.by();
        self.call(move |world, at| {
            world.revoke(at, by, id);
            Ok(())
        })
    }

    async fn watch(&self, range: Range) -> Result<Opened<SimStream>, Failure> {
        let (from, lag) = (range.revision, self.with_line(|line| line.lag));
        // A history that is too short is told of at once, or by the stream.
        let at_once = self.with_line(|line| line.dice.bool());
        let may = self.may([&range.from]);
        let opening = move |world: &mut World, at: Duration| {
            may.clone()?;
            if from != 0 && at_once {
                world.reaches(from)?;
            }
            let revision = world.revision_at(at.saturating_sub(lag));
            Ok((Moment { revision, ..world.moment }, world.replaced, world.compacted))
        };
        let (moment, replaced, compacted) = self.call(opening).await?;
        Ok(Opened { stream: SimStream::new(self.clone(), range, moment, replaced, compacted), moment })
    }

    fn start_over(&self) {
        self.with_line(|line| line.epoch += 1);
    }

    fn heard(&self) -> Option<Instant> {
        self.line(&mut self.etcd.state()).heard
    }

    fn endpoints(&self) -> String {
        "the simulated etcd".into()
    }
}
