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
            let choice = choose(config, snapshot, attrs.public_ip, previous);
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
                Choice::Ask(subnet) => self.create_lease(grant, subnet, attrs).await?,
                Choice::PickFrom(free) => {
                    let subnet = free.pick((fastrand::u64(..), fastrand::u64(..)));
                    self.create_lease(grant, subnet, attrs).await?
                }
                Choice::Exhausted { leased } => return Err(self.exhausted(config, leased)),
            };
            if let Some(held) = held {
                // Only now: whatever goes wrong before leaves us what we had.
                for misfit in misfits(config, snapshot, attrs.public_ip) {
                    self.give_back(misfit).await?;
                }
                self.first.keep(listing, &held.lease);
                return Ok(held);
            }
            race.lost("taking a subnet").await?;
        }
    }

    pub(crate) async fn renew(&self, held: &HeldLease) -> Result<Expiry, StoreError> {
        if held.handle == 0 {
            return Ok(Expiry::Never);
        }
        let Lease { subnet, attrs, .. } = &held.lease;
        let lost = |holder| StoreError::Lost { subnet: *subnet, holder };
        let asked = Instant::now();
        let alive = self.keep_alive(held.handle).await?;
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
        if matches!(recorded, Recorded::Nobody) && !same_host(&theirs, attrs) {
            return Err(lost(theirs.public_ip.map(|holder| holder.to_string())));
        }
        if found.lease != 0 {
            // Ours, but on another etcd lease: publishing adopts it.
            return Err(lost(None));
        }
        debug!(%subnet, "the lease has become a reservation");
        self.keep_record(subnet, attrs, &standing).await;
        self.revoke_if_bare(held.handle, attrs).await;
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
        let key = self.layout.lease(subnet);
        let lost = |holder| StoreError::Lost { subnet: *subnet, holder };
        if !same_host(former, attrs) {
            let listing = self.list().await?;
            if let Err(twin) = self.make_way(&listing.snapshot, *subnet, attrs).await {
                // However long the two stay at one address, the subnet is ours.
                self.keep_alive(held.handle).await?;
                return Err(twin);
            }
        }
        let race = Race::begin();
        loop {
            let standing = self.read_standing(subnet).await?;
            let published = match &standing.key {
                Some(found) => {
                    let recorded = self.recorded(&standing);
                    if let Recorded::Them(them) = recorded {
                        return Err(lost(Some(them.words())));
                    }
                    let theirs = readable(&key, found)?;
                    let is_ours = same_host(&theirs, former)
                        || same_host(&theirs, attrs)
                        || self.may_have_written(*subnet, &theirs);
                    if matches!(recorded, Recorded::Nobody) && !is_ours {
                        return Err(lost(theirs.public_ip.map(|holder| holder.to_string())));
                    }
                    self.will_write(*subnet, attrs);
                    let published = self.adopt_found(grant, *subnet, attrs, &standing, None).await?;
                    self.have_written();
                    published
                }
                None => {
                    let asked = Instant::now();
                    // The etcd lease outlives a key that was deleted by hand.
                    if grant.granted.is_none() && held.handle != 0 && self.keep_alive(held.handle).await? {
                        grant.granted = Some((held.handle, asked));
                    }
                    self.create_lease(grant, *subnet, attrs).await?
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
        attrs: &LeaseAttrs,
    ) -> Result<Option<HeldLease>, StoreError> {
        let (id, since) = grant.get(self, attrs).await?;
        self.will_write(subnet, attrs);
        let created = self.write(&subnet, attrs, id, &Standing::default(), None).await? == Written::Done;
        self.have_written();
        grant.used |= created;
        Ok(created.then(|| leased(subnet, attrs, id, since)))
    }

    /// The subnet that may be ours yet, later than we would wait: so it is the one to ask for again.
    fn asked_for(&self) -> Option<Subnet> {
        self.unanswered().last().map(|(subnet, _)| *subnet)
    }

    /// Whether this stands there because a write of ours was carried out whose answer was lost.
    fn may_have_written(&self, subnet: Subnet, found: &LeaseAttrs) -> bool {
        self.unanswered().iter().any(|(asked, attrs)| *asked == subnet && same_host(attrs, found))
    }

    fn will_write(&self, subnet: Subnet, attrs: &LeaseAttrs) {
        let mut unanswered = self.unanswered();
        if !unanswered.iter().any(|(asked, written)| *asked == subnet && written == attrs) {
            let too_many = (unanswered.len() + 1).saturating_sub(UNANSWERED);
            unanswered.drain(..too_many);
            unanswered.push((subnet, attrs.clone()));
        }
    }

    /// There was an answer: of two writes over one thing only one is carried out.
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
            Recorded::Nobody => attributes(&found.value).is_ok_and(|theirs| same_host(&theirs, &lease.attrs)),
            Recorded::Us => true,
            Recorded::Them(_) => false,
        };
        if still_ours && found.lease != 0 && self.delete(&lease.subnet, &standing, None).await? {
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
        if let Some(them) = self.clear(stray, &held.lease.attrs).await? {
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
        let has_our_address = |lease: &&Lease| lease.subnet != own && same_host(&lease.attrs, attrs);
        for lease in snapshot.leases.iter().filter(has_our_address) {
            if let Some(them) = self.clear(lease.subnet, attrs).await? {
                return Err(self.twin(lease.subnet, &them, attrs));
            }
        }
        Ok(())
    }

    /// Deletes a lease if its record says that it is ours, or that of another host with our
    /// address which does not answer; whoever has our address and does.
    async fn clear(&self, stray: Subnet, attrs: &LeaseAttrs) -> Result<Option<Record>, StoreError> {
        let standing = self.read_standing(&stray).await?;
        let Some(found) = &standing.key else { return Ok(None) };
        let has_our_address = attributes(&found.value).is_ok_and(|theirs| same_host(&theirs, attrs));
        let (question, them) = match self.recorded(&standing) {
            Recorded::Us => (None, None),
            Recorded::Them(them) if has_our_address || self.is_our_id(&them) => {
                match self.ask(stray, &standing, &them, attrs).await? {
                    None => return Ok(None),
                    question => (question, Some(them)),
                }
            }
            Recorded::Nobody | Recorded::Them(_) => return Ok(None),
        };
        if !self.delete(&stray, &standing, question).await? {
            return Ok(them.filter(|_| has_our_address));
        }
        info!(%stray, "gave back a lease that was taken for ours");
        self.revoke_if_bare(found.lease, attrs).await;
        Ok(None)
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
        let theirs = attributes(&found.value);
        let has_our_address = theirs.as_ref().is_ok_and(|theirs| same_host(theirs, attrs));
        // That of the device which this host had under another address.
        let has_our_vtep = theirs.is_ok_and(|theirs| same_vtep(&theirs, attrs));
        match self.recorded(&standing) {
            Recorded::Nobody if !has_our_address && !has_our_vtep => Ok(None),
            Recorded::Nobody | Recorded::Us => self.adopt_found(grant, subnet, attrs, &standing, None).await,
            Recorded::Them(them) if has_our_address || self.is_our_id(&them) => {
                match self.ask(subnet, &standing, &them, attrs).await? {
                    Some(question) => {
                        self.adopt_found(grant, subnet, attrs, &standing, Some((question, &them))).await
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
        if by_address.is_some() {
            let is_ours = match self.recorded(&self.read_standing(&former).await?) {
                Recorded::Us => true,
                Recorded::Them(them) => self.is_our_id(&them),
                Recorded::Nobody => false,
            };
            if !is_ours {
                return Ok(None);
            }
            self.make_way(snapshot, former, attrs).await?;
        }
        match self.adopt(grant, former, attrs).await {
            // A copy of our disk that lives, at an address of its own: it keeps its subnet and we take another.
            Err(StoreError::Twin { .. }) => Ok(None),
            adopted => adopted,
        }
    }

    /// The same for a lease that is ours, or whose holder has been asked.
    async fn adopt_found(
        &self,
        grant: &mut Grant,
        subnet: Subnet,
        attrs: &LeaseAttrs,
        standing: &Standing,
        asked: Option<(i64, &Record)>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let Some(found) = &standing.key else { return Ok(None) };
        let written = async |id| {
            let question = asked.map(|(question, _)| question);
            match (self.write(&subnet, attrs, id, standing, question).await?, asked) {
                (Written::Answered, Some((_, them))) => Err(self.twin(subnet, them, attrs)),
                (written, _) => Ok(written == Written::Done),
            }
        };
        if found.lease == 0 {
            return Ok(written(0).await?.then(|| reserved(subnet, attrs)));
        }

        // A lease of another term is not flannel's: nobody would renew it in time.
        let asked = Instant::now();
        if self.granted_term(found.lease).await? == Some(TERM) && self.keep_alive(found.lease).await? {
            return Ok(written(found.lease).await?.then(|| leased(subnet, attrs, found.lease, asked)));
        }

        let (id, since) = grant.get(self, attrs).await?;
        if !written(id).await? {
            return Ok(None);
        }
        grant.used = true;
        self.revoke_if_bare(found.lease, attrs).await;
        Ok(Some(leased(subnet, attrs, id, since)))
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

pub(crate) fn same_host(one: &LeaseAttrs, other: &LeaseAttrs) -> bool {
    match (one.public_ip, other.public_ip) {
        (None, None) => one.public_ipv6.is_some() && one.public_ipv6 == other.public_ipv6,
        (one, other) => one == other,
    }
}

fn same_vtep(one: &LeaseAttrs, other: &LeaseAttrs) -> bool {
    one.backend_data.is_some() && one.backend_data == other.backend_data
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
