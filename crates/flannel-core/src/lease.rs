//! What a node holds and publishes: its subnet, and how to reach it.
//!
//! The JSON here is flannel's own, byte for byte, because Go nodes read what we
//! write: the order of the members, `null` for a missing IPv6 address, members
//! left out when empty (`pkg/lease/lease.go`). Peers are read more kindly than
//! we write: keys in any case, members of newer versions passed over.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::ser::{Serialize, SerializeStruct, Serializer};
use serde_json::value::RawValue;

use crate::json::{BadValue, Object};
use crate::shown::shown;
use crate::state::MacAddr;

/// In bytes: backend data of more than this is not kept. What any backend
/// publishes is well below it, and a host keeps the data of every peer.
pub const MOST_DATA: usize = 1024;

/// In bytes: no backend has a longer name.
const MOST_TYPE: usize = 64;

/// The identity of a lease: an IPv4 prefix, an IPv6 prefix, or both.
///
/// Prefixes are kept as found, host bits and all, so that a key with host bits
/// stays another key than the one without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subnet {
    /// An IPv4 prefix alone, as in every IPv4 network.
    V4(Ipv4Network),
    /// An IPv6 prefix alone; its key begins with `0.0.0.0-0`.
    V6(Ipv6Network),
    /// One prefix of each family.
    Dual(Ipv4Network, Ipv6Network),
}

impl Subnet {
    /// The IPv4 part.
    pub fn v4(&self) -> Option<Ipv4Network> {
        match self {
            Self::V4(v4) | Self::Dual(v4, _) => Some(*v4),
            Self::V6(_) => None,
        }
    }

    /// The IPv6 part.
    pub fn v6(&self) -> Option<Ipv6Network> {
        match self {
            Self::V6(v6) | Self::Dual(_, v6) => Some(*v6),
            Self::V4(_) => None,
        }
    }

    /// One or two prefixes, IPv4 first.
    pub fn networks(&self) -> impl Iterator<Item = IpNetwork> + use<> {
        self.v4().map(IpNetwork::V4).into_iter().chain(self.v6().map(IpNetwork::V6))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(v4) => write!(f, "{v4}"),
            Self::V6(v6) => write!(f, "{v6}"),
            Self::Dual(v4, v6) => write!(f, "{v4} and {v6}"),
        }
    }
}

/// JSON text that is passed on as it stands; known to be well formed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawJson(Box<str>);

impl RawJson {
    /// Turns a value into JSON text.
    ///
    /// # Panics
    /// Never for the plain structs and strings that backends publish.
    pub fn of(value: &impl Serialize) -> Self {
        Self(serde_json::to_string(value).expect("plain structs serialise").into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_str(&self.0).map_err(serde::ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

/// What a backend publishes beside the addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendData {
    /// The tunnel end of a VXLAN node. Every peer of a large cluster has one, so
    /// what it says is kept and not its text.
    Vtep {
        /// Nodes before flannel v0.14 publish none.
        vni: Option<u32>,
        /// The address of its device.
        mac: MacAddr,
    },
    /// Anything else, as it stands.
    Json(RawJson),
    /// So many bytes of something: more than [`MOST_DATA`], and not kept.
    TooLong(usize),
}

impl BackendData {
    fn read(text: &str) -> Self {
        match Self::vtep(text) {
            Some(vtep) => vtep,
            None if text.len() > MOST_DATA => Self::TooLong(text.len()),
            None => Self::Json(RawJson(text.into())),
        }
    }

    /// The address of a tunnel's end, if it names one.
    pub fn mac(&self) -> Option<MacAddr> {
        match self {
            Self::Vtep { mac, .. } => Some(*mac),
            Self::Json(json) => Object::parse("", json.as_str()).ok()?.text("VtepMAC").ok()??.parse().ok(),
            Self::TooLong(_) => None,
        }
    }

    /// What `text` says if it is a VXLAN node's and says nothing else.
    fn vtep(text: &str) -> Option<Self> {
        let object = Object::parse("", text).ok()?;
        if !object.unknown(&["VNI", "VtepMAC"]).is_empty() {
            return None;
        }
        let vni = object.number("VNI", 0..=u32::MAX).ok()?;
        Some(Self::Vtep { vni, mac: object.text("VtepMAC").ok()??.parse().ok()? })
    }
}

impl Serialize for BackendData {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Vtep { vni, mac } => {
                let mut object = serializer.serialize_struct("BackendData", 2)?;
                if let Some(vni) = vni {
                    object.serialize_field("VNI", vni)?;
                }
                object.serialize_field("VtepMAC", &mac.to_string())?;
                object.end()
            }
            Self::Json(json) => json.serialize(serializer),
            Self::TooLong(_) => serializer.serialize_none(),
        }
    }
}

/// What a node tells the others: the value of its lease key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseAttrs {
    /// Where the node is reached over IPv4; published as `0.0.0.0` when absent.
    pub public_ip: Option<Ipv4Addr>,
    /// Where the node is reached over IPv6.
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw` …; empty for backends that publish no type. Of what is too long for a name only the beginning.
    pub backend_type: Cow<'static, str>,
    /// The backend's own words for IPv4.
    pub backend_data: Option<BackendData>,
    /// The backend's own words for IPv6; few have any.
    pub backend_v6_data: Option<Box<BackendData>>,
}

impl LeaseAttrs {
    /// Reads the value of a lease key.
    ///
    /// # Errors
    /// Not a JSON object, or a member of the wrong kind. `PublicIP` may be
    /// absent but not `null`-like text or IPv6.
    pub fn from_json(text: &str) -> Result<Self, BadValue> {
        let object = Object::parse("", text)?;
        let data = |key| object.get(key).map(BackendData::read);
        let public_ip: Option<Ipv4Addr> = object.parsed("PublicIP", "an IPv4 address")?;
        let backend_type = object.text("BackendType")?.unwrap_or_default();
        Ok(Self {
            public_ip: public_ip.filter(|ip| !ip.is_unspecified()),
            public_ipv6: object.parsed("PublicIPv6", "an IPv6 address")?,
            backend_type: interned(backend_type),
            backend_data: data("BackendData"),
            backend_v6_data: data("BackendV6Data").map(Box::new),
        })
    }

    /// The value of a lease key, byte for byte as Go flanneld writes it.
    ///
    /// # Panics
    /// Never: every member serialises.
    pub fn to_json(&self) -> String {
        let json = serde_json::to_string(self).expect("a lease serialises");
        // Go's encoder escapes these three inside strings, which is the only place they can stand.
        json.replace('&', "\\u0026").replace('<', "\\u003c").replace('>', "\\u003e")
    }

    /// Whether two leases name one host: by its public IPv4 address, as flannel tells hosts
    /// apart, or by the IPv6 one where neither has an IPv4 address.
    pub fn same_host(&self, other: &Self) -> bool {
        match (self.public_ip, other.public_ip) {
            (None, None) => self.public_ipv6.is_some() && self.public_ipv6 == other.public_ipv6,
            (one, other) => one == other,
        }
    }

    /// The backend's own words for the family of `subnet`.
    pub fn data(&self, subnet: &IpNetwork) -> Option<&BackendData> {
        match subnet {
            IpNetwork::V4(_) => self.backend_data.as_ref(),
            IpNetwork::V6(_) => self.backend_v6_data.as_deref(),
        }
    }

    /// The public address of the same family as `subnet`.
    pub fn public_address(&self, subnet: &IpNetwork) -> Option<IpAddr> {
        match subnet {
            IpNetwork::V4(_) => self.public_ip.map(IpAddr::V4),
            IpNetwork::V6(_) => self.public_ipv6.map(IpAddr::V6),
        }
    }
}

impl Serialize for LeaseAttrs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("LeaseAttrs", 5)?;
        object.serialize_field("PublicIP", &self.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED))?;
        object.serialize_field("PublicIPv6", &self.public_ipv6)?;
        if !self.backend_type.is_empty() {
            object.serialize_field("BackendType", &self.backend_type)?;
        }
        if let Some(data) = &self.backend_data {
            object.serialize_field("BackendData", data)?;
        }
        if let Some(data) = &self.backend_v6_data {
            object.serialize_field("BackendV6Data", data)?;
        }
        object.end()
    }
}

/// The usual backend names are shared, not kept once per peer.
fn interned(name: String) -> Cow<'static, str> {
    const USUAL: [&str; 7] = ["", "vxlan", "host-gw", "wireguard", "ipip", "ipsec", "extension"];
    match USUAL.into_iter().find(|usual| *usual == name) {
        Some(usual) => Cow::Borrowed(usual),
        None if name.len() > MOST_TYPE => Cow::Owned(shown(&name)),
        None => Cow::Owned(name),
    }
}

/// Whether a lease ends when nobody renews it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tenure {
    /// Kept by renewal, gone after its time to live.
    Leased,
    /// A reservation: stays until somebody deletes it.
    Reserved,
}

/// A subnet and what its holder publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The identity.
    pub subnet: Subnet,
    /// What the holder publishes.
    pub attrs: LeaseAttrs,
    /// Whether it ends by itself.
    pub tenure: Tenure,
}

/// When a lease of ours ends if it is not renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// At that instant of the monotonic clock.
    At(Instant),
    /// Never: it is a reservation.
    Never,
}

/// Which host this is, whatever its addresses: two hosts with one address, or
/// with one disk copied to the other, are told apart by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// Chosen at random once and kept on the host's disk.
    pub id: String,
    /// The kernel's, of this boot (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// The host's name, for people.
    pub name: String,
}

impl HostIdentity {
    /// Whether `other` is this very machine, and not a copy of it.
    pub fn is_same_machine(&self, other: &Self) -> bool {
        self.id == other.id && self.boot == other.boot
    }
}

impl fmt::Display for HostIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Another host has written it into the store.
        write!(f, "{} (host id {})", shown(&self.name), shown(&self.id))
    }
}

/// Our own lease, as the store gave it to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldLease {
    /// The subnet and what we publish.
    pub lease: Lease,
    /// When it ends.
    pub expiry: Expiry,
    /// What the store needs to renew it: etcd's lease id, 0 for a reservation.
    pub handle: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vxlan() -> LeaseAttrs {
        LeaseAttrs {
            public_ip: Some(Ipv4Addr::new(192, 168, 77, 1)),
            public_ipv6: None,
            backend_type: "vxlan".into(),
            backend_data: Some(BackendData::Vtep {
                vni: Some(1),
                mac: MacAddr([0x36, 0x8a, 0xca, 0x4c, 0x79, 0xec]),
            }),
            backend_v6_data: None,
        }
    }

    #[test]
    fn a_vxlan_lease_is_written_as_flannel_writes_it() {
        assert_eq!(
            vxlan().to_json(),
            r#"{"PublicIP":"192.168.77.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"36:8a:ca:4c:79:ec"}}"#
        );
    }

    #[test]
    fn a_lease_without_a_type_is_written_as_flannel_writes_it() {
        let attrs = LeaseAttrs { backend_type: "".into(), backend_data: None, ..vxlan() };

        assert_eq!(attrs.to_json(), r#"{"PublicIP":"192.168.77.1","PublicIPv6":null}"#);
    }

    #[test]
    fn an_ipv6_only_lease_publishes_the_unspecified_ipv4_address() {
        let attrs = LeaseAttrs {
            public_ip: None,
            public_ipv6: Some("fd77::1".parse().unwrap()),
            backend_data: None,
            backend_v6_data: vxlan().backend_data.map(Box::new),
            ..vxlan()
        };

        assert_eq!(
            attrs.to_json(),
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::1","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"36:8a:ca:4c:79:ec"}}"#
        );
    }

    #[test]
    fn leases_name_one_host_by_its_ipv4_address_or_by_its_ipv6_one_if_it_has_no_other() {
        let [a, b] = ["fd77::1", "fd77::2"].map(|ip| ip.parse().ok());
        let with = |public_ip: u8, public_ipv6| {
            let public_ip = (public_ip > 0).then(|| Ipv4Addr::new(192, 168, 77, public_ip));
            LeaseAttrs { public_ip, public_ipv6, ..vxlan() }
        };

        for (one, other, same) in [
            (with(1, None), with(1, a), true),
            (with(1, a), with(2, a), false),
            (with(0, a), with(0, a), true),
            (with(0, a), with(0, b), false),
            (with(0, a), with(1, a), false),
            (with(0, None), with(0, None), false),
        ] {
            assert_eq!((one.same_host(&other), other.same_host(&one)), (same, same), "{one:?} {other:?}");
        }
    }

    #[test]
    fn data_that_says_more_or_other_than_a_tunnel_end_is_kept_as_it_stands() {
        for data in [
            r#"{"VNI":1,"VtepMAC":"36:8a:ca:4c:79:ec","New":1}"#,
            r#"{"VNI":1,"VtepMAC":"36:8a"}"#,
            r#"{"VNI":-1,"VtepMAC":"36:8a:ca:4c:79:ec"}"#,
            r#"{"VNI":1}"#,
            "[1]",
        ] {
            let attrs = LeaseAttrs::from_json(&format!(r#"{{"BackendData":{data}}}"#)).unwrap();

            assert_eq!(attrs.backend_data, Some(BackendData::Json(RawJson(data.into()))), "{data}");
        }
    }

    #[test]
    fn of_what_is_longer_than_any_backend_s_words_nothing_is_kept() {
        let long = "x".repeat(MOST_DATA);
        let attrs = LeaseAttrs::from_json(&format!(
            r#"{{"PublicIP":"192.168.77.1","BackendType":"{long}","BackendData":"{long}","BackendV6Data":["{long}"]}}"#
        ))
        .unwrap();

        assert_eq!(attrs.public_ip, vxlan().public_ip);
        assert!(attrs.backend_type.len() <= MOST_TYPE, "{}", attrs.backend_type);
        assert_eq!(attrs.backend_data, Some(BackendData::TooLong(MOST_DATA + 2)));
        assert_eq!(attrs.backend_v6_data.as_deref(), Some(&BackendData::TooLong(MOST_DATA + 4)));
        assert!(
            attrs.to_json().ends_with(r#""BackendData":null,"BackendV6Data":null}"#),
            "{}",
            attrs.to_json()
        );
    }

    #[test]
    fn words_of_another_host_stay_on_one_line() {
        let host = HostIdentity { id: "0".repeat(1000), boot: "b".into(), name: "web-1\n\u{1b}[2J".into() };

        let words = host.to_string();

        assert!(words.starts_with(r"web-1\n\u{1b}[2J (host id 000"), "{words}");
        assert!(words.len() < 120, "{words}");
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        assert_eq!(LeaseAttrs::from_json(&vxlan().to_json()).unwrap(), vxlan());
    }

    #[test]
    fn a_value_of_2018_reads_without_the_members_it_did_not_have() {
        let attrs = LeaseAttrs::from_json(
            r#"{"PublicIP":"192.168.77.1","BackendType":"vxlan","BackendData":{"VtepMAC":"36:8a:ca:4c:79:ec"}}"#,
        )
        .unwrap();

        assert_eq!(attrs.public_ip, vxlan().public_ip);
        assert_eq!(attrs.public_ipv6, None);
        assert!(matches!(attrs.backend_data, Some(BackendData::Vtep { vni: None, .. })));
    }

    #[test]
    fn keys_are_read_in_any_case_and_unknown_ones_passed_over() {
        let attrs =
            LeaseAttrs::from_json(r#"{"publicip":"10.0.0.1","backendtype":"host-gw","New":[1]}"#).unwrap();

        assert_eq!(attrs.backend_type, "host-gw");
    }

    #[test]
    fn markup_in_a_string_is_escaped_as_go_escapes_it() {
        let attrs = LeaseAttrs { backend_data: Some(BackendData::Json(RawJson::of(&"<a&b>"))), ..vxlan() };

        assert!(attrs.to_json().ends_with(r#""BackendData":"\u003ca\u0026b\u003e"}"#), "{}", attrs.to_json());
    }

    #[test]
    fn an_ipv6_public_ip_is_refused_by_name() {
        let error = LeaseAttrs::from_json(r#"{"PublicIP":"fd00::1"}"#).unwrap_err();

        assert_eq!(error.to_string(), r#"PublicIP is "fd00::1": must be an IPv4 address"#);
    }
}
