//! Writes down every event of etcd, whatever happens to its members.
//!
//! A watch at each member from the first revision on, resumed at the next one
//! when it falls silent; who hears of an event first writes it, so that its time
//! is as true as it can be while a member is frozen. An etcd whose revision has
//! gone back or whose identity has changed is another world, read from its start.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use etcd_client::{Client, Error, EventType, WatchOptions, WatchResponse};
use tokio::time::timeout;

use crate::peers::PREFIX;
use crate::record::{Event, Lines, What, now};
use crate::store::connect;
use crate::world::enter;

/// After so long without a word a member is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(2);

/// A value longer than this is not kept whole.
const MOST_KEPT: usize = 4096;

pub(crate) struct History {
    stop: Arc<AtomicBool>,
    heard: Arc<Mutex<Heard>>,
    threads: Vec<JoinHandle<()>>,
}

/// What has been written so far.
struct Heard {
    lines: Lines,
    world: u32,
    cluster: Option<u64>,
    /// The revision to go on with.
    next: i64,
}

impl History {
    /// Begins to record; `namespace` is one that reaches the endpoints.
    pub(crate) fn record(
        namespace: &str,
        endpoints: Vec<String>,
        user: Option<(String, String)>,
        lines: Lines,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(Mutex::new(Heard { lines, world: 0, cluster: None, next: 1 }));
        let record = |endpoint| {
            let recorder =
                Recorder { endpoint, user: user.clone(), heard: heard.clone(), stop: stop.clone() };
            let namespace = namespace.to_owned();
            thread::spawn(move || {
                enter(&namespace);
                recorder.run();
            })
        };
        let threads = endpoints.into_iter().map(record).collect();
        Self { stop, heard, threads }
    }

    /// Waits until it has seen that revision, for so long at most.
    pub(crate) fn reaches(&self, revision: i64, patience: Duration) -> bool {
        let start = Instant::now();
        while locked(&self.heard).next <= revision {
            if start.elapsed() > patience {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
        true
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn locked(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Listens to one member.
struct Recorder {
    endpoint: String,
    user: Option<(String, String)>,
    heard: Arc<Mutex<Heard>>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    fn run(self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be built");
        while !self.stops() {
            // Why a watch ended does not matter: the next one goes on where all stand.
            drop(runtime.block_on(self.watch()));
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    async fn watch(&self) -> Result<(), Error> {
        let silent = |_| Error::Internal("silent".into());
        let opened = timeout(SILENCE, connect(&self.endpoint, self.user.as_ref()));
        let mut client = opened.await.map_err(silent)??;
        let (world, next) = timeout(SILENCE, self.look(&mut client)).await.map_err(silent)??;
        let options = WatchOptions::new().with_prefix().with_start_revision(next).with_prev_key();
        let watching = timeout(SILENCE, client.watch(PREFIX, Some(options)));
        let mut stream = watching.await.map_err(silent)??;
        let mut asked = false;
        while !self.stops() {
            let response = match timeout(SILENCE, stream.message()).await {
                Ok(response) => response?,
                Err(_) if asked => return Ok(()),
                Err(_) => {
                    asked = true;
                    stream.request_progress().await?;
                    continue;
                }
            };
            let Some(response) = response else { return Ok(()) };
            asked = false;
            let mut heard = locked(&self.heard);
            if heard.world != world {
                return Ok(());
            }
            heard.take(&response);
            if response.canceled() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The present world, and where to go on in it.
    async fn look(&self, client: &mut Client) -> Result<(u32, i64), Error> {
        let (world, next) = {
            let heard = locked(&self.heard);
            (heard.world, heard.next)
        };
        // A read through the majority: it has at least what anybody has heard before.
        let answer = client.get("x", None).await?;
        let mut heard = locked(&self.heard);
        if let Some(header) = answer.header().filter(|_| heard.world == world) {
            let is_other = heard.cluster.is_some_and(|cluster| cluster != header.cluster_id());
            if is_other || header.revision() < next - 1 {
                heard.world += 1;
                heard.next = 1;
                heard.write(What::World, header.revision(), "", "", 0);
            }
            heard.cluster = Some(header.cluster_id());
        }
        Ok((heard.world, heard.next))
    }
}

impl Heard {
    fn take(&mut self, response: &WatchResponse) {
        if response.compact_revision() > self.next {
            self.write(What::Gap, response.compact_revision() - 1, "", "", 0);
            self.next = response.compact_revision();
        }
        let mut last = self.next - 1;
        // All events of a revision come together.
        for kv in response.events().iter().filter_map(|event| Some((event.event_type(), event.kv()?))) {
            let (what, kv) = match kv {
                (EventType::Put, kv) => (What::Put, kv),
                (EventType::Delete, kv) => (What::Delete, kv),
            };
            if kv.mod_revision() < self.next {
                continue;
            }
            let value = &kv.value()[..kv.value().len().min(MOST_KEPT)];
            let (key, value) = (String::from_utf8_lossy(kv.key()), String::from_utf8_lossy(value));
            self.write(what, kv.mod_revision(), &key, &value, kv.lease());
            last = last.max(kv.mod_revision());
        }
        self.next = last + 1;
    }

    fn write(&self, what: What, revision: i64, key: &str, value: &str, lease: i64) {
        let (world, key, value) = (self.world, key.into(), value.into());
        self.lines.write(&Event { t: now(), world, revision, what, key, value, lease });
    }
}
