//! A cluster in one process: real agents on simulated kernels and a simulated
//! etcd, at a time of its own, while everything goes wrong that can.
//!
//! ```text
//!   seed ─▶ dice ─▶ nemesis ──────┬──────────────┬─────────────┐
//!                                 ▼              ▼             ▼
//!           Agent ─▶ EtcdStore ─▶ line ─▶ SimEtcd ─▶ record ─▶ checks
//!             └────▶ FakeNetwork ─────────────▶ steps ──────────┘
//! ```
//!
//! All chance comes from the seed: the nemesis and each line have dice of their
//! own, and what the agents' own code leaves to chance follows the thread's
//! generator, which is set by the seed too. So a seed that fails, fails again.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use flannel_core::diff::Step;
use flannel_core::network::NetworkConfig;
use flannel_core::state::RouteKey;
use flanneld::args::Settings;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::build;
use crate::log::Log;
use crate::sim_etcd::{By, SimEtcd};

mod checks;
mod host;
mod nemesis;

use host::Host;

/// Under which the simulated cluster keeps its keys.
pub const PREFIX: &str = "/coreos.com/network";

/// And the leases among them.
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// And what is known of their holders.
const RECORDS: &str = "/coreos.com/network/hosts/";

/// Hosts of one simulation, at most.
const MOST_HOSTS: usize = 5;

/// How long after the last trouble everything may take to be as it should be.
const PATIENCE: Duration = Duration::from_secs(2 * 3600);

/// And after which somebody comes and does what the agents' warnings ask for.
const CALLED: Duration = Duration::from_secs(3600);

/// What simulations one after the other can share.
pub struct Bench {
    /// Of the hosts' files; removed at the end.
    directory: TempDir,
    settings: Vec<Arc<Settings>>,
}

impl Bench {
    /// A bench of its own for each thread.
    ///
    /// # Panics
    /// No directory can be made.
    pub fn new() -> Self {
        // What a host writes it syncs; in memory that costs nothing.
        let memory = std::path::Path::new("/dev/shm");
        let directory = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let directory = directory.expect("a directory for the files of the hosts");
        let settings = (1..=MOST_HOSTS).map(|number| Arc::new(host::settings(directory.path(), number)));
        Self { settings: settings.collect(), directory }
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

/// What a simulation came to.
#[derive(Debug)]
pub struct Outcome {
    /// All that happened, one line each; the kernels' steps and the log only if they were asked for.
    pub history: String,
    /// How much time has passed in it.
    pub lasted: Duration,
    /// How many lines the agents have logged.
    pub lines: usize,
    /// What is not as it must be; nothing if all is well.
    pub wrong: Option<String>,
}

/// Lets the cluster of that seed live and end. With `telling`, the history has
/// every step and every line of the log.
///
/// # Panics
/// No runtime can be made.
pub fn run(seed: u64, bench: &Bench, telling: bool) -> Outcome {
    fastrand::seed(seed);
    let log = Log::default();
    let _heard = tracing::subscriber::set_default(log.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    runtime.block_on(async {
        let mut cluster = Cluster::new(seed, bench, log, telling);
        let wrong = cluster.live().await.err();
        Outcome {
            history: cluster.etcd.printed(usize::MAX),
            lasted: cluster.etcd.now(),
            lines: cluster.log.lines(),
            wrong,
        }
    })
}

/// A route that an agent has taken away.
#[derive(Clone, Copy, Debug)]
struct Removal {
    at: Duration,
    host: usize,
    route: RouteKey,
}

/// All there is.
struct Cluster {
    dice: Rng,
    etcd: SimEtcd,
    hosts: Vec<Host>,
    config: NetworkConfig,
    /// Whether there is hardly room for all hosts.
    tight: bool,
    log: Log,
    removals: Arc<Mutex<Vec<Removal>>>,
    later: nemesis::Later,
    /// The keys that somebody else has written.
    foreign: Vec<String>,
    /// Whether the agents' users may write records.
    fenced: bool,
    /// What has been done to the hosts.
    past: Past,
}

/// What has been done to the hosts, as far as it excuses what they do.
#[derive(Default)]
struct Past {
    /// From when on which of them had nothing to suffer.
    wells: Vec<(Duration, Vec<bool>)>,
    /// When one of them was given an address that another has.
    twins: Vec<(Duration, Ipv4Addr)>,
    /// When which of them lost its disk, and with it all it knew.
    losses: Vec<(Duration, usize)>,
}

impl Cluster {
    fn new(seed: u64, bench: &Bench, log: Log, telling: bool) -> Self {
        let mut dice = Rng::with_seed(seed);
        let etcd = SimEtcd::start();
        if telling {
            let (etcd, directory) = (etcd.clone(), bench.directory.path().display().to_string());
            log.read_by(move |line| etcd.say(By::Hand, line.replace(&directory, "")));
        }
        let page = if dice.bool() { 2 } else { 10_000 };
        let number = dice.usize(2..=MOST_HOSTS);
        let tight = dice.u8(..3) == 0;
        let config = build::config(&config(&mut dice, number, tight));
        let removals: Arc<Mutex<Vec<Removal>>> = Arc::default();
        let host = |(place, settings): (usize, &Arc<Settings>)| {
            let number = u8::try_from(place + 1).expect("there are few hosts");
            let mut host = Host::new(&etcd, settings.clone(), number, page, dice.u64(..));
            let (removals, etcd) = (removals.clone(), etcd.clone());
            host.watch_steps(move |step| {
                if let Step::RemoveRoute(route, _) = step {
                    let removal = Removal { at: etcd.now(), host: place, route: *route };
                    removals.lock().expect("nobody panics holding this").push(removal);
                }
                if telling {
                    etcd.say(By::Client(place), format!("kernel: {step}"));
                }
            });
            host
        };
        let hosts: Vec<Host> = bench.settings.iter().take(number).enumerate().map(host).collect();
        let fenced = dice.u8(..12) > 0;
        if !fenced {
            hosts.iter().for_each(|host| host.client.keep_out_of(RECORDS));
        }
        let later = nemesis::Later::default();
        let (foreign, past) = (vec![], Past::default());
        Self { dice, etcd, hosts, config, tight, log, removals, later, foreign, fenced, past }
    }

    async fn live(&mut self) -> Result<(), String> {
        self.put_config();
        self.harass().await?;
        self.heal();
        self.settle().await?;
        self.check()
    }

    /// Waits until everything is as it should be, and then whether it stays so.
    async fn settle(&mut self) -> Result<(), String> {
        let began = Instant::now();
        let mut pause = Duration::from_secs(1);
        let mut is_called = false;
        while let Err(wrong) = self.converged().await {
            if began.elapsed() > PATIENCE {
                return Err(format!("not as it should be after {} s: {wrong}", PATIENCE.as_secs()));
            }
            if began.elapsed() > CALLED && !is_called {
                self.clear_away();
                is_called = true;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(60));
        }
        self.etcd.say(By::Hand, format!("all is well after {:?}", began.elapsed()));
        sleep(Duration::from_secs(4000)).await;
        self.converged().await.map_err(|wrong| format!("it does not stay as it should be: {wrong}"))
    }

    /// What is not as it should be.
    async fn converged(&mut self) -> Result<(), String> {
        for (place, host) in self.hosts.iter_mut().enumerate() {
            if let Some(words) = host.ended().await {
                return Err(format!("the agent of client {place} has ended: {words}"));
            }
        }
        checks::converged(&self.etcd, &self.config, &self.hosts, self.fenced)
    }

    fn check(&self) -> Result<(), String> {
        let removals = self.removals.lock().expect("nobody panics holding this");
        self.etcd.read_record(0, |record| checks::history(record, &self.hosts, &removals, &self.past))
    }
}

/// A network config: one of the backends, with room for many hosts or hardly enough.
fn config(dice: &mut Rng, hosts: usize, tight: bool) -> String {
    let backend = match dice.u8(..6) {
        0 => r#"{"Type":"host-gw"}"#,
        1 => r#"{"Type":"vxlan","DirectRouting":true}"#,
        _ => r#"{"Type":"vxlan"}"#,
    };
    let range = match tight {
        true => format!(r#""SubnetMin":"10.5.1.0","SubnetMax":"10.5.{}.0","#, hosts + dice.usize(..3)),
        false => String::new(),
    };
    format!(r#"{{"Network":"10.5.0.0/16",{range}"Backend":{backend}}}"#)
}
