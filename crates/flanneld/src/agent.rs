//! The loop: events in, reconcile out.
//!
//! Every input is a variant of one enum and every turn of the loop is the same:
//! take what came, then settle. One peer's change is applied as it is read;
//! whatever asks for a full pass sets a flag, and what arrives while a pass runs
//! forms the next one.
//!
//! ```text
//!   store pump ─┐
//!   renewal ────┤            ┌─ one peer ────▶ patch ──┐
//!   rules ──────┼─▶ Input ──▶┤                         ├─▶ status, subnet file
//!   audit ──────┘            ├─ need ────────▶ full ───┤
//!   kernel ────▶ Changes ───▶┴─ one object ──▶ repair ─┘
//!                                retry, with backoff
//! ```
//!
//! Only channel receipts and timers stand in the loop's `select!`, so nothing
//! that is dropped there is lost.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::diff::Step;
use flannel_core::firewall::{self, Ruleset, Wanted};
use flannel_core::guard::Guard;
use flannel_core::host::{Changes, Ensured, Failure, Firewall, HostError, Network};
use flannel_core::keeper::LeaseKeeper;
use flannel_core::lease::{Expiry, HeldLease, Lease, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::state::LinkName;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, Snapshot, StoreError};
use flannel_core::subnet_env::SubnetEnv;
use flannel_core::underlay::Interface;
use flannel_core::view::{Applied, Change, LeaseView};
use ipnetwork::IpNetwork;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::health::{Aspect, Status};
use crate::lease::delays;
use crate::reconcile::{Outcome, Reconciler};
use crate::state_dir::{StateDir, StateError};
use crate::subnet_file::SubnetFile;

mod doubt;
mod fight;
mod note;
mod said;
mod tenancy;

use doubt::Question;
use fight::Fight;
use note::Note;
use said::Said;
use tenancy::Heard;

/// How often between two renewals a value of our own lease that somebody changed is put right: two agents must not
/// fight for ever.
const REWRITES: u32 = 3;

/// Between attempts that fail again and again.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Between attempts to write the subnet file: dockerd waits for it, and they cost little.
const FILE_AGAIN: Duration = Duration::from_secs(1);

/// Between full comparisons that the kernel's word asks for, at least; the first one goes at once.
const BREATH: Duration = Duration::from_millis(50);

/// The same while somebody keeps changing what is ours.
const BREATH_IN_A_FIGHT: Duration = Duration::from_secs(1);

/// Of its time, such comparisons have at most one part in so many.
const SHARE: u32 = 5;

/// An address that goes and comes again, as with DHCP, is not worth a word for so long.
const MISSED: Duration = Duration::from_secs(2);

/// The store may tell us of an earlier write of ours for so long after a later one.
const ECHOES: Duration = Duration::from_secs(30);

/// What an agent is made of, beside the firewall.
pub struct Parts<S, N> {
    /// Where leases are kept.
    pub store: Arc<S>,
    /// The kernel, with the plans for it.
    pub reconciler: Reconciler<N>,
    /// The cluster's agreement.
    pub config: NetworkConfig,
    /// Our own lease.
    pub held: HeldLease,
    /// The file for dockerd.
    pub file: SubnetFile,
    /// What the operator chose.
    pub options: Options,
    /// Where the agent tells how it is doing.
    pub status: watch::Sender<Status>,
    /// Called once, when the host's path to the cluster stands.
    pub on_ready: Option<Box<dyn FnOnce() + Send>>,
    /// Where the agent remembers what it knows of the cluster.
    pub state: Option<StateDir>,
    /// Everybody else's leases as they are remembered, if the store is away and
    /// our own lease too is only remembered.
    pub recalled: Option<Vec<Lease>>,
}

/// What the operator chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which traffic rules.
    pub wanted: Wanted,
    /// Networks of an earlier run, whose rules go.
    pub former: Vec<IpNetwork>,
    /// Between checks of the rules.
    pub rules_interval: Duration,
    /// Between full comparisons.
    pub audit_interval: Duration,
    /// Latest renewal before a lease ends.
    pub renew_margin: Duration,
    /// How long many peers that vanish at once are held before the store is asked again; zero believes at once.
    pub removal_grace: Duration,
}

/// Something that happened.
enum Input {
    Store(Result<LeaseEvent, StoreError>),
    Renewed(Result<Expiry, StoreError>),
    Published(Result<HeldLease, StoreError>),
    Acquired(HeldLease),
    /// What we stood by belongs to another host.
    Lost(StoreError),
    /// A lease beside ours has been given back, or is not ours to give back; or it is still to be.
    GaveBack(Option<Subnet>),
    /// All leases, to a question that was asked then.
    Listed(Instant, Result<Snapshot, StoreError>),
    Rules(Result<Ensured, HostError>),
    Remembered(Result<(), StateError>),
    /// The network config is the one we remembered.
    ConfigStands,
    /// The network config is not the one we remembered.
    Reconfigured,
}

/// How an agent's run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to stop.
    Stopped,
    /// It has to be started anew, with the network config that the store has now.
    Reconfigured,
}

/// What is being done about our own lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tenancy {
    /// It is remembered; whether it is ours the store has yet to say.
    Confirming,
    Held,
    Renewing,
    /// The store says something else of it; that is being put right.
    Publishing,
    /// Somebody else has it; another one is being taken.
    Moving,
    /// Another one that is ours as well is being given back.
    GivingBack,
}

/// What a full pass has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Nothing,
    /// Compare the kernel with the plan.
    Compare,
    /// Plan anew, and compare.
    Plan,
}

/// One host's agent.
pub struct Agent<S, N, F> {
    parts: Parts<S, N>,
    firewall: Option<F>,
    view: LeaseView,
    guard: Guard,
    question: Question,
    keeper: LeaseKeeper,
    tenancy: Tenancy,
    /// Whether the network config is not the one we remembered.
    reconfigured: bool,
    /// Whether a snapshot has been seen: before that nothing is written to the kernel.
    listed: bool,
    need: Need,
    /// When what failed is tried again.
    retry: Option<Instant>,
    /// Whether that takes a full pass.
    retry_all: bool,
    /// When the kernel's word may ask for a full comparison again.
    breath: Instant,
    /// Why it has asked for one, if it has.
    asked: Option<String>,
    fight: Fight,
    /// What we should publish.
    wanted: watch::Sender<LeaseAttrs>,
    /// What we have published before, and until when.
    former_attrs: VecDeque<(LeaseAttrs, Instant)>,
    delays: Box<dyn Iterator<Item = Duration> + Send>,
    rules: watch::Sender<Ruleset>,
    rules_seen: bool,
    /// Whether the host's own device and address stand, whatever single peers lack.
    node_stands: bool,
    /// How often yet a value of our lease that somebody changed is put right.
    rewrites_left: u32,
    /// Whether somebody else keeps writing to our lease.
    disputed: bool,
    /// When it was last written by somebody else.
    overwritten: Option<Instant>,
    /// How often it was put right after they had been quiet.
    truces: u32,
    /// A subnet that we had to give up.
    former: Option<Subnet>,
    /// The interface that has an address of our subnet: docker's bridge.
    bridge: Option<LinkName>,
    /// What the subnet file says, once it is written.
    written: Option<SubnetEnv>,
    /// When the subnet file is to be written; not before the host's own part stands.
    file_due: Option<Instant>,
    note: Note,
    said: Said,
    inputs: (mpsc::Sender<Input>, mpsc::Receiver<Input>),
    /// Of which leases the store has told since it was asked for ours: what it told may be newer
    /// than its answer.
    heard: Heard,
    /// Leases beside ours that look as if they were ours too.
    strays: BTreeSet<Subnet>,
    /// The task that answers whoever asks whether we are alive.
    standing_by: Option<AbortHandle>,
    /// All tasks of the agent; dropping it ends them.
    tasks: JoinSet<()>,
}

impl<S: LeaseStore, N: Network, F: Firewall> Agent<S, N, F> {
    /// An agent that has done nothing yet.
    pub fn new(parts: Parts<S, N>, firewall: F) -> Self {
        let keeper = LeaseKeeper::new(parts.options.renew_margin, parts.held.expiry, now());
        parts.status.send_modify(|status| (status.lease, status.memory) = (Aspect::Good, Aspect::Good));
        Self {
            rules: watch::Sender::new(ruleset(&parts)),
            firewall: Some(firewall),
            view: LeaseView::default(),
            guard: Guard::new(parts.options.removal_grace),
            question: Question::default(),
            keeper,
            tenancy: Tenancy::Held,
            reconfigured: false,
            listed: false,
            need: Need::Plan,
            retry: None,
            retry_all: false,
            breath: Instant::now(),
            asked: None,
            fight: Fight::default(),
            wanted: watch::Sender::new(parts.held.lease.attrs.clone()),
            former_attrs: VecDeque::new(),
            delays: Box::new(delays()),
            rules_seen: false,
            node_stands: false,
            rewrites_left: REWRITES,
            disputed: false,
            overwritten: None,
            truces: 0,
            former: None,
            bridge: None,
            written: None,
            file_due: Some(Instant::now()),
            note: Note::default(),
            said: Said::default(),
            inputs: mpsc::channel(256),
            heard: Heard::default(),
            strays: BTreeSet::new(),
            standing_by: None,
            tasks: JoinSet::new(),
            parts,
        }
    }

    /// Runs until `stop`; leaves the kernel, the lease and the file as they are.
    ///
    /// A pass under way is dropped: what it has not done, the next start does.
    pub async fn run(mut self, stop: CancellationToken) -> Ended {
        let ended = tokio::select! {
            biased;
            () = stop.cancelled() => Ended::Stopped,
            ended = self.work() => ended,
        };
        self.remember_at_last();
        ended
    }

    async fn work(&mut self) -> Ended {
        self.said.lease(&self.parts.held, self.keeper.expiry());
        if self.parts.recalled.is_some() {
            self.recall().await;
        } else {
            self.stand_by();
            self.spawn_pump();
        }
        self.spawn_rules();
        let audits = self.parts.options.audit_interval;
        let mut audit = tokio::time::interval_at(Instant::now() + audits, audits);
        audit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let renewal = Some(self.keeper.next_renewal()).filter(|_| self.tenancy == Tenancy::Held);
            let file_due = self.file_due.filter(|_| self.node_stands && self.rules_seen);
            tokio::select! {
                // The timers first: a store that never pauses must not keep a lease from being renewed.
                biased;
                () = at(renewal.map(Instant::from_std)) => self.renew(),
                () = at(file_due) => self.write_file(),
                () = at(self.truce_over()) => self.end_truce(),
                () = at(self.question_due()) => self.ask_store(),
                () = at(self.retry) => self.try_once_more().await,
                () = at(self.note.due()) => self.remember(),
                () = at(Some(self.breath).filter(|_| self.asked.is_some())) => self.needs(Need::Compare),
                _ = audit.tick() => {
                    self.needs(Need::Compare);
                    self.file_due.get_or_insert_with(Instant::now);
                }
                Some(ended) = self.tasks.join_next() => pass_on_panic(ended),
                // And the cluster before the kernel: others could change things there without end.
                Some(input) = self.inputs.1.recv() => self.take(input).await,
                changes = self.parts.reconciler.changed() => self.take_changes(changes).await,
            }
            self.settle().await;
            if self.reconfigured {
                return Ended::Reconfigured;
            }
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Store(Ok(event)) => {
                self.tell_store(Aspect::Good);
                self.take_event(event).await;
            }
            Input::Store(Err(error)) => {
                let error = chain(&error);
                warn!(%error, "the leases cannot be watched; the kernel stays as it is");
                self.tell_store(Aspect::Flawed(format!("etcd: {error}; the kernel stays as it is")));
            }
            Input::Listed(asked, answer) => self.take_answer(asked, answer).await,
            Input::Renewed(result) => self.take_renewal(result),
            Input::Published(result) => self.take_published(result),
            Input::Acquired(held) => self.hold(held),
            Input::Lost(error) => self.take_loss(error),
            Input::GaveBack(still) => {
                self.strays.extend(still);
                if self.tenancy == Tenancy::GivingBack {
                    self.tenancy = Tenancy::Held;
                }
            }
            Input::Rules(result) => self.take_rules(result),
            Input::Remembered(result) => self.take_remembered(result),
            // Only now: where there is no config for us, there is nobody's lease for us either.
            Input::ConfigStands => self.spawn_pump(),
            Input::Reconfigured => self.reconfigured = true,
        }
    }

    async fn take_event(&mut self, event: LeaseEvent) {
        self.look_for_strays(&event);
        self.heard.take(&event);
        match &event {
            LeaseEvent::Snapshot(snapshot) => {
                self.said.only_unreadable(&snapshot.unreadable);
                snapshot.unreadable.iter().for_each(|key| self.said.unreadable(key));
                self.listed = true;
                self.parts.reconciler.trust_kernel(false);
            }
            LeaseEvent::Unreadable(key) => self.said.unreadable(key),
            LeaseEvent::Put(Lease { subnet, attrs, .. }) => {
                if *subnet == self.own() && *attrs != self.parts.held.lease.attrs {
                    self.overwritten = Some(Instant::now());
                }
                self.said.readable(*subnet);
            }
            LeaseEvent::Removed(subnet) => self.said.readable(*subnet),
            LeaseEvent::RemovedTogether(subnets) => {
                subnets.iter().for_each(|subnet| self.said.readable(*subnet));
            }
            LeaseEvent::Resumed => {}
        }
        let admitted = self.guard.admit(event, &self.view, self.own(), now());
        for event in admitted.events {
            self.believe(event).await;
        }
        self.tell_held(admitted.held);
    }

    async fn believe(&mut self, event: LeaseEvent) {
        let applied = self.view.apply(event);
        if applied != Applied::Nothing {
            self.news();
        }
        match applied {
            Applied::Nothing => {}
            Applied::Everything => self.needs(Need::Plan),
            Applied::One(change) => {
                if change.subnet() != Some(self.own()) {
                    self.said.peer(&change);
                }
                self.patch(&change).await;
            }
        }
    }

    fn tell_store(&self, aspect: Aspect) {
        self.parts.status.send_if_modified(|status| {
            let news = status.store != aspect;
            status.store = aspect;
            news
        });
    }

    /// What somebody else has done to the kernel.
    async fn take_changes(&mut self, changes: Changes) {
        if self.need != Need::Nothing || !self.listed {
            return;
        }
        let objects = match changes {
            Changes::Everything(why) => return self.ask(why),
            // Whoever changes things without end is answered now and then.
            Changes::Objects(_) if self.fight.goes_on() => return self.ask("what is ours".into()),
            Changes::Objects(objects) => objects,
        };
        match self.parts.reconciler.repair(objects).await {
            // What was touched is gone with its device, or is not as it was told: only a look will tell.
            Ok(Some(outcome)) if !outcome.report.in_sync() => self.ask("what is ours".into()),
            Ok(Some(outcome)) => {
                self.said.repaired(&outcome);
                self.fought(&outcome);
                self.take_outcome(outcome);
            }
            // Not at once: the kernel may be telling of this without end.
            Ok(None) => self.ask("what is ours".into()),
            Err(error) => self.broken(&error),
        }
    }

    /// Has the whole host compared, once there is time for it.
    fn ask(&mut self, why: String) {
        debug!(why, "comparing the whole host");
        self.asked.get_or_insert(why);
    }

    /// Takes in that somebody had changed what is ours.
    fn fought(&mut self, outcome: &Outcome) {
        if let Some(first) = outcome.first.as_ref().filter(|_| outcome.report.applied > 0) {
            self.fight.round(Instant::now(), first);
        }
    }

    /// Tries again what has failed.
    async fn try_once_more(&mut self) {
        self.retry = None;
        if std::mem::take(&mut self.retry_all) {
            return self.needs(Need::Compare);
        }
        match self.parts.reconciler.retry().await {
            Ok(outcome) => self.take_outcome(outcome),
            Err(error) => self.broken(&error),
        }
    }

    fn needs(&mut self, need: Need) {
        self.need = self.need.max(need);
    }

    /// Whether a bridge is still on the subnet that we had to give up.
    fn check_bridge(&mut self, interfaces: &[Interface]) {
        let own = self.own();
        self.bridge = self.interface_on(own, interfaces);
        let Some(former) = self.former else { return };
        let bridge = match self.interface_on(former, interfaces) {
            Some(bridge) => Aspect::Pending(format!("{bridge} still has {former}, which is not ours")),
            None => Aspect::Good,
        };
        self.parts.status.send_modify(|status| status.bridge = bridge);
    }

    /// The interface of somebody else, docker's bridge most likely, that has an address of `subnet`.
    fn interface_on(&self, subnet: Subnet, interfaces: &[Interface]) -> Option<LinkName> {
        let inside = |address: IpAddr| subnet.networks().any(|subnet| subnet.contains(address));
        let is_there = |interface: &&Interface| {
            let ours = self.parts.reconciler.owns(interface.name);
            !ours && interface.addresses.iter().any(|own| inside(own.network.ip()))
        };
        interfaces.iter().find(is_there).map(|interface| interface.name)
    }

    fn take_rules(&mut self, result: Result<Ensured, HostError>) {
        self.rules_seen = true;
        if result.is_ok() && !self.parts.options.former.is_empty() {
            // Rules of a former network are gone; from now on they may be somebody else's.
            self.parts.options.former.clear();
            self.rules.send_replace(ruleset(&self.parts));
        }
        let aspect = match &result {
            Ok(_) => Aspect::Good,
            Err(error) => Aspect::Pending(format!("firewall pending: {}", chain(error))),
        };
        self.said.rules(&result);
        self.parts.status.send_modify(|status| status.rules = aspect);
    }

    async fn patch(&mut self, change: &Change) {
        if self.need != Need::Nothing || !self.listed {
            return self.needs(Need::Plan);
        }
        match self.parts.reconciler.patch(change, &self.view).await {
            Ok(Some(outcome)) => self.take_outcome(outcome),
            Ok(None) => self.needs(Need::Plan),
            Err(error) => self.broken(&error),
        }
    }

    /// Does what has been put off until now.
    async fn settle(&mut self) {
        self.check_own();
        if self.asked.is_some() && self.breath <= Instant::now() {
            self.needs(Need::Compare);
        }
        if self.need == Need::Nothing || !self.listed {
            return;
        }
        let replan = self.need == Need::Plan;
        let asked = self.asked.take();
        (self.need, self.retry, self.retry_all) = (Need::Nothing, None, false);
        let (began, mtu) = (Instant::now(), self.parts.reconciler.mtu());
        let stood = self.parts.reconciler.underlay().clone();
        match self.parts.reconciler.full(&self.view, replan).await {
            Ok(outcome) => {
                if asked.is_some() {
                    self.fought(&outcome);
                }
                self.take_outcome(Outcome { after: asked, ..outcome });
            }
            Err(error) => self.broken(&error),
        }
        let breath = if self.fight.goes_on() { BREATH_IN_A_FIGHT } else { BREATH };
        self.breath = Instant::now() + breath.max(began.elapsed() * (SHARE - 1));
        let stands = self.parts.reconciler.underlay();
        self.said.moved(&stood, stands);
        if (stood.link, stood.address) != (stands.link, stands.address) {
            self.parts.store.host_moved();
        }
        if mtu != self.parts.reconciler.mtu() {
            self.file_due = Some(Instant::now());
        }
        let attrs = self.parts.reconciler.attributes();
        self.wanted.send_if_modified(|wanted| {
            let news = *wanted != attrs;
            *wanted = attrs;
            news
        });
        // Before anything else is heard: peers wait for it.
        self.check_own();
    }

    fn take_outcome(&mut self, outcome: Outcome) {
        if let Some(planned) = &outcome.planned {
            self.said.skipped(planned);
        }
        if let Some(seen) = &outcome.seen {
            self.said.strays(seen);
            self.said.lost(seen, Instant::now());
            self.check_bridge(&seen.interfaces);
            let underlay = match &seen.lost {
                Some(why) => {
                    self.retry_all = true;
                    self.retry = Some(Instant::now() + MISSED);
                    Aspect::Pending(why.clone())
                }
                None => Aspect::Good,
            };
            self.parts.status.send_modify(|status| status.underlay = underlay);
        }
        let full = outcome.seen.is_some();
        let failures = &outcome.report.failures;
        self.node_stands |= full && !failures.iter().any(concerns_node);
        if let Some(first) = failures.first() {
            let more = self.parts.reconciler.refused().saturating_sub(1);
            if self.said.is_lost() {
                debug!(step = %first.step, reason = %first.reason, more, "refused for want of an interface");
            } else {
                self.said.refused(first, more);
            }
            let mut phrase = format!("the kernel refused to {}: {}", first.step, first.reason);
            if more > 0 {
                phrase += &format!(", and {more} more");
            }
            let few = self.parts.reconciler.refused_few() && !failures.iter().any(concerns_node);
            let aspect = if few { Aspect::Flawed(phrase) } else { Aspect::Pending(phrase) };
            self.parts.status.send_modify(|status| status.host = aspect);
            self.retry_all |= failures.iter().any(concerns_node);
            self.try_again();
        } else if self.parts.reconciler.refused() > 0 {
            // Others are still refused; this one was not.
            self.try_again();
        } else if self.need == Need::Nothing {
            self.delays = Box::new(delays());
            if !self.retry_all {
                self.retry = None;
            }
            self.fight.forget(Instant::now());
            if self.fight.goes_on() && self.retry.is_none() {
                // Once it is quiet nobody else would look whether it is over.
                (self.retry, self.retry_all) = (Some(Instant::now() + fight::LATE), true);
            }
            self.said.in_sync(&outcome, self.view.count_peers(self.own()));
            let aspect = match self.said.fight(&self.fight) {
                Some(phrase) => Aspect::Pending(phrase),
                None => Aspect::Good,
            };
            self.parts.status.send_modify(|status| status.host = aspect);
        }
    }

    /// The kernel cannot be read or written at all.
    fn broken(&mut self, error: &HostError) {
        self.said.broken(error);
        let pending = format!("the kernel is not in step: {}", chain(error));
        self.parts.status.send_modify(|status| status.host = Aspect::Pending(pending));
        self.retry_all = true;
        self.try_again();
    }

    /// Has what failed tried again in a while; a little later each time in a row.
    fn try_again(&mut self) {
        if self.retry.is_none() {
            self.retry = Some(Instant::now() + self.delays.next().unwrap_or(LONGEST_WAIT));
        }
    }

    fn write_file(&mut self) {
        let env = SubnetEnv {
            networks: self.parts.config.networks().collect(),
            subnet: self.own(),
            mtu: self.parts.reconciler.mtu(),
            masquerade: self.parts.options.wanted.masquerade,
        };
        let result = self.parts.file.write(&env.to_string());
        self.said.file(&result, &self.parts.file, &env, self.written.as_ref());
        match result {
            Ok(_) => {
                self.file_due = None;
                self.said.outdated(self.written.as_ref(), &env, self.bridge);
                self.written = Some(env);
                self.parts.status.send_modify(|status| status.file = Aspect::Good);
                if let Some(on_ready) = self.parts.on_ready.take() {
                    on_ready();
                }
            }
            Err(error) => {
                let pending = chain(&error);
                self.parts.status.send_modify(|status| status.file = Aspect::Pending(pending));
                self.file_due = Some(Instant::now() + FILE_AGAIN);
            }
        }
    }

    fn own(&self) -> Subnet {
        self.parts.held.lease.subnet
    }

    /// Moves events from the store's watch, which must not be dropped half-way, into the channel.
    fn spawn_pump(&mut self) {
        let (mut watch, inputs) = (self.parts.store.watch(), self.inputs.0.clone());
        self.tasks.spawn(async move { while inputs.send(Input::Store(watch.next().await)).await.is_ok() {} });
    }

    /// Checks the traffic rules again and again, and at once when they are to be
    /// others or somebody else has changed them.
    fn spawn_rules(&mut self) {
        let Some(mut firewall) = self.firewall.take() else { return };
        let (mut rules, inputs) = (self.rules.subscribe(), self.inputs.0.clone());
        let every = self.parts.options.rules_interval;
        self.tasks.spawn(async move {
            loop {
                let ruleset = rules.borrow_and_update().clone();
                let ensured = firewall.ensure(&ruleset).await;
                let ensured = ensured.and_then(|ensured| firewall.trouble().map_or(Ok(ensured), Err));
                if inputs.send(Input::Rules(ensured)).await.is_err() {
                    return;
                }
                tokio::select! {
                    biased;
                    () = tokio::time::sleep(every) => {}
                    () = firewall.changed() => {}
                    changed = rules.changed() => if changed.is_err() { return },
                }
            }
        });
    }

    fn spawn(&mut self, work: impl Future<Output = Input> + Send + 'static) {
        let inputs = self.inputs.0.clone();
        self.tasks.spawn(async move {
            // A closed channel means that the agent has stopped.
            drop(inputs.send(work.await).await);
        });
    }
}

fn ruleset<S, N: Network>(parts: &Parts<S, N>) -> Ruleset {
    let pool = parts.config.v4.as_ref().expect("a config without IPv4 is refused before an agent is made");
    let subnet = parts.held.lease.subnet.v4().expect("a lease has a prefix of every family of the config");
    firewall::rules(pool.network, subnet.into(), parts.options.wanted, parts.options.former.clone())
}

/// A bug in a task is a bug in the agent: the supervisor starts us again, the kernel goes on meanwhile.
fn pass_on_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

/// Whether a failure leaves the host itself without its path, not just one peer.
fn concerns_node(failure: &Failure) -> bool {
    matches!(
        failure.step,
        Step::AddLink(..) | Step::ChangeLink(..) | Step::RemoveLink(..) | Step::AddAddress(..)
    )
}

/// Now, on the clock that tests can pause.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
