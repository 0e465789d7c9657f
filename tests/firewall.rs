//! The rules stand as flannel's do, through both kinds of iptables.
//!
//! Each test runs once with iptables-nft and once with iptables-legacy, each in
//! a network namespace of its own. What only one of them can do is at the end.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::env;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use flannel_core::firewall::{Purpose, Ruleset, Wanted, rules};
use flannel_core::host::{Ensured, Firewall, HostError};
use flannel_linux::{IptablesFirewall, NftablesFirewall};
use flannel_tests::netns::{Netns, in_netns};
use flannel_tests::{need, pass_over};
use ipnetwork::IpNetwork;
use tempfile::TempDir;

/// One kind of iptables, and the programs by which it is asked for.
#[derive(Clone, Copy)]
struct Engine {
    program: &'static str,
    restorer: &'static str,
}

const NFT: Engine = Engine { program: "iptables-nft", restorer: "iptables-nft-restore" };
const LEGACY: Engine = Engine { program: "iptables-legacy", restorer: "iptables-legacy-restore" };
const NFT_6: Engine = Engine { program: "ip6tables-nft", restorer: "ip6tables-nft-restore" };
const LEGACY_6: Engine = Engine { program: "ip6tables-legacy", restorer: "ip6tables-legacy-restore" };

const ALL: Wanted = Wanted { masquerade: true, random_fully: true, forward: true };

/// The rules of a node with `subnet` in `network`.
fn ruleset(network: &str, subnet: &str, wanted: Wanted) -> Ruleset {
    let prefix = |text: &str| -> IpNetwork { text.parse().unwrap() };
    rules(prefix(network), prefix(subnet), wanted, vec![])
}

fn ours(wanted: Wanted) -> Ruleset {
    ruleset("10.5.0.0/16", "10.5.86.0/24", wanted)
}

struct Host {
    netns: Netns,
    engine: Engine,
    firewall: IptablesFirewall,
}

impl Host {
    async fn ensure(&mut self, rules: &Ruleset) -> Ensured {
        self.firewall.ensure(rules).await.unwrap()
    }

    fn iptables(&self, words: &str) -> String {
        self.netns.run(&format!("{} {words}", self.engine.program))
    }

    fn rules(&self, purpose: Purpose, chain: &str) -> Vec<String> {
        let printed = self.iptables(&format!("-t {} -S {chain}", purpose.table()));
        printed.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
    }

    fn has_chain(&self, purpose: Purpose) -> bool {
        let all = self.iptables(&format!("-t {} -S", purpose.table()));
        all.lines().any(|line| line == format!("-N {}", purpose.chain()))
    }
}

async fn on(engine: Engine, netns: Netns) -> Host {
    let firewall = IptablesFirewall::with_programs(engine.program, engine.restorer);
    Host { netns, engine, firewall }
}

/// Runs the test with both kinds of iptables.
fn with_both(test: impl AsyncFnOnce(Host) + Copy + Send + 'static) {
    with_each([NFT, LEGACY], test);
}

fn with_each(engines: [Engine; 2], test: impl AsyncFnOnce(Host) + Copy + Send + 'static) {
    for engine in engines {
        with(engine, test);
    }
}

fn with(engine: Engine, test: impl AsyncFnOnce(Host) + Send + 'static) {
    if need(engine.program) && (engine.program.ends_with("nft") || may_lock()) {
        in_netns(async move |netns| test(on(engine, netns).await).await);
    }
}

/// Whether iptables-legacy may take its lock.
fn may_lock() -> bool {
    let writable = |path: &str| fs::OpenOptions::new().create(true).append(true).open(path).is_ok();
    env::var_os("XTABLES_LOCKFILE").is_some()
        || writable("/run/xtables.lock")
        || pass_over("iptables-legacy may not write its lock; name another in XTABLES_LOCKFILE")
}

/// Makes a script of the shell; returns its name as a program.
fn script(netns: &Netns, path: &Path, text: &str) -> &'static str {
    let draft = path.with_extension("draft");
    fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
    // What is open for writing cannot be run, and the child that another test is
    // starting right now may have it open as we do: so a child of ours writes it.
    netns.run(&format!("install -m 755 {} {}", draft.display(), path.display()));
    path.display().to_string().leak()
}

/// How often a firewall has run one of its programs.
struct Runs {
    directory: TempDir,
}

impl Runs {
    /// Puts a writer of a line for each run between the firewall and its programs.
    fn of(host: &mut Host) -> Self {
        let runs = Self { directory: tempfile::tempdir().unwrap() };
        let counted = |program: &str| {
            let text = format!("echo {program} \"$@\" >>{}\nexec {program} \"$@\"", runs.log());
            script(&host.netns, &runs.directory.path().join(program), &text)
        };
        let (program, restorer) = (counted(host.engine.program), counted(host.engine.restorer));
        host.firewall = IptablesFirewall::with_programs(program, restorer);
        runs
    }

    fn log(&self) -> String {
        self.directory.path().join("log").display().to_string()
    }

    /// Those since the last time.
    fn take(&self) -> Vec<String> {
        let lines = fs::read_to_string(self.log()).unwrap_or_default();
        fs::write(self.log(), "").unwrap();
        lines.lines().map(str::to_owned).collect()
    }
}

/// A host whose rules have been written and found right, and the runs from then on.
async fn at_rest(mut host: Host) -> (Host, Runs) {
    let runs = Runs::of(&mut host);
    assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
    assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
    assert!(runs.take().iter().any(|run| run.contains("restore")), "the runs are not counted");
    (host, runs)
}

/// Somebody who flushes FORWARD in the middle of an ensure.
struct Meddler {
    directory: TempDir,
}

impl Meddler {
    /// Behind the runs of a program that have this word among theirs.
    fn behind(host: &Host, program: &'static str, word: &str) -> (Self, &'static str) {
        let meddler = Self { directory: tempfile::tempdir().unwrap() };
        let text = format!(
            "{program} \"$@\" || exit\n\
             case \"$*\" in *{word}*) rm {} 2>/dev/null && {} -F FORWARD;; esac\n\
             exit 0",
            meddler.sign(),
            host.engine.program
        );
        let script = script(&host.netns, &meddler.directory.path().join(program), &text);
        (meddler, script)
    }

    fn sign(&self) -> String {
        self.directory.path().join("sign").display().to_string()
    }

    /// Lets it happen, once.
    fn wake(&self) {
        fs::write(self.sign(), "").unwrap();
    }

    fn has_struck(&self) -> bool {
        !fs::exists(self.sign()).unwrap()
    }
}

const NO_RUN: [&str; 0] = [];

#[test]
fn the_rules_are_flannel_s() {
    with_both(async |mut host| {
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);

        assert_eq!(
            host.rules(Purpose::Masquerade, "FLANNEL-POSTRTG"),
            [
                r#"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN"#,
                r#"-A FLANNEL-POSTRTG -s 10.5.86.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN"#,
                r#"-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.86.0/24 -m comment --comment "flanneld masq" -j RETURN"#,
                r#"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.86.0/24 -m comment --comment "flanneld masq" -j RETURN"#,
                r#"-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#,
                r#"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#,
            ]
        );
        assert_eq!(
            host.rules(Purpose::Masquerade, "POSTROUTING"),
            [r#"-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG"#]
        );
        assert_eq!(
            host.rules(Purpose::Forward, "FLANNEL-FWD"),
            [
                r#"-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#,
                r#"-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#,
            ]
        );
        assert_eq!(
            host.rules(Purpose::Forward, "FORWARD"),
            [r#"-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD"#]
        );
    });
}

#[test]
fn rules_that_stand_are_not_written_again() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        // Writing the chain anew would set its counters back.
        let words =
            "-R FLANNEL-FWD 1 -s 10.5.0.0/16 -m comment --comment flanneld#forward -j ACCEPT -c 7 700";
        let words = words.split(' ').map(|word| word.replace('#', " "));
        assert!(Command::new(host.engine.program).args(words).status().unwrap().success());

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);

        assert!(host.iptables("-v -S FLANNEL-FWD").contains("-c 7 700"));
    });
}

#[test]
fn rules_without_random_ports_are_not_written_again() {
    with_both(async |mut host| {
        let rules = ours(Wanted { random_fully: false, ..ALL });

        assert_eq!(host.ensure(&rules).await, Ensured::Written);
        assert_eq!(host.ensure(&rules).await, Ensured::Unchanged);
    });
}

#[test]
fn rules_of_ipv6_stand_and_are_not_written_again() {
    with_each([NFT_6, LEGACY_6], async |mut host| {
        let rules = ruleset("fd05::/48", "fd05:0:0:1::/64", ALL);

        assert_eq!(host.ensure(&rules).await, Ensured::Written);
        assert_eq!(host.ensure(&rules).await, Ensured::Unchanged);
        assert_eq!(host.rules(Purpose::Masquerade, "FLANNEL-POSTRTG").len(), 6);
    });
}

#[test]
fn flushed_rules_come_back() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        let before = host.iptables("-t nat -S");
        host.iptables("-t nat -F FLANNEL-POSTRTG");

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);

        assert_eq!(host.iptables("-t nat -S"), before);
    });
}

#[test]
fn a_flushed_jump_comes_back_alone() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        let before = host.iptables("-t filter -S");
        host.iptables("-t filter -F FORWARD");

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);

        assert_eq!(host.iptables("-t filter -S"), before);
    });
}

#[test]
fn a_hundred_flushes_leave_as_many_rules_as_before() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        let shown = |host: &Host| host.iptables("-t nat -S") + &host.iptables("-S");
        let before = shown(&host);

        for _ in 0..100 {
            host.iptables("-F");
            host.iptables("-t nat -F POSTROUTING");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
        }

        assert_eq!(shown(&host), before);
    });
}

#[test]
fn a_deleted_rule_comes_back_in_its_place() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        let before = host.iptables("-t nat -S");
        host.iptables("-t nat -D FLANNEL-POSTRTG 3");

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);

        assert_eq!(host.iptables("-t nat -S"), before);
    });
}

#[test]
fn forwarding_passes_where_the_policy_is_to_drop() {
    with_both(async |mut host| {
        host.iptables("-P FORWARD DROP");

        host.ensure(&ours(ALL)).await;

        let shown = host.iptables("-S FORWARD");
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "-P FORWARD DROP");
        assert!(lines[1].ends_with("-j FLANNEL-FWD"), "{shown}");
    });
}

#[test]
fn rules_that_are_switched_off_go_with_chain_and_jump() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        let none = ours(Wanted { masquerade: false, forward: false, ..ALL });

        assert_eq!(host.ensure(&none).await, Ensured::Written);

        for purpose in Purpose::ALL {
            assert!(!host.has_chain(purpose), "{}", purpose.chain());
            assert_eq!(host.rules(purpose, purpose.parent()), Vec::<String>::new());
        }
        assert_eq!(host.ensure(&none).await, Ensured::Unchanged);
    });
}

#[test]
fn nothing_wanted_leaves_nothing() {
    with_both(async |mut host| {
        let none = ours(Wanted { masquerade: false, forward: false, ..ALL });

        assert_eq!(host.ensure(&none).await, Ensured::Unchanged);

        assert!(!Purpose::ALL.iter().any(|purpose| host.has_chain(*purpose)));
    });
}

#[test]
fn what_others_put_into_the_built_in_chains_stays() {
    with_both(async |mut host| {
        host.iptables("-t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
        host.iptables("-A FORWARD -i docker0 -j ACCEPT");

        host.ensure(&ours(ALL)).await;
        host.ensure(&ours(Wanted { masquerade: false, forward: false, ..ALL })).await;

        assert_eq!(
            host.rules(Purpose::Masquerade, "POSTROUTING"),
            ["-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE"]
        );
        assert_eq!(host.rules(Purpose::Forward, "FORWARD"), ["-A FORWARD -i docker0 -j ACCEPT"]);
    });
}

#[test]
fn two_agents_with_two_networks_share_the_chains_in_peace() {
    with_both(async |mut host| {
        let other = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);
        host.ensure(&ours(ALL)).await;
        host.ensure(&other).await;
        host.ensure(&ours(ALL)).await;

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        assert_eq!(host.ensure(&other).await, Ensured::Unchanged);

        let forward = host.rules(Purpose::Forward, "FLANNEL-FWD");
        assert_eq!(forward.iter().filter(|rule| rule.contains("10.5.0.0/16")).count(), 2);
        assert_eq!(forward.iter().filter(|rule| rule.contains("10.9.0.0/16")).count(), 2);
        for purpose in Purpose::ALL {
            assert_eq!(host.rules(purpose, purpose.parent()).len(), 1);
        }
    });
}

#[test]
fn the_rules_of_a_former_network_go() {
    with_both(async |mut host| {
        host.ensure(&ruleset("10.9.0.0/16", "10.9.1.0/24", ALL)).await;
        let rules = Ruleset { former: vec!["10.9.0.0/16".parse().unwrap()], ..ours(ALL) };

        host.ensure(&rules).await;

        assert!(!host.iptables("-t nat -S").contains("10.9."));
        assert!(!host.iptables("-t filter -S").contains("10.9."));
    });
}

#[test]
fn rules_of_an_older_flannel_in_our_chain_are_replaced() {
    with_both(async |mut host| {
        host.iptables("-N FLANNEL-FWD");
        for side in ["-s", "-d"] {
            host.iptables(&format!("-A FLANNEL-FWD {side} 10.5.0.0/16 -j ACCEPT"));
        }

        assert_eq!(host.ensure(&ours(Wanted { masquerade: false, ..ALL })).await, Ensured::Written);

        assert_eq!(host.rules(Purpose::Forward, "FLANNEL-FWD").len(), 2);
    });
}

#[test]
fn a_rule_that_somebody_puts_into_our_chain_goes() {
    with_both(async |mut host| {
        host.ensure(&ruleset("10.9.0.0/16", "10.9.1.0/24", ALL)).await;
        host.ensure(&ours(ALL)).await;
        let shown =
            |host: &Host| host.iptables("-t nat -S") + &host.iptables("-S") + &host.iptables("-t raw -S");
        let before = shown(&host);
        for rule in [
            "-I FLANNEL-FWD -j DROP",
            "-I FLANNEL-FWD -s 10.5.3.0/24 -j REJECT",
            "-A FLANNEL-FWD -j LOG",
            "-t nat -I FLANNEL-POSTRTG -s 10.5.1.0/24 -j RETURN",
            "-t raw -I FLANNEL-ADMIT -d 10.5.86.0/24 -j DROP",
        ] {
            host.iptables(rule);

            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written, "{rule}");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged, "{rule}");

            assert_eq!(shown(&host), before, "{rule}");
        }
    });
}

#[test]
fn a_restore_that_fails_is_an_error_with_its_own_words() {
    with_both(async |host| {
        // A listing program knows no --noflush.
        let programs = (host.engine.program, "iptables-legacy-save");
        let mut firewall = IptablesFirewall::with_programs(programs.0, programs.1);

        let error = firewall.ensure(&ours(ALL)).await.unwrap_err();

        let HostError::Broken { operation, source } = error else { panic!("{error:?}") };
        assert_eq!(operation, "cannot write the rules");
        assert!(source.to_string().contains("noflush"), "{source}");
    });
}

#[test]
fn a_lock_that_somebody_holds_is_an_error_in_the_end() {
    in_netns(async |netns| {
        if !need("iptables-legacy") || !need("flock") {
            return;
        }
        // With a lock file of its own the test holds nobody else up.
        let directory = tempfile::tempdir().unwrap();
        let lock = directory.path().join("lock");
        let text = format!("XTABLES_LOCKFILE={} exec iptables-legacy \"$@\"", lock.display());
        let program = script(&netns, &directory.path().join("iptables"), &text);
        netns.run(&format!("{program} -S"));
        let mut holder = Command::new("flock")
            .args([lock.as_os_str(), "sh".as_ref(), "-c".as_ref(), "echo held; read line".as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
        let mut firewall = IptablesFirewall::with_programs(program, LEGACY.restorer);

        let error = firewall.ensure(&ours(ALL)).await.unwrap_err();

        drop(holder.stdin.take());
        holder.wait().unwrap();
        let HostError::Broken { operation, source } = error else { panic!("{error:?}") };
        assert_eq!(operation, "somebody holds the xtables lock");
        assert!(source.to_string().contains("fuser"), "{source}");
    });
}

#[test]
fn a_part_of_the_kernel_that_is_missing_is_named() {
    with(NFT, async |host| {
        let directory = tempfile::tempdir().unwrap();
        let words = "can't initialize iptables table `nat': Table does not exist (do you need to insmod?)";
        let text = format!(
            "echo 'iptables v1.8.9 (legacy)'\n[ \"$1\" = --version ] && exit\ncat >&2 <<'-'\n{words}\n-\nexit 3"
        );
        let iptables = script(&host.netns, &directory.path().join("iptables"), &text);
        let words = "/dev/stdin:4:8-14: Error: Could not process rule: No such file or directory";
        let text = format!(
            "echo '{words}' >&2\n[ \"$1\" = -f ] || echo 'Error: No such file or directory' >&2\nexit 1"
        );
        let nft = script(&host.netns, &directory.path().join("nft"), &text);

        let iptables = IptablesFirewall::with_programs(iptables, NFT.restorer).ensure(&ours(ALL)).await;
        let nft = NftablesFirewall::with_program(nft).ensure(&ours(ALL)).await;

        for (result, part) in [(iptables, "table `nat'"), (nft, "Could not process rule")] {
            let error = result.unwrap_err();
            assert!(
                matches!(&error, HostError::Missing { missing, .. } if missing.contains(part)),
                "{error:?}"
            );
        }
    });
}

#[test]
fn a_missing_restore_is_told_with_a_remedy() {
    with_both(async |host| {
        let programs = (host.engine.program, "no-such-restore");
        let mut firewall = IptablesFirewall::with_programs(programs.0, programs.1);

        let error = firewall.ensure(&ours(ALL)).await.unwrap_err();

        assert!(
            matches!(&error, HostError::Missing { missing, .. } if missing == "no-such-restore"),
            "{error}"
        );
    });
}

#[test]
fn rules_that_stand_in_nf_tables_start_no_process() {
    with(NFT, async |host| {
        let (mut host, runs) = at_rest(host).await;

        for _ in 0..3 {
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
            assert_eq!(runs.take(), NO_RUN);
        }
    });
}

#[test]
fn rules_of_ipv6_that_stand_in_nf_tables_start_no_process() {
    with(NFT_6, async |mut host| {
        let runs = Runs::of(&mut host);
        let rules = ruleset("fd05::/48", "fd05:0:0:1::/64", ALL);
        host.ensure(&rules).await;
        host.ensure(&rules).await;
        runs.take();

        assert_eq!(host.ensure(&rules).await, Ensured::Unchanged);
        assert_eq!(runs.take(), NO_RUN);
    });
}

#[test]
fn a_jump_that_goes_while_the_rules_are_at_rest_comes_back() {
    with(NFT, async |host| {
        let (mut host, runs) = at_rest(host).await;
        let before = host.iptables("-t filter -S");
        host.iptables("-F FORWARD");

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);

        assert_eq!(host.iptables("-t filter -S"), before);
        // Of its own write it knows what it did.
        runs.take();
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        assert_eq!(runs.take(), NO_RUN);
    });
}

#[test]
fn a_change_of_another_table_is_looked_at_once() {
    with(NFT, async |host| {
        let (mut host, runs) = at_rest(host).await;
        host.iptables("-t mangle -N SOMEBODY");

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        assert_eq!(runs.take().len(), 2 * Purpose::ALL.len());

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        assert_eq!(runs.take(), NO_RUN);
    });
}

#[test]
fn a_jump_that_goes_behind_a_check_comes_back() {
    with(NFT, async |mut host| {
        let (meddler, program) = Meddler::behind(&host, NFT.program, "FLANNEL-FWD");
        host.firewall = IptablesFirewall::with_programs(program, NFT.restorer);
        host.ensure(&ours(ALL)).await;
        host.iptables("-t mangle -N SOMEBODY");
        meddler.wake();

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        assert!(meddler.has_struck());
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
    });
}

#[test]
fn a_jump_that_goes_behind_a_write_comes_back() {
    with(NFT, async |mut host| {
        let (meddler, restorer) = Meddler::behind(&host, NFT.restorer, "noflush");
        host.firewall = IptablesFirewall::with_programs(NFT.program, restorer);
        host.ensure(&ours(ALL)).await;
        host.iptables("-F FORWARD");
        meddler.wake();

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
        assert!(meddler.has_struck());
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
    });
}

#[test]
fn other_rules_are_looked_at_though_nothing_has_changed() {
    with(NFT, async |host| {
        let (mut host, _runs) = at_rest(host).await;
        let fewer = ours(Wanted { forward: false, ..ALL });

        assert_eq!(host.ensure(&fewer).await, Ensured::Written);

        assert!(!host.has_chain(Purpose::Forward));
    });
}

#[test]
fn a_check_that_fails_is_made_again() {
    with(NFT, async |host| {
        let (mut host, runs) = at_rest(host).await;
        host.iptables("-F FORWARD");
        let restorer = runs.directory.path().join(NFT.restorer);
        let aside = restorer.with_extension("aside");
        fs::rename(&restorer, &aside).unwrap();
        host.firewall.ensure(&ours(ALL)).await.unwrap_err();
        host.firewall.ensure(&ours(ALL)).await.unwrap_err();
        fs::rename(&aside, &restorer).unwrap();

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
    });
}

#[test]
fn a_rule_that_somebody_puts_above_ours_comes_after_them() {
    with_both(async |mut host| {
        host.iptables("-N DOCKER-USER");
        host.iptables("-A FORWARD -j DOCKER-USER");
        host.ensure(&ours(ALL)).await;
        for (purpose, rule) in [
            (Purpose::Forward, "-I FORWARD -i eth0 -j DROP"),
            (Purpose::Forward, "-I FORWARD 2 -j REJECT"),
            (Purpose::Masquerade, "-t nat -I POSTROUTING -s 10.5.0.0/16 -j ACCEPT"),
        ] {
            host.iptables(rule);

            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written, "{rule}");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged, "{rule}");

            let rules = host.rules(purpose, purpose.parent());
            let operator = usize::from(purpose == Purpose::Forward);
            assert!(operator == 0 || rules[0] == "-A FORWARD -j DOCKER-USER", "{rules:?}");
            assert_eq!(rules[operator], purpose.jump(), "{rules:?}");
        }
        assert_eq!(host.rules(Purpose::Forward, "FORWARD").len(), 4);
    });
}

#[test]
fn our_jump_goes_behind_who_denies_and_is_at_rest_there() {
    with_both(async |mut host| {
        host.iptables("-N DOCKER-USER");
        host.ensure(&ours(ALL)).await;

        // The operator's own is followed wherever it is put, and however often.
        for _ in 0..3 {
            host.iptables("-A FORWARD -j DOCKER-USER");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
            assert_eq!(host.rules(Purpose::Forward, "FORWARD")[1], Purpose::Forward.jump());
            // And Docker puts it first.
            host.iptables("-D FORWARD -j DOCKER-USER");
            host.iptables("-I FORWARD -j DOCKER-USER");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
            host.iptables("-D FORWARD -j DOCKER-USER");
        }
    });
}

#[test]
fn a_policy_engine_that_comes_last_is_gone_behind_once() {
    with_both(async |mut host| {
        host.iptables("-N cali-FORWARD");
        host.ensure(&ours(ALL)).await;
        host.iptables("-A FORWARD -j cali-FORWARD");

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
        assert_eq!(host.rules(Purpose::Forward, "FORWARD")[1], Purpose::Forward.jump());

        for _ in 0..3 {
            host.iptables("-D FORWARD -j cali-FORWARD");
            host.iptables("-A FORWARD -j cali-FORWARD");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        }
    });
}

#[test]
fn a_policy_engine_that_is_below_ours_starts_no_process() {
    with(NFT, async |mut host| {
        host.iptables("-N cali-FORWARD");
        let runs = Runs::of(&mut host);
        host.ensure(&ours(ALL)).await;
        host.iptables("-A FORWARD -j cali-FORWARD");
        host.ensure(&ours(ALL)).await;
        host.iptables("-D FORWARD -j cali-FORWARD");
        host.iptables("-A FORWARD -j cali-FORWARD");
        host.ensure(&ours(ALL)).await;
        runs.take();

        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        assert_eq!(runs.take(), NO_RUN);
    });
}

#[test]
fn somebody_who_insists_on_being_first_is_let_be_now_and_then() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        let mut moves = 0;
        host.iptables("-A FORWARD -j DROP");
        for _ in 0..10 {
            host.iptables("-D FORWARD -j DROP");
            host.iptables("-I FORWARD -j DROP");
            moves += usize::from(host.ensure(&ours(ALL)).await == Ensured::Written);
        }

        assert_eq!(moves, 5);
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
        // And the rest is looked after as ever.
        host.iptables("-F FLANNEL-FWD");
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);
    });
}

#[test]
fn rules_that_come_but_once_are_no_fight() {
    with_both(async |mut host| {
        host.iptables("-N DOCKER");
        host.ensure(&ours(ALL)).await;

        // As Docker up to 27 does for each network that it makes.
        for network in 0..10 {
            host.iptables(&format!("-I FORWARD -o br-{network} -j DOCKER"));
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written, "{network}");
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged, "{network}");
        }
    });
}

#[test]
fn a_fight_about_one_rule_leaves_no_other_above_ours() {
    with_both(async |mut host| {
        host.ensure(&ours(ALL)).await;
        host.iptables("-A FORWARD -j REJECT");
        while {
            host.iptables("-D FORWARD -j REJECT");
            host.iptables("-I FORWARD -j REJECT");
            host.ensure(&ours(ALL)).await == Ensured::Written
        } {}

        host.iptables("-I FORWARD 2 -j DROP");
        assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Written);

        let rules = host.rules(Purpose::Forward, "FORWARD");
        let place = |words: &str| rules.iter().position(|rule| rule.contains(words)).unwrap();
        assert!(place("FLANNEL-FWD") < place("DROP"), "{rules:?}");
    });
}

#[test]
fn rules_in_legacy_tables_are_looked_at_each_time() {
    with(LEGACY, async |host| {
        let (mut host, runs) = at_rest(host).await;

        for _ in 0..2 {
            assert_eq!(host.ensure(&ours(ALL)).await, Ensured::Unchanged);
            assert_eq!(runs.take().len(), 2 * Purpose::ALL.len());
        }
    });
}
