//! What a host remembers of the cluster, for a start while the store is away.
//!
//! A text that a person can read, one lease per line, with a checksum over all
//! of it: what a power cut or a wrong hand has left is recognised and not
//! believed.
//!
//! ```text
//!   flannel-rs-state 1 9b1c4e0f3a7d2265
//!   {"Prefix":"/coreos.com/network","Config":"{…}","Subnet":"10.5.1.0-24", …}
//!   10.5.1.0-24 {"PublicIP":"192.168.0.1", …}
//!   10.5.2.0-24 {"PublicIP":"192.168.0.2", …}
//! ```
//!
//! Times are seconds of the wall clock, the only one that outlives a reboot. So
//! a clock that is behind the moment of writing says nothing about the lease.

use std::fmt::{self, Write};
use std::str::FromStr;

use serde::ser::{Serialize, SerializeStruct, Serializer};
use thiserror::Error;

use crate::json::Object;
use crate::key::{parse_subnet_key, subnet_key};
use crate::lease::{Lease, LeaseAttrs, Subnet, Tenure};

/// The first word of the file.
const MAGIC: &str = "flannel-rs-state";

/// What this version writes and reads.
const VERSION: &str = "1";

/// What a host remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Of all keys of the cluster: two clusters are not to be taken for each other.
    pub prefix: String,
    /// The network config, as it stood in the store.
    pub config: String,
    /// Our own lease.
    pub own: Lease,
    /// What the store needs to renew it.
    pub handle: i64,
    /// When this was written, in seconds since 1970.
    pub written: u64,
    /// When our lease ends, in seconds since 1970; `None` for a reservation.
    pub expires: Option<u64>,
    /// Everybody else's leases, in the order of subnets; each as if it ended one day.
    pub peers: Vec<Lease>,
}

/// Why a text is nothing to remember by.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Forgotten {
    /// Something else altogether.
    #[error("it is not a state file of flannel-rs")]
    Foreign,
    /// Written by another version.
    #[error("it has version {found}: this program reads version {VERSION}")]
    Version {
        /// What its first line says.
        found: String,
    },
    /// Cut short, or changed by hand.
    #[error("its checksum is wrong: it is not whole, or was changed by hand")]
    Broken,
    /// Whole, and yet not what this program writes.
    #[error("line {line}: {reason}")]
    Unreadable {
        /// From 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why a memory is of no use now, as a phrase.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Stale {
    /// Our lease has ended; the subnet may be somebody else's.
    #[error("our lease on {subnet} has run out")]
    Expired {
        /// The subnet.
        subnet: Subnet,
    },
    /// How old it is cannot be told.
    #[error("the clock is {seconds} s behind the moment it was written at")]
    Clock {
        /// How far.
        seconds: u64,
    },
}

impl Memory {
    /// How long our lease lasts yet, in seconds, when the clock says `now`, in
    /// seconds since 1970; `None` for ever.
    ///
    /// # Errors
    /// It has ended, or that cannot be told.
    pub fn left(&self, now: u64) -> Result<Option<u64>, Stale> {
        let Some(expires) = self.expires else { return Ok(None) };
        if now < self.written {
            return Err(Stale::Clock { seconds: self.written - now });
        }
        let left = expires.saturating_sub(now);
        if left == 0 { Err(Stale::Expired { subnet: self.own.subnet }) } else { Ok(Some(left)) }
    }

    fn body(&self) -> String {
        let mut body = serde_json::to_string(&Head(self)).expect("texts and numbers serialise");
        body.push('\n');
        for Lease { subnet, attrs, .. } in std::iter::once(&self.own).chain(&self.peers) {
            // Within JSON a line break is space, and never part of a string.
            let value = attrs.to_json().replace(['\n', '\r'], " ");
            writeln!(body, "{} {value}", subnet_key(subnet)).expect("a text takes what is written to it");
        }
        body
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = self.body();
        write!(f, "{MAGIC} {VERSION} {:016x}\n{body}", checksum(&body))
    }
}

impl FromStr for Memory {
    type Err = Forgotten;

    fn from_str(text: &str) -> Result<Self, Forgotten> {
        let (first, body) = text.split_once('\n').unwrap_or((text, ""));
        let rest =
            first.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix(' ')).ok_or(Forgotten::Foreign)?;
        let (version, sum) = rest.split_once(' ').unwrap_or((rest, ""));
        if version != VERSION {
            let short = |text: &str| text.escape_default().take(20).collect();
            return Err(Forgotten::Version { found: short(version) });
        }
        if sum != format!("{:016x}", checksum(body)) {
            return Err(Forgotten::Broken);
        }
        let mut lines = body.lines().enumerate().map(|(number, line)| (number + 2, line));
        let mut memory = match lines.next() {
            Some((line, head)) => read_head(head).map_err(|reason| Forgotten::Unreadable { line, reason })?,
            None => return Err(Forgotten::Broken),
        };
        let mut own = None;
        for (line, text) in lines {
            let lease = read_lease(text).map_err(|reason| Forgotten::Unreadable { line, reason })?;
            if lease.subnet == memory.own.subnet {
                own = Some(lease.attrs);
            } else {
                memory.peers.push(lease);
            }
        }
        let missing =
            || Forgotten::Unreadable { line: 2, reason: "the lease on its Subnet does not follow".into() };
        memory.own.attrs = own.ok_or_else(missing)?;
        Ok(memory)
    }
}

/// The second line.
struct Head<'a>(&'a Memory);

impl Serialize for Head<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(memory) = self;
        let mut head = serializer.serialize_struct("Head", 6)?;
        head.serialize_field("Prefix", &memory.prefix)?;
        head.serialize_field("Config", &memory.config)?;
        head.serialize_field("Subnet", &subnet_key(&memory.own.subnet))?;
        // As text: 63 bits are more than every reader of JSON numbers keeps.
        head.serialize_field("Handle", &memory.handle.to_string())?;
        head.serialize_field("Written", &memory.written.to_string())?;
        head.serialize_field("Expires", &memory.expires.map(|expires| expires.to_string()))?;
        head.end()
    }
}

/// All but the leases.
fn read_head(line: &str) -> Result<Memory, String> {
    let head = Object::parse("", line).map_err(|error| error.to_string())?;
    let text = |key: &str| {
        let text = head.text(key).map_err(|error| error.to_string())?;
        text.ok_or_else(|| format!("{key} is missing"))
    };
    let whole = "a whole number of seconds";
    let seconds = |key: &str| head.parsed::<u64>(key, whole).map_err(|error| error.to_string());
    let key = text("Subnet")?;
    let subnet = parse_subnet_key(&key).ok_or("Subnet is not the key of a subnet")?;
    let expires = seconds("Expires")?;
    let handle = head.parsed("Handle", "a whole number").map_err(|error| error.to_string())?;
    let nobody = LeaseAttrs {
        public_ip: None,
        public_ipv6: None,
        backend_type: "".into(),
        backend_data: None,
        backend_v6_data: None,
    };
    Ok(Memory {
        prefix: text("Prefix")?,
        config: text("Config")?,
        own: Lease {
            subnet,
            attrs: nobody,
            tenure: if expires.is_some() { Tenure::Leased } else { Tenure::Reserved },
        },
        handle: handle.ok_or("Handle is missing")?,
        written: seconds("Written")?.ok_or("Written is missing")?,
        expires,
        peers: vec![],
    })
}

fn read_lease(line: &str) -> Result<Lease, String> {
    let (key, value) = line.split_once(' ').ok_or("it is not a key and a value")?;
    let subnet = parse_subnet_key(key).ok_or("it does not begin with the key of a subnet")?;
    let attrs = LeaseAttrs::from_json(value).map_err(|error| error.to_string())?;
    Ok(Lease { subnet, attrs, tenure: Tenure::Leased })
}

/// FNV-1a with 64 bits (draft-eastlake-fnv): one byte that is another one always shows.
fn checksum(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(number: u8) -> Lease {
        Lease {
            subnet: Subnet::V4(format!("10.5.{number}.0/24").parse().unwrap()),
            attrs: LeaseAttrs::from_json(&format!(
                r#"{{"PublicIP":"192.168.0.{number}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:0{number}"}}}}"#
            ))
            .unwrap(),
            tenure: Tenure::Leased,
        }
    }

    fn memory() -> Memory {
        Memory {
            prefix: "/coreos.com/network".into(),
            config: "{\"Network\":\"10.5.0.0/16\",\n\"Backend\":{\"Type\":\"vxlan\"}}".into(),
            own: lease(1),
            handle: i64::MAX,
            written: 1_000,
            expires: Some(87_400),
            peers: vec![lease(2), lease(3)],
        }
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        let reserved = Memory {
            own: Lease { tenure: Tenure::Reserved, ..lease(1) },
            expires: None,
            peers: vec![],
            ..memory()
        };

        for memory in [memory(), reserved] {
            assert_eq!(memory.to_string().parse(), Ok(memory));
        }
    }

    #[test]
    fn a_person_can_read_it() {
        let text = memory().to_string();

        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("flannel-rs-state 1 "), "{text}");
        assert_eq!(
            lines[3],
            r#"10.5.2.0-24 {"PublicIP":"192.168.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}}"#
        );
        assert_eq!(lines.len(), 5);
    }

    #[test]
    fn a_text_that_was_cut_or_changed_at_any_byte_is_not_believed() {
        let text = memory().to_string();

        for place in 0..text.len() {
            assert!(text[..place].parse::<Memory>().is_err(), "cut at {place}");
            let mut bytes = text.clone().into_bytes();
            bytes[place] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert!(changed.parse::<Memory>().is_err(), "changed at {place}");
        }
    }

    #[test]
    fn what_is_something_else_or_of_another_version_is_said_to_be() {
        for foreign in ["", "\n", "FLANNEL_MTU=1450\n", "flannel-rs-stately 1 0\n"] {
            assert_eq!(foreign.parse::<Memory>(), Err(Forgotten::Foreign), "{foreign:?}");
        }
        let newer = memory().to_string().replacen(" 1 ", " 2 ", 1).parse::<Memory>();
        assert_eq!(newer, Err(Forgotten::Version { found: "2".into() }));
    }

    #[test]
    fn a_whole_text_that_says_nonsense_is_refused_with_its_line() {
        let body = memory().body().replace("10.5.3.0-24 {", "10.5.3.0-24 [");
        let text = format!("{MAGIC} {VERSION} {:016x}\n{body}", checksum(&body));

        let error = text.parse::<Memory>().unwrap_err();

        assert!(error.to_string().starts_with("line 5: the value is"), "{error}");
    }

    #[test]
    fn a_lease_is_good_until_it_ends_and_only_by_a_clock_that_went_on() {
        let expired = Stale::Expired { subnet: lease(1).subnet };

        assert_eq!(memory().left(1_000), Ok(Some(86_400)));
        assert_eq!(memory().left(87_399), Ok(Some(1)));
        assert_eq!(memory().left(87_400), Err(expired));
        assert_eq!(memory().left(999), Err(Stale::Clock { seconds: 1 }));
        assert_eq!(Memory { expires: None, ..memory() }.left(0), Ok(None));
    }
}
