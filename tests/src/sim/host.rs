//! One host: a process on a kernel, a disk and a line to etcd, each of which can
//! fail or go without the others.

use std::future::{Future, poll_fn};
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use fastrand::Rng;
use flannel_core::diff::Step;
use flannel_core::host::Changes;
use flannel_core::lease::{HostIdentity, Subnet};
use flannel_core::state::HostState;
use flannel_core::subnet_env::FormerEnv;
use flannel_etcd::EtcdStore;
use flanneld::agent::{Agent, Ended};
use flanneld::args::{Request, Settings};
use flanneld::health::Status;
use flanneld::startup::join;
use flanneld::state_dir::StateDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::PREFIX;
use crate::fake_network::{FakeFirewall, FakeNetwork};
use crate::sim_etcd::{SimClient, SimEtcd};

/// When simulations begin, in seconds since 1970.
const EPOCH: u64 = 1_700_000_000;

/// A host that outlives its processes.
pub(super) struct Host {
    etcd: SimEtcd,
    /// The host's line to etcd.
    pub(super) client: SimClient,
    /// The host's kernel.
    pub(super) network: FakeNetwork,
    settings: Arc<Settings>,
    identity: HostIdentity,
    /// How many leases it lists at a time.
    page: i64,
    address: Ipv4Addr,
    /// Every address that it has had.
    addresses: Vec<Ipv4Addr>,
    boots: usize,
    refusing: Arc<AtomicBool>,
    process: Option<Process>,
}

struct Process {
    task: JoinHandle<String>,
    status: watch::Receiver<Status>,
    gate: Gate,
}

/// What is so slow to make that it is made once for many simulations: the flags
/// of a host, and a directory for its files.
pub(super) fn settings(directory: &Path, number: usize) -> Settings {
    let file = directory.join(format!("{number}/run/subnet.env"));
    let words = [
        format!("--subnet-file={}", file.display()),
        format!("--state-dir={}", directory.join(format!("{number}/state")).display()),
        "--audit-interval=3600".into(),
        "--iptables-resync=86400".into(),
    ];
    match Request::read(words.map(Into::into), |_| None) {
        Ok(Request::Run(settings)) => *settings,
        other => panic!("the flags of a host mean {other:?}"),
    }
}

impl Host {
    /// The host with that number, at 192.168.0.&lt;number&gt;, not running yet.
    pub(super) fn new(etcd: &SimEtcd, settings: Arc<Settings>, number: u8, page: i64, seed: u64) -> Self {
        let client = etcd.client(seed);
        let identity = HostIdentity {
            id: format!("{number:032x}"),
            boot: "boot-1".into(),
            name: format!("host-{number}"),
        };
        let address = Ipv4Addr::new(192, 168, 0, number);
        let host = Self {
            etcd: etcd.clone(),
            client,
            network: FakeNetwork::default(),
            settings,
            identity,
            page,
            address,
            addresses: vec![],
            boots: 1,
            refusing: Arc::default(),
            process: None,
        };
        host.forget_run();
        host.forget_disk();
        Self { addresses: vec![address], ..host }.standing()
    }

    fn standing(self) -> Self {
        self.put_address();
        self
    }

    /// Sees every step that the kernel takes.
    pub(super) fn watch_steps(&mut self, mut see: impl FnMut(&Step) + Send + 'static) {
        let refusing = self.refusing.clone();
        let mut dice = Rng::with_seed(self.client.number() as u64);
        self.network.refuse(move |step| {
            if refusing.load(Ordering::Relaxed) && dice.u8(..3) == 0 {
                return Some("Invalid argument".into());
            }
            see(step);
            None
        });
    }

    /// The kernel refuses one step in three, or no longer any.
    pub(super) fn refuse(&self, refusing: bool) {
        self.refusing.store(refusing, Ordering::Relaxed);
    }

    /// Starts the agent, if it does not run.
    pub(super) fn start(&mut self) {
        if self.process.is_some() {
            return;
        }
        let store = EtcdStore::over(self.client.clone(), PREFIX, self.page, Some(self.identity.clone()));
        let (status, seen) = watch::channel(Status::default());
        let gate = Gate::default();
        let work = process(self.settings.clone(), self.state(), store, self.network.clone(), status);
        let task = tokio::spawn(gate.clone().before(work));
        self.process = Some(Process { task, status: seen, gate });
    }

    /// Ends the agent wherever it is.
    pub(super) async fn kill(&mut self) {
        if let Some(Process { task, .. }) = self.process.take() {
            task.abort();
            // Whatever it says, it is over.
            drop(task.await);
        }
        self.client.still(false);
    }

    /// The kernel's state and the files in /run are gone; the disk is not. The agent must not run.
    pub(super) fn reboot(&mut self) {
        self.boots += 1;
        self.identity.boot = format!("boot-{}", self.boots);
        self.network.kernel().state = HostState::default();
        self.forget_run();
    }

    /// The same, and nothing is left on the disk. The agent must not run.
    pub(super) fn reinstall(&mut self) {
        self.reboot();
        self.forget_disk();
        self.identity.id = format!("{:016x}{:016x}", self.boots, self.client.number());
    }

    /// Whether it has nothing to suffer.
    pub(super) fn is_well(&self) -> bool {
        self.process.as_ref().is_some_and(|process| !process.gate.is_closed()) && self.client.is_fair()
    }

    /// The process stands still, or goes on.
    pub(super) fn still(&self, still: bool) {
        if let Some(process) = &self.process {
            process.gate.close(still);
            self.client.still(still);
        }
    }

    /// Another address.
    pub(super) fn move_to(&mut self, address: Ipv4Addr) {
        self.address = address;
        self.addresses.push(address);
        self.put_address();
        self.network.tell(Changes::Everything("the addresses of eth0 were changed".into()));
    }

    fn put_address(&self) {
        let network = format!("{}/24", self.address).parse().expect("a prefix");
        for own in self.network.kernel().facts.interfaces.iter_mut().flat_map(|link| &mut link.addresses) {
            own.network = network;
        }
    }

    /// Where it is reached.
    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Whether it is or was reached there.
    pub(super) fn has_had(&self, address: Ipv4Addr) -> bool {
        self.addresses.contains(&address)
    }

    /// Whether an agent runs.
    pub(super) fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// What the agent says of itself; nothing if none runs.
    pub(super) fn pending(&self) -> Vec<String> {
        let Some(process) = &self.process else { return vec![] };
        process.status.borrow().pending().into_iter().map(str::to_owned).collect()
    }

    /// Why the process has ended by itself, if it has.
    pub(super) async fn ended(&mut self) -> Option<String> {
        let process = self.process.take_if(|process| process.task.is_finished())?;
        match process.task.await {
            // Then the supervisor starts it again.
            Ok(words) if words == "the kernel cannot be read" => {
                self.start();
                None
            }
            Ok(words) => Some(words),
            Err(error) => Some(error.to_string()),
        }
    }

    /// The subnet that its file names.
    pub(super) fn subnet(&self) -> Option<Subnet> {
        let text = std::fs::read_to_string(&self.settings.subnet_file).ok()?;
        let FormerEnv { subnet, .. } = text.parse().ok()?;
        subnet
    }

    /// What is in /run.
    fn forget_run(&self) {
        if let Some(run) = self.settings.subnet_file.parent() {
            drop(std::fs::remove_dir_all(run));
        }
    }

    /// What is on the disk.
    fn forget_disk(&self) {
        if let Some(directory) = &self.settings.state_dir {
            drop(std::fs::remove_dir_all(directory));
        }
    }

    fn state(&self) -> Option<StateDir> {
        let (directory, etcd) = (self.settings.state_dir.clone()?, self.etcd.clone());
        Some(StateDir::new(directory, PREFIX).simulated(move || EPOCH + etcd.now().as_secs()))
    }
}

/// What the daemon does, from the first question to the end.
async fn process(
    settings: Arc<Settings>,
    state: Option<StateDir>,
    store: EtcdStore<SimClient>,
    network: FakeNetwork,
    status: watch::Sender<Status>,
) -> String {
    let (store, state) = (Arc::new(store), state.as_ref());
    let mut memory = state.and_then(StateDir::recall);
    loop {
        let (status, network) = (status.clone(), network.clone());
        let parts = match join(&settings, store.clone(), network, status, state, memory.take()).await {
            Ok(parts) => parts,
            Err(error) => return error.to_string(),
        };
        match Agent::new(parts, FakeFirewall::default()).run(CancellationToken::new()).await {
            Ended::Stopped => return "it has stopped though nobody told it to".into(),
            Ended::Reconfigured => {}
        }
    }
}

/// Keeps a process from going on.
#[derive(Clone, Default)]
struct Gate {
    state: Arc<Mutex<(bool, Option<Waker>)>>,
}

impl Gate {
    fn is_closed(&self) -> bool {
        self.state.lock().expect("nobody panics holding a gate").0
    }

    fn close(&self, closed: bool) {
        let mut state = self.state.lock().expect("nobody panics holding a gate");
        state.0 = closed;
        if let Some(waker) = state.1.take() {
            waker.wake();
        }
    }

    /// Whether it is closed; if so, whoever asks is woken later.
    fn stops(&self, context: &Context<'_>) -> bool {
        let mut state = self.state.lock().expect("nobody panics holding a gate");
        if state.0 {
            state.1 = Some(context.waker().clone());
        }
        state.0
    }

    async fn before<F: Future>(self, work: F) -> F::Output {
        let mut work = std::pin::pin!(work);
        poll_fn(|context| match self.stops(context) {
            true => Poll::Pending,
            false => work.as_mut().poll(context),
        })
        .await
    }
}
