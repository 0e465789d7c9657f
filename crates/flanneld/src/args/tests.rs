use super::*;

fn read(words: &[&str], variables: &[(&str, &str)]) -> Result<Settings, Vec<String>> {
    let variable = |name: &str| {
        variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| OsString::from(value))
    };
    match Request::read(words.iter().map(OsString::from), variable) {
        Ok(Request::Run(settings)) => Ok(*settings),
        Ok(Request::Print(text)) => panic!("printed {text}"),
        Err(Mistakes(mistakes)) => Err(mistakes),
    }
}

#[test]
fn the_defaults_are_those_of_flannel() {
    let settings = read(&[], &[]).unwrap();

    assert_eq!(settings.etcd_endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
    assert_eq!(settings.etcd_prefix, "/coreos.com/network");
    assert_eq!(settings.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
    assert_eq!(settings.renew_margin, Duration::from_secs(3600));
    assert_eq!(settings.rules_interval, Duration::from_secs(5));
    assert_eq!((settings.masquerade, settings.random_fully, settings.forward), (false, true, true));
    assert_eq!(settings.health, None);
}

#[test]
fn one_dash_is_as_good_as_two() {
    for words in [
        ["-etcd-prefix=/a"].as_slice(),
        &["--etcd-prefix=/a"],
        &["-etcd-prefix", "/a"],
        &["--etcd-prefix", "/a"],
    ] {
        assert_eq!(read(words, &[]).unwrap().etcd_prefix, "/a", "{words:?}");
    }
}

#[test]
fn a_boolean_reads_in_go_s_spellings_and_never_takes_the_next_word() {
    for (word, expected) in
        [("-ip-masq", true), ("--ip-masq=T", true), ("-ip-masq=1", true), ("-ip-masq=False", false)]
    {
        assert_eq!(read(&[word, "-v=1"], &[]).unwrap().masquerade, expected, "{word}");
    }

    let mistakes = read(&["-ip-masq", "true", "-iface", "eth0"], &[]).unwrap_err();

    assert_eq!(
        mistakes,
        [r#""true" is no flag: a boolean is written --flag or --flag=false, a value --flag=value"#]
    );
}

#[test]
fn a_number_reads_in_go_s_bases() {
    for (text, expected) in
        [("90", 90), ("0x5a", 90), ("0o132", 90), ("0132", 90), ("0b1011010", 90), ("1_00", 100)]
    {
        let settings = read(&["-subnet-lease-renew-margin", text], &[]).unwrap();

        assert_eq!(settings.renew_margin, Duration::from_secs(60 * expected), "{text}");
    }
}

#[test]
fn the_last_of_a_flag_counts_and_lists_grow() {
    let settings =
        read(&["-v=1", "-v=2", "-iface=eth0", "-iface", "eth1,eth2", "-iface-regex=^10\\."], &[]).unwrap();

    assert_eq!(settings.verbosity, 2);
    assert_eq!(settings.selection.interfaces, ["eth0", "eth1,eth2"]);
    assert!((settings.selection.patterns[0].matches)("10.5.0.1"));
}

#[test]
fn the_environment_gives_what_the_command_line_does_not() {
    let variables = [
        ("FLANNELD_ETCD_PREFIX", "/env"),
        ("FLANNELD_IP_MASQ", "true"),
        ("FLANNELD_IFACE", "eth0,eth1"),
        ("FLANNELD_V", ""),
    ];

    let settings = read(&["-etcd-prefix=/line"], &variables).unwrap();

    assert_eq!(settings.etcd_prefix, "/line");
    assert!(settings.masquerade);
    assert_eq!(settings.selection.interfaces, ["eth0,eth1"]);
    assert_eq!(settings.verbosity, 0);
}

#[test]
fn every_mistake_of_both_places_is_told_at_once() {
    let words = [
        "-nonsense",
        "-subnet-lease-renew-margin=0",
        "-iptables-resync=zz",
        "-public-ip=fd00::1",
        "-iface-regex=(",
        "-etcd-certfile=/c",
        "-etcd-endpoints=http://a:1,ftp://b:2",
        "-kube-subnet-mgr",
        "-healthz-port=70000",
        "-ip-masq=yes",
    ];

    let mistakes =
        read(&words, &[("FLANNELD_AUDIT_INTERVAL", "soon"), ("FLANNELD_ETCD_USERNAME", "joe")]).unwrap_err();

    assert_eq!(
        mistakes,
        [
            "--nonsense: there is no such flag",
            r#"--iptables-resync is "zz": must be a whole number"#,
            r#"--ip-masq is "yes": must be true or false"#,
            r#"FLANNELD_AUDIT_INTERVAL is "soon": must be a whole number"#,
            "--kube-subnet-mgr: the Kubernetes subnet manager is not there yet; leave it out and use etcd",
            "--etcd-certfile is given alone: must be together with --etcd-keyfile",
            "FLANNELD_ETCD_USERNAME is given alone: must be together with --etcd-password or --etcd-password-file",
            r#"--public-ip is "fd00::1": must be an IPv4 address"#,
            r#"--iface-regex is "(": must be a regular expression (unclosed group)"#,
            "--subnet-lease-renew-margin is 0: must be from 1 to 1439 minutes, for a lease lasts 1440",
            "--healthz-port is 70000: must be from 0 to 65535",
            r#"--etcd-endpoints "ftp://b:2": must be http://host:port, https://host:port or host:port"#,
        ]
    );
}

#[test]
fn a_mistake_in_the_environment_is_named_as_it_stands_there() {
    let variables = [
        ("FLANNELD_KUBE_SUBNET_MGR", "1"),
        ("FLANNELD_HEALTHZ_IP", "x"),
        ("FLANNELD_PUBLIC_IP", "224.0.0.1"),
        ("FLANNELD_ETCD_PREFIX", "/"),
    ];

    let mistakes = read(&["-audit-interval=0"], &variables).unwrap_err();

    for (mistake, start) in mistakes.iter().zip([
        "FLANNELD_KUBE_SUBNET_MGR: ",
        "FLANNELD_PUBLIC_IP is 224.0.0.1: ",
        "FLANNELD_ETCD_PREFIX is \"/\": ",
        "--audit-interval is 0: ",
        "FLANNELD_HEALTHZ_IP is \"x\": ",
    ]) {
        assert!(mistake.starts_with(start), "{mistake} does not start with {start}");
    }
    assert_eq!(mistakes.len(), 5, "{mistakes:?}");
}

#[test]
fn a_flag_of_a_part_that_does_not_exist_yet_is_refused_by_name() {
    for word in [
        "-kube-subnet-mgr",
        "-kube-api-url=x",
        "-kubeconfig-file=x",
        "-kube-annotation-prefix=x",
        "-net-config-path=x",
        "-set-node-network-unavailable=false",
        "-public-ipv6=fd00::1",
    ] {
        let mistakes = read(&[word], &[]).unwrap_err();

        let name = word.split('=').next().unwrap();
        assert!(
            mistakes[0].starts_with(&format!("-{name}")) && mistakes[0].contains("not there yet"),
            "{mistakes:?}"
        );
    }
}

#[test]
fn an_interval_longer_than_a_day_is_refused() {
    for flag in ["audit-interval", "iptables-resync", "removal-grace"] {
        let mistakes = read(&[&format!("--{flag}=9223372036854775807")], &[]).unwrap_err();

        assert!(
            mistakes[0].starts_with(&format!("--{flag} is 9223372036854775807: must be")),
            "{mistakes:?}"
        );
    }
}

#[test]
fn a_removal_may_be_believed_at_once_but_not_sooner() {
    let grace = |seconds: &str| read(&[&format!("--removal-grace={seconds}")], &[]);

    assert_eq!(read(&[], &[]).unwrap().removal_grace, Duration::from_secs(60));
    assert_eq!(grace("0").unwrap().removal_grace, Duration::ZERO);
    assert_eq!(grace("-1").unwrap_err(), ["--removal-grace is -1: must be from 0 to 86400 seconds, a day"]);
}

#[test]
fn a_missing_value_is_told() {
    assert_eq!(read(&["-iface"], &[]).unwrap_err(), ["--iface needs a value"]);
}

#[test]
fn a_password_is_never_shown() {
    let settings = read(&["-etcd-username=joe", "-etcd-password=canary"], &[]).unwrap();
    let mistakes = read(&["-etcd-password=canary"], &[]).unwrap_err();

    let Some((_, PasswordFrom::Flag(password))) = &settings.etcd_user else { panic!("no password") };
    assert_eq!(password.reveal(), "canary");
    assert!(!format!("{settings:?}").contains("canary"));
    assert!(!format!("{mistakes:?}").contains("canary"));
}

#[test]
fn a_word_that_may_be_a_password_is_not_repeated() {
    for words in [
        ["-etcd-password=", "canary"].as_slice(),
        &["-etcd-passwort", "canary"],
        &["-iface", "-etcd-password", "canary"],
        &["-iface", "-etcd-password=canary"],
        &["-iface", "-etcd-passwort", "canary"],
        &["--", "-etcd-password=canary"],
    ] {
        let mistakes = read(words, &[]).unwrap_err();

        assert!(!format!("{mistakes:?}").contains("canary"), "{mistakes:?}");
    }
}

#[test]
fn a_flag_in_the_place_of_a_value_is_no_value() {
    let mistakes = read(&["-iface", "-ip-masq=yes", "-v"], &[]).unwrap_err();

    assert_eq!(
        mistakes,
        ["--iface needs a value", "--v needs a value", r#"--ip-masq is "yes": must be true or false"#]
    );
}

#[test]
fn whatever_is_written_each_mistake_is_one_line() {
    let mistakes = read(&["-no\nsuch", "-v=\n", "-route-mode=\u{1b}[31m", "two\nlines"], &[]).unwrap_err();

    assert_eq!(mistakes.len(), 4, "{mistakes:?}");
    assert!(!mistakes.iter().any(|mistake| mistake.contains(char::is_control)), "{mistakes:?}");
}

#[test]
fn help_and_version_are_printed() {
    for (word, expected) in
        [("-h", "--etcd-endpoints"), ("--help", "Traffic rules"), ("-version", "flanneld 0")]
    {
        let Ok(Request::Print(text)) = Request::read([OsString::from(word)], |_| None) else {
            panic!("{word}")
        };

        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_route_mode_is_one_of_three_words() {
    for (word, mode) in
        [("auto", RouteMode::Auto), ("Plain", RouteMode::Plain), ("nexthop", RouteMode::Nexthop)]
    {
        let Ok(Request::Run(settings)) = Request::read([format!("--route-mode={word}").into()], |_| None)
        else {
            panic!("{word} is refused");
        };
        assert_eq!(settings.route_mode, mode);
    }

    let mistakes = read(&["--route-mode=fast"], &[]).unwrap_err();

    assert_eq!(mistakes, [r#"--route-mode is "fast": must be auto, plain or nexthop"#]);
}
