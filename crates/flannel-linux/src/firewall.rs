//! The traffic rules of this host: one engine makes them stand, what the others
//! hold of us goes, and the kernel's word of changes wakes whoever waits for it.
//!
//! ```text
//!   ensure ──▶ firewalld: at its own just now? ──▶ engine: iptables or nftables
//!                                                  └──▶ then, once: leftovers in the other engines
//!   changed ◀─┬ ear ◀── the kernel, of nf_tables
//!             └ firewalld, by the bus of the system, of x_tables
//! ```
//!
//! The new rules come before the old ones go: at no moment would a packet meet none.
//! x_tables tell nothing: rules there are looked at by the clock, and when firewalld
//! says that it was there. In nf_tables, which nobody can lock, our rules wait until
//! firewalld is done with its own.

use std::time::Duration;

use flannel_core::firewall::Ruleset;
use flannel_core::host::{Ensured, Firewall, HostError};
use flannel_core::network::FirewallEngine;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

mod docker;
mod ear;
mod firewalld;
mod generation;
mod insistence;
pub mod iptables;
mod leftovers;
pub mod nftables;
mod program;

use docker::Docker;
use ear::{Concern, Ear};
use firewalld::{Firewalld, Question};
use iptables::{Family, IptablesFirewall};
use leftovers::Leftovers;
use nftables::NftablesFirewall;

/// What is told one after the other is looked at together.
const TOGETHER: Duration = Duration::from_millis(20);

/// Of its time, looking at what others change has at most one part in so many.
const SHARE: u32 = 5;

/// The traffic rules of one family, by the engine of the network config, in the
/// network namespace of whoever asks; it is to be the same one each time.
pub struct LinuxFirewall {
    engine: Engine,
    leftovers: Leftovers,
    docker: Docker,
    ear: Option<Ear>,
    /// Only where the kernel tells nothing.
    firewalld: Option<Firewalld>,
    /// To firewalld, before rules are written that no lock guards.
    question: Question,
    /// Where the bus is that firewalld is heard by, if it is not that of the system.
    bus: Option<String>,
    /// Whether something was heard that nobody has looked at yet.
    heard: bool,
    /// Before that nobody is woken again.
    rests_until: Instant,
}

enum Engine {
    Iptables(IptablesFirewall),
    Nftables(NftablesFirewall),
}

impl Engine {
    /// Whether the kernel tells that nothing has changed since the rules were found right.
    fn is_at_rest(&self) -> bool {
        match self {
            Self::Iptables(iptables) => iptables.is_at_rest(),
            Self::Nftables(nftables) => nftables.is_at_rest(),
        }
    }

    /// Whether its writes could come into the midst of somebody else's; x_tables have a lock.
    fn minds_company(&self) -> bool {
        match self {
            Self::Iptables(iptables) => iptables.is_told() != Some(false),
            Self::Nftables(_) => true,
        }
    }

    /// When rules that had to be left as they are may be put right.
    fn waits_until(&self) -> Option<Instant> {
        match self {
            Self::Iptables(iptables) => iptables.waits_until(),
            Self::Nftables(_) => None,
        }
    }
}

impl LinuxFirewall {
    /// The rules of `family` by that engine, through the programs that the path leads to.
    pub fn new(engine: FirewallEngine, family: Family) -> Self {
        match engine {
            FirewallEngine::Iptables => Self::through_iptables(IptablesFirewall::new(family), family),
            FirewallEngine::Nftables => Self::through_nft(NftablesFirewall::default(), family),
        }
    }

    /// The rules of `family` by that iptables.
    pub fn through_iptables(iptables: IptablesFirewall, family: Family) -> Self {
        Self::with(Engine::Iptables(iptables), Leftovers::new(FirewallEngine::Iptables, family))
    }

    /// The rules of `family` by that nft.
    pub fn through_nft(nftables: NftablesFirewall, family: Family) -> Self {
        Self::with(Engine::Nftables(nftables), Leftovers::new(FirewallEngine::Nftables, family))
    }

    fn with(engine: Engine, leftovers: Leftovers) -> Self {
        Self {
            engine,
            leftovers,
            docker: Docker::default(),
            ear: None,
            firewalld: None,
            question: Question::default(),
            bus: None,
            heard: false,
            rests_until: Instant::now(),
        }
    }

    /// Hears firewalld by the bus of that address.
    #[must_use]
    pub fn on_bus(self, address: &str) -> Self {
        Self { bus: Some(address.into()), ..self }
    }

    /// Listens where the rules are: to the kernel if it tells of changes there, else to firewalld.
    fn listen(&mut self, rules: &Ruleset) {
        let concern = match &self.engine {
            Engine::Iptables(iptables) => match iptables.is_told() {
                Some(told) => told.then(|| Concern::iptables(rules)),
                None => return,
            },
            Engine::Nftables(_) => Some(Concern::nftables(rules)),
        };
        if let Some(concern) = concern {
            if self.ear.as_ref().is_some_and(|ear| *ear.concern() == concern) {
                return;
            }
            match Ear::open(concern) {
                // What has changed until now was not heard.
                Ok(ear) => (self.ear, self.heard) = (Some(ear), !self.engine.is_at_rest()),
                Err(error) => {
                    debug!(%error, "nf_tables tells us nothing; its rules are looked at by the clock")
                }
            }
        }
        match &self.ear {
            Some(_) => self.firewalld = None,
            None if self.firewalld.is_none() => self.firewalld = Some(Firewalld::listen(self.bus.clone())),
            None => {}
        }
    }

    /// Waits for whoever tells of changes. Safe to drop at any moment, as both of them are.
    async fn word(&mut self) {
        match (&mut self.ear, &mut self.firewalld) {
            (Some(ear), _) => ear.heard().await,
            (None, Some(firewalld)) => firewalld.heard().await,
            (None, None) => std::future::pending().await,
        }
    }

    /// Forgets what was heard: all is looked at now.
    fn forget(&mut self) {
        if let Some(ear) = &mut self.ear {
            ear.forget();
        }
        if let Some(firewalld) = &mut self.firewalld {
            firewalld.forget();
        }
        self.heard = false;
    }
}

impl Firewall for LinuxFirewall {
    async fn ensure(&mut self, rules: &Ruleset) -> Result<Ensured, HostError> {
        if self.engine.minds_company() && !self.engine.is_at_rest() {
            self.question.at_rest(self.bus.as_deref()).await;
        }
        let began = Instant::now();
        self.forget();
        self.leftovers.look_before();
        let ensured = match &mut self.engine {
            Engine::Iptables(iptables) => iptables.ensure(rules).await,
            Engine::Nftables(nftables) => nftables.ensure(rules).await,
        };
        let ensured = match ensured {
            // Nothing to make stand, and nothing to do it with.
            Err(HostError::Missing { .. }) if rules.is_empty() => Ok(Ensured::Unchanged),
            ensured => ensured,
        };
        if ensured.is_ok() {
            let on_nft = match &self.engine {
                Engine::Iptables(iptables) => iptables.is_told(),
                Engine::Nftables(_) => None,
            };
            self.leftovers.sweep(rules, on_nft).await;
            let iptables = match &self.engine {
                Engine::Iptables(iptables) => Some(iptables.program()),
                Engine::Nftables(_) => None,
            };
            self.docker.look(rules, iptables).await;
        }
        self.listen(rules);
        self.rests_until = Instant::now() + began.elapsed() * (SHARE - 1);
        ensured
    }

    fn trouble(&self) -> Option<HostError> {
        self.leftovers.trouble()
    }

    async fn changed(&mut self) {
        let waits_until = self.engine.waits_until().filter(|until| *until > Instant::now());
        loop {
            if !self.heard {
                let due = async {
                    match waits_until {
                        Some(until) => sleep_until(until).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = self.word() => self.heard = true,
                    () = due => return,
                }
            }
            sleep_until(self.rests_until.max(Instant::now() + TOGETHER)).await;
            self.forget();
            // Or else it was we who changed something.
            if !self.engine.is_at_rest() {
                return;
            }
        }
    }
}
