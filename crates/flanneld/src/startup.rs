//! The start, a straight line: file → store → config → underlay → backend → lease.
//!
//! A store that does not answer at once is not waited for if this host remembers
//! a lease that still lasts: then config, lease and everybody else's leases are
//! those it remembers, until the store answers and the truth wins.
//!
//! What can come right by itself (a store that is away, a config that is not
//! there or not good, a full range) is waited for, and said once. What needs
//! the flags or the host to change ends the start with a sentence.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::backend::{Backend, Node};
use flannel_core::chain::chain;
use flannel_core::claim::Claim;
use flannel_core::firewall::Wanted;
use flannel_core::host::{HostError, Network, Observed};
use flannel_core::lease::{BackendData, Expiry, HeldLease, HostIdentity, Lease};
use flannel_core::memory::Memory;
use flannel_core::network::NetworkConfig;
use flannel_core::plan::{Planner, RouteMode};
use flannel_core::state::{HostState, MacAddr};
use flannel_core::store::{LeaseStore, StoreError};
use flannel_core::subnet_env::FormerEnv;
use flannel_core::underlay::{self, Facts, InterfaceAddress, NoUnderlay, Underlay};
use flannel_etcd::EtcdStore;
use flannel_linux::sysctl::bridge_netfilter_remedy;
use flannel_linux::{Family, LinuxFirewall, LinuxNetwork};
use ipnetwork::IpNetwork;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use crate::agent::{Agent, Ended, Options, Parts};
use crate::args::{PasswordFrom, Settings};
use crate::health::{self, Status};
use crate::lease::{Usable, acquire, network_config, usable};
use crate::reconcile::Reconciler;
use crate::state_dir::{self, StateDir};
use crate::subnet_file::SubnetFile;
use crate::{notify, shutdown};

/// How long the store has for its first answer before we go by what we remember, if we can.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// How long a lease may take until we look whether this host still stands where it did.
const FIRST_LOOK: Duration = Duration::from_secs(1);

/// How often we look then, whatever the kernel tells.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Why the agent could not start. It helps to change the flags or the host.
#[derive(Debug, Error)]
pub enum StartError {
    /// The process itself could not be set up.
    #[error("{what}")]
    Process {
        /// What was attempted.
        what: String,
        /// What was met.
        #[source]
        source: std::io::Error,
    },
    /// The flags on etcd cannot be used.
    #[error(transparent)]
    Etcd(#[from] flannel_etcd::SettingsError),
    /// The kernel could not be read.
    #[error("the kernel cannot be read")]
    Host(#[from] HostError),
    /// No interface fits.
    #[error(transparent)]
    Underlay(#[from] NoUnderlay),
    /// The backend cannot work on the interface.
    #[error("{0}")]
    Backend(String),
}

impl StartError {
    /// The exit status: 2 for flags that cannot be used, 1 for anything else.
    pub fn status(&self) -> u8 {
        if matches!(self, Self::Etcd(_)) { 2 } else { 1 }
    }
}

/// Runs the agent until a signal.
///
/// # Errors
/// It could not start.
pub async fn run(settings: Settings) -> Result<(), StartError> {
    let failed = |what: String| move |source| StartError::Process { what, source };
    let stop = shutdown::on_signal().map_err(failed("installing the signal handlers".into()))?;
    let (status, seen) = watch::channel(Status::default());
    if let Some(address) = settings.health {
        let listener = health::listen(address)
            .await
            .map_err(failed(format!("listening on {address} for --healthz-port")))?;
        tokio::spawn(async move {
            if let Err(error) = health::serve(listener, seen).await {
                error!(%error, %address, "the health server has ended");
            }
        });
    }
    for flag in &settings.without_effect {
        warn!(flag, "this flag has no effect here");
    }
    let state = settings.state_dir.clone().map(|directory| StateDir::new(directory, &settings.etcd_prefix));
    let mut memory = state.as_ref().and_then(StateDir::recall);
    loop {
        let agent = tokio::select! {
            biased;
            // The start may be dropped anywhere: it changes nothing but the store, and that by whole transactions.
            () = stop.cancelled() => return Ok(()),
            agent = start(&settings, status.clone(), state.as_ref(), memory.take()) => agent?,
        };
        match agent.run(stop.clone()).await {
            Ended::Stopped => return Ok(()),
            Ended::Reconfigured => {
                info!("the network config is not the one we remembered; starting over with it")
            }
        }
    }
}

/// Everything up to the first event.
async fn start(
    settings: &Settings,
    status: watch::Sender<Status>,
    state: Option<&StateDir>,
    memory: Option<Memory>,
) -> Result<Agent<EtcdStore, LinuxNetwork, LinuxFirewall>, StartError> {
    let store = Arc::new(EtcdStore::connect(&etcd(settings, state_dir::identity(state))).await?);
    let parts = join(settings, store, LinuxNetwork::new()?, status, state, memory).await?;
    if let Some(remedy) = bridge_netfilter_remedy().filter(|_| !parts.options.wanted.nothing()) {
        warn!(remedy, "bridged containers pass the traffic rules by");
    }
    let parts = Parts { on_ready: Some(Box::new(notify::ready)), ..parts };
    let firewall = LinuxFirewall::new(parts.config.engine, Family::Ipv4);
    Ok(Agent::new(parts, firewall))
}

/// Takes this host's place in the cluster: what an agent is made of, on
/// whatever store and kernel.
///
/// # Errors
/// The flags or the host have to change first.
pub async fn join<S: LeaseStore, N: Network>(
    settings: &Settings,
    store: Arc<S>,
    mut network: N,
    status: watch::Sender<Status>,
    state: Option<&StateDir>,
    memory: Option<Memory>,
) -> Result<Parts<S, N>, StartError> {
    let file = SubnetFile::new(settings.subnet_file.clone());
    let mut former = former(&file);
    // The file is gone after a reboot; the memory is not.
    former.subnet = former.subnet.or(memory.as_ref().map(|memory| memory.own.subnet));
    let memory = memory.zip(state);
    let mut memory =
        memory.and_then(|(memory, state)| Recalled::of(memory, &store.config_key(), state.now()));
    // From the config on, the line is walked again if the range turns out to be full and is then made another one.
    let (place, peers) = loop {
        let first_answer = async {
            match &memory {
                Some(_) => sleep(FIRST_ANSWER).await,
                None => std::future::pending().await,
            }
        };
        let config = tokio::select! {
            biased;
            config = network_config(&*store, &status) => Some(config),
            () = first_answer => None,
        };
        let place = match (config, memory.take()) {
            (Some(config), _) => {
                let place = take_place(&*store, &mut network, settings, &former, config, &status).await?;
                place.map(|place| (place, None))
            }
            (None, Some(recalled)) => recall_place(&mut network, settings, &former, recalled).await?,
            (None, None) => None,
        };
        if let Some(place) = place {
            break place;
        }
    };

    let wanted = Wanted {
        masquerade: settings.masquerade,
        random_fully: settings.random_fully,
        forward: settings.forward,
    };
    let pools = place.config.pools().copied().collect();
    let node = Node { pools, underlay: place.underlay, lease: place.held.lease.clone(), mtu: None };
    if settings.route_mode == RouteMode::Nexthop && place.backend.links().is_empty() {
        warn!(
            backend = place.backend.kind(),
            "--route-mode nexthop has no effect: this backend has no device of its own, and routes by others are plain"
        );
    }
    let planner = Planner::new(place.backend, node, settings.route_mode).with_blackhole(settings.blackhole);
    Ok(Parts {
        store,
        reconciler: Reconciler::new(network, planner, place.claim, settings.selection.clone()),
        config: place.config,
        held: place.held,
        file,
        options: Options {
            wanted,
            former: place.gone,
            rules_interval: settings.rules_interval,
            audit_interval: settings.audit_interval,
            renew_margin: settings.renew_margin,
            removal_grace: settings.removal_grace,
        },
        status,
        on_ready: None,
        state: state.cloned(),
        recalled: peers,
    })
}

/// This host's place in the cluster.
struct Place {
    config: NetworkConfig,
    backend: Box<dyn Backend>,
    underlay: Underlay,
    claim: Claim,
    /// Networks of an earlier run that the config no longer has.
    gone: Vec<IpNetwork>,
    held: HeldLease,
}

/// Underlay, backend, lease; `None` if the config changed while we waited for room in it.
async fn take_place<S: LeaseStore, N: Network>(
    store: &S,
    network: &mut N,
    settings: &Settings,
    former: &FormerEnv,
    (config, backend): (NetworkConfig, Box<dyn Backend>),
    status: &watch::Sender<Status>,
) -> Result<Option<Place>, StartError> {
    let mut ground = survey(network, settings, former, &config, &*backend).await?;
    let mac = random_mac();
    let wanted = watch::Sender::new(backend.attributes(&ground.underlay, &ground.state, mac));
    let mut acquiring = Box::pin(acquire(store, &config, wanted.subscribe(), former.subnet, status));
    let mut pause = FIRST_LOOK;
    let held = loop {
        tokio::select! {
            biased;
            // If the host has moved since, the agent sees it as at any other time.
            held = &mut acquiring => break held,
            _ = timeout(pause, network.changed()) => {}
        }
        // What is waited for may be just that: another address for this host. The kernel tells only of
        // the interface that was the one between the hosts when it was last looked at.
        pause = LOOK_AGAIN;
        let Some(now) = look_again(network, settings, &ground, &*backend).await else { continue };
        let (was, link) = (std::mem::replace(&mut ground.underlay, now), ground.underlay.link);
        let has_moved = (was.link, was.address) != (link, ground.underlay.address);
        if has_moved {
            info!(%link, address = %ground.underlay.address, "this host is at another address now");
            store.host_moved();
        }
        if was.link != link {
            (ground.claim.underlay, pause) = (Some(link), FIRST_LOOK);
        }
        let attrs = backend.attributes(&ground.underlay, &ground.state, mac);
        wanted.send_if_modified(|wanted| std::mem::replace(wanted, attrs) != *wanted);
    };
    drop(acquiring);
    Ok(held.ok().map(|held| ground.place(config, backend, held)))
}

/// What this host stands on now, if that is not what it was. No interface at all is no
/// reason to end here: it may be back before there is a lease.
async fn look_again<N: Network>(
    network: &mut N,
    settings: &Settings,
    ground: &Ground,
    backend: &dyn Backend,
) -> Option<Underlay> {
    let observed = network.observe(&ground.claim, settings.selection.can_reach).await;
    let chosen = underlay::choose(&observed.ok()?.facts, &settings.selection).ok()?.underlay;
    if chosen == ground.underlay || backend.check(&chosen).is_err() {
        return None;
    }
    Some(chosen)
}

/// What we remember, as far as it can be gone by.
struct Recalled {
    config: NetworkConfig,
    backend: Box<dyn Backend>,
    held: HeldLease,
    peers: Vec<Lease>,
    /// In seconds.
    age: u64,
}

impl Recalled {
    /// `None`, which is told, if our lease may have ended or the config cannot be used.
    fn of(memory: Memory, key: &str, now: u64) -> Option<Self> {
        let unusable = |reason: String| {
            info!(reason, "what this host remembers of the network is of no use any more");
        };
        let left = memory.left(now).inspect_err(|stale| unusable(stale.to_string())).ok()?;
        let config = NetworkConfig::parse(&memory.config);
        let config = config.map_err(|source| StoreError::BadConfig { key: key.into(), source });
        let Usable { config, backend, .. } =
            config.and_then(|config| usable(config, key)).inspect_err(|error| unusable(chain(error))).ok()?;
        let expiry = match left {
            Some(seconds) => Expiry::At((Instant::now() + Duration::from_secs(seconds)).into_std()),
            None => Expiry::Never,
        };
        let held = HeldLease { lease: memory.own, expiry, handle: memory.handle };
        Some(Self { config, backend, held, peers: memory.peers, age: now.saturating_sub(memory.written) })
    }
}

/// The place that we remember, with everybody else's leases; `None` if this
/// host no longer stands where it did.
async fn recall_place<N: Network>(
    network: &mut N,
    settings: &Settings,
    former: &FormerEnv,
    recalled: Recalled,
) -> Result<Option<(Place, Option<Vec<Lease>>)>, StartError> {
    let Recalled { config, backend, mut held, peers, age } = recalled;
    let ground = survey(network, settings, former, &config, &*backend).await?;
    let mac = match &held.lease.attrs.backend_data {
        Some(BackendData::Vtep { mac, .. }) => *mac,
        _ => random_mac(),
    };
    let attrs = backend.attributes(&ground.underlay, &ground.state, mac);
    if !attrs.same_host(&held.lease.attrs) {
        let was = held.lease.attrs.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
        warn!(
            %was, is = %ground.underlay.public_ip,
            "etcd has given no network config yet, and what this host remembers of the network is from another address; waiting for etcd"
        );
        return Ok(None);
    }
    held.lease.attrs = attrs;
    warn!(
        subnet = %held.lease.subnet, peers = peers.len(), age_s = age,
        "etcd has given no network config yet; going by what this host remembers of the network until it does"
    );
    Ok(Some((ground.place(config, backend, held), Some(peers))))
}

fn random_mac() -> MacAddr {
    MacAddr::local(std::array::from_fn(|_| fastrand::u8(..)))
}

/// Where this host stands.
struct Ground {
    underlay: Underlay,
    claim: Claim,
    gone: Vec<IpNetwork>,
    state: HostState,
}

impl Ground {
    fn place(self, config: NetworkConfig, backend: Box<dyn Backend>, held: HeldLease) -> Place {
        Place { config, backend, underlay: self.underlay, claim: self.claim, gone: self.gone, held }
    }
}

/// Looks at the host, and chooses the interface between the hosts.
async fn survey<N: Network>(
    network: &mut N,
    settings: &Settings,
    former: &FormerEnv,
    config: &NetworkConfig,
    backend: &dyn Backend,
) -> Result<Ground, StartError> {
    let networks: Vec<IpNetwork> = config.networks().collect();
    // What a network we no longer have has left here is ours to clear away; but no file makes the whole world ours.
    let is_gone = |network: &&IpNetwork| network.prefix() > 0 && !networks.contains(network);
    let gone: Vec<IpNetwork> = former.networks.iter().filter(is_gone).copied().collect();
    let networks = [networks, gone.clone()].concat();
    let claim = Claim { links: backend.links(), networks, underlay: None };
    let Observed { facts, state } = network.observe(&claim, settings.selection.can_reach).await?;
    warn_of_another_agent(&claim, &facts);
    let underlay = choose_underlay(&facts, settings)?;
    let claim = Claim { underlay: Some(underlay.link), ..claim };
    backend.check(&underlay).map_err(StartError::Backend)?;
    if backend.mtu_cut(&underlay) {
        warn!(mtu = underlay.mtu, link = %underlay.link, "Backend.MTU is above that of the interface and is cut to it");
    }
    warn_of_collisions(config, &facts, &underlay, &claim, former);
    Ok(Ground { underlay, claim, gone, state })
}

fn etcd(settings: &Settings, host: HostIdentity) -> flannel_etcd::Settings {
    let user = settings.etcd_user.as_ref();
    let (password, password_file) = match user.map(|(_, password)| password) {
        Some(PasswordFrom::Flag(password)) => (Some(flannel_etcd::Password::new(password.reveal())), None),
        Some(PasswordFrom::File(path)) => (None, Some(path.clone())),
        None => (None, None),
    };
    flannel_etcd::Settings {
        endpoints: settings.etcd_endpoints.clone(),
        prefix: settings.etcd_prefix.clone(),
        ca_file: settings.etcd_ca.clone(),
        cert_file: settings.etcd_cert.clone(),
        key_file: settings.etcd_key.clone(),
        username: user.map(|(name, _)| name.clone()),
        password,
        password_file,
        host: Some(host),
    }
}

/// What an earlier run left in the subnet file; nothing if that cannot be read.
fn former(file: &SubnetFile) -> FormerEnv {
    let former = file.read().unwrap_or_else(|error| {
        warn!(error = %chain(&error), "the previous subnet is not known");
        None
    });
    let former = former.unwrap_or_default();
    if let Some((flaw, more)) = former.flaws.split_first() {
        warn!(path = %file.path().display(), flaw, more = more.len(), "part of the subnet file cannot be read");
    }
    former
}

/// A device of ours with an address of no network of ours has most likely two masters.
fn warn_of_another_agent(claim: &Claim, facts: &Facts) {
    for interface in facts.interfaces.iter().filter(|interface| claim.owns_link(interface.name)) {
        let is_theirs = |own: &&InterfaceAddress| {
            own.network.is_ipv4() && !claim.owns_address(interface.name, own.network)
        };
        if let Some(theirs) = interface.addresses.iter().find(is_theirs) {
            warn!(
                device = %interface.name, address = %theirs.network,
                "our device has an address of another network: if another agent on this host uses the same VNI, give \
                 one of them another"
            );
        }
    }
}

/// A network on ground of this host's own makes part of either unreachable.
fn warn_of_collisions(
    config: &NetworkConfig,
    facts: &Facts,
    underlay: &Underlay,
    claim: &Claim,
    former: &FormerEnv,
) {
    let networks: Vec<IpNetwork> = config.networks().collect();
    // There docker's bridge has its address.
    let subnets: Vec<IpNetwork> = former.subnet.iter().flat_map(|subnet| subnet.networks()).collect();
    for collision in underlay::collisions(facts, underlay, &networks, claim, &subnets) {
        warn!(collision, "the network of the cluster is not free on this host");
    }
}

fn choose_underlay(facts: &Facts, settings: &Settings) -> Result<Underlay, NoUnderlay> {
    let chosen = underlay::choose(facts, &settings.selection)?;
    for passed_over in &chosen.passed_over {
        warn!("passed over {passed_over}");
    }
    let underlay = chosen.underlay;
    info!(
        link = %underlay.link, address = %underlay.address, public_ip = %underlay.public_ip, mtu = underlay.mtu,
        reason = %chosen.reason, "interface chosen"
    );
    Ok(underlay)
}
