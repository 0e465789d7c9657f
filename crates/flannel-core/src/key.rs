//! The name of a lease in the store: `10.5.52.0-24`, both ways.
//!
//! With two families it is `10.5.47.0-24&fd05:0:0:2f::-64`; an IPv6-only lease
//! puts `0.0.0.0-0` in front of the `&` (`pkg/subnet/subnet.go`, `MakeSubnetKey`
//! and `ParseSubnetKey`). Go reads a little more than it writes (any text in
//! front of the address); we read exactly what it writes, so that no two names
//! can mean one subnet.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};

use crate::lease::Subnet;

/// The last part of the key of `subnet`'s lease.
pub fn subnet_key(subnet: &Subnet) -> String {
    let v4 = subnet.v4().map_or_else(|| "0.0.0.0-0".into(), |v4| format!("{}-{}", v4.ip(), v4.prefix()));
    match subnet.v6() {
        None => v4,
        Some(v6) => format!("{v4}&{}-{}", v6.ip(), v6.prefix()),
    }
}

/// Reads the last part of a lease's key; `None` if it is not the name of a subnet.
pub fn parse_subnet_key(key: &str) -> Option<Subnet> {
    let (v4, v6) = match key.split_once('&') {
        Some((v4, v6)) => (v4, Some(v6)),
        None => (key, None),
    };
    let (address, prefix) = split_prefix(v4, 31)?;
    let v4 = Ipv4Network::new(address.parse::<Ipv4Addr>().ok()?, prefix).ok()?;
    let v6 = match v6 {
        None => None,
        Some(v6) => {
            let (address, prefix) = split_prefix(v6, 127)?;
            Some(Ipv6Network::new(address.parse::<Ipv6Addr>().ok()?, prefix).ok()?)
        }
    };
    let subnet = match v6 {
        None => Subnet::V4(v4),
        Some(v6) if v4.prefix() == 0 => Subnet::V6(v6),
        Some(v6) => Subnet::Dual(v4, v6),
    };
    // One subnet, one name: what we would not write ourselves is not a name.
    (subnet_key(&subnet) == key).then_some(subnet)
}

fn split_prefix(text: &str, longest: u8) -> Option<(&str, u8)> {
    let (address, prefix) = text.rsplit_once('-')?;
    let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix = prefix.parse().ok().filter(|prefix| digits && *prefix <= longest)?;
    Some((address, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_key_reads_and_writes_back() {
        let subnet = parse_subnet_key("10.12.13.0-24").unwrap();

        assert_eq!(subnet, Subnet::V4("10.12.13.0/24".parse().unwrap()));
        assert_eq!(subnet_key(&subnet), "10.12.13.0-24");
    }

    #[test]
    fn a_dual_key_reads_and_writes_back() {
        let key = "10.5.47.0-24&fd05:0:0:2f::-64";

        let subnet = parse_subnet_key(key).unwrap();

        assert_eq!(subnet.v6(), Some("fd05:0:0:2f::/64".parse().unwrap()));
        assert_eq!(subnet_key(&subnet), key);
    }

    #[test]
    fn an_ipv6_only_key_has_the_zero_prefix_in_front() {
        let key = "0.0.0.0-0&fd05:0:0:2f::-64";

        let subnet = parse_subnet_key(key).unwrap();

        assert_eq!(subnet, Subnet::V6("fd05:0:0:2f::/64".parse().unwrap()));
        assert_eq!(subnet_key(&subnet), key);
    }

    #[test]
    fn host_bits_are_kept() {
        let subnet = parse_subnet_key("10.5.1.7-24").unwrap();

        assert_eq!(subnet.v4().unwrap().ip(), Ipv4Addr::new(10, 5, 1, 7));
    }

    #[test]
    fn what_is_not_a_subnet_is_refused() {
        for key in [
            "",
            "10",
            "10.5.1.0",
            "10.5.1-24",
            "10.5.300.0-24",
            "10.5.01.0-24",
            "10.5.1.0-32",
            "10.5.1.0-024",
            "10.5.1.0-+24",
            "10.5.1.0-24x",
            "pre10.5.1.0-24",
            "10.5.1.0-24&",
            "10.5.1.0-24&fd00::",
            "&fd00::-64",
            "10.5.1.0-24&fd00::-128",
            "10.5.1.0-24&FD00::-64",
            "10.5.1.0-24&fd00:0::-64",
            "10.5.1.0-24&zz::-64",
            "10.5.1.0-24&fd00::-64&fd00::-64",
            "junk",
        ] {
            assert_eq!(parse_subnet_key(key), None, "{key}");
        }
    }
}
