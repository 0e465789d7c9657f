//! What the kernel of a host holds and tells, in words that can be compared.
//!
//! ```text
//!   route 10.5.2.0/24 10.5.2.0 flannel.1
//!   neighbour 10.5.2.0 0e:…:02
//!   entry 0e:…:02 192.168.77.2
//! ```

use std::collections::BTreeSet;

use flannel_tests::lab::{Host, output};
use serde_json::Value;

use crate::peers::{Lease, NETWORK_START};

/// The device of the backend.
pub(crate) const DEVICE: &str = "flannel.1";

/// The protocol number of our routes, with or without a name for it.
const PROTOCOLS: [&str; 2] = ["76", "flannel"];

/// Objects in the words above.
pub(crate) type Objects = BTreeSet<String>;

/// What a kernel should hold for others' leases.
pub(crate) fn wanted<'a>(leases: impl IntoIterator<Item = &'a Lease>, own: &str) -> Objects {
    // A lease without a MAC is of a backend that has nothing in the kernel.
    let others = leases.into_iter().filter(|lease| lease.address != own && !lease.mac.is_empty());
    others.flat_map(Lease::objects).collect()
}

/// What it does hold.
pub(crate) fn held(host: &Host) -> Objects {
    let namespace = host.namespace.as_str();
    let routes = json(&["ip", "-n", namespace, "-j", "-4", "route", "show"]);
    let neighbours = json(&["ip", "-n", namespace, "-j", "neigh", "show", "dev", DEVICE, "nud", "permanent"]);
    let entries = json(&["bridge", "-n", namespace, "-j", "fdb", "show", "dev", DEVICE]);
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let routes =
        routes.iter().filter(|route| PROTOCOLS.contains(&text(route, "protocol").as_str())).map(|route| {
            format!("route {} {} {}", text(route, "dst"), text(route, "gateway"), text(route, "dev"))
        });
    let neighbours = neighbours
        .iter()
        .map(|neighbour| format!("neighbour {} {}", text(neighbour, "dst"), text(neighbour, "lladdr")));
    let entries = entries
        .iter()
        .filter(|entry| entry["dst"].is_string())
        .map(|entry| format!("entry {} {}", text(entry, "mac"), text(entry, "dst")));
    routes.chain(neighbours).chain(entries).collect()
}

/// What is missing and what is too much, in words; `None` if nothing is.
pub(crate) fn difference(wanted: &Objects, held: &Objects) -> Option<String> {
    let missing: Vec<_> = wanted.difference(held).collect();
    let extra: Vec<_> = held.difference(wanted).collect();
    if missing.is_empty() && extra.is_empty() {
        return None;
    }
    let first = |objects: &[&String]| objects.first().map(|object| object.to_string()).unwrap_or_default();
    Some(format!(
        "{} missing [{}], {} too many [{}]",
        missing.len(),
        first(&missing),
        extra.len(),
        first(&extra)
    ))
}

/// A list as `ip` and `bridge` print it; empty if the device is not there.
fn json(words: &[&str]) -> Vec<Value> {
    serde_json::from_slice(&output(words).stdout).unwrap_or_default()
}

/// What the kernel has told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// An object of the backend came or was changed.
    Came(Object),
    Went(Object),
    /// The device of the backend is gone or down, and with it all that is on it.
    DeviceGone,
}

/// An object of the backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Object {
    Route { subnet: String, text: String },
    Neighbour { address: String, mac: String },
    Entry { mac: String, to: String },
}

impl Object {
    /// In the words of [`Objects`].
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Route { text, .. } => text.clone(),
            Self::Neighbour { address, mac } => format!("neighbour {address} {mac}"),
            Self::Entry { mac, to } => format!("entry {mac} {to}"),
        }
    }
}

/// What a line of `ip monitor` or, after `fdb `, of `bridge monitor` says about the backend's objects.
pub(crate) fn heard(line: &str) -> Option<Heard> {
    let (line, is_entry) = match line.strip_prefix("fdb ") {
        Some(rest) => (rest, true),
        None => (line, false),
    };
    let (line, went) = match line.strip_prefix("Deleted ") {
        Some(rest) => (rest, true),
        None => (line, false),
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    let first = words.first()?;
    let after = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1).map(|word| (*word).to_owned())
    };
    if first.ends_with(':') {
        let is_device = words.get(1).is_some_and(|name| name.trim_end_matches(':') == DEVICE);
        // An address of the device has a colon after the index too.
        let is_link = is_device && words.get(2).is_some_and(|flags| flags.starts_with('<'));
        let is_down = is_link && !words[2].contains("UP");
        return (is_link && (went || is_down)).then_some(Heard::DeviceGone);
    }
    let object = if is_entry {
        Object::Entry { mac: (*first).to_owned(), to: after("dst")? }
    } else if let (Some(gateway), Some(protocol)) = (after("via"), after("proto")) {
        if !PROTOCOLS.contains(&protocol.as_str()) {
            return None;
        }
        let text = format!("route {first} {gateway} {}", after("dev").unwrap_or_default());
        Object::Route { subnet: (*first).to_owned(), text }
    } else if after("dev").as_deref() == Some(DEVICE) && first.starts_with(NETWORK_START) {
        // A neighbour on its way out is told as failed, without its MAC.
        let is_permanent = words.contains(&"PERMANENT");
        match (went, is_permanent) {
            (false, false) => return None,
            _ => Object::Neighbour { address: (*first).to_owned(), mac: after("lladdr").unwrap_or_default() },
        }
    } else {
        return None;
    };
    Some(if went { Heard::Went(object) } else { Heard::Came(object) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_ip_and_bridge_monitor_are_understood() {
        let route = "10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 76 onlink ";
        let text = "route 10.5.2.0/24 10.5.2.0 flannel.1".to_owned();
        let object = Object::Route { subnet: "10.5.2.0/24".into(), text };
        assert_eq!(heard(route), Some(Heard::Came(object.clone())));
        assert_eq!(heard(&format!("Deleted {route}")), Some(Heard::Went(object)));

        let neighbour = "10.5.2.0 dev flannel.1 lladdr 0e:00:00:00:00:02 PERMANENT ";
        let object = Object::Neighbour { address: "10.5.2.0".into(), mac: "0e:00:00:00:00:02".into() };
        assert_eq!(heard(neighbour), Some(Heard::Came(object)));
        assert_eq!(heard("10.5.2.0 dev flannel.1 FAILED "), None);
        let object = Object::Neighbour { address: "10.5.2.0".into(), mac: String::new() };
        assert_eq!(heard("Deleted 10.5.2.0 dev flannel.1 FAILED "), Some(Heard::Went(object)));

        let entry = "fdb Deleted 0e:00:00:00:00:02 dev flannel.1 dst 192.168.1.2 self permanent";
        let object = Object::Entry { mac: "0e:00:00:00:00:02".into(), to: "192.168.1.2".into() };
        assert_eq!(heard(entry), Some(Heard::Went(object)));

        let gone = "Deleted 5: flannel.1: <BROADCAST,MULTICAST> mtu 1450 qdisc noop state DOWN group default";
        assert_eq!(heard(gone), Some(Heard::DeviceGone));
        assert_eq!(heard("5: flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450"), None);
        assert_eq!(heard("Deleted 5: flannel.1    inet 10.5.1.0/32 scope global flannel.1"), None);
    }
}
