//! What the log has been told last, so that it hears of changes only.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::host::{Ensured, Failure, HostError};
use flannel_core::lease::{Expiry, HeldLease, Subnet};
use flannel_core::state::LinkName;
use flannel_core::store::{StoreError, Unreadable};
use flannel_core::subnet_env::SubnetEnv;
use flannel_core::underlay::Underlay;
use flannel_core::view::Change;
use ipnetwork::IpNetwork;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::Fight;
use crate::reconcile::{Outcome, Planned, Seen};
use crate::state_dir::StateError;
use crate::subnet_file::{SubnetFile, SubnetFileError};

/// Rules that are written again within that are not worth a line each.
const RULES_AGAIN: Duration = Duration::from_secs(60);

/// How many keys that are no lease are remembered.
const MOST_UNREADABLE: usize = 1000;

#[derive(Default)]
pub(super) struct Said {
    skipped: BTreeMap<Subnet, String>,
    /// Reason and subnet by key.
    unreadable: BTreeMap<String, (String, Option<Subnet>)>,
    strays: BTreeSet<IpNetwork>,
    /// Since when the interface between the hosts is lost, and whether that was told.
    lost: Option<(Instant, bool)>,
    fight: bool,
    /// Peers that vanished from the store at once, since nobody was held: all, and those let go.
    vanished: usize,
    let_go: usize,
    unanswered: Option<String>,
    /// Peers since the last full pass.
    joined: usize,
    left: usize,
    changed: usize,
    /// Objects put right since the last full pass.
    repaired: usize,
    trouble: Option<String>,
    in_sync: bool,
    renewal: Option<String>,
    rules: Option<String>,
    /// Whether the rules have stood before: then it is somebody else who has changed them.
    rules_stood: bool,
    /// When it was last told that rules were put right, and how often it was not since.
    rules_put_right: Option<(Instant, usize)>,
    file: Option<String>,
    note: Option<String>,
}

/// Keeps `words`; whether they are new.
fn is_new(last: &mut Option<String>, words: &str) -> bool {
    let new = last.as_deref() != Some(words);
    *last = Some(words.into());
    new
}

impl Said {
    pub(super) fn lease(&self, held: &HeldLease, expiry: Expiry) {
        let public_ip = held.lease.attrs.public_ip.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED);
        info!(subnet = %held.lease.subnet, %public_ip, expires_in = %left(expiry), "holding a lease");
    }

    pub(super) fn renewal(&mut self, subnet: Subnet, expiry: Expiry, error: &StoreError) {
        let (error, expires_in) = (chain(error), left(expiry));
        if is_new(&mut self.renewal, &error) {
            warn!(%subnet, %expires_in, %error, "the lease could not be renewed; trying again every minute");
        }
    }

    pub(super) fn renewed(&mut self, subnet: Subnet, expiry: Expiry) {
        let expires_in = left(expiry);
        match self.renewal.take() {
            Some(_) => info!(%subnet, %expires_in, "the lease is renewed again"),
            None => debug!(%subnet, %expires_in, "lease renewed"),
        }
    }

    pub(super) fn unreadable(&mut self, key: &Unreadable) {
        let told = self.unreadable.get(&key.key).is_some_and(|(reason, _)| *reason == key.reason);
        if !told {
            warn!(key = %key.key, reason = %key.reason, "skipping a key that is no lease");
            // Whoever fills the store with junk does not fill our memory.
            if self.unreadable.len() >= MOST_UNREADABLE {
                self.unreadable.clear();
            }
            self.unreadable.insert(key.key.clone(), (key.reason.clone(), key.subnet));
        }
    }

    /// Forgets the keys that are not in a snapshot any more.
    pub(super) fn only_unreadable(&mut self, keys: &[Unreadable]) {
        self.unreadable.retain(|key, _| keys.iter().any(|other| other.key == *key));
    }

    /// The key of that subnet is a lease again, or gone.
    pub(super) fn readable(&mut self, subnet: Subnet) {
        self.unreadable.retain(|_, (_, other)| *other != Some(subnet));
    }

    /// Peers that are left out, and those that no longer are.
    pub(super) fn skipped(&mut self, outcome: &Planned) {
        for peer in &outcome.skipped {
            if self.skipped.get(&peer.subnet) != Some(&peer.reason) {
                warn!(subnet = %peer.subnet, reason = %peer.reason, "skipping a peer");
            }
        }
        match &outcome.planned {
            Some(planned) => self.skipped.retain(|subnet, _| !planned.contains(subnet)),
            None => self.skipped.clear(),
        }
        let now = outcome.skipped.iter().map(|peer| (peer.subnet, peer.reason.clone()));
        self.skipped.extend(now);
    }

    /// Routes that lead into the network and are nobody's we know.
    pub(super) fn strays(&mut self, seen: &Seen) {
        for route in &seen.strays {
            if !self.strays.contains(&route.destination) {
                warn!(
                    destination = %route.destination, gateway = ?route.gateway,
                    "a route into the network that is not ours and leads to no lease; remove it if nobody needs it"
                );
            }
        }
        self.strays = seen.strays.iter().map(|route| route.destination).collect();
    }

    /// The interface between the hosts is not to be found, or is again. An
    /// address that goes and comes again at once is not worth a word.
    pub(super) fn lost(&mut self, seen: &Seen, now: Instant) {
        let Some(why) = &seen.lost else {
            if let Some((_, true)) = self.lost.take() {
                info!("the interface between the hosts is back");
            }
            return;
        };
        let (since, told) = self.lost.get_or_insert((now, false));
        if !*told && now.duration_since(*since) >= super::MISSED {
            *told = true;
            warn!(%why, "the interface between the hosts is lost; everything stays as it is until it is back");
        }
    }

    /// Whether there is no interface between the hosts at the moment.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Somebody keeps changing what is ours, or no longer does; a phrase if so.
    pub(super) fn fight(&mut self, fight: &Fight) -> Option<String> {
        if !fight.goes_on() {
            if std::mem::take(&mut self.fight) {
                info!("nobody changes what is ours any more");
            }
            return None;
        }
        let phrase = format!("somebody keeps changing what is ours, as in: {}", fight.about());
        if !std::mem::replace(&mut self.fight, true) {
            error!(
                first = fight.about(),
                "somebody keeps changing what is ours in the kernel: another agent with this VNI, a script? Putting it \
                 right once a second"
            );
        }
        Some(phrase)
    }

    /// So many peers are held, `new` of them since just now.
    pub(super) fn held(&mut self, held: usize, new: usize, peers: usize, grace: Duration) {
        self.vanished += new;
        if new > 0 {
            error!(
                vanished = new, held, peers, believed_in = ?grace,
                "many peers vanished from the store at once; their routes stay, and those who are still gone then are \
                 believed gone. If nobody meant that, look at the store: was a range deleted, a backup restored? Hosts \
                 that run put their own leases back"
            );
        } else if held == 0 && self.vanished > 0 {
            let (let_go, back) = (self.let_go, self.vanished.saturating_sub(self.let_go));
            info!(back, let_go, "no peer is held any more");
            (self.vanished, self.let_go, self.unanswered) = (0, 0, None);
        }
    }

    /// Whether the held ones are gone could not be asked.
    pub(super) fn unanswered(&mut self, error: &StoreError) {
        if is_new(&mut self.unanswered, &error.trouble()) {
            warn!(error = %chain(error), "the store cannot be asked whether the held peers are gone; holding them on");
        }
    }

    /// So many of the held peers are gone, the store says so again.
    pub(super) fn let_go(&mut self, gone: usize) {
        self.let_go += gone;
        self.unanswered = None;
        warn!(gone, "the store still lacks these peers; removing them");
    }

    /// This host stands elsewhere than before.
    pub(super) fn moved(&self, stood: &Underlay, stands: &Underlay) {
        let place = |underlay: &Underlay| (underlay.link, underlay.address, underlay.mtu, underlay.public_ip);
        if place(stood) != place(stands) {
            info!(
                link = %stands.link, address = %stands.address, public_ip = %stands.public_ip, mtu = stands.mtu,
                was = %format_args!("{} {} mtu {}", stood.link, stood.address, stood.mtu),
                "following the interface between the hosts"
            );
        }
    }

    /// What dockerd has read from the subnet file is no longer what it says.
    pub(super) fn outdated(&self, was: Option<&SubnetEnv>, is: &SubnetEnv, bridge: Option<LinkName>) {
        let Some(was) = was.filter(|was| was.mtu != is.mtu) else { return };
        let bridge = bridge.map_or_else(|| "none yet".into(), |bridge| bridge.to_string());
        warn!(
            mtu = is.mtu, was = was.mtu, %bridge,
            "the MTU in the subnet file is another one now: dockerd gives containers the former one until `systemctl restart docker`"
        );
    }

    /// Somebody has touched objects of ours, and they were put right: the first
    /// with its name, the rest as a sum with the next full pass.
    pub(super) fn repaired(&mut self, outcome: &Outcome) {
        if let Some(first) = outcome.first.as_ref().filter(|_| outcome.report.applied > 0) {
            if self.repaired == 0 {
                info!(%first, "putting right what somebody else has changed in the kernel");
            } else {
                debug!(%first, "putting right what somebody else has changed in the kernel");
            }
            self.repaired += outcome.report.applied;
        }
    }

    /// One peer came, went or changed: a line each for whoever looks closer,
    /// a sum with the next full pass for the day's history.
    pub(super) fn peer(&mut self, change: &Change) {
        let (subnet, what) = match (&change.before, &change.after) {
            (None, Some(peer)) => {
                self.joined += 1;
                (peer.subnet, "peer joined")
            }
            (Some(peer), None) => {
                self.left += 1;
                (peer.subnet, "peer left")
            }
            (Some(_), Some(peer)) => {
                self.changed += 1;
                (peer.subnet, "peer changed")
            }
            (None, None) => return,
        };
        debug!(%subnet, "{what}");
    }

    pub(super) fn refused(&mut self, first: &Failure, more: usize) {
        self.in_sync = false;
        if is_new(&mut self.trouble, &format!("{}: {}", first.step, first.reason)) {
            warn!(step = %first.step, reason = %first.reason, more, "the kernel refused a step; trying again");
        }
    }

    pub(super) fn broken(&mut self, error: &HostError) {
        self.in_sync = false;
        let error = chain(error);
        if is_new(&mut self.trouble, &error) {
            error!(%error, "the kernel cannot be read or changed; trying again");
        }
    }

    /// `leases` counts the others' leases, those that are skipped too.
    pub(super) fn in_sync(&mut self, outcome: &Outcome, leases: usize) {
        let (applied, skipped) = (outcome.report.applied, self.skipped.len());
        let peers = leases.saturating_sub(skipped);
        let full = outcome.seen.is_some();
        match &outcome.first {
            Some(first) if full || !self.in_sync => {
                let after = outcome.after.as_deref().map(tracing::field::display);
                info!(applied, %first, after, peers, skipped, "host in sync");
            }
            None if !self.in_sync => info!(applied, peers, skipped, "host in sync"),
            _ if full => debug!(peers, skipped, "host still in sync"),
            _ => {}
        }
        self.in_sync = true;
        self.trouble = None;
        if !full {
            return;
        }
        let (joined, left, changed) = (self.joined, self.left, self.changed);
        if joined + left + changed > 0 {
            info!(joined, left, changed, peers, "peers came, went or changed");
            (self.joined, self.left, self.changed) = (0, 0, 0);
        }
        let repaired = std::mem::take(&mut self.repaired);
        if repaired > 1 {
            info!(repaired, "objects of the kernel that somebody else had changed were put right");
        }
    }

    pub(super) fn rules(&mut self, result: &Result<Ensured, HostError>) {
        match result {
            Err(error) => {
                let error = chain(error);
                if is_new(&mut self.rules, &error) {
                    error!(%error, "firewall pending; trying again");
                }
            }
            Ok(ensured) => {
                if self.rules.take().is_some() {
                    info!("traffic rules stand again");
                } else if *ensured == Ensured::Written {
                    self.rules_written();
                }
                self.rules_stood = true;
                self.rules_written_again();
            }
        }
    }

    fn rules_written(&mut self) {
        match (self.rules_stood, &mut self.rules_put_right) {
            (false, _) => info!("traffic rules written"),
            (true, Some((_, untold))) => {
                *untold += 1;
                debug!("traffic rules put right again");
            }
            (true, none) => {
                warn!("traffic rules that somebody had changed or removed were put right");
                *none = Some((Instant::now(), 0));
            }
        }
    }

    /// From now on other rules are wanted.
    pub(super) fn other_rules(&mut self) {
        self.rules_stood = false;
    }

    /// Tells how often rules were put right, once a while is over in which it was not told.
    fn rules_written_again(&mut self) {
        let Some((_, untold)) = self.rules_put_right.take_if(|(told, _)| told.elapsed() >= RULES_AGAIN)
        else {
            return;
        };
        if untold > 0 {
            warn!(times = untold, "somebody keeps changing the traffic rules; each time they were put right");
            self.rules_put_right = Some((Instant::now(), 0));
        }
    }

    pub(super) fn note(&mut self, result: &Result<(), StateError>) {
        match result {
            Ok(()) if self.note.take().is_some() => info!("the state file can be written again"),
            Ok(()) => debug!("state file written"),
            Err(error) => {
                let error = chain(error);
                if is_new(&mut self.note, &error) {
                    warn!(%error, "the state file cannot be written: a reboot while etcd is away would find an old one");
                }
            }
        }
    }

    pub(super) fn file(
        &mut self,
        result: &Result<bool, SubnetFileError>,
        file: &SubnetFile,
        env: &SubnetEnv,
        before: Option<&SubnetEnv>,
    ) {
        let (path, subnet, mtu) = (file.path().display(), env.subnet, env.mtu);
        match result {
            Ok(written) => {
                let was_wrong = self.file.take().is_some();
                match (*written, before == Some(env)) {
                    (true, true) if !was_wrong => {
                        warn!(%path, %subnet, mtu, "subnet file put back: somebody had changed or removed it");
                    }
                    (true, _) => info!(%path, %subnet, mtu, "subnet file written"),
                    (false, true) => debug!(%path, "subnet file as it should be"),
                    (false, false) => info!(%path, %subnet, mtu, "subnet file as it should be"),
                }
            }
            Err(error) => {
                let error = chain(error);
                if is_new(&mut self.file, &error) {
                    error!(%error, "the subnet file cannot be written; trying again");
                }
            }
        }
    }
}

/// How long a lease lasts, for a person.
fn left(expiry: Expiry) -> String {
    match expiry {
        Expiry::Never => "never (it is a reservation)".into(),
        Expiry::At(end) => {
            let minutes = end.saturating_duration_since(super::now()).as_secs().div_ceil(60);
            format!("{}h{:02}m", minutes / 60, minutes % 60)
        }
    }
}
