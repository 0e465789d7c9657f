//! The start, a straight line: file → store → config → underlay → backend → lease.
//!
//! What can come right by itself (a store that is away, a config that is not
//! there or not good, a full range) is waited for, and said once. What needs
//! the flags or the host to change ends the start with a sentence.

use std::sync::Arc;
use std::time::Duration;

use flannel_core::backend::{self, Backend, Node};
use flannel_core::chain::chain;
use flannel_core::claim::Claim;
use flannel_core::firewall::Wanted;
use flannel_core::host::{HostError, Network, Observed};
use flannel_core::lease::HeldLease;
use flannel_core::network::NetworkConfig;
use flannel_core::plan::{Planner, RouteMode};
use flannel_core::state::MacAddr;
use flannel_core::store::{LeaseStore, StoreError};
use flannel_core::subnet_env::FormerEnv;
use flannel_core::underlay::{self, Facts, InterfaceAddress, NoUnderlay, Underlay};
use flannel_etcd::EtcdStore;
use flannel_linux::sysctl::bridge_netfilter_remedy;
use flannel_linux::{Family, IptablesFirewall, LinuxNetwork};
use ipnetwork::IpNetwork;
use thiserror::Error;
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::agent::{Agent, Options, Parts};
use crate::args::Settings;
use crate::health::{self, Status};
use crate::lease::acquire;
use crate::reconcile::Reconciler;
use crate::subnet_file::SubnetFile;
use crate::{notify, shutdown};

/// How often the network config is asked for while it is not there or not good, as in flannel.
const ASK_AGAIN: Duration = Duration::from_secs(1);

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
    let agent = tokio::select! {
        // The start may be dropped anywhere: it changes nothing but the store, and that by whole transactions.
        () = stop.cancelled() => return Ok(()),
        agent = start(settings, status) => agent?,
    };
    agent.run(stop).await;
    Ok(())
}

/// Everything up to the first event.
async fn start(
    settings: Settings,
    status: watch::Sender<Status>,
) -> Result<Agent<EtcdStore, LinuxNetwork, IptablesFirewall>, StartError> {
    for flag in &settings.without_effect {
        warn!(flag, "this flag has no effect here");
    }
    let file = SubnetFile::new(settings.subnet_file.clone());
    let former = former(&file);
    let store = Arc::new(EtcdStore::connect(&etcd(&settings)).await?);
    let mut network = LinuxNetwork::new()?;
    // From the config on, the line is walked again if the range turns out to be full and is then made another one.
    let place = loop {
        if let Some(place) = take_place(&*store, &mut network, &settings, &former).await? {
            break place;
        }
    };

    let wanted = Wanted {
        masquerade: settings.masquerade,
        random_fully: settings.random_fully,
        forward: settings.forward,
    };
    if let Some(remedy) = bridge_netfilter_remedy().filter(|_| !wanted.nothing()) {
        warn!(remedy, "bridged containers pass the traffic rules by");
    }
    let networks: Vec<IpNetwork> = place.config.networks().collect();
    let node = Node { networks, underlay: place.underlay, lease: place.held.lease.clone(), mtu: None };
    if settings.route_mode == RouteMode::Nexthop && place.backend.links().is_empty() {
        warn!(
            backend = place.backend.kind(),
            "--route-mode nexthop has no effect: this backend has no device of its own, and routes by others are plain"
        );
    }
    let planner = Planner::new(place.backend, node, settings.route_mode);
    let parts = Parts {
        store,
        reconciler: Reconciler::new(network, planner, place.claim, settings.selection),
        config: place.config,
        held: place.held,
        file,
        options: Options {
            wanted,
            former: place.gone,
            rules_interval: settings.rules_interval,
            audit_interval: settings.audit_interval,
            renew_margin: settings.renew_margin,
        },
        status,
        on_ready: Some(Box::new(notify::ready)),
    };
    Ok(Agent::new(parts, IptablesFirewall::new(Family::Ipv4)))
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

/// Config, underlay, backend, lease; `None` if the config changed while we waited for room in it.
async fn take_place<S: LeaseStore>(
    store: &S,
    network: &mut LinuxNetwork,
    settings: &Settings,
    former: &FormerEnv,
) -> Result<Option<Place>, StartError> {
    let (config, backend) = network_config(store).await;
    let networks: Vec<IpNetwork> = config.networks().collect();
    // What a network we no longer have has left here is ours to clear away; but no file makes the whole world ours.
    let is_gone = |network: &&IpNetwork| network.prefix() > 0 && !networks.contains(network);
    let gone: Vec<IpNetwork> = former.networks.iter().filter(is_gone).copied().collect();
    let networks = [networks, gone.clone()].concat();
    let claim = Claim { links: backend.links(), networks, underlay: None };
    let Observed { facts, state } = network.observe(&claim, settings.selection.can_reach).await?;
    warn_of_another_agent(&claim, &facts);
    let underlay = choose_underlay(&facts, settings)?;
    backend.check(&underlay).map_err(StartError::Backend)?;
    if backend.mtu_cut(&underlay) {
        warn!(mtu = underlay.mtu, link = %underlay.link, "Backend.MTU is above that of the interface and is cut to it");
    }
    let attrs = backend.attributes(&underlay, &state, MacAddr::local(rand::random()));
    let held = acquire(store, &config, &attrs, former.subnet).await;
    Ok(held.ok().map(|held| Place { config, backend, underlay, claim, gone, held }))
}

fn etcd(settings: &Settings) -> flannel_etcd::Settings {
    let user = settings.etcd_user.as_ref();
    flannel_etcd::Settings {
        endpoints: settings.etcd_endpoints.clone(),
        prefix: settings.etcd_prefix.clone(),
        ca_file: settings.etcd_ca.clone(),
        cert_file: settings.etcd_cert.clone(),
        key_file: settings.etcd_key.clone(),
        username: user.map(|(name, _)| name.clone()),
        password: user.map(|(_, password)| flannel_etcd::Password::new(password.reveal())),
    }
}

/// What an earlier run left in the subnet file; nothing if that cannot be read.
fn former(file: &SubnetFile) -> FormerEnv {
    let former = file.read().unwrap_or_else(|error| {
        warn!(error = %chain(&error), "the previous subnet is not known");
        None
    });
    let former = former.unwrap_or_default();
    for flaw in &former.flaws {
        warn!(path = %file.path().display(), flaw, "part of the subnet file cannot be read");
    }
    former
}

/// Waits for a network config that can be used; says once what is wrong with it.
async fn network_config<S: LeaseStore>(store: &S) -> (NetworkConfig, Box<dyn Backend>) {
    let mut said = None;
    loop {
        match usable_config(store).await {
            Ok((config, backend, unknown)) => {
                let network =
                    config.networks().map(|network| network.to_string()).collect::<Vec<_>>().join(" and ");
                info!(network, backend = backend.kind(), "network config read");
                for key in unknown {
                    warn!(key, "the network config has a key that nobody knows");
                }
                return (config, backend);
            }
            Err(error) => {
                if said.replace(error.trouble()) != Some(error.trouble()) {
                    warn!(error = %chain(&error), "waiting for a network config");
                }
            }
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

async fn usable_config<S: LeaseStore>(
    store: &S,
) -> Result<(NetworkConfig, Box<dyn Backend>, Vec<String>), StoreError> {
    let bad = |source| StoreError::BadConfig { key: store.config_key(), source };
    let config = store.network_config().await?.supported().map_err(bad)?;
    let (backend, unknown) = backend::from_config(&config).map_err(bad)?;
    let unknown = config.unknown.iter().cloned().chain(unknown).collect();
    Ok((config, backend, unknown))
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
