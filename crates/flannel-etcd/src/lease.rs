//! Taking a subnet, keeping it, and taking it back.
//!
//! Every write is a transaction that compares first, so that nothing here ever
//! writes over a key that another host holds. Losing such a comparison is no
//! fault: the world has moved, and one looks at it again.
//!
//! ```text
//!   list ──▶ choose ──▶ ours already ──▶ adopt ─┐
//!    ▲            └───▶ a free one ──▶ create ──┤
//!    └──────────── lost the race ◀──────────────┴──▶ held
//! ```
//!
//! Peers see an event when a key is written and none when its etcd lease is
//! kept alive. So a key is written only if its bytes change.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use flannel_core::allocation::{Choice, choose, fits, misfits};
use flannel_core::lease::{Expiry, HeldLease, Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{Snapshot, StoreError};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::codec::attributes;
use crate::hosts::{Record, Recorded};
use crate::kv::{Entry, Kv};
use crate::registry::{Registry, Standing, TERM, Written};

/// How long races may be lost before something else must be wrong.
const RACING: Duration = Duration::from_secs(60);

/// How long a host that waits for another address takes to look again whether it may have it, and then some.
const WAITING: Duration = Duration::from_secs(180);

/// Writes without an answer that are remembered; a host seldom has two.
const UNANSWERED: usize = 8;

/// An etcd lease that is granted when it is first needed, and only once.
#[derive(Default)]
struct Grant {
    /// Its id, and a moment from which its term certainly still lasts.
    granted: Option<(i64, Instant)>,
    used: bool,
}

impl Grant {
    async fn get<K: Kv>(
        &mut self,
        registry: &Registry<K>,
        attrs: &LeaseAttrs,
    ) -> Result<(i64, Instant), StoreError> {
        if let Some(granted) = self.granted {
            return Ok(granted);
        }
        let asked = Instant::now();
        let id = registry.grant(attrs).await?;
        Ok(*self.granted.insert((id, asked)))
    }

    /// Gives it back if nothing hangs on it. When the store went away in the
    /// middle something may, without our knowing, and nobody would answer.
    async fn end<K: Kv, T>(
        self,
        registry: &Registry<K>,
        attrs: &LeaseAttrs,
        outcome: &Result<T, StoreError>,
    ) {
        let away = matches!(outcome, Err(StoreError::Unreachable { .. }));
        if let Some((id, _)) = self.granted.filter(|_| !self.used && !away) {
            registry.revoke_if_bare(id, attrs).await;
        }
    }
}

/// When to ask one who has left our address, and still seems to have it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Never,
    LongAgo,
}

/// What a host says at its subnet.
#[derive(Clone, Copy)]
pub(crate) struct Said<'a> {
    /// To its peers.
    pub(crate) attrs: &'a LeaseAttrs,
    /// To whoever wants its address: the one at which it is by now.
    pub(crate) place: &'a LeaseAttrs,
}

impl<'a> Said<'a> {
    pub(crate) fn of(attrs: &'a LeaseAttrs) -> Self {
        Self { attrs, place: attrs }
    }
}

impl<K: Kv> Registry<K> {
    pub(crate) async fn acquire(
        &self,
        config: &NetworkConfig,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<HeldLease, StoreError> {
        let mut grant = Grant::default();
        let held = self.acquire_with(&mut grant, config, attrs, previous).await;
        grant.end(self, attrs, &held).await;
        held
    }

    async fn acquire_with(
        &self,
        grant: &mut Grant,
        config: &NetworkConfig,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<HeldLease, StoreError> {
        let race = Race::begin();
        loop {
            let listing = self.list().await?;
            let snapshot = &listing.snapshot;
            let previous = self.asked_for().or(previous);
            let choice = choose(config, snapshot, attrs, previous);
            let by_address = match &choice {
                Choice::Reuse(lease) => Some(lease.subnet),
                _ => None,
            };
            let stands = |subnet: &Subnet| snapshot.leases.iter().any(|lease| lease.subnet == *subnet);
            let former = previous.filter(|subnet| stands(subnet) && fits(config, *subnet));
            let held = match former.filter(|former| by_address != Some(*former)) {
                Some(former) => self.adopt_former(grant, snapshot, former, attrs, by_address).await?,
                None => None,
            };
            let held = match choice {
                _ if held.is_some() => held,
                Choice::Reuse(lease) => self.adopt(grant, lease.subnet, attrs).await?,
                Choice::Ask(subnet) => self.create_lease(grant, subnet, Said::of(attrs)).await?,
                Choice::PickFrom(free) => {
                    let subnet = free.pick((fastrand::u64(..), fastrand::u64(..)));
                    self.create_lease(grant, subnet, Said::of(attrs)).await?
                }
                Choice::Exhausted { leased } => return Err(self.exhausted(config, leased)),
            };
            if let Some(held) = held {
                // Only now: whatever goes wrong before leaves us what we had.
                for misfit in misfits(config, snapshot, attrs) {
                    self.give_back(misfit).await?;
                }
                self.first.keep(listing, &held.lease);
                return Ok(held);
            }
            race.lost("taking a subnet").await?;
        }
    }

    pub(crate) async fn renew(&self, held: &HeldLease) -> Result<Expiry, StoreError> {
        self.fence_again();
        let Lease { subnet, attrs, .. } = &held.lease;
        let lost = |holder| StoreError::Lost { subnet: *subnet, holder };
        let asked = Instant::now();
        // A reservation has no term, and is looked at all the same.
        let alive = held.handle != 0 && self.keep_alive(held.handle).await?;
        let standing = self.read_standing(subnet).await?;
        let found = standing.key.as_ref().ok_or_else(|| lost(None))?;
        let recorded = self.recorded(&standing);
        if let Recorded::Them(them) = recorded {
            return Err(lost(Some(them.words())));
        }
        if alive && found.lease == held.handle {
            self.keep_record(subnet, attrs, &standing).await;
            return Ok(expiry(asked));
        }
        let theirs = readable(&self.layout.lease(subnet), found)?;
        if matches!(recorded, Recorded::Nobody) && !theirs.same_host(attrs) {
            return Err(lost(theirs.public_ip.map(|holder| holder.to_string())));
        }
        if found.lease != 0 {
            // Ours, but on another etcd lease: publishing adopts it.
            return Err(lost(None));
        }
        self.keep_record(subnet, attrs, &standing).await;
        if held.handle != 0 {
            debug!(%subnet, "the lease has become a reservation");
            self.revoke_if_bare(held.handle, attrs).await;
        }
        Ok(Expiry::Never)
    }

    pub(crate) async fn publish(
        &self,
        held: &HeldLease,
        attrs: &LeaseAttrs,
    ) -> Result<HeldLease, StoreError> {
        let mut grant = Grant::default();
        let published = self.publish_with(&mut grant, held, attrs).await;
        grant.end(self, attrs, &published).await;
        published
    }

    async fn publish_with(
        &self,
        grant: &mut Grant,
        held: &HeldLease,
        attrs: &LeaseAttrs,
    ) -> Result<HeldLease, StoreError> {
        let Lease { subnet, attrs: former, .. } = &held.lease;
        let way = match former.same_host(attrs) {
            true => Ok(()),
            false => self.make_way(&self.list().await?.snapshot, *subnet, attrs).await,
        };
        let twin = match way {
            Ok(()) => None,
            Err(twin @ StoreError::Twin { .. }) => Some(twin),
            Err(error) => return Err(error),
        };
        // However long the two stay at one address, the subnet is ours. And our record tells where we
        // are, so that nobody waits for an address which we have left and only seem to have.
        let said = if twin.is_some() { former } else { attrs };
        let published = self.publish_as(grant, held, Said { attrs: said, place: attrs }).await?;
        twin.map_or(Ok(published), Err)
    }

    async fn publish_as(
        &self,
        grant: &mut Grant,
        held: &HeldLease,
        said: Said<'_>,
    ) -> Result<HeldLease, StoreError> {
        let Lease { subnet, attrs: former, .. } = &held.lease;
        let key = self.layout.lease(subnet);
        let lost = |holder| StoreError::Lost { subnet: *subnet, holder };
        let race = Race::begin();
        let mut patient = true;
        loop {
            let standing = self.read_standing(subnet).await?;
            let published = match &standing.key {
                Some(found) => {
                    let recorded = self.recorded(&standing);
                    if let Recorded::Them(them) = recorded {
                        if std::mem::take(&mut patient) {
                            self.given_back(subnet, &standing).await;
                            continue;
                        }
                        return Err(lost(Some(them.words())));
                    }
                    let theirs = readable(&key, found)?;
                    let is_ours = theirs.same_host(former)
                        || theirs.same_host(said.place)
                        || self.may_have_written(*subnet, &theirs);
                    if matches!(recorded, Recorded::Nobody) && !is_ours {
                        return Err(lost(theirs.public_ip.map(|holder| holder.to_string())));
                    }
                    self.will_write(*subnet, said.attrs);
                    let published = self.adopt_found(grant, *subnet, said, &standing, None).await?;
                    if published.is_some() {
                        self.have_written();
                    }
                    published
                }
                None => {
                    if grant.granted.is_none() {
                        let asked = Instant::now();
                        // The etcd lease outlives a key that was deleted by hand.
                        if held.handle != 0 && self.keep_alive(held.handle).await? {
                            grant.granted = Some((held.handle, asked));
                        } else {
                            // For a while nobody could know of us, and our address may be another host's.
                            self.make_way(&self.list().await?.snapshot, *subnet, said.attrs).await?;
                        }
                    }
                    self.create_lease(grant, *subnet, said).await?
                }
            };
            if let Some(published) = published {
                return Ok(published);
            }
            race.lost(&format!("publishing {key}")).await?;
        }
    }

    /// Publishes on a free subnet; `None` if it is no longer free.
    async fn create_lease(
        &self,
        grant: &mut Grant,
        subnet: Subnet,
        said: Said<'_>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let (id, since) = grant.get(self, said.attrs).await?;
        self.will_write(subnet, said.attrs);
        if self.write(&subnet, said, id, &Standing::default(), None).await? != Written::Done {
            return Ok(None);
        }
        self.have_written();
        grant.used = true;
        Ok(Some(leased(subnet, said.attrs, id, since)))
    }

    /// The subnet that may be ours yet, later than we would wait: so it is the one to ask for again.
    fn asked_for(&self) -> Option<Subnet> {
        self.unanswered().last().map(|(subnet, _)| *subnet)
    }

    /// Whether this stands there because a write of ours was carried out whose answer was lost.
    fn may_have_written(&self, subnet: Subnet, found: &LeaseAttrs) -> bool {
        self.unanswered().iter().any(|(asked, attrs)| *asked == subnet && attrs.same_host(found))
    }

    fn will_write(&self, subnet: Subnet, attrs: &LeaseAttrs) {
        let mut unanswered = self.unanswered();
        if !unanswered.iter().any(|(asked, written)| *asked == subnet && written == attrs) {
            let too_many = (unanswered.len() + 1).saturating_sub(UNANSWERED);
            unanswered.drain(..too_many);
            unanswered.push((subnet, attrs.clone()));
        }
    }

    /// One was carried out: of two writes over one thing only one is.
    fn have_written(&self) {
        self.unanswered().clear();
    }

    fn unanswered(&self) -> MutexGuard<'_, Vec<(Subnet, LeaseAttrs)>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes a lease of ours that the config no longer allows.
    async fn give_back(&self, lease: &Lease) -> Result<(), StoreError> {
        let standing = self.read_standing(&lease.subnet).await?;
        let Some(found) = &standing.key else { return Ok(()) };
        let still_ours = match self.recorded(&standing) {
            Recorded::Nobody => attributes(&found.value).is_ok_and(|theirs| theirs.same_host(&lease.attrs)),
            Recorded::Us => true,
            Recorded::Them(_) => false,
        };
        if still_ours
            && found.lease != 0
            && self.delete(&lease.subnet, &standing, None).await? == Written::Done
        {
            info!(subnet = %lease.subnet, "gave back a lease of ours that the network config no longer allows");
            self.revoke_if_bare(found.lease, &lease.attrs).await;
        }
        Ok(())
    }

    /// Deletes a lease beside the one we hold, if its record says that it is ours, or that of
    /// another host with our address which does not answer.
    pub(crate) async fn give_back_stray(&self, held: &HeldLease, stray: Subnet) -> Result<(), StoreError> {
        if stray == held.lease.subnet {
            return Ok(());
        }
        if let Some(them) = self.clear(stray, &held.lease.attrs, Left::LongAgo).await? {
            let holder = them.words();
            warn!(
                %stray, holder, subnet = %held.lease.subnet,
                "another host holds a lease with our public address: give one of the two another address"
            );
        }
        Ok(())
    }

    /// Sees to it that no lease but that on `own` names our address, before ours does.
    ///
    /// # Errors
    /// `Twin` if another host has it and lives.
    async fn make_way(&self, snapshot: &Snapshot, own: Subnet, attrs: &LeaseAttrs) -> Result<(), StoreError> {
        let has_our_address = |lease: &&Lease| lease.subnet != own && lease.attrs.same_host(attrs);
        for lease in snapshot.leases.iter().filter(has_our_address) {
            if let Some(them) = self.clear(lease.subnet, attrs, Left::Never).await? {
                return Err(self.twin(lease.subnet, &them, attrs));
            }
        }
        Ok(())
    }

    /// Deletes a lease if its record says that it is ours, or that of another host with our
    /// address which does not answer; whoever has our address and does. One who has left our
    /// address and cannot say so yet, since he waits for another, is asked only if he has been
    /// waiting for as long as that.
    async fn clear(
        &self,
        stray: Subnet,
        attrs: &LeaseAttrs,
        ask: Left,
    ) -> Result<Option<Record>, StoreError> {
        let race = Race::begin();
        loop {
            let standing = self.read_standing(&stray).await?;
            let Some(found) = &standing.key else { return Ok(None) };
            let has_our_address = attributes(&found.value).is_ok_and(|theirs| theirs.same_host(attrs));
            let them = match self.recorded(&standing) {
                Recorded::Us => None,
                Recorded::Them(them) if has_our_address || self.is_our_id(&them) => Some(them),
                Recorded::Nobody | Recorded::Them(_) => return Ok(None),
            };
            // That is somebody's word, and his to take back.
            let is_reserved = found.lease == 0;
            let has_left = them.as_ref().is_some_and(|them| has_our_address && them.is_elsewhere(attrs));
            let question = match &them {
                None if is_reserved => return Ok(None),
                None => None,
                Some(them) => {
                    if has_left
                        && !self.is_our_id(them)
                        && !(ask == Left::LongAgo && self.left_long_ago(stray))
                    {
                        return Ok(None);
                    }
                    self.ask(stray, &standing, them, attrs).await?
                }
            };
            let cleared = match (question, &them) {
                (None, Some(_)) => Written::Not,
                _ => self.delete(&stray, &standing, question).await?,
            };
            match (cleared, them) {
                (Written::Done, None) => {
                    info!(%stray, "gave back a lease that was taken for ours");
                    self.revoke_if_bare(found.lease, attrs).await;
                    return Ok(None);
                }
                (Written::Done, Some(them)) => {
                    let holder = them.words();
                    match is_reserved {
                        true => warn!(
                            %stray, holder,
                            "a reservation names our public address, and its holder does not answer: delete it if \
                             nobody is to have it"
                        ),
                        false => warn!(
                            %stray, holder, "deleted the lease of a host that has our address, or our id, and does \
                             not answer"
                        ),
                    }
                    return Ok(None);
                }
                (Written::Answered, them) => return Ok(them.filter(|_| has_our_address && !has_left)),
                (Written::Not, _) => race.lost("clearing a lease").await?,
            }
        }
    }

    /// Whether it is known for a while that the holder of a lease has left its address: whoever
    /// lives has another one by then, as far as it depends on us.
    fn left_long_ago(&self, subnet: Subnet) -> bool {
        let now = Instant::now();
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        match *left {
            Some((known, since)) if known == subnet => now - since > WAITING,
            _ => {
                *left = Some((subnet, now));
                false
            }
        }
    }

    /// Publishes on a subnet that is ours; `None` if it no longer is.
    async fn adopt(
        &self,
        grant: &mut Grant,
        subnet: Subnet,
        attrs: &LeaseAttrs,
    ) -> Result<Option<HeldLease>, StoreError> {
        let standing = self.read_standing(&subnet).await?;
        let Some(found) = &standing.key else { return Ok(None) };
        let has_our_address = attributes(&found.value).is_ok_and(|theirs| theirs.same_host(attrs));
        match self.recorded(&standing) {
            Recorded::Nobody if !has_our_address => Ok(None),
            Recorded::Nobody | Recorded::Us => {
                self.adopt_found(grant, subnet, Said::of(attrs), &standing, None).await
            }
            Recorded::Them(them) if has_our_address || self.is_our_id(&them) => {
                match self.ask(subnet, &standing, &them, attrs).await? {
                    Some(question) => {
                        let asked = Some((question, &them));
                        self.adopt_found(grant, subnet, Said::of(attrs), &standing, asked).await
                    }
                    None => Ok(None),
                }
            }
            Recorded::Them(_) => Ok(None),
        }
    }

    /// The same for the subnet that we had before and that stands under another address: only the
    /// record tells that it is ours still. It tells more than the address does, by which the lease
    /// on `by_address` would be ours.
    async fn adopt_former(
        &self,
        grant: &mut Grant,
        snapshot: &Snapshot,
        former: Subnet,
        attrs: &LeaseAttrs,
        by_address: Option<Subnet>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let adopted = match by_address {
            None => self.adopt(grant, former, attrs).await,
            Some(_) => self.adopt_recorded(grant, snapshot, former, attrs).await,
        };
        match adopted {
            // A copy of our disk that lives, at an address of its own: it keeps its subnet and we take another.
            Err(StoreError::Twin { subnet, .. }) if subnet == former => Ok(None),
            adopted => adopted,
        }
    }

    async fn adopt_recorded(
        &self,
        grant: &mut Grant,
        snapshot: &Snapshot,
        former: Subnet,
        attrs: &LeaseAttrs,
    ) -> Result<Option<HeldLease>, StoreError> {
        let standing = self.read_standing(&former).await?;
        let them = match self.recorded(&standing) {
            Recorded::Us => None,
            Recorded::Them(them) if self.is_our_id(&them) => Some(them),
            Recorded::Nobody | Recorded::Them(_) => return Ok(None),
        };
        let asked = match &them {
            None => None,
            Some(them) => match self.ask(former, &standing, them, attrs).await? {
                // What we have by our address is given up only for something that is to be had.
                Some(question) if self.is_unanswered(former, &standing, question).await? => {
                    Some((question, them))
                }
                _ => return Ok(None),
            },
        };
        match self.make_way(snapshot, former, attrs).await {
            Ok(()) => self.adopt_found(grant, former, Said::of(attrs), &standing, asked).await,
            Err(twin @ StoreError::Twin { .. }) => {
                // It stays ours as it is, and its record tells where we are.
                let standing_attrs = standing.key.as_ref().and_then(|found| attributes(&found.value).ok());
                if let Some(stands) = standing_attrs {
                    let said = Said { attrs: &stands, place: attrs };
                    self.adopt_found(grant, former, said, &standing, asked).await?;
                }
                Err(twin)
            }
            Err(error) => Err(error),
        }
    }

    /// The same for a lease that is ours, or whose holder has been asked.
    async fn adopt_found(
        &self,
        grant: &mut Grant,
        subnet: Subnet,
        said: Said<'_>,
        standing: &Standing,
        asked: Option<(i64, &Record)>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let Some(found) = &standing.key else { return Ok(None) };
        let written = async |id| {
            let question = asked.map(|(question, _)| question);
            match (self.write(&subnet, said, id, standing, question).await?, asked) {
                (Written::Answered, Some((_, them))) => Err(self.twin(subnet, them, said.place)),
                (written, _) => Ok(written == Written::Done),
            }
        };
        if found.lease == 0 {
            return Ok(written(0).await?.then(|| reserved(subnet, said.attrs)));
        }

        // A lease of another term is not flannel's: nobody would renew it in time.
        let asked = Instant::now();
        if self.granted_term(found.lease).await? == Some(TERM) && self.keep_alive(found.lease).await? {
            return Ok(written(found.lease).await?.then(|| leased(subnet, said.attrs, found.lease, asked)));
        }

        let (id, since) = grant.get(self, said.attrs).await?;
        if !written(id).await? {
            return Ok(None);
        }
        grant.used = true;
        self.revoke_if_bare(found.lease, said.attrs).await;
        Ok(Some(leased(subnet, said.attrs, id, since)))
    }

    fn exhausted(&self, config: &NetworkConfig, leased: usize) -> StoreError {
        let (network, subnet_len) = config
            .pools()
            .next()
            .map_or_else(Default::default, |pool| (pool.network.to_string(), pool.subnet_len));
        StoreError::Exhausted { key: self.layout.config().into(), network, subnet_len, leased }
    }
}

/// A subnet that several hosts want.
struct Race(Instant);

impl Race {
    fn begin() -> Self {
        Self(Instant::now())
    }

    /// Waits a moment before the next round, so that those who lost together
    /// do not run together again.
    async fn lost(&self, operation: &str) -> Result<(), StoreError> {
        if self.0.elapsed() > RACING {
            let source = format!("somebody else was faster for {} s on end", RACING.as_secs()).into();
            return Err(StoreError::Refused { operation: operation.into(), source });
        }
        debug!(operation, "lost a race, looking again");
        sleep(Duration::from_millis(fastrand::u64(1..50))).await;
        Ok(())
    }
}

/// Reads whose key this is. One that cannot be read is nobody's to overwrite.
fn readable(key: &str, found: &Entry) -> Result<LeaseAttrs, StoreError> {
    attributes(&found.value).map_err(|reason| StoreError::Refused {
        operation: format!("keeping {key}"),
        source: format!("somebody has written a value there that is no lease: {reason}").into(),
    })
}

fn expiry(since: Instant) -> Expiry {
    Expiry::At(since.into_std() + Duration::from_secs(TERM.unsigned_abs()))
}

fn leased(subnet: Subnet, attrs: &LeaseAttrs, handle: i64, since: Instant) -> HeldLease {
    let lease = Lease { subnet, attrs: attrs.clone(), tenure: Tenure::Leased };
    HeldLease { lease, expiry: expiry(since), handle }
}

fn reserved(subnet: Subnet, attrs: &LeaseAttrs) -> HeldLease {
    let lease = Lease { subnet, attrs: attrs.clone(), tenure: Tenure::Reserved };
    HeldLease { lease, expiry: Expiry::Never, handle: 0 }
}
