//! The network config: what the whole cluster has agreed on.
//!
//! The value of `<prefix>/config`, read with flannel's keys, defaults and rules
//! (`pkg/subnet/config.go`), and strictly where flannel is lax: a range that is
//! upside down, a value of the wrong family or off its boundary is refused by a
//! sentence that names the key, what was found and what is allowed.

use std::net::IpAddr;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use thiserror::Error;

use crate::json::{BadValue, Object};

/// Why a network config cannot be used.
///
/// Trying again helps only once somebody has changed the config.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// A key holds something it may not hold.
    #[error(transparent)]
    Value(#[from] BadValue),
    /// The config asks for a part that does not exist yet.
    #[error("{key} is {found}: {what} is not supported yet; {instead}")]
    Unsupported {
        /// The key that asks for it.
        key: String,
        /// What the key holds.
        found: String,
        /// The part that is missing.
        what: String,
        /// What to write instead.
        instead: String,
    },
    /// Both families are switched off.
    #[error("EnableIPv4 is false and EnableIPv6 is not true: one of them must be true")]
    NoFamily,
}

/// Which part of the kernel holds the traffic rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirewallEngine {
    /// `iptables`, of whichever flavour the host has.
    Iptables,
    /// nftables tables of our own.
    Nftables,
}

/// The cluster's agreement.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// The IPv4 network and how it is cut into subnets.
    pub v4: Option<Pool>,
    /// The IPv6 network and how it is cut into subnets.
    pub v6: Option<Pool>,
    /// Where masquerade and forward rules go.
    pub engine: FirewallEngine,
    /// `Backend`, still unread, for `backend::from_config`; `None` if the key is absent.
    pub backend: Option<Object>,
    /// Keys that nobody knows, each worth a warning.
    pub unknown: Vec<String>,
    /// All of it, as it stands in the store.
    pub text: Box<str>,
}

const KEYS: [&str; 12] = [
    "Network",
    "IPv6Network",
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "Backend",
];

impl NetworkConfig {
    /// Reads and checks the value of `<prefix>/config`.
    ///
    /// # Errors
    /// Anything that flannel refuses, and what it should have refused.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let object = Object::parse("", text)?;
        let v4_on = object.switch("EnableIPv4")?.unwrap_or(true);
        let v6_on = object.switch("EnableIPv6")?.unwrap_or(false);
        // Both families are read even when one is off: a wrong value is a wrong value.
        let v4 = Pool::parse(&object, &V4_KEYS, v4_on)?;
        let v6 = Pool::parse(&object, &V6_KEYS, v6_on)?;
        if !v4_on && !v6_on {
            return Err(ConfigError::NoFamily);
        }
        let engine = match object.switch("EnableNFTables")? {
            Some(true) => FirewallEngine::Nftables,
            Some(false) | None => FirewallEngine::Iptables,
        };
        Ok(Self {
            v4: v4.filter(|_| v4_on),
            v6: v6.filter(|_| v6_on),
            engine,
            backend: object.object("Backend")?,
            unknown: object.unknown(&KEYS),
            text: text.into(),
        })
    }

    /// Refuses what can be read but not yet run.
    ///
    /// # Errors
    /// The config needs IPv6.
    pub fn supported(self) -> Result<Self, ConfigError> {
        let unsupported = |key: &str, what: &str, instead: &str| {
            Err(ConfigError::Unsupported {
                key: key.into(),
                found: "true".into(),
                what: what.into(),
                instead: instead.into(),
            })
        };
        if self.v6.is_some() {
            return unsupported("EnableIPv6", "IPv6", "leave the key out and give an IPv4 Network");
        }
        Ok(self)
    }

    /// The pools of the families that are on, IPv4 first.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.v4.iter().chain(&self.v6)
    }

    /// The networks of the families that are on, IPv4 first.
    pub fn networks(&self) -> impl Iterator<Item = IpNetwork> {
        self.pools().map(|pool| pool.network)
    }
}

/// One family's network and the subnets that may be leased out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The whole network, host bits cleared.
    pub network: IpNetwork,
    /// The prefix length of a host's subnet.
    pub subnet_len: u8,
    /// The address of the first subnet that may be leased.
    pub min: IpAddr,
    /// The address of the last subnet that may be leased.
    pub max: IpAddr,
}

/// What differs between the two families in the config.
struct FamilyKeys {
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
    /// Bits of an address.
    bits: u8,
    /// Networks up to this prefix are cut into subnets of `usual + 2`.
    usual: u8,
    family: &'static str,
    sample: &'static str,
}

const V4_KEYS: FamilyKeys = FamilyKeys {
    network: "Network",
    len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    bits: 32,
    usual: 22,
    family: "IPv4",
    sample: "10.5.0.0/16",
};

const V6_KEYS: FamilyKeys = FamilyKeys {
    network: "IPv6Network",
    len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    bits: 128,
    usual: 62,
    family: "IPv6",
    sample: "fd05::/48",
};

impl FamilyKeys {
    fn is_ours(&self, address: IpAddr) -> bool {
        address.is_ipv4() == (self.bits == 32)
    }

    fn address(&self, object: &Object, key: &str) -> Result<Option<IpAddr>, BadValue> {
        let allowed = format!("an {} address", self.family);
        match object.parsed::<IpAddr>(key, &allowed)? {
            Some(address) if !self.is_ours(address) => Err(object.bad(key, allowed)),
            address => Ok(address.filter(|address| !address.is_unspecified())),
        }
    }
}

impl Pool {
    fn parse(object: &Object, keys: &FamilyKeys, required: bool) -> Result<Option<Self>, BadValue> {
        let allowed = format!("an {} prefix like {}", keys.family, keys.sample);
        // `IpNetwork` reads a bare address as a host prefix; flannel does not.
        let text = object.text(keys.network).map_err(|_| object.bad(keys.network, &*allowed))?;
        let network = match text {
            None => None,
            Some(text) => {
                let network: Option<IpNetwork> = text.parse().ok().filter(|_| text.contains('/'));
                let network = network.filter(|network| keys.is_ours(network.ip()));
                Some(network.ok_or_else(|| object.bad(keys.network, &*allowed))?)
            }
        };
        let len = object.number(keys.len, 0..=u32::from(keys.bits - 2))?.filter(|len| *len > 0);
        let min = keys.address(object, keys.min)?;
        let max = keys.address(object, keys.max)?;

        let network = match network {
            Some(network) if network.prefix() > 0 => network,
            // The unspecified one is as good as absent, any other with a length of 0 a mistake.
            Some(network) if required || !network.ip().is_unspecified() => {
                return Err(object.bad(keys.network, allowed));
            }
            None if required => return Err(object.bad(keys.network, allowed)),
            _ => return Ok(None),
        };
        let prefix = network.prefix();
        let subnet_len = match len {
            Some(len) if len >= u32::from(prefix) + 2 => len as u8,
            Some(_) => {
                let (least, most) = (prefix + 2, keys.bits - 2);
                return Err(object.bad(
                    keys.len,
                    if least > most {
                        format!("left out, and {} be a prefix of /{} or shorter", keys.network, keys.bits - 4)
                    } else {
                        format!("from {least} to {most}, so that {network} holds four subnets or more")
                    },
                ));
            }
            None if prefix > keys.bits - 4 => {
                return Err(object.bad(
                    keys.network,
                    format!("a prefix of /{} or shorter, to hold subnets", keys.bits - 4),
                ));
            }
            None if prefix <= keys.usual => keys.usual + 2,
            None => prefix + 2,
        };

        let size = 1u128 << (keys.bits - subnet_len);
        let network = IpNetwork::new(network.network(), prefix).expect("the prefix was read from a prefix");
        let first = number_of(network.ip());
        let last = first + ((1u128 << (keys.bits - prefix - 1)) - 1) * 2 + 1 - (size - 1);
        let bound = |key: &str, given: Option<IpAddr>, default: u128| -> Result<IpAddr, BadValue> {
            let Some(given) = given else { return Ok(address_of(default, network.ip())) };
            if !network.contains(given) {
                return Err(object.bad(key, format!("inside {network}")));
            }
            if !number_of(given).is_multiple_of(size) {
                return Err(object.bad(key, format!("the first address of a /{subnet_len}")));
            }
            Ok(given)
        };
        let min = bound(keys.min, min, first + size)?;
        let max = bound(keys.max, max, last)?;
        if min > max {
            return Err(object.bad(
                if object.get(keys.max).is_some() { keys.max } else { keys.min },
                if object.get(keys.max).is_some() {
                    format!("{min} ({}) or above", keys.min)
                } else {
                    format!("{max} or below")
                },
            ));
        }
        Ok(Some(Self { network, subnet_len, min, max }))
    }

    /// Of which family it is.
    pub fn is_ipv4(&self) -> bool {
        self.network.is_ipv4()
    }

    /// How many subnets may be leased.
    pub fn capacity(&self) -> u128 {
        (number_of(self.max) - number_of(self.min)) / self.subnet_size() + 1
    }

    /// The subnet with that index, counted from `min`; `None` past `max`.
    pub fn subnet(&self, index: u128) -> Option<IpNetwork> {
        if index >= self.capacity() {
            return None;
        }
        let address = address_of(number_of(self.min) + index * self.subnet_size(), self.min);
        Some(IpNetwork::new(address, self.subnet_len).expect("the length was checked when the pool was made"))
    }

    /// The indexes of the leasable subnets that `network` overlaps, first and last.
    pub fn overlapped_by(&self, network: IpNetwork) -> Option<(u128, u128)> {
        if network.is_ipv4() != self.network.is_ipv4() {
            return None;
        }
        let (least, most) = (number_of(self.min), number_of(self.max) + (self.subnet_size() - 1));
        let (first, last) = (number_of(network.network()), number_of(network.broadcast()));
        if last < least || first > most {
            return None;
        }
        let index = |address: u128| (address - least) / self.subnet_size();
        Some((index(first.max(least)), index(last.min(most))))
    }

    /// Whether a host of this network may hold `subnet`: the right length,
    /// between `min` and `max`, on its boundary.
    pub fn leases_out(&self, subnet: IpNetwork) -> bool {
        subnet.is_ipv4() == self.network.is_ipv4()
            && subnet.prefix() == self.subnet_len
            && subnet.ip() == subnet.network()
            && (self.min..=self.max).contains(&subnet.ip())
    }

    fn subnet_size(&self) -> u128 {
        let bits = if self.network.is_ipv4() { 32 } else { 128 };
        1u128 << (bits - self.subnet_len)
    }
}

/// An address as a number; IPv4 addresses are below 2³².
fn number_of(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The address of that number, in the family of `like`.
fn address_of(number: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => {
            IpAddr::V4(Ipv4Addr::from(u32::try_from(number).expect("arithmetic stays inside the network")))
        }
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

/// The address after `network`'s first: what dockerd gives its bridge.
pub fn first_host(network: IpNetwork) -> IpNetwork {
    let address = address_of(number_of(network.network()) + 1, network.ip());
    match (address, network.prefix()) {
        (IpAddr::V4(v4), prefix) => IpNetwork::V4(Ipv4Network::new(v4, prefix).expect("a prefix stays one")),
        (IpAddr::V6(v6), prefix) => IpNetwork::V6(Ipv6Network::new(v6, prefix).expect("a prefix stays one")),
    }
}

#[cfg(test)]
mod tests;
