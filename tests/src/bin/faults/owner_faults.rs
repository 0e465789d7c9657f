//! Who a subnet belongs to: reboots, crowds, sleepers, twins.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use flannel_tests::lab::{Host, Process, flanneld, run};
use nix::sys::signal::Signal;
use rand::RngExt;
use rand::seq::IndexedRandom;

use crate::kernel::{DEVICE, held};
use crate::members::Data;
use crate::peers::{key_of, leases};
use crate::record::{Mark, Records, now};
use crate::scenario::Shown;
use crate::world::{Form, PATIENCE, Shape, World, agent_knows, attempt, delete_device};

const SECOND: Duration = Duration::from_secs(1);

/// E-5.
pub(crate) fn reboot_without_etcd(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape { hosts: form.of(3, 10), ..Shape::default() });
    let mut shown = Shown::default();
    let rebooted: Vec<usize> = (0..form.of(1, 3)).collect();
    // What is remembered is written half a minute after a change.
    let is_written = |world: &mut World| rebooted.iter().all(|&index| has_state(world.host(index)));
    let written = world.comes(SECOND * 45, is_written);
    world.claim(written.is_some(), || "no state file after 45 s".into());
    world.members.kill_all(Data::Kept);
    let since = now();
    for &index in &rebooted {
        world.kill_agent(index);
        let host = world.host(index).clone();
        let before = held(&host);
        reboot(&host);
        let start = Instant::now();
        world.start_agent(index);
        let file = world.comes(SECOND * 30, |_| host.subnet_file().exists()).map(|_| start.elapsed());
        let file = file.ok_or_else(|| "no subnet.env".to_owned());
        shown.within(&mut world, "subnet.env without etcd", SECOND * 2, file.clone());
        let stands = world.comes(SECOND * 10, |_| held(&host) == before).map(|_| start.elapsed());
        shown.within(&mut world, "peers without etcd", SECOND * 3, stands.ok_or_else(|| "never".into()));
        world.excuse(index, since, now(), "it was booted");
        world.mark(&Mark::Meddled { host: index + 1, since, until: now() });
        let (code, page) = world.page(index);
        world.claim(code == 503 && page.lines().count() > 1, || format!("says {code} without etcd: {page}"));
        shown.note(format!("subnet.env after {:.2} s", file.unwrap_or_default().as_secs_f64()));
    }
    thread::sleep(SECOND * 2);
    world.members.start_all();
    world.store.answers();
    let start = Instant::now();
    world.join(150);
    let back = world.converges(PATIENCE).map(|_| start.elapsed());
    shown.within(&mut world, "after etcd's return", SECOND * 5, back);
    let ready = world.comes(SECOND * 10, |world| rebooted.iter().all(|&index| world.is_ready(index)));
    world.claim(ready.is_some(), || "not ready after etcd's return".into());
    shown.end(world)
}

/// Whether there is something to start from.
fn has_state(host: &Host) -> bool {
    let files = fs::read_dir(host.state_dir()).into_iter().flatten().flatten();
    files.into_iter().any(|file| file.path().extension().is_some_and(|extension| extension == "state"))
}

/// Takes away what does not outlive a boot; the bridge stands for docker's, which comes again.
pub(crate) fn reboot(host: &Host) {
    delete_device(host);
    drop(fs::remove_file(host.subnet_file()));
    drop(fs::remove_file(host.directory.join("boot_id")));
    for words in ["iptables -F FORWARD", "iptables -F FLANNEL-FWD", "iptables -X FLANNEL-FWD"] {
        attempt(host, words);
    }
}

/// E-10.
pub(crate) fn stampede(records: Records, form: Form) -> Shown {
    const FEW: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.50.0","Backend":{"Type":"alloc"}}"#;
    const MANY: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.250.0","Backend":{"Type":"alloc"}}"#;
    let (agents, slots, config) = form.of((60, 50, FEW), (300, 250, MANY));
    let mut world = World::new(records, Shape { hosts: 1, peers: 0, config, rate: 0, ..Shape::default() });
    let mut shown = Shown::default();
    world.start_store();
    let mut random = rand::rng();
    let mut crowd: Vec<Process> = (0..agents).map(|number| one_of_a_crowd(&world, number)).collect();
    let start = Instant::now();
    // While they fight for the slots, a third of them dies and comes again.
    for _ in 0..agents / 3 {
        let number = random.random_range(0..agents);
        crowd[number].kill();
        thread::sleep(Duration::from_millis(random.random_range(0..50)));
        crowd[number] = one_of_a_crowd(&world, number);
    }
    let full =
        world.comes(PATIENCE, |world| world.store.list(&leases()).len() == slots).map(|_| start.elapsed());
    shown.within(&mut world, "all slots taken", SECOND * 30, full.ok_or_else(|| "never".into()));
    let subnet = |world: &World, number: usize| fs::read_to_string(crowd_file(world, number, "env")).ok();
    let settled = world.comes(PATIENCE, |world| {
        (0..agents).filter(|&number| subnet(world, number).is_some()).count() == slots
    });
    world.claim(settled.is_some(), || "not as many files as slots".into());
    let has = |number: &usize| subnet(&world, *number).is_some();
    let (holders, waiting): (Vec<usize>, Vec<usize>) = (0..agents).partition(has);
    let mut files: Vec<Option<String>> = holders.iter().map(|&number| subnet(&world, number)).collect();
    files.sort();
    files.dedup();
    let owners = world.store.list(&leases());
    let distinct = files.len();
    world.claim(distinct == slots, || format!("{distinct} distinct subnets in {slots} files"));
    let told = |world: &mut World| {
        let log = |number: usize| fs::read_to_string(crowd_file(world, number, "log")).unwrap_or_default();
        waiting.iter().filter(|number| log(**number).contains("no free /24")).count()
    };
    let all = world.comes(SECOND * 10, |world| told(world) == agents - slots);
    world.claim(all.is_some(), || format!("not all of the {} agents that wait say why", agents - slots));
    // A slot becomes free.
    let gone = *holders.choose(&mut random).expect("somebody holds a subnet");
    crowd[gone].kill();
    let address = public_address(gone);
    let key = owners
        .iter()
        .find(|(_, value)| value.contains(&format!("\"{address}\"")))
        .map(|(key, _)| key.clone());
    let key = key.expect("its key is there");
    world.store.delete(&key);
    let start = Instant::now();
    let taken = world.comes(SECOND * 20, |world| world.store.get(&key).is_some()).map(|_| start.elapsed());
    shown.within(
        &mut world,
        "a slot that became free",
        SECOND * 5,
        taken.ok_or_else(|| "never taken".into()),
    );
    shown.note(format!("{agents} agents, {slots} slots, {} killed meanwhile", agents / 3));
    for process in &mut crowd {
        process.kill();
    }
    shown.end(world)
}

/// An agent beside others on one host; nothing but its lease is its own.
fn one_of_a_crowd(world: &World, number: usize) -> Process {
    let host = world.host(0);
    let mut command = host.command(flanneld());
    fs::create_dir_all(world.lab.path("crowd")).expect("a directory can be made");
    command.arg(format!("--etcd-endpoints={}", world.members.endpoints().join(",")));
    command.arg(format!("--subnet-file={}", crowd_file(world, number, "env").display()));
    command.args(["--iface=eth0", "--iptables-forward-rules=false"]);
    command.arg(format!("--public-ip={}", public_address(number)));
    if agent_knows("--state-dir") {
        command.arg(format!("--state-dir={}", crowd_file(world, number, "state").display()));
    }
    Process::start(command, crowd_file(world, number, "log"))
}

fn crowd_file(world: &World, number: usize, what: &str) -> std::path::PathBuf {
    world.lab.path("crowd").join(format!("{number}.{what}"))
}

fn public_address(number: usize) -> String {
    format!("172.17.{}.{}", number / 200, number % 200 + 1)
}

/// E-11.
pub(crate) fn sleeper(records: Records, _: Form) -> Shown {
    // Three slots, for two hosts, one that waits, and somebody who will leave.
    const THREE: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.3.0","Backend":{"Type":"vxlan"}}"#;
    let mut world = World::new(
        records,
        // The bridge is looked at with the audit.
        Shape { peers: 10, config: THREE, flags: vec!["--audit-interval=5".into()], ..Shape::default() },
    );
    let mut shown = Shown::default();
    world.start_store();
    for index in [0, 1] {
        world.start_agent(index);
        world.settle_in(index);
    }
    let taken = world.store.list(&leases());
    let free = (1..=3)
        .map(|number| format!("10.5.{number}.0/24"))
        .find(|subnet| !taken.contains_key(&key_of(subnet)));
    let mut guest = world.peers.peer(0);
    guest.subnet = free.expect("two of three are taken");
    world.store.put_peer(&guest);
    world.start_agent(2);
    let waits = world.comes(PATIENCE, |world| world.log(2).contains("no free /24"));
    world.claim(waits.is_some(), || "the third host does not wait for a slot".into());

    let (since, subnet) = (now(), world.agents[0].subnet.clone());
    let key = key_of(&format!("{subnet}.0/24"));
    world.signal_agent(0, Signal::SIGSTOP);
    let lease = world.store.get(&key).map(|(_, lease)| lease).expect("its key is there");
    world.store.revoke(lease);
    world.settle_in(2);
    let other = world.agents[2].subnet.clone();
    world.claim(other == subnet, || format!("the third host has {other}, the first had {subnet}"));
    let found = world.converge(&[1, 2], PATIENCE);
    world.claim(found.is_ok(), || format!("with the new owner: {found:?}"));
    world.start_flow_between(&[1, 2]);
    world.mark(&Mark::Moves { host: 1 });
    world.fault("it slept while its subnet went to another host", [0]);
    world.signal_agent(0, Signal::SIGCONT);
    let start = Instant::now();
    let left =
        world.comes(PATIENCE, |world| world.log(0).contains("not ours any more")).map(|_| start.elapsed());
    shown.within(
        &mut world,
        "the sleeper sees that it lost",
        SECOND * 15,
        left.ok_or_else(|| "never".into()),
    );
    let (code, page) = world.page(0);
    world.claim(code == 503, || format!("ready without a subnet: {code} {page}"));
    // The guest leaves, and the sleeper has a place again.
    world.store.remove_peer(&guest);
    let place = guest.subnet.trim_end_matches(".0/24").to_owned();
    let moved = |world: &mut World| world.host(0).subnet() == place;
    let found = world.comes(PATIENCE, moved);
    world.claim(found.is_some(), || "the sleeper found no other place".into());
    let named = world.comes(SECOND * 10, |world| world.page(0).1.contains("pods still has"));
    let page = world.page(0).1;
    world.claim(named.is_some(), || format!("the bridge on the old subnet is not named: {page}"));
    let host = world.host(0).clone();
    host.run(&["ip", "addr", "flush", "dev", "pods"]);
    host.run(&["ip", "addr", "add", &format!("{place}.1/24"), "dev", "pods"]);
    let ready = world.comes(PATIENCE, |world| world.is_ready(0));
    let page = world.page(0).1;
    world.claim(ready.is_some(), || format!("not ready on its new subnet: {page}"));
    let found = world.converges(PATIENCE);
    world.claim(found.is_ok(), || format!("at the end: {found:?}"));
    world.blind(0, since);
    shown.note("its etcd lease was revoked while it slept: a TTL of 24 h cannot be waited for");
    shown.end(world)
}

/// E-12, two hosts with one public address.
pub(crate) fn twins_by_address(records: Records, _: Form) -> Shown {
    twins(records, |world| world.agents[2].flags.push("--public-ip=192.168.77.1".into()))
}

/// E-12, a disk that was cloned, host id and all, and the address with it.
pub(crate) fn twins_by_disk(records: Records, _: Form) -> Shown {
    twins(records, |world| {
        world.agents[2].flags.push("--public-ip=192.168.77.1".into());
        let (from, to) = (world.host(0).state_dir(), world.host(2).state_dir());
        let written = world.comes(SECOND * 45, |world| world.host(0).state_dir().join("host-id").exists());
        world.claim(written.is_some(), || "the first host has no host-id".into());
        fs::create_dir_all(&world.host(2).directory).expect("a directory can be made");
        run(&["cp", "-r", &from.display().to_string(), &to.display().to_string()]);
    })
}

fn twins(records: Records, make: fn(&mut World)) -> Shown {
    let mut world = World::new(records, Shape::default());
    let mut shown = Shown::default();
    world.start_store();
    for index in [0, 1] {
        world.start_agent(index);
        world.settle_in(index);
    }
    let found = world.converge(&[0, 1], PATIENCE);
    world.claim(found.is_ok(), || format!("at first: {found:?}"));
    let ready = world.comes(PATIENCE, |world| world.is_ready(0) && world.is_ready(1));
    world.claim(ready.is_some(), || "not ready at first".into());
    world.start_flow_between(&[0, 1]);
    let (before, file) = (world.store.list(&leases()), fs::read_to_string(world.host(0).subnet_file()));
    make(&mut world);
    world.mark(&Mark::Unserved { host: 3 });
    world.fault("a second host with the same address", [2]);
    world.start_agent(2);
    let words = ["host1", "host3"];
    let start = Instant::now();
    let named = world.comes(SECOND * 15, |world| {
        let log = world.log(2);
        log.lines().any(|line| words.iter().all(|word| line.contains(word)))
    });
    let named = named.map(|_| start.elapsed()).ok_or_else(|| "no line names both hosts".to_owned());
    shown.within(&mut world, "the second host is refused with both names", SECOND * 10, named);
    thread::sleep(SECOND * 10);
    let after = world.store.list(&leases());
    let changed = after.iter().find(|(key, value)| before.get(*key) != Some(value));
    world.claim(before == after, || format!("the leases changed, as in {changed:?}"));
    let has_file = world.host(2).subnet_file().exists();
    world.claim(!has_file, || "the second host has a subnet".into());
    let same = fs::read_to_string(world.host(0).subnet_file()).ok() == file.ok();
    world.claim(same && world.is_ready(0), || "the first host did not stay as it was".into());
    let devices = world.host(2).run(&["ip", "link"]);
    world.claim(!devices.contains(DEVICE), || "the second host has a device".into());
    shown.end(world)
}

/// E-13.
pub(crate) fn suspended(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 20, ..Shape::default() });
    let mut shown = Shown::default();
    let asleep = form.of(SECOND * 25, SECOND * 600);
    let since = now();
    world.signal_agent(0, Signal::SIGSTOP);
    thread::sleep(asleep / 2);
    (100..103).for_each(|number| world.join(number));
    world.leave(110);
    world.join(150);
    thread::sleep(asleep / 2);
    world.signal_agent(0, Signal::SIGCONT);
    let start = Instant::now();
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    world.blind(0, since);
    shown.within(&mut world, "awake again", SECOND * 10, found);
    shown.note(format!(
        "stopped for {asleep:?}; jumps of the wall clock are for the simulation: time namespaces have none"
    ));
    shown.end(world)
}
