//! Rules that a Go flanneld up to 0.19 left, right in the built-in chains.
//!
//! Since 0.17 they carry flannel's comment; before, only their shape tells. Each
//! names exactly our network, and a rule of any other shape is somebody else's:
//!
//! ```text
//!   POSTROUTING   -s C -d C -j RETURN
//!                 -s C ! -d 224.0.0.0/4 -j MASQUERADE [--random-fully]      nobody else writes this one
//!                 ! -s C -d P -j RETURN                                     P: a subnet of C
//!                 ! -s C -d C -j MASQUERADE [--random-fully]
//!   FORWARD       -s C -j ACCEPT
//!                 -d C -j ACCEPT
//! ```
//!
//! An operator may have written some of these by hand. So without the comment
//! they go only if the one that nobody else writes stands among them, and those
//! in FORWARD only if ours take their place.

use ipnetwork::IpNetwork;

use super::after;
use crate::claim::within;
use crate::firewall::{Chain, Purpose, Ruleset, multicast};

/// Those among the lines of the built-in chain.
pub(super) fn left_in<'a>(rules: &Ruleset, chain: &Chain, parent: &'a [String]) -> Vec<&'a String> {
    let networks = [rules.network].into_iter().chain(rules.former.iter().copied());
    let shapes: Vec<Shape> = networks.map(|network| Shape { purpose: chain.purpose, network }).collect();
    let bare =
        |line: &str| line.replace(&format!(" -m comment --comment \"{}\"", chain.purpose.comment()), "");
    let of = |line: &String, found: fn(&Shape, &str) -> bool| {
        let bare = bare(line);
        shapes.iter().find(|shape| found(shape, bare.trim_end_matches(" --random-fully"))).copied()
    };
    let signed = |shape: &Shape| {
        parent
            .iter()
            .any(|line| of(line, Shape::is_signature).is_some_and(|other| other.network == shape.network))
    };
    let is_left = |line: &&String| {
        let Some(shape) = of(line, Shape::fits) else { return false };
        let commented = bare(line) != **line;
        commented
            || match chain.purpose {
                Purpose::Masquerade => signed(&shape),
                Purpose::Forward => !chain.rules.is_empty(),
                Purpose::Admit => false,
            }
    };
    parent.iter().filter(is_left).collect()
}

#[derive(Clone, Copy)]
struct Shape {
    purpose: Purpose,
    network: IpNetwork,
}

impl Shape {
    /// Whether a rule, less what varies, is one of these.
    fn fits(&self, bare: &str) -> bool {
        let Self { purpose, network } = self;
        match purpose {
            Purpose::Admit => false,
            Purpose::Forward => {
                ["-s", "-d"].iter().any(|side| bare == format!("-A FORWARD {side} {network} -j ACCEPT"))
            }
            Purpose::Masquerade => {
                let subnet = after(bare, &["-d"]).and_then(|subnet| subnet.parse().ok());
                let subnet = subnet.filter(|subnet| within(*network, *subnet));
                self.is_signature(bare)
                    || bare == format!("-A POSTROUTING -s {network} -d {network} -j RETURN")
                    || bare == format!("-A POSTROUTING ! -s {network} -d {network} -j MASQUERADE")
                    || subnet.is_some_and(|subnet| {
                        bare == format!("-A POSTROUTING ! -s {network} -d {subnet} -j RETURN")
                    })
            }
        }
    }

    /// Whether it is the one that nobody else writes.
    fn is_signature(&self, bare: &str) -> bool {
        let Self { network, .. } = self;
        bare == format!("-A POSTROUTING -s {network} ! -d {} -j MASQUERADE", multicast(*network))
    }
}
