//! The environment file that dockerd's start reads, both ways.
//!
//! Written byte for byte as flannel does (`pkg/subnet/subnet.go`,
//! `WriteSubnetFile`); read back kindly, because somebody may have edited it,
//! and because all it is read for is which subnet to ask for again.

use std::fmt;
use std::str::FromStr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::lease::Subnet;
use crate::network::first_host;

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The cluster's networks.
    pub networks: Vec<IpNetwork>,
    /// This host's subnet; the file names its first host address.
    pub subnet: Subnet,
    /// In bytes.
    pub mtu: u32,
    /// Whether flanneld masquerades; if so, dockerd must not.
    pub masquerade: bool,
}

impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for subnet in self.subnet.networks() {
            let family = if subnet.is_ipv4() { "" } else { "IPV6_" };
            if let Some(network) = self.networks.iter().find(|network| network.is_ipv4() == subnet.is_ipv4())
            {
                writeln!(f, "FLANNEL_{family}NETWORK={network}")?;
            }
            writeln!(f, "FLANNEL_{family}SUBNET={}", first_host(subnet))?;
        }
        writeln!(f, "FLANNEL_MTU={}", self.mtu)?;
        writeln!(f, "FLANNEL_IPMASQ={}", self.masquerade)
    }
}

/// What a file of an earlier run tells: nothing in it is required.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FormerEnv {
    /// The networks it names.
    pub networks: Vec<IpNetwork>,
    /// The subnet it names, host bits cleared.
    pub subnet: Option<Subnet>,
    /// What could not be read, one phrase each, with its line.
    pub flaws: Vec<String>,
}

impl FromStr for FormerEnv {
    type Err = std::convert::Infallible;

    /// Reads dotenv lines: comments, `export`, quotes. The last of several
    /// equal keys counts, as in a shell. A last line without its end is not
    /// believed: cut off, `10.5.0.0/16` becomes half the world.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut former = Self::default();
        let (mut v4, mut v6) = (None::<Ipv4Network>, None::<Ipv6Network>);
        for (number, whole) in text.split_inclusive('\n').enumerate() {
            let line = whole.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if !whole.ends_with('\n') {
                former.flaws.push(format!("line {}: it has no end", number + 1));
                continue;
            }
            let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
            let Some((key, value)) = line.split_once('=') else {
                former.flaws.push(format!("line {}: no `=`", number + 1));
                continue;
            };
            let (key, value) = (key.trim_end(), unquote(value.trim()));
            let mut flaw =
                |allowed: &str| former.flaws.push(format!("line {}: {key} must be {allowed}", number + 1));
            match key {
                "FLANNEL_NETWORK" | "FLANNEL_IPV6_NETWORK" => match networks(value) {
                    Some(networks) => former.networks.extend(networks),
                    None => flaw("prefixes, separated by commas"),
                },
                "FLANNEL_SUBNET" => match networks(value).as_deref() {
                    Some([IpNetwork::V4(only)]) => v4 = Some(*only),
                    _ => flaw("one IPv4 prefix"),
                },
                "FLANNEL_IPV6_SUBNET" => match networks(value).as_deref() {
                    Some([IpNetwork::V6(only)]) => v6 = Some(*only),
                    _ => flaw("one IPv6 prefix"),
                },
                _ => {}
            }
        }
        former.subnet = match (v4, v6) {
            (Some(v4), Some(v6)) => Some(Subnet::Dual(v4, v6)),
            (Some(v4), None) => Some(Subnet::V4(v4)),
            (None, Some(v6)) => Some(Subnet::V6(v6)),
            (None, None) => None,
        };
        Ok(former)
    }
}

fn unquote(value: &str) -> &str {
    let inner = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).unwrap_or(value)
}

/// Comma-separated prefixes, host bits cleared; `None` unless all are prefixes.
fn networks(value: &str) -> Option<Vec<IpNetwork>> {
    let one = |text: &str| {
        let network: IpNetwork = text.trim().parse().ok().filter(|_| text.contains('/'))?;
        IpNetwork::new(network.network(), network.prefix()).ok()
    };
    value.split(',').map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_file_is_four_lines() {
        let env = SubnetEnv {
            networks: vec!["10.5.0.0/16".parse().unwrap()],
            subnet: Subnet::V4("10.5.86.0/24".parse().unwrap()),
            mtu: 1450,
            masquerade: true,
        };

        assert_eq!(
            env.to_string(),
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.86.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn a_dual_stack_file_is_six_lines() {
        let env = SubnetEnv {
            networks: vec!["10.5.0.0/16".parse().unwrap(), "fd05::/48".parse().unwrap()],
            subnet: Subnet::Dual("10.5.97.0/24".parse().unwrap(), "fd05:0:0:3d::/64".parse().unwrap()),
            mtu: 1450,
            masquerade: false,
        };

        assert_eq!(
            env.to_string(),
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.97.1/24\nFLANNEL_IPV6_NETWORK=fd05::/48\n\
             FLANNEL_IPV6_SUBNET=fd05:0:0:3d::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        );
    }

    #[test]
    fn what_was_written_tells_the_subnet_again() {
        let former: FormerEnv =
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.86.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
                .parse()
                .unwrap();

        assert_eq!(former.subnet, Some(Subnet::V4("10.5.86.0/24".parse().unwrap())));
        assert_eq!(former.networks, ["10.5.0.0/16".parse().unwrap()]);
        assert_eq!(former.flaws, [""; 0]);
    }

    #[test]
    fn export_comments_and_quotes_are_read() {
        let former: FormerEnv =
            "# mine\n\nexport FLANNEL_SUBNET='10.5.60.129/24'\nOTHER=x\n".parse().unwrap();

        assert_eq!(former.subnet, Some(Subnet::V4("10.5.60.0/24".parse().unwrap())));
    }

    #[test]
    fn a_damaged_file_costs_only_what_is_damaged() {
        let former: FormerEnv =
            "FLANNEL_SUBNET=10.5.60.1/24\nFLANNEL_NETWORK=10.5.0\nhalf a li\n".parse().unwrap();

        assert_eq!(former.subnet, Some(Subnet::V4("10.5.60.0/24".parse().unwrap())));
        assert_eq!(
            former.flaws,
            ["line 2: FLANNEL_NETWORK must be prefixes, separated by commas", "line 3: no `=`"]
        );
    }

    #[test]
    fn a_flaw_is_told_in_one_line() {
        let former: FormerEnv = "FLANNEL_SUBNET\r\u{b}=x\n".parse().unwrap();

        assert_eq!(former.flaws, ["line 1: FLANNEL_SUBNET must be one IPv4 prefix"]);
    }

    #[test]
    fn a_line_that_was_cut_off_is_not_believed() {
        let text = "FLANNEL_SUBNET=10.5.60.1/24\nFLANNEL_NETWORK=10.5.0.0/16\n";
        let whole: FormerEnv = text.parse().unwrap();

        for end in 0..text.len() {
            let former: FormerEnv = text[..end].parse().unwrap();

            assert!(former.networks.is_empty(), "{}", &text[..end]);
            assert!(former.subnet.is_none() || former.subnet == whole.subnet, "{}", &text[..end]);
        }
        assert_eq!(whole.networks.len(), 1);
    }

    #[test]
    fn a_prefix_of_the_wrong_family_or_several_are_no_subnet() {
        for value in ["fd00::1/64", "10.5.1.1/24,10.5.2.1/24", "10.5.1.1", ""] {
            let former: FormerEnv = format!("FLANNEL_SUBNET={value}\n").parse().unwrap();

            assert_eq!((former.subnet, former.flaws.len()), (None, 1), "{value}");
        }
    }
}
