//! Which subnet to take, as a value; the store does the transaction.
//!
//! The order is flannel's (`pkg/subnet/etcd/local_manager.go`): the lease that
//! carries our public address, else the subnet we had before, else a random
//! free one. Unlike flannel, which looks at the lowest hundred, a free one is
//! picked from all of them: hosts that start together then rarely collide.

use std::net::Ipv4Addr;

use ipnetwork::IpNetwork;

use crate::claim::within;
use crate::lease::{Lease, Subnet, Tenure};
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

/// The leases of the host at `public_ip` that the config no longer allows,
/// reservations left out: they are to be given back, or every peer would route
/// to them for another day.
pub fn misfits<'a>(
    config: &'a NetworkConfig,
    snapshot: &'a Snapshot,
    public_ip: Option<Ipv4Addr>,
) -> impl Iterator<Item = &'a Lease> {
    snapshot.leases.iter().filter(move |lease| {
        let ours = public_ip.is_some() && lease.attrs.public_ip == public_ip;
        ours && lease.tenure == Tenure::Leased && !fits(config, lease.subnet)
    })
}

/// Whether a host of this network may hold `subnet`.
fn fits(config: &NetworkConfig, subnet: Subnet) -> bool {
    let part = |pool: &Option<Pool>, network: Option<IpNetwork>| match (pool, network) {
        (Some(pool), Some(network)) => pool.leases_out(network),
        (None, None) => true,
        _ => false,
    };
    part(&config.v4, subnet.v4().map(IpNetwork::V4)) && part(&config.v6, subnet.v6().map(IpNetwork::V6))
}

/// Decides for the host at `public_ip` among the leases of `snapshot`.
///
/// A lease of ours that no longer fits the config is passed over.
pub fn choose(
    config: &NetworkConfig,
    snapshot: &Snapshot,
    public_ip: Option<Ipv4Addr>,
    previous: Option<Subnet>,
) -> Choice {
    let fits = |subnet: Subnet| fits(config, subnet);
    let ours =
        |lease: &&Lease| public_ip.is_some() && lease.attrs.public_ip == public_ip && fits(lease.subnet);
    if let Some(lease) = snapshot.leases.iter().filter(ours).min_by_key(|lease| lease.subnet) {
        return Choice::Reuse(lease.clone());
    }

    let taken: Vec<IpNetwork> = snapshot
        .leases
        .iter()
        .map(|lease| lease.subnet)
        .chain(snapshot.unreadable.iter().filter_map(|key| key.subnet))
        .flat_map(|subnet| subnet.networks().collect::<Vec<_>>())
        // What covers a whole network is nobody's subnet: one bad key must not keep every host out.
        .filter(|network| !config.networks().any(|whole| within(*network, whole)))
        .collect();
    let free = |subnet: &Subnet| {
        subnet.networks().all(|network| !taken.iter().any(|taken| overlap(*taken, network)))
    };
    if let Some(previous) = previous.filter(|previous| fits(*previous) && free(previous)) {
        return Choice::Ask(previous);
    }

    let side = |pool: &Option<Pool>| pool.map(|pool| FreeSide::new(pool, &taken));
    let free = FreeSubnets { v4: side(&config.v4), v6: side(&config.v6) };
    if free.v4.iter().chain(&free.v6).any(|side| side.count() == 0) {
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
    fn new(pool: Pool, taken: &[IpNetwork]) -> Self {
        let mut ranges: Vec<(u128, u128)> =
            taken.iter().filter_map(|network| pool.overlapped_by(*network)).collect();
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

fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    match (one, other) {
        (IpNetwork::V4(one), IpNetwork::V4(other)) => one.overlaps(other),
        (IpNetwork::V6(one), IpNetwork::V6(other)) => one.overlaps(other),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeaseAttrs;
    use crate::store::Unreadable;

    const US: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);

    fn config() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network":"10.5.0.0/22"}"#).unwrap()
    }

    fn subnet(text: &str) -> Subnet {
        Subnet::V4(text.parse().unwrap())
    }

    fn leases(leases: &[(&str, &str)]) -> Snapshot {
        let lease = |(network, ip): &(&str, &str)| Lease {
            subnet: subnet(network),
            attrs: LeaseAttrs::from_json(&format!(r#"{{"PublicIP":"{ip}"}}"#)).unwrap(),
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

        let choice = choose(&config(), &snapshot, Some(US), Some(subnet("10.5.1.0/24")));

        assert_eq!(choice, Choice::Reuse(snapshot.leases[1].clone()));
    }

    #[test]
    fn a_lease_of_ours_that_no_longer_fits_the_config_is_passed_over() {
        let snapshot = leases(&[("10.9.2.0/24", "192.168.0.1"), ("10.5.2.0/25", "192.168.0.1")]);

        let choice = choose(&config(), &snapshot, Some(US), None);

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
        let misfits: Vec<&Lease> = misfits(&config, &snapshot, Some(US)).collect();

        assert_eq!(misfits, [&snapshot.leases[0]]);
    }

    #[test]
    fn the_subnet_we_had_before_is_asked_for_if_it_is_free() {
        let snapshot = leases(&[("10.5.1.0/24", "192.168.0.2")]);

        let choice = choose(&config(), &snapshot, Some(US), Some(subnet("10.5.3.0/24")));

        assert_eq!(choice, Choice::Ask(subnet("10.5.3.0/24")));
    }

    #[test]
    fn the_subnet_we_had_before_is_not_taken_from_somebody_else() {
        let snapshot = leases(&[("10.5.3.0/24", "192.168.0.2")]);

        let choice = choose(&config(), &snapshot, Some(US), Some(subnet("10.5.3.0/24")));

        assert_eq!(picks(choice), ["10.5.1.0/24", "10.5.2.0/24"]);
    }

    #[test]
    fn the_subnet_we_had_before_must_fit_the_config() {
        let choice = choose(&config(), &leases(&[]), Some(US), Some(subnet("10.9.3.0/24")));

        assert_eq!(picks(choice), ["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"]);
    }

    #[test]
    fn what_overlaps_a_lease_of_any_length_is_not_free() {
        let snapshot = leases(&[("10.5.2.0/23", "192.168.0.2"), ("10.5.3.64/26", "192.168.0.3")]);

        assert_eq!(picks(choose(&config(), &snapshot, Some(US), None)), ["10.5.1.0/24"]);
    }

    #[test]
    fn a_subnet_whose_value_cannot_be_read_is_not_free() {
        let mut snapshot = leases(&[("10.5.1.0/24", "192.168.0.2")]);
        snapshot.unreadable.push(Unreadable {
            key: "10.5.2.0-24".into(),
            subnet: Some(subnet("10.5.2.0/24")),
            reason: "not JSON".into(),
        });

        assert_eq!(picks(choose(&config(), &snapshot, Some(US), None)), ["10.5.3.0/24"]);
    }

    #[test]
    fn a_full_range_is_exhausted() {
        let snapshot = leases(&[("10.5.1.0/24", "192.168.0.2"), ("10.5.2.0/23", "192.168.0.3")]);

        assert_eq!(choose(&config(), &snapshot, Some(US), None), Choice::Exhausted { leased: 2 });
    }

    #[test]
    fn a_key_that_covers_the_whole_network_keeps_nobody_out() {
        let snapshot = leases(&[("0.0.0.0/0", "192.168.0.2"), ("10.5.0.0/22", "192.168.0.3")]);

        assert_eq!(picks(choose(&config(), &snapshot, Some(US), None)).len(), 3);
    }

    #[test]
    fn both_families_are_picked_from_their_own_range() {
        let config =
            NetworkConfig::parse(r#"{"Network":"10.5.0.0/22","EnableIPv6":true,"IPv6Network":"fd05::/48"}"#)
                .unwrap();
        let Choice::PickFrom(free) = choose(&config, &Snapshot::default(), Some(US), None) else { panic!() };

        assert_eq!(free.pick((0, 65534)).to_string(), "10.5.1.0/24 and fd05:0:0:ffff::/64");
    }

    proptest::proptest! {
        #[test]
        fn a_pick_is_always_free(taken in proptest::collection::vec((0u8..=255, 20u8..=28), 0..40), dice: u64) {
            let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).unwrap();
            let networks: Vec<String> =
                taken.iter().map(|(third, len)| format!("10.5.{third}.0/{len}")).collect();
            let pairs: Vec<(&str, &str)> = networks.iter().map(|network| (network.as_str(), "192.168.0.2")).collect();
            let snapshot = leases(&pairs);

            if let Choice::PickFrom(free) = choose(&config, &snapshot, Some(US), None) {
                let picked = free.pick((dice, 0));
                for lease in &snapshot.leases {
                    let (one, other) = (picked.v4().unwrap(), lease.subnet.v4().unwrap());
                    proptest::prop_assert!(!one.overlaps(other), "{one} overlaps {other}");
                }
            }
        }
    }
}
