use super::*;

fn v4(text: &str) -> Pool {
    NetworkConfig::parse(text).unwrap().v4.unwrap()
}

fn refusal(text: &str) -> String {
    NetworkConfig::parse(text).and_then(NetworkConfig::supported).unwrap_err().to_string()
}

fn described(pool: Pool) -> (u8, String, String, u128) {
    (pool.subnet_len, pool.min.to_string(), pool.max.to_string(), pool.capacity())
}

#[test]
fn ipv4_defaults_are_those_of_flannel() {
    for (config, len, min, max, subnets) in [
        (r#"{"Network":"10.5.0.0/16"}"#, 24, "10.5.1.0", "10.5.255.0", 255),
        (r#"{"Network":"10.0.0.0/8"}"#, 24, "10.0.1.0", "10.255.255.0", 65535),
        (r#"{"Network":"10.0.0.0/8","SubnetLen":20}"#, 20, "10.0.16.0", "10.255.240.0", 4095),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":18}"#, 18, "10.3.64.0", "10.3.192.0", 3),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":28}"#, 28, "10.3.0.16", "10.3.255.240", 4095),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":30}"#, 30, "10.3.0.4", "10.3.255.252", 16383),
        (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.0.0"}"#, 24, "10.3.0.0", "10.3.255.0", 256),
        (r#"{"Network":"10.3.0.0/22"}"#, 24, "10.3.1.0", "10.3.3.0", 3),
        (r#"{"Network":"10.3.0.0/23"}"#, 25, "10.3.0.128", "10.3.1.128", 3),
        (r#"{"Network":"10.3.0.0/24"}"#, 26, "10.3.0.64", "10.3.0.192", 3),
        (r#"{"Network":"10.3.0.0/28"}"#, 30, "10.3.0.4", "10.3.0.12", 3),
        (r#"{"Network":"255.255.0.0/16"}"#, 24, "255.255.1.0", "255.255.255.0", 255),
    ] {
        assert_eq!(described(v4(config)), (len, min.into(), max.into(), subnets), "{config}");
    }
}

#[test]
fn ipv6_defaults_are_those_of_flannel() {
    for (network, len, min, max, subnets) in [
        ("fc00::/48", 64, "fc00:0:0:1::", "fc00:0:0:ffff::", 65535),
        ("2001:cafe:42::/56", 64, "2001:cafe:42:1::", "2001:cafe:42:ff::", 255),
        ("fd00::/62", 64, "fd00:0:0:1::", "fd00:0:0:3::", 3),
        ("fd00::/63", 65, "fd00::8000:0:0:0", "fd00:0:0:1:8000::", 3),
        ("fd00::/124", 126, "fd00::4", "fd00::c", 3),
    ] {
        let config = format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"}}"#);

        let pool = NetworkConfig::parse(&config).unwrap().v6.unwrap();

        assert_eq!(described(pool), (len, min.into(), max.into(), subnets), "{network}");
    }
}

#[test]
fn host_bits_of_the_network_are_cleared() {
    assert_eq!(v4(r#"{"Network":"10.3.7.9/16"}"#).network, "10.3.0.0/16".parse().unwrap());
}

#[test]
fn unspecified_bounds_are_as_good_as_absent() {
    let pool = v4(r#"{"Network":"10.3.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":null,"SubnetLen":0}"#);

    assert_eq!(pool, v4(r#"{"network":"10.3.0.0/16"}"#));
}

#[test]
fn an_unknown_key_is_reported_and_harmless() {
    let config = NetworkConfig::parse(r#"{"Network":"10.3.0.0/16","SubnetLenght":24}"#).unwrap();

    assert_eq!(config.unknown, ["SubnetLenght"]);
}

#[test]
fn what_is_wrong_is_refused_by_key_finding_and_rule() {
    for (config, sentence) in [
        ("{", "the value is {: must be a JSON object (EOF while parsing an object at line 1 column 1)"),
        ("[]", "the value is []: must be a JSON object"),
        ("{}", "Network is missing: must be an IPv4 prefix like 10.5.0.0/16"),
        (r#"{"Network":7}"#, "Network is 7: must be an IPv4 prefix like 10.5.0.0/16"),
        (r#"{"Network":"10.3.0.0"}"#, r#"Network is "10.3.0.0": must be an IPv4 prefix like 10.5.0.0/16"#),
        (r#"{"Network":"fd00::/48"}"#, r#"Network is "fd00::/48": must be an IPv4 prefix like 10.5.0.0/16"#),
        (r#"{"Network":"0.0.0.0/0"}"#, r#"Network is "0.0.0.0/0": must be an IPv4 prefix like 10.5.0.0/16"#),
        (
            r#"{"Network":"10.3.0.0/0"}"#,
            r#"Network is "10.3.0.0/0": must be an IPv4 prefix like 10.5.0.0/16"#,
        ),
        (
            r#"{"Network":"10.3.0.0/29"}"#,
            r#"Network is "10.3.0.0/29": must be a prefix of /28 or shorter, to hold subnets"#,
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#,
            "SubnetLen is 17: must be from 18 to 30, so that 10.3.0.0/16 holds four subnets or more",
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#,
            "SubnetLen is 31: must be a whole number from 0 to 30",
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetLen":-1}"#,
            "SubnetLen is -1: must be a whole number from 0 to 30",
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetLen":"24"}"#,
            r#"SubnetLen is "24": must be a whole number from 0 to 30"#,
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}"#,
            r#"SubnetMin is "10.4.0.0": must be inside 10.3.0.0/16"#,
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetMax":"fd00::"}"#,
            r#"SubnetMax is "fd00::": must be an IPv4 address"#,
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.7"}"#,
            r#"SubnetMin is "10.3.1.7": must be the first address of a /24"#,
        ),
        (
            r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.5.0"}"#,
            r#"SubnetMax is "10.3.5.0": must be 10.3.9.0 (SubnetMin) or above"#,
        ),
        (r#"{"Network":"10.3.0.0/16","EnableIPv4":"yes"}"#, r#"EnableIPv4 is "yes": must be true or false"#),
        (r#"{"Network":"10.3.0.0/16","Backend":"vxlan"}"#, r#"Backend is "vxlan": must be a JSON object"#),
        (
            r#"{"Network":"10.3.0.0/16","IPv6Network":"10.0.0.0/8"}"#,
            r#"IPv6Network is "10.0.0.0/8": must be an IPv6 prefix like fd05::/48"#,
        ),
        (
            r#"{"EnableIPv4":false}"#,
            "EnableIPv4 is false and EnableIPv6 is not true: one of them must be true",
        ),
        (
            r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd05::/48"}"#,
            "EnableIPv6 is true: IPv6 is not supported yet; leave the key out and give an IPv4 Network",
        ),
    ] {
        assert_eq!(refusal(config), sentence, "{config}");
    }
}

#[test]
fn the_rules_are_iptables_s_unless_the_config_says_otherwise() {
    let engine = |key: &str| {
        let config = NetworkConfig::parse(&format!(r#"{{"Network":"10.3.0.0/16"{key}}}"#));
        config.and_then(NetworkConfig::supported).unwrap().engine
    };

    assert_eq!(engine(""), FirewallEngine::Iptables);
    assert_eq!(engine(r#","EnableNFTables":false"#), FirewallEngine::Iptables);
    assert_eq!(engine(r#","EnableNFTables":true"#), FirewallEngine::Nftables);
}

#[test]
fn what_would_bend_the_log_is_written_out_in_the_refusal() {
    let sentence = refusal("{\"Network\":\"\u{9b}2J\u{202e}\"}");
    let long = refusal(&format!(r#"{{"Network":"{}"}}"#, "x".repeat(1 << 20)));
    let deep = refusal(&format!(
        r#"{{"Network":"10.3.0.0/16","Backend":{}{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    ));

    assert_eq!(sentence, r#"Network is "\u{9b}2J\u{202e}": must be an IPv4 prefix like 10.5.0.0/16"#);
    assert!(long.len() < 150, "{long}");
    assert!(deep.len() < 150, "{deep}");
}

#[test]
fn overlap_is_counted_in_subnets_of_the_pool() {
    let pool = v4(r#"{"Network":"10.3.0.0/16"}"#);

    assert_eq!(pool.overlapped_by("10.3.1.0/24".parse().unwrap()), Some((0, 0)));
    assert_eq!(pool.overlapped_by("10.3.4.0/22".parse().unwrap()), Some((3, 6)));
    assert_eq!(pool.overlapped_by("10.3.0.0/16".parse().unwrap()), Some((0, 254)));
    assert_eq!(pool.overlapped_by("10.3.9.128/25".parse().unwrap()), Some((8, 8)));
    assert_eq!(pool.overlapped_by("10.3.0.0/24".parse().unwrap()), None);
    assert_eq!(pool.overlapped_by("10.4.0.0/24".parse().unwrap()), None);
}

#[test]
fn the_bridge_address_is_the_one_after_the_subnets() {
    assert_eq!(first_host("10.5.86.0/24".parse().unwrap()).to_string(), "10.5.86.1/24");
    assert_eq!(first_host("fd05:0:0:3d::/64".parse().unwrap()).to_string(), "fd05:0:0:3d::1/64");
}

proptest::proptest! {
    #[test]
    fn every_subnet_of_every_pool_can_be_leased_and_lies_where_it_says(
        address: u32, prefix in 4u8..=28, extra in 2u8..=20, pick: u64,
    ) {
        let len = (prefix + extra).min(30);
        let network = Ipv4Network::new(Ipv4Addr::from(address | 0x0100_0000), prefix).unwrap();
        let config = format!(r#"{{"Network":"{network}","SubnetLen":{len}}}"#);
        let pool = v4(&config);
        let index = u128::from(pick) % pool.capacity();

        let subnet = pool.subnet(index).unwrap();

        proptest::prop_assert!(pool.leases_out(subnet));
        proptest::prop_assert!(pool.network.contains(subnet.network()) && pool.network.contains(subnet.broadcast()));
        proptest::prop_assert_eq!(pool.overlapped_by(subnet), Some((index, index)));
        proptest::prop_assert_eq!(pool.subnet(pool.capacity()), None);
    }
}
