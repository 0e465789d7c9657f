//! Which subnet to take, as a value; the store does the transaction.
//!
//! The order is flannel's (`pkg/subnet/etcd/local_manager.go`): the lease that
//! carries our public address, else the subnet we had before, else a random
//! free one. Unlike flannel, which looks at the lowest hundred, a free one is
//! picked from all of them: hosts that start together then rarely collide.
//!
//! What is taken? Every subnet that this config hands out and that has a key,
//! whether the key's value can be read or not. A subnet that it does not hand
//! out, of another length say, as the hosts hold them that joined before the
//! config was changed, takes all that it overlaps. But a key is quickly written,
//! and one for half the network must not shut everybody out. So of those only
//! what the hosts route to counts: its value can be read and names an address, it
//! is no wider than any config of this network allows, and it overlaps no subnet
//! of the config's own that somebody holds, for those go before it (see
//! [`crate::plan`]).

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;

use crate::backend::no_host;
use crate::key::subnet_key;
use crate::lease::{Lease, LeaseAttrs, Subnet, Tenure};
use crate::network::{NetworkConfig, Pool};
use crate::store::Snapshot;

/// What to do to hold a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This lease is ours already: publish there.
    Reuse(Lease),
    /// Create this one: the subnet we had before, and it is free.
    Ask(Subnet),
    /// Create any of these.
    PickFrom(FreeSubnets),
    /// Nothing is free; so many are leased.
    Exhausted {
        /// How many leases stand in the way.
        leased: usize,
    },
}

/// The leases of the host with `attrs` that the config no longer allows,
/// reservations left out: they are to be given back, or every peer would route
/// to them for another day.
pub fn misfits<'a>(
    config: &'a NetworkConfig,
    snapshot: &'a Snapshot,
    attrs: &LeaseAttrs,
) -> impl Iterator<Item = &'a Lease> {
    snapshot.leases.iter().filter(move |lease| {
        lease.attrs.same_host(attrs) && lease.tenure == Tenure::Leased && !fits(config, lease.subnet)
    })
}

/// Whether a host of this network may hold `subnet`.
pub fn fits(config: &NetworkConfig, subnet: Subnet) -> bool {
    let part = |pool: &Option<Pool>, network: Option<IpNetwork>| match (pool, network) {
        (Some(pool), Some(network)) => pool.leases_out(network),
        (None, None) => true,
        _ => false,
    };
    part(&config.v4, subnet.v4().map(IpNetwork::V4)) && part(&config.v6, subnet.v6().map(IpNetwork::V6))
}

/// Decides for the host with `attrs` among the leases of `snapshot`.
///
/// A lease of ours that no longer fits the config is passed over.
pub fn choose(
    config: &NetworkConfig,
    snapshot: &Snapshot,
    attrs: &LeaseAttrs,
    previous: Option<Subnet>,
) -> Choice {
    let ours = |lease: &&Lease| lease.attrs.same_host(attrs) && fits(config, lease.subnet);
    let ours = || snapshot.leases.iter().filter(ours);
    // Several are rare, and Go flanneld takes the one that comes first in etcd.
    let former = ours().find(|lease| Some(lease.subnet) == previous);
    if let Some(lease) = former.or_else(|| ours().min_by_key(|lease| subnet_key(&lease.subnet))) {
        return Choice::Reuse(lease.clone());
    }

    let side = |pool: &Option<Pool>| pool.map(|pool| FreeSide::new(pool, snapshot));
    let free = FreeSubnets { v4: side(&config.v4), v6: side(&config.v6) };
    if let Some(previous) = previous.filter(|previous| fits(config, *previous) && free.has(*previous)) {
        return Choice::Ask(previous);
    }
    if free.sides().any(|side| side.count() == 0) {
        return Choice::Exhausted { leased: snapshot.leases.len() };
    }
    Choice::PickFrom(free)
}

/// The subnets that nobody holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeSubnets {
    v4: Option<FreeSide>,
    v6: Option<FreeSide>,
}

impl FreeSubnets {
    /// One of them, each as likely as any other, decided by two numbers from
    /// anywhere in their range.
    ///
    /// # Panics
    /// Never: a `FreeSubnets` has a subnet in every family it has.
    pub fn pick(&self, dice: (u64, u64)) -> Subnet {
        let pick = |side: &Option<FreeSide>, dice| side.as_ref().map(|side| side.pick(dice));
        match (pick(&self.v4, dice.0), pick(&self.v6, dice.1)) {
            (Some(IpNetwork::V4(v4)), None) => Subnet::V4(v4),
            (None, Some(IpNetwork::V6(v6))) => Subnet::V6(v6),
            (Some(IpNetwork::V4(v4)), Some(IpNetwork::V6(v6))) => Subnet::Dual(v4, v6),
            _ => unreachable!("a config has a pool of at least one family"),
        }
    }

    fn sides(&self) -> impl Iterator<Item = &FreeSide> {
        self.v4.iter().chain(&self.v6)
    }

    /// Whether a subnet is free in every family.
    fn has(&self, subnet: Subnet) -> bool {
        subnet.networks().all(|part| self.sides().all(|side| side.has(part)))
    }
}

/// One family's free subnets, kept as the pool and what is taken out of it,
/// because an IPv6 pool has too many to list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FreeSide {
    pool: Pool,
    /// Ranges of taken indexes, first and last, merged and in order.
    blocks: Vec<(u128, u128)>,
}

impl FreeSide {
    fn new(pool: Pool, snapshot: &Snapshot) -> Self {
        let unreadable = snapshot.unreadable.iter().filter_map(|key| Some((key.subnet?, None)));
        let leases = snapshot.leases.iter().map(|lease| (lease.subnet, Some(&lease.attrs)));
        let parts = leases.chain(unreadable);
        let parts = parts.flat_map(|(subnet, attrs)| subnet.networks().map(move |part| (part, attrs)));
        let (regular, odd): (Vec<_>, Vec<_>) = parts.partition(|(part, _)| pool.leases_out(*part));
        let overlapped = |part: &IpNetwork| pool.overlapped_by(*part);
        let regular: BTreeSet<(u128, u128)> =
            regular.iter().filter_map(|(part, _)| overlapped(part)).collect();
        let odd =
            odd.into_iter().filter(|(part, attrs)| attrs.is_some_and(|attrs| stands(pool, *part, attrs)));
        let odd = odd.filter_map(|(part, _)| overlapped(&part));
        let odd =
            odd.filter(|(first, last)| regular.range((*first, *first)..=(*last, *last)).next().is_none());
        let mut ranges: Vec<(u128, u128)> = odd.chain(regular.iter().copied()).collect();
        ranges.sort_unstable();
        let mut blocks: Vec<(u128, u128)> = Vec::new();
        for (first, last) in ranges {
            match blocks.last_mut() {
                Some((_, end)) if first <= *end + 1 => *end = (*end).max(last),
                _ => blocks.push((first, last)),
            }
        }
        Self { pool, blocks }
    }

    /// Whether a subnet of the pool is free; one of the other family is none of its business.
    fn has(&self, part: IpNetwork) -> bool {
        let Some((index, _)) = self.pool.overlapped_by(part) else { return true };
        let next = self.blocks.partition_point(|(_, last)| *last < index);
        self.blocks.get(next).is_none_or(|(first, _)| index < *first)
    }

    fn count(&self) -> u128 {
        let blocked: u128 = self.blocks.iter().map(|(first, last)| last - first + 1).sum();
        self.pool.capacity() - blocked
    }

    fn pick(&self, dice: u64) -> IpNetwork {
        // The n-th free index: step over every block that lies before it.
        let mut index = u128::from(dice) % self.count();
        for (first, last) in &self.blocks {
            if index < *first {
                break;
            }
            index += last - first + 1;
        }
        self.pool.subnet(index).expect("the index is below the number of free subnets")
    }
}

/// Whether the hosts route to a subnet that the pool does not hand out, if
/// nobody who goes before it claims the same.
fn stands(pool: Pool, part: IpNetwork, attrs: &LeaseAttrs) -> bool {
    let address = attrs.public_address(&part);
    let is_host = |address| no_host(address).is_none() && !pool.network.contains(address);
    // A network holds four subnets or more, whatever its config.
    part.ip() == part.network() && part.prefix() >= pool.network.prefix() + 2 && address.is_some_and(is_host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Unreadable;

    fn attrs(ip: &str) -> LeaseAttrs {
        LeaseAttrs::from_json(&format!(r#"{{"PublicIP":"{ip}"}}"#)).unwrap()
    }

    fn us() -> LeaseAttrs {
        attrs("192.168.0.1")
    }

    fn config() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network":"10.5.0.0/22"}"#).unwrap()
    }

    fn subnet(text: &str) -> Subnet {
        Subnet::V4(text.parse().unwrap())
    }

    fn leases(leases: &[(&str, &str)]) -> Snapshot {
        let lease = |(network, ip): &(&str, &str)| Lease {
            subnet: subnet(network),
            attrs: attrs(ip),
            tenure: Tenure::Leased,
        };
        Snapshot { leases: leases.iter().map(lease).collect(), unreadable: vec![] }
    }

    fn picks(choice: Choice) -> Vec<String> {
        let Choice::PickFrom(free) = choice else { panic!("{choice:?} is not a pick") };
        let mut all: Vec<String> = (0..16).map(|dice| free.pick((dice, 0)).to_string()).collect();
        all.sort();
        all.dedup();
        all
    }

    #[test]
    fn the_lease_with_our_public_address_is_ours() {
        let snapshot = leases(&[("10.5.3.0/24", "192.168.0.2"), ("10.5.2.0/24", "192.168.0.1")]);

        let choice = choose(&config(), &snapshot, &us(), Some(subnet("10.5.1.0/24")));

        assert_eq!(choice, Choice::Reuse(snapshot.leases[1].clone()));
    }

    #[test]
    fn of_several_leases_of_ours_the_one_we_had_before_is_ours_or_else_the_first_in_etcd() {
        let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap();
        let snapshot = leases(&[
            ("10.5.2.0/24", "192.168.0.1"),
            ("10.5.9.0/24", "192.168.0.1"),
            ("10.5.10.0/24", "192.168.0.1"),
        ]);
        let reused = |previous: Option<&str>| match choose(&config, &snapshot, &us(), previous.map(subnet)) {
            Choice::Reuse(lease) => lease.subnet.to_string(),
            other => panic!("{other:?}"),
        };

        assert_eq!(reused(Some("10.5.9.0/24")), "10.5.9.0/24");
        assert_eq!(reused(Some("10.5.3.0/24")), "10.5.10.0/24", "10.5.10.0-24 is before 10.5.2.0-24");
        assert_eq!(reused(None), "10.5.10.0/24");
    }

    #[test]
    fn a_lease_of_ours_that_no_longer_fits_the_config_is_passed_over() {
        let snapshot = leases(&[("10.9.2.0/24", "192.168.0.1"), ("10.5.2.0/25", "192.168.0.1")]);

        let choice = choose(&config(), &snapshot, &us(), None);

        assert_eq!(picks(choice), ["10.5.1.0/24", "10.5.3.0/24"]);
    }

    #[test]
    fn what_no_longer_fits_is_to_be_given_back_if_it_is_ours_and_no_reservation() {
        let mut snapshot = leases(&[
            ("10.9.2.0/24", "192.168.0.1"),
            ("10.9.3.0/24", "192.168.0.2"),
            ("10.9.4.0/24", "192.168.0.1"),
            ("10.5.2.0/24", "192.168.0.1"),
        ]);
        snapshot.leases[2].tenure = Tenure::Reserved;

        let config = config();
        let misfits: Vec<&Lease> = misfits(&config, &snapshot, &us()).collect();

        assert_eq!(misfits, [&snapshot.leases[0]]);
    }

    #[test]
    fn the_subnet_we_had_before_is_asked_for_if_it_is_free() {
        let snapshot = leases(&[("10.5.1.0/24", "192.168.0.2")]);

        let choice = choose(&config(), &snapshot, &us(), Some(subnet("10.5.3.0/24")));

        assert_eq!(choice, Choice::Ask(subnet("10.5.3.0/24")));
    }

    #[test]
    fn the_subnet_we_had_before_is_not_taken_from_somebody_else() {
        let snapshot = leases(&[("10.5.3.0/24", "192.168.0.2")]);

        let choice = choose(&config(), &snapshot, &us(), Some(subnet("10.5.3.0/24")));

        assert_eq!(picks(choice), ["10.5.1.0/24", "10.5.2.0/24"]);
    }

    #[test]
    fn the_subnet_we_had_before_must_fit_the_config() {
        let choice = choose(&config(), &leases(&[]), &us(), Some(subnet("10.9.3.0/24")));

        assert_eq!(picks(choice), ["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"]);
    }

    #[test]
    fn what_overlaps_a_lease_of_any_length_is_not_free() {
        let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/21"}"#).unwrap();
        let snapshot = leases(&[("10.5.2.0/23", "192.168.0.2"), ("10.5.4.64/26", "192.168.0.3")]);

        let choice = choose(&config, &snapshot, &us(), None);

        assert_eq!(picks(choice), ["10.5.1.0/24", "10.5.5.0/24", "10.5.6.0/24", "10.5.7.0/24"]);
    }

    #[test]
    fn a_subnet_whose_value_cannot_be_read_is_not_free() {
        let mut snapshot = leases(&[("10.5.1.0/24", "192.168.0.2")]);
        snapshot.unreadable.push(Unreadable {
            key: "10.5.2.0-24".into(),
            subnet: Some(subnet("10.5.2.0/24")),
            reason: "not JSON".into(),
        });

        assert_eq!(picks(choose(&config(), &snapshot, &us(), None)), ["10.5.3.0/24"]);
    }

    #[test]
    fn a_full_range_is_exhausted() {
        let of = |third| (["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"][third], "192.168.0.2");

        let choice = choose(&config(), &leases(&[of(0), of(1), of(2)]), &us(), None);

        assert_eq!(choice, Choice::Exhausted { leased: 3 });
    }

    /// What is free beside some leases in a /16 of 255 subnets.
    fn count_free(snapshot: &Snapshot) -> usize {
        let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap();
        match choose(&config, snapshot, &us(), None) {
            Choice::PickFrom(free) => free.v4.unwrap().count().try_into().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_larger_subnet_of_former_days_takes_all_that_it_overlaps() {
        assert_eq!(count_free(&leases(&[("10.5.64.0/18", "192.168.0.2")])), 255 - 64);
        assert_eq!(
            count_free(&leases(&[("10.5.0.0/20", "192.168.0.2"), ("10.5.20.0/24", "192.168.0.3")])),
            255 - 15 - 1
        );
    }

    #[test]
    fn a_key_wider_than_any_config_allows_takes_nothing() {
        assert_eq!(
            count_free(&leases(&[("10.5.0.0/17", "192.168.0.2"), ("10.5.128.0/17", "192.168.0.3")])),
            255
        );
    }

    #[test]
    fn a_wide_key_that_overlaps_a_subnet_of_the_config_takes_nothing_but_that() {
        let honest = [("10.5.70.0/24", "192.168.0.3"), ("10.5.128.0/26", "192.168.0.4")];
        let with = |wide: &[(&str, &str)]| count_free(&leases(&[&honest, wide].concat()));

        assert_eq!(with(&[("10.5.64.0/18", "192.168.0.2")]), with(&[]));
        assert_eq!(with(&[("10.5.128.0/18", "192.168.0.2")]), 255 - 1 - 64, "the /26 does not go before it");
    }

    #[test]
    fn a_wide_key_that_nobody_routes_to_takes_nothing() {
        for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.5.3.4"] {
            assert_eq!(count_free(&leases(&[("10.5.64.0/18", address)])), 255, "{address}");
        }
        assert_eq!(count_free(&leases(&[("10.5.64.9/18", "192.168.0.2")])), 255, "host bits");
        let mut unreadable = leases(&[]);
        for (key, text) in [("10.5.64.0-18", "10.5.64.0/18"), ("10.5.7.0-24", "10.5.7.0/24")] {
            let reason = "not JSON".into();
            unreadable.unreadable.push(Unreadable { key: key.into(), subnet: Some(subnet(text)), reason });
        }
        assert_eq!(count_free(&unreadable), 254, "the /24 alone");
    }

    #[test]
    fn the_subnet_we_had_before_is_free_within_a_wide_key_that_takes_nothing() {
        let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap();
        let ask =
            |others: &[(&str, &str)]| choose(&config, &leases(others), &us(), Some(subnet("10.5.2.0/24")));
        let (wide, inside) = (("10.5.0.0/18", "192.168.0.2"), ("10.5.1.0/24", "192.168.0.3"));

        assert_eq!(ask(&[wide, inside]), Choice::Ask(subnet("10.5.2.0/24")));
        assert!(matches!(ask(&[wide]), Choice::PickFrom(_)));
    }

    #[test]
    fn a_key_that_covers_the_whole_network_keeps_nobody_out() {
        let snapshot = leases(&[("0.0.0.0/0", "192.168.0.2"), ("10.5.0.0/22", "192.168.0.3")]);

        assert_eq!(picks(choose(&config(), &snapshot, &us(), None)).len(), 3);
    }

    #[test]
    fn both_families_are_picked_from_their_own_range() {
        let config =
            NetworkConfig::parse(r#"{"Network":"10.5.0.0/22","EnableIPv6":true,"IPv6Network":"fd05::/48"}"#)
                .unwrap();
        let Choice::PickFrom(free) = choose(&config, &Snapshot::default(), &us(), None) else { panic!() };

        assert_eq!(free.pick((0, 65534)).to_string(), "10.5.1.0/24 and fd05:0:0:ffff::/64");
    }

    proptest::proptest! {
        #[test]
        fn a_pick_is_always_free(taken in proptest::collection::vec((1u8..=255, 18u8..=28), 0..40), dice: u64) {
            let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap();
            let networks: Vec<String> = taken.iter().map(|(third, len)| format!("10.5.{third}.0/{len}")).collect();
            let pairs: Vec<(&str, &str)> = networks.iter().map(|network| (network.as_str(), "192.168.0.2")).collect();
            let snapshot = leases(&pairs);

            if let Choice::PickFrom(free) = choose(&config, &snapshot, &us(), None) {
                let picked = free.pick((dice, 0)).v4().unwrap();
                for lease in snapshot.leases.iter().filter_map(|lease| lease.subnet.v4()) {
                    let beaten = pairs.iter().any(|(other, _)| other.ends_with("/24") && lease.overlaps(other.parse().unwrap()));
                    let counts = lease.prefix() == 24 || lease.ip() == lease.network() && !beaten;
                    proptest::prop_assert!(!counts || !picked.overlaps(lease), "{picked} overlaps {lease}");
                }
                proptest::prop_assert!(free.has(Subnet::V4(picked)));
            }
        }
    }
}
