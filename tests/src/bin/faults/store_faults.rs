//! Data that lies, data that is gone, data that is old.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use flannel_tests::lab::output;
use rand::RngExt;

use crate::kernel::{Heard, heard};
use crate::members::{Data, cut, mend};
use crate::peers::{PREFIX, key_of, leases};
use crate::record::{Event, Mark, Records, Told, now, read};
use crate::scenario::Shown;
use crate::world::{Form, PATIENCE, Shape, World};

const SECOND: Duration = Duration::from_secs(1);

/// The grace of scenarios that wait for its end.
const GRACE: u32 = 8;

/// A key that is no lease to anybody.
struct Poison {
    key: String,
    value: Vec<u8>,
}

impl Poison {
    fn new(name: &str, value: impl Into<Vec<u8>>) -> Self {
        Self { key: format!("{}{name}", leases()), value: value.into() }
    }

    /// Whether a line of a log is about it: by its key or, if that can be read, by its subnet.
    fn is_named_in(&self, line: &str) -> bool {
        let subnet = self.key.strip_prefix(&leases()).unwrap_or_default().replace('-', "/");
        let names = [format!("key={}", self.key), format!("subnet={subnet}")];
        names.iter().any(|name| {
            line.match_indices(name).any(|(at, _)| line[at + name.len()..].starts_with([' ', '"']))
        })
    }
}

fn poisons() -> Vec<Poison> {
    let good = |address: &str, mac: &str| {
        format!(
            r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    };
    let mac = |number: usize| format!("0e:bb:00:00:00:{number:02x}");
    let mut poisons = vec![];
    // Keys that are no subnet.
    for (number, name) in [
        "rubbish",
        "10.5.200.0",
        "10.5.200.0-33",
        "10.5.200.0-24-24",
        "10.5.300.0-24",
        "-",
        "10.5.200.0-24/deeper",
        "10.5.200.0-٢٤",
        "10.5.0200.0-24",
        "0.0.0.0-0",
        "%2e%2e-24",
    ]
    .into_iter()
    .enumerate()
    {
        poisons.push(Poison::new(name, good(&format!("172.20.0.{number}"), &mac(number))));
    }
    // Subnets that nobody may have.
    for (number, subnet) in [
        "10.6.0.0-24",
        "10.5.0.0-16",
        "10.0.0.0-8",
        "192.168.77.0-24",
        "10.5.201.7-24",
        "127.0.0.0-24",
        "224.0.0.0-24",
    ]
    .into_iter()
    .enumerate()
    {
        poisons.push(Poison::new(subnet, good(&format!("172.20.1.{number}"), &mac(0x20 + number))));
    }
    // Values that nobody can use, each in a subnet of its own.
    let values: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"null".to_vec(),
        b"[]".to_vec(),
        b"\xff\xfe\x00".to_vec(),
        [b"[".repeat(100_000), b"]".repeat(100_000)].concat(),
        vec![b'x'; 1 << 20],
        br#"{"PublicIP":7}"#.to_vec(),
        br#"{"PublicIP":"not an address","BackendType":"vxlan"}"#.to_vec(),
        good("0.0.0.0", &mac(0x40)).into(),
        good("127.0.0.1", &mac(0x41)).into(),
        good("224.0.0.1", &mac(0x42)).into(),
        good("255.255.255.255", &mac(0x43)).into(),
        good("10.5.100.1", &mac(0x44)).into(),
        good("172.20.2.1", "00:00:00:00:00:00").into(),
        good("172.20.2.2", "ff:ff:ff:ff:ff:ff").into(),
        good("172.20.2.3", "01:00:5e:00:00:01").into(),
        good("172.20.2.4", "nonsense").into(),
        br#"{"PublicIP":"172.20.2.5","BackendType":"host-gw"}"#.to_vec(),
        br#"{"PublicIP":"172.20.2.6","BackendType":"vxlan"}"#.to_vec(),
        br#"{"PublicIP":"172.20.2.7","BackendType":"vxlan","BackendData":{"VNI":99,"VtepMAC":"0e:bb:00:00:00:50"}}"#
            .to_vec(),
        br#"{"PublicIP":"172.20.2.8","BackendType":"vxlan","BackendData":"0e:bb:00:00:00:51"}"#.to_vec(),
        br#"{"PublicIP":"172.20.2.9","BackendType":"vxlan","BackendData":{"VNI":-1,"VtepMAC":"0e:bb:00:00:00:52"}}"#
            .to_vec(),
        br#"{"PublicIP":"::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:bb:00:00:00:53"}}"#.to_vec(),
    ];
    for (number, value) in values.into_iter().enumerate() {
        poisons.push(Poison::new(&format!("10.5.{}.0-24", 202 + number), value));
    }
    poisons
}

/// E-3.
pub(crate) fn poison(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 20, ..Shape::default() });
    let mut shown = Shown::default();
    let mut poisons = poisons();
    let first = world.there[&100].clone();
    // Two who want one MAC, and one who says to be where a host is: the lower subnet has it.
    poisons.push(Poison::new("10.5.240.0-24", first.value().replace(&first.address, "172.20.3.1")));
    let other = first.value().replace(&first.mac, "0e:bb:00:00:01:01");
    poisons.push(Poison::new("10.5.241.0-24", other.replace(&first.address, "192.168.77.1")));
    // Parts of what a host has.
    for (part, number) in [("0-25", 1), ("128-25", 2)] {
        let other = other.replace(":01:01", &format!(":02:{number:02x}"));
        let other = other.replace(&first.address, &format!("172.20.4.{number}"));
        poisons.push(Poison::new(&format!("{}.{part}", world.agents[0].subnet), other));
    }
    let mut random = rand::rng();
    // Of a thousand keys the agent remembers that it has named them.
    for number in 0..form.of(20, 900) {
        let bytes: Vec<u8> = (0..random.random_range(0..200)).map(|_| random.random()).collect();
        let name: String = (0..8)
            .map(|_| char::from(random.random_range(b'!'..b'~')))
            // One would be a path, the other is shown as two.
            .filter(|letter| !['/', '\\'].contains(letter))
            .collect();
        poisons.push(Poison::new(&format!("random-{number}-{name}"), bytes));
    }
    for poison in &poisons {
        world.poison.insert(poison.key.clone());
        world.mark(&Mark::Poison { key: poison.key.clone() });
    }
    world.fault("poison in the store", 0..world.agents.len());
    let start = Instant::now();
    for poison in &poisons {
        world.store.put(&poison.key, poison.value.clone());
    }
    let put = start.elapsed();
    world.join(150);
    let found = world.converges(SECOND * 10);
    shown.within(&mut world, "healthy peers beside poison", SECOND * 10, found);
    // The same again tells nothing new.
    for poison in &poisons {
        world.store.put(&poison.key, poison.value.clone());
    }
    thread::sleep(SECOND * 2);
    named_once(&mut world, &poisons);
    for poison in &poisons {
        world.store.delete(&poison.key);
    }
    world.leave(150);
    let found = world.converges(SECOND * 10);
    shown.within(&mut world, "after the poison", SECOND * 10, found);
    shown.note(format!("{} keys put in {:.1} s, twice", poisons.len(), put.as_secs_f64()));
    // A line for each.
    shown.bounds.log = 50_000 + 400 * poisons.len() as u64;
    shown.end(world)
}

/// Each is named by a warning of each agent, once.
fn named_once(world: &mut World, poisons: &[Poison]) {
    for index in 0..world.agents.len() {
        let log = world.log(index);
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
        let count = |poison: &Poison| warnings.iter().filter(|line| poison.is_named_in(line)).count();
        let others =
            poisons.iter().map(|poison| (&poison.key, count(poison))).filter(|(_, count)| *count != 1);
        let words: Vec<String> = others.map(|(key, count)| format!("{key} {count} times")).collect();
        let (many, words) = (words.len(), words.iter().take(5).cloned().collect::<Vec<_>>().join(", "));
        world.claim(many == 0, || {
            format!("host {} names {many} keys otherwise than once: {words}", index + 1)
        });
    }
}

/// E-8.
pub(crate) fn compacted_while_cut_off(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 40, ..Shape::default() });
    let mut shown = Shown::default();
    let cut_off = form.of(SECOND * 20, SECOND * 300);
    let (host, since) = (world.host(0).clone(), now());
    world.fault("cut off from etcd", [0]);
    cut(&host);
    thread::sleep(cut_off / 2);
    // Thirty in a hundred: changed, gone, come.
    (100..106).for_each(|number| world.join(number));
    (110..113).for_each(|number| world.leave(number));
    (150..153).for_each(|number| world.join(number));
    world.catch_up();
    let revision = world.store.revision();
    world.store.compact(revision);
    thread::sleep(cut_off / 2);
    let start = Instant::now();
    mend(&host);
    world.blind(0, since);
    let healed = now();
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    // Its next attempt is five seconds away at most.
    shown.within(&mut world, "healed", SECOND * 8, found);
    // The kernels' words are written down a moment after they are said.
    thread::sleep(Duration::from_millis(300));
    let own = read::<Told>(&world.records.kernel(1));
    let changes =
        own.iter().filter(|told| told.t >= healed).filter_map(|told| Some((told, heard(&told.line)?)));
    let (first, last) = changes
        .fold((f64::INFINITY, 0.0_f64), |(first, last), (told, _)| (told.t.min(first), told.t.max(last)));
    let spread = (last - first).max(0.0);
    world.claim(spread <= 2.0, || format!("from the first change to the last {spread:.1} s, 2 are allowed"));
    only_changed(&mut world, &own, healed);
    world.catch_up();
    let key = key_of(&format!("{}.0/24", world.agents[0].subnet));
    let history: Vec<Event> = read(&world.records.path("history.jsonl"));
    let writes = history.iter().filter(|event| event.key == key).count();
    world.claim(writes == 1, || format!("its own key was written {writes} times, once is enough"));
    shown.note(format!(
        "cut off for {cut_off:?}; all changes made within {:.0} ms of the first",
        spread * 1000.0
    ));
    shown.end(world)
}

/// After `healed` the kernel of the first host told of nothing but what had changed.
fn only_changed(world: &mut World, told: &[Told], healed: f64) {
    let changed: Vec<String> =
        (100..106).chain(110..113).chain(150..153).map(|number| format!("10.5.{number}.0")).collect();
    let unchanged: Vec<String> = world
        .there
        .iter()
        .filter(|(number, _)| !(100..106).contains(*number) && !(150..153).contains(*number))
        .flat_map(|(_, peer)| [peer.mac.clone(), peer.subnet.trim_end_matches("/24").to_owned()])
        .chain(world.agents.iter().map(|agent| format!("{}.0", agent.subnet)))
        .collect();
    let is_wrong = |told: &&Told| {
        let is_ours = heard(&told.line).is_some_and(|heard| heard != Heard::DeviceGone);
        told.t >= healed
            && is_ours
            && unchanged.iter().any(|word| told.line.contains(word.as_str()))
            && !changed.iter().any(|word| told.line.contains(word.as_str()))
    };
    let wrong: Vec<&Told> = told.iter().filter(is_wrong).collect();
    let (count, first) = (wrong.len(), wrong.first().map(|told| told.line.clone()).unwrap_or_default());
    world.claim(count == 0, || format!("{count} operations on unchanged peers, as in: {first}"));
}

/// E-9, by `del --prefix`.
pub(crate) fn all_deleted(records: Records, _: Form) -> Shown {
    emptied(records, |world| {
        let deleted = world.store.delete_prefix(&leases());
        world.say(&format!("{deleted} leases deleted"));
    })
}

/// E-9, by a new etcd in the place of the old one.
pub(crate) fn wiped(records: Records, _: Form) -> Shown {
    emptied(records, |world| {
        world.wipe();
        let config = world.shape.config;
        world.put_foreign_keys();
        world.store.put(&format!("{PREFIX}/config"), config);
    })
}

/// All leases are gone: the hosts put theirs back, those of the others are held for a while.
fn emptied(records: Records, empty: fn(&mut World)) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 20, grace: GRACE, ..Shape::default() });
    let mut shown = Shown::default();
    world.fault("all leases are gone", 0..world.agents.len());
    let start = Instant::now();
    empty(&mut world);
    world.there.clear();
    let back = world.comes(PATIENCE, |world| world.store.list(&leases()).len() == world.agents.len());
    let back = back.map(|_| start.elapsed());
    shown.within(
        &mut world,
        "the owners' own keys",
        SECOND * 10,
        back.ok_or_else(|| "never came back".into()),
    );
    let held = Duration::from_secs(GRACE.into());
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    let time = found.clone().unwrap_or_default();
    world.claim(found.is_ok(), || format!("those who are really gone: {found:?}"));
    shown.note(format!("the hosts' keys came back; the rest was let go after {:.1} s", time.as_secs_f64()));
    world.claim(time >= held / 2, || format!("let go after {time:.1?}: nothing was held for {held:?}"));
    shown.end(world)
}

/// E-9, a snapshot of before: the same cluster to its clients.
pub(crate) fn restored_same(records: Records, _: Form) -> Shown {
    restored(records, false)
}

/// E-9, the same as another cluster.
pub(crate) fn restored_other(records: Records, _: Form) -> Shown {
    restored(records, true)
}

fn restored(records: Records, is_other: bool) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 20, grace: GRACE, ..Shape::default() });
    let mut shown = Shown::default();
    let file = world.lab.path("snapshot");
    let etcdctl = |world: &World, words: &[&str]| {
        let endpoint = world.members.endpoint(0);
        let mut all = vec!["env", "ETCDCTL_API=3", "etcdctl", "--endpoints", &endpoint];
        all.extend(words);
        let output = output(&[&["ip", "netns", "exec", &world.lab.wire()], &all[..]].concat());
        assert!(output.status.success(), "etcdctl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let file = file.display().to_string();
    etcdctl(&world, &["snapshot", "save", &file]);
    // The world goes on, and all of it will be forgotten: some join, some change, some leave, a host has its lease
    // put anew.
    let was = world.there.clone();
    (120..135).for_each(|number| world.join(number));
    (100..103).for_each(|number| world.join(number));
    (105..107).for_each(|number| world.leave(number));
    let found = world.converges(SECOND * 10);
    shown.within(&mut world, "before", SECOND * 10, found);
    world.catch_up();
    world.members.kill_all(Data::Gone);
    if is_other {
        world.members.new_token();
    }
    for index in 0..world.members.count() {
        let (data, cluster, token) =
            (world.members.data(index), world.members.cluster(), world.members.token());
        let peer = format!("http://{}:2380", world.members.host(index).address);
        let data = data.display().to_string();
        let name = format!("m{index}");
        let words = ["snapshot", "restore", &file, "--name", &name, "--data-dir", &data];
        let more = ["--initial-cluster", &cluster, "--initial-cluster-token", &token];
        etcdctl(&world, &[&words[..], &more, &["--initial-advertise-peer-urls", &peer]].concat());
    }
    world.fault("an old snapshot was restored", 0..world.agents.len());
    world.members.start_all();
    world.store.answers();
    world.there = was;
    let start = Instant::now();
    let grace = Duration::from_secs(GRACE.into());
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    shown.within(&mut world, "after the return", SECOND * 10 + grace, found);
    fs::remove_file(file).expect("it was just written");
    shown.end(world)
}
