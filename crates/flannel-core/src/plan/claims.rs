//! Who claims what, in an order that answers who disputes it.
//!
//! All claims stand in one set: those on subnets by where they begin, then those
//! on MACs, then those on addresses, and those with one claim by who goes first.
//! So whoever disputes a claim stands beside it, and at any number of peers it
//! takes a few lookups to find them.
//!
//! ```text
//!   10.5.0.0/22       around   one lookup for each shorter length that is in use
//!     10.5.2.0/23     this
//!     10.5.2.0/24     inside   from where it begins to where it ends
//!     10.5.3.128/25   inside
//!   0e:00:…:02 → 192.168.0.2   one MAC, two hosts: side by side
//!   0e:00:…:02 → 192.168.0.9
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Bound::{Excluded, Unbounded};
use std::ops::RangeInclusive;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::claim::within;
use crate::lease::Subnet;
use crate::state::MacAddr;

/// What only one host can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claimed {
    /// The packets to a subnet: where it begins, and its prefix length.
    Subnet(IpAddr, u8),
    /// The forwarding entry of a MAC, to a host with that address.
    Mac(MacAddr, IpAddr),
    /// A public address, for a tunnel's end with that MAC.
    Address(IpAddr, Option<MacAddr>),
}

/// Whether the network config could hand a subnet out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    Regular,
    Odd,
}

/// Who goes before whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) standing: Standing,
    /// Whether nobody has to be alive for the lease to stay.
    pub(super) is_reserved: bool,
    pub(super) subnet: Subnet,
}

/// All claims.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    set: BTreeSet<(Claimed, Rank)>,
    /// How many claims on subnets there are of each prefix length: mostly there is one.
    lengths: BTreeMap<u8, usize>,
}

impl From<Vec<(Claimed, Rank)>> for Claims {
    fn from(mut claims: Vec<(Claimed, Rank)>) -> Self {
        let mut lengths = BTreeMap::new();
        for (_, length) in claims.iter().filter_map(|(claimed, _)| claimed.subnet()) {
            *lengths.entry(length).or_default() += 1;
        }
        // Unsorted, the set would sort them in more room.
        claims.sort_unstable();
        Self { set: claims.into_iter().collect(), lengths }
    }
}

impl Claims {
    pub(super) fn insert(&mut self, claimed: Claimed, rank: Rank) {
        let new = self.set.insert((claimed, rank));
        if let Some((_, length)) = claimed.subnet().filter(|_| new) {
            *self.lengths.entry(length).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, claimed: Claimed, rank: Rank) {
        let there = self.set.remove(&(claimed, rank));
        if let Some((_, length)) = claimed.subnet().filter(|_| there)
            && let Some(count) = self.lengths.get_mut(&length)
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length);
            }
        }
    }

    /// Those who claim just that.
    pub(super) fn of(&self, claimed: Claimed) -> impl Iterator<Item = Rank> {
        self.set.range(all_of(claimed)).map(|(_, rank)| *rank)
    }

    /// Those who claim what cannot be had beside `claimed`.
    pub(super) fn disputing(&self, claimed: Claimed) -> impl Iterator<Item = Rank> {
        let alike = claimed.least_alike().into_iter().flat_map(move |least| {
            let below = self.set.range((least, Rank::FIRST)..(claimed, Rank::FIRST));
            let above = self.set.range((Excluded((claimed, Rank::LAST)), Unbounded));
            below.chain(above.take_while(move |(other, _)| other.least_alike() == Some(least)))
        });
        let subnet = claimed.subnet().into_iter();
        let overlapping = subnet.flat_map(|(first, length)| self.overlapping(first, length));
        alike.chain(overlapping).map(|(_, rank)| *rank)
    }

    /// Everybody who claims what somebody else claims too, be it the same host.
    pub(super) fn contenders(&self) -> BTreeSet<Subnet> {
        let mut contenders = BTreeSet::new();
        // Who has what the next ones may claim too: the widest subnet begun, or the first with that MAC or address.
        let mut first: Option<&(Claimed, Rank)> = None;
        for claim in &self.set {
            match first.filter(|(claimed, _)| claimed.covers(claim.0)) {
                Some((_, rank)) => contenders.extend([rank.subnet, claim.1.subnet]),
                None => first = Some(claim),
            }
        }
        contenders
    }

    /// The claims on subnets that overlap one: what is around it, and what begins inside it.
    fn overlapping(&self, first: IpAddr, length: u8) -> impl Iterator<Item = &(Claimed, Rank)> {
        let shorter =
            self.lengths.range(..length).filter_map(move |(length, _)| IpNetwork::new(first, *length).ok());
        let around = shorter
            .flat_map(|network| self.set.range(all_of(Claimed::Subnet(network.network(), network.prefix()))));
        let inside = IpNetwork::new(first, length).into_iter().flat_map(move |network| {
            let most = Claimed::Subnet(network.broadcast(), u8::MAX);
            self.set.range((Claimed::Subnet(first, length), Rank::FIRST)..=(most, Rank::LAST))
        });
        around.chain(inside)
    }
}

/// Where those stand who claim just that.
fn all_of(claimed: Claimed) -> RangeInclusive<(Claimed, Rank)> {
    (claimed, Rank::FIRST)..=(claimed, Rank::LAST)
}

impl Claimed {
    /// Where the subnet begins, and its length.
    fn subnet(self) -> Option<(IpAddr, u8)> {
        match self {
            Self::Subnet(first, length) => Some((first, length)),
            Self::Mac(..) | Self::Address(..) => None,
        }
    }

    /// The least of the claims on the same MAC or address.
    fn least_alike(self) -> Option<Self> {
        match self {
            Self::Subnet(..) => None,
            Self::Mac(mac, _) => Some(Self::Mac(mac, IpAddr::V4(Ipv4Addr::UNSPECIFIED))),
            Self::Address(address, _) => Some(Self::Address(address, None)),
        }
    }

    /// Whether it is a claim on a subnet around that of `later`, or on the same MAC or address.
    fn covers(self, later: Self) -> bool {
        match (self, later) {
            (Self::Subnet(around, length), Self::Subnet(first, longer)) => {
                let networks = (IpNetwork::new(around, length), IpNetwork::new(first, longer));
                matches!(networks, (Ok(around), Ok(inside)) if within(around, inside))
            }
            _ => self.least_alike().is_some() && self.least_alike() == later.least_alike(),
        }
    }
}

impl Rank {
    /// Nobody goes before it.
    const FIRST: Self = match Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0) {
        Some(least) => Self { standing: Standing::Regular, is_reserved: false, subnet: Subnet::V4(least) },
        None => panic!("0 is a valid prefix length"),
    };
    /// Nobody comes after it.
    const LAST: Self = {
        let v4 = Ipv4Network::new_checked(Ipv4Addr::BROADCAST, 32);
        let v6 = Ipv6Network::new_checked(Ipv6Addr::from_bits(u128::MAX), 128);
        match (v4, v6) {
            (Some(v4), Some(v6)) => {
                Self { standing: Standing::Odd, is_reserved: true, subnet: Subnet::Dual(v4, v6) }
            }
            _ => panic!("32 and 128 are valid prefix lengths"),
        }
    };
}
