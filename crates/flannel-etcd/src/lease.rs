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

use std::sync::PoisonError;
use std::time::Duration;

use flannel_core::allocation::{Choice, choose, fits, misfits};
use flannel_core::lease::{Expiry, HeldLease, Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{Snapshot, StoreError};
use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use crate::codec::attributes;
use crate::hosts::{Record, Recorded};
use crate::kv::{Entry, Kv};
use crate::registry::{Registry, Standing, TERM, Written};

/// How long races may be lost before something else must be wrong.
const RACING: Duration = Duration::from_secs(60);

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
            let previous = self.asked().or(previous);
            let choice = choose(config, snapshot, attrs.public_ip, previous);
            let former = match &choice {
                Choice::Reuse(_) => None,
                _ => self.adopt_former(grant, config, snapshot, attrs, previous).await?,
            };
            let held = match choice {
                _ if former.is_some() => former,
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
                    // An earlier attempt may have been carried out though its answer was lost.
                    let has_our_address = same_host(&theirs, former) || same_host(&theirs, attrs);
                    if matches!(recorded, Recorded::Nobody) && !has_our_address {
                        return Err(lost(theirs.public_ip.map(|holder| holder.to_string())));
                    }
                    self.adopt_found(grant, *subnet, attrs, &standing, None).await?
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
        self.ask_for(Some(subnet));
        let created = self.write(&subnet, attrs, id, &Standing::default(), None).await? == Written::Done;
        self.ask_for(None);
        grant.used |= created;
        Ok(created.then(|| leased(subnet, attrs, id, since)))
    }

    fn asked(&self) -> Option<Subnet> {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_for(&self, subnet: Option<Subnet>) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = subnet;
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

    /// Deletes a lease beside the one we hold, if its record says that it is ours.
    pub(crate) async fn give_back_stray(&self, held: &HeldLease, stray: Subnet) -> Result<(), StoreError> {
        let attrs = &held.lease.attrs;
        let standing = self.read_standing(&stray).await?;
        let Some(found) = standing.key.as_ref().filter(|_| stray != held.lease.subnet) else { return Ok(()) };
        let question = match self.recorded(&standing) {
            Recorded::Us => None,
            // Ours from before a boot, or that of a copy of our disk.
            Recorded::Them(them) if self.is_our_id(&them) => {
                match self.ask(stray, &standing, &them, attrs).await? {
                    None => return Ok(()),
                    question => question,
                }
            }
            Recorded::Nobody | Recorded::Them(_) => return Ok(()),
        };
        if self.delete(&stray, &standing, question).await? {
            info!(%stray, subnet = %held.lease.subnet, "gave back a second lease of ours");
            if found.lease != held.handle {
                self.revoke_if_bare(found.lease, attrs).await;
            }
        }
        Ok(())
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
        let has_our_address = attributes(&found.value).is_ok_and(|theirs| same_host(&theirs, attrs));
        match self.recorded(&standing) {
            Recorded::Nobody if !has_our_address => Ok(None),
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

    /// The same for the subnet that we had before, if it stands under another address: only the
    /// record tells then that it is ours still.
    async fn adopt_former(
        &self,
        grant: &mut Grant,
        config: &NetworkConfig,
        snapshot: &Snapshot,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let stands = |subnet: &Subnet| snapshot.leases.iter().any(|lease| lease.subnet == *subnet);
        let Some(subnet) = previous.filter(|subnet| stands(subnet) && fits(config, *subnet)) else {
            return Ok(None);
        };
        match self.adopt(grant, subnet, attrs).await {
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
