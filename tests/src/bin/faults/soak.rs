//! Faults by chance for as long as one likes, on five hosts, and what the agents use meanwhile.
//!
//! One fault at a time, each followed by a moment in which all has to come right
//! again. Three of the agents live through all of it, and their memory,
//! descriptors and logs are what is measured; the other two are killed now and then.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::check::{Bounds, check};
use crate::host_faults::move_address;
use crate::kernel::held;
use crate::members::{Data, cut, mend};
use crate::owner_faults::reboot;
use crate::peers::{key_of, leases};
use crate::record::{Mark, Records, Sample, now, read};
use crate::tell;
use crate::world::{PATIENCE, Shape, World, agent_knows, delete_device, delete_object};

const HOSTS: usize = 5;

/// Hosts whose agents are never killed: the first so many.
const SURVIVORS: usize = 3;

/// Longer than any fault needs to be forgotten.
const LIMIT: Duration = Duration::from_secs(30);

/// Seconds that a mass removal is held.
const GRACE: u32 = 8;

type Fault = (&'static str, u32, fn(&mut Nemesis));

/// What is done, and how often compared with the others.
const FAULTS: &[Fault] = &[
    ("nothing but a few changes", 2, |nemesis| nemesis.churn(5)),
    ("many changes at once", 2, |nemesis| nemesis.churn(40)),
    ("leader killed", 4, Nemesis::leader_killed),
    ("member frozen", 2, Nemesis::member_frozen),
    ("endpoint whose packets vanish", 2, Nemesis::black_hole),
    ("all members away", 1, Nemesis::all_away),
    ("host cut off, history compacted", 2, Nemesis::cut_off),
    ("agent killed", 3, Nemesis::agent_killed),
    ("agent frozen", 2, Nemesis::agent_frozen),
    ("device deleted", 2, Nemesis::device_deleted),
    ("a third of the entries deleted", 2, Nemesis::entries_deleted),
    ("a host's own key deleted", 2, Nemesis::own_key_deleted),
    ("a host's etcd lease revoked", 1, Nemesis::own_lease_revoked),
    ("all leases deleted", 1, Nemesis::all_deleted),
    ("poison", 2, Nemesis::poison),
    ("host booted", 2, Nemesis::booted),
    ("host booted while all members are away", 1, Nemesis::booted_alone),
    ("another address between the hosts", 1, Nemesis::address_moved),
];

struct Nemesis {
    world: World,
    random: StdRng,
    /// When each host was given another address last.
    moved: [f64; HOSTS],
}

/// Whether all went well.
#[allow(clippy::print_stdout)]
pub(crate) fn soak(minutes: u64, seed: Option<u64>, directory: &Path) -> bool {
    let seed = seed.unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    println!("seed {seed}");
    let records = Records::create(directory.to_owned());
    let work = || run(records.clone(), Duration::from_secs(minutes * 60), seed);
    // On a thread of its own, because a thread that has entered a namespace stays there.
    let outcome = thread::scope(|scope| scope.spawn(work).join());
    let Ok(outcome) = outcome else {
        println!("it panicked; the seed was {seed}");
        return false;
    };
    let hours = minutes as f64 / 60.0;
    let faults: u32 = outcome.faults.values().map(|(count, _)| count).sum();
    println!("\n| Fault | Times | Right again within |\n|---|---|---|");
    for (name, (count, worst)) in &outcome.faults {
        println!("| {name} | {count} | {:.1} s |", worst.as_secs_f64());
    }
    // A few lines for a fault.
    let bounds = Bounds { log: 50_000 + 500 * u64::from(faults), ..Bounds::default() };
    let verdict = check(&records, bounds);
    println!(
        "\n{} packets lost of {} on pairs that were not hurt, {} on those that were",
        verdict.lost, verdict.sent, verdict.excused
    );
    let mut broken = [outcome.broken, verdict.broken].concat();
    println!(
        "\n| Agent of host | RSS at 1/4, 1/2, 3/4, end | Last quarter over second | Descriptors first, last, most | Log per hour | Processor |"
    );
    println!("|---|---|---|---|---|---|");
    for host in 1..=SURVIVORS {
        println!("{}", flatness(&records, host, hours, &mut broken));
    }
    broken.iter().for_each(|words| println!("- {words}"));
    println!("{faults} faults, seed {seed}: {}", if broken.is_empty() { "passed" } else { "failed" });
    broken.is_empty()
}

struct Outcome {
    /// How often, and how long it took at most.
    faults: BTreeMap<&'static str, (u32, Duration)>,
    broken: Vec<String>,
}

fn run(records: Records, time: Duration, seed: u64) -> Outcome {
    let shape = Shape { hosts: HOSTS, peers: 20, grace: GRACE, rate: 100, ..Shape::default() };
    let world = World::healthy(records, shape);
    let mut nemesis = Nemesis { world, random: StdRng::seed_from_u64(seed), moved: [0.0; HOSTS] };
    let mut faults: BTreeMap<&'static str, (u32, Duration)> = BTreeMap::new();
    let (start, mut told) = (Instant::now(), Instant::now());
    let weights: u32 = FAULTS.iter().map(|(_, weight, _)| weight).sum();
    while start.elapsed() < time {
        let mut at = nemesis.random.random_range(0..weights);
        let (name, _, fault) = FAULTS
            .iter()
            .find(|(_, weight, _)| {
                let is_it = at < *weight;
                at = at.saturating_sub(*weight);
                is_it
            })
            .expect("the weights cover the range");
        nemesis.world.say(name);
        let since = now();
        fault(&mut nemesis);
        let healed = Instant::now();
        let found = nemesis.world.converges(LIMIT);
        let world = &mut nemesis.world;
        world.claim(found.is_ok(), || format!("after {name:?} at {since:.0}: {found:?}"));
        let (count, worst) = faults.entry(name).or_default();
        *count += 1;
        *worst = (*worst).max(healed.elapsed());
        thread::sleep(Duration::from_millis(nemesis.random.random_range(500..4000)));
        if told.elapsed() > Duration::from_secs(300) {
            told = Instant::now();
            let broken = nemesis.world.broken.len();
            tell(&format!(
                "{} of {} minutes, {broken} claims broken",
                start.elapsed().as_secs() / 60,
                time.as_secs() / 60
            ));
        }
    }
    // The last removals are held for a while.
    thread::sleep(Duration::from_secs(u64::from(GRACE)));
    let found = nemesis.world.converges(PATIENCE);
    nemesis.world.claim(found.is_ok(), || format!("at the end: {found:?}"));
    Outcome { faults, broken: nemesis.world.finish() }
}

impl Nemesis {
    fn seconds(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.random.random_range(from * 1000..to * 1000))
    }

    fn pause(&mut self, from: u64, to: u64) {
        thread::sleep(self.seconds(from, to));
    }

    fn host(&mut self) -> usize {
        self.random.random_range(0..HOSTS)
    }

    fn member(&mut self) -> usize {
        self.random.random_range(0..self.world.members.count())
    }

    /// Peers come, change and go; about twenty are there.
    fn churn(&mut self, changes: u32) {
        for _ in 0..changes {
            let number = self.random.random_range(100..140);
            match self.world.there.contains_key(&number) && self.random.random_bool(0.6) {
                true => self.world.leave(number),
                false => self.world.join(number),
            }
        }
    }

    fn leader_killed(&mut self) {
        let leader = self.world.store.leader();
        self.world.members.kill(leader, Data::Kept);
        self.churn(5);
        self.pause(0, 5);
        self.world.members.start(leader);
        self.churn(2);
    }

    fn member_frozen(&mut self) {
        let member = self.member();
        self.world.members.signal(member, Signal::SIGSTOP);
        self.churn(5);
        self.pause(1, 15);
        self.world.members.signal(member, Signal::SIGCONT);
    }

    fn black_hole(&mut self) {
        let member = self.member();
        self.world.members.hole(member);
        self.churn(5);
        self.pause(1, 20);
        self.world.members.mend(member);
    }

    fn all_away(&mut self) {
        self.world.members.kill_all(Data::Kept);
        self.pause(2, 30);
        self.world.members.start_all();
        self.world.store.answers();
        self.churn(3);
    }

    fn cut_off(&mut self) {
        let (index, since) = (self.host(), now());
        let host = self.world.host(index).clone();
        cut(&host);
        self.churn(10);
        self.pause(0, 25);
        if self.random.random_bool(0.5) {
            self.world.catch_up();
            let revision = self.world.store.revision();
            self.world.store.compact(revision);
        }
        mend(&host);
        self.world.blind(index, since);
    }

    fn agent_killed(&mut self) {
        let (index, since) = (self.random.random_range(SURVIVORS..HOSTS), now());
        self.world.kill_agent(index);
        self.churn(5);
        self.pause(0, 3);
        self.world.start_agent(index);
        self.world.blind(index, since);
    }

    fn agent_frozen(&mut self) {
        let (index, since) = (self.host(), now());
        self.world.signal_agent(index, Signal::SIGSTOP);
        self.churn(5);
        self.pause(1, 12);
        self.world.signal_agent(index, Signal::SIGCONT);
        self.world.blind(index, since);
    }

    /// Does something to the kernel of a host, whose packets are then excused until it is right again.
    fn meddle(&mut self, work: impl FnOnce(&mut Self, usize)) {
        let (index, since) = (self.host(), now());
        work(self, index);
        let found = self.world.converge(&[index], LIMIT);
        self.world.claim(found.is_ok(), || format!("host {}: {found:?}", index + 1));
        self.world.mark(&Mark::Meddled { host: index + 1, since, until: now() });
        self.world.excuse(index, since, now(), "its kernel was changed");
    }

    fn device_deleted(&mut self) {
        self.meddle(|nemesis, index| delete_device(nemesis.world.host(index)));
    }

    fn entries_deleted(&mut self) {
        self.meddle(|nemesis, index| {
            let host = nemesis.world.host(index).clone();
            for object in held(&host) {
                if nemesis.random.random_bool(0.3) {
                    delete_object(&host, &object);
                }
            }
        });
    }

    fn own_key_deleted(&mut self) {
        self.without_its_key(|nemesis, key| {
            nemesis.world.store.delete(key);
        });
    }

    fn own_lease_revoked(&mut self) {
        self.without_its_key(|nemesis, key| {
            if let Some((_, lease)) = nemesis.world.store.get(key) {
                nemesis.world.store.revoke(lease);
            }
        });
    }

    /// The others believe that a single host is gone, until it has put its key back.
    fn without_its_key(&mut self, work: impl FnOnce(&mut Self, &str)) {
        let (index, since) = (self.host(), now());
        let key = key_of(&format!("{}.0/24", self.world.agents[index].subnet));
        work(self, &key);
        let start = Instant::now();
        let back = self.world.comes(PATIENCE, |world| world.store.get(&key).is_some());
        let time = start.elapsed();
        let world = &mut self.world;
        world.claim(back.is_some() && time < Duration::from_secs(2), || {
            format!("the key of host {} took {time:.1?} to come back", index + 1)
        });
        let found = world.converges(LIMIT);
        world.claim(found.is_ok(), || format!("after the key of host {} came back: {found:?}", index + 1));
        world.excuse(index, since, now(), "its key was gone");
    }

    fn all_deleted(&mut self) {
        let since = now();
        self.world.store.delete_prefix(&leases());
        self.world.there.clear();
        let all = self.world.comes(PATIENCE, |world| world.store.list(&leases()).len() == HOSTS);
        self.world.claim(all.is_some(), || "the hosts' keys never came back".into());
        if !agent_knows("--removal-grace") {
            let found = self.world.converges(LIMIT);
            self.world.claim(found.is_ok(), || format!("after all was deleted: {found:?}"));
            (0..HOSTS).for_each(|index| self.world.excuse(index, since, now(), "nothing is held yet"));
        }
        self.churn(30);
    }

    fn booted(&mut self) {
        let (index, since) = (self.random.random_range(SURVIVORS..HOSTS), now());
        self.world.kill_agent(index);
        reboot(self.world.host(index));
        self.churn(5);
        self.world.start_agent(index);
        self.settled_again(index, since);
    }

    fn booted_alone(&mut self) {
        let (index, since) = (self.random.random_range(SURVIVORS..HOSTS), now());
        self.world.members.kill_all(Data::Kept);
        self.world.kill_agent(index);
        let host = self.world.host(index).clone();
        reboot(&host);
        let start = Instant::now();
        self.world.start_agent(index);
        let limit = Duration::from_secs(4);
        let file = self.world.comes(limit, |_| host.subnet_file().exists()).is_some();
        // What is remembered follows half a minute later, and of another address it is of no use.
        let remembers = since - self.moved[index] > 40.0;
        self.world.claim(file || !remembers, || {
            format!("no subnet.env of host {} after {:.1?}", index + 1, start.elapsed())
        });
        self.pause(0, 10);
        self.world.members.start_all();
        self.world.store.answers();
        self.settled_again(index, since);
    }

    fn settled_again(&mut self, index: usize, since: f64) {
        let found = self.world.converges(LIMIT);
        let ready = self.world.comes(LIMIT, |world| world.is_ready(index));
        self.world
            .claim(found.is_ok() && ready.is_some(), || format!("host {}, booted: {found:?}", index + 1));
        self.world.blind(index, since);
        self.world.mark(&Mark::Meddled { host: index + 1, since, until: now() });
        self.world.excuse(index, since, now(), "it was booted");
    }

    fn address_moved(&mut self) {
        let index = self.random.random_range(SURVIVORS..HOSTS);
        let key = key_of(&format!("{}.0/24", self.world.agents[index].subnet));
        let since = now();
        self.moved[index] = since;
        self.world.mark(&Mark::Given { key, t: since });
        // Never two of them the same.
        let first = 100 + 20 * u8::try_from(index).expect("few hosts");
        move_address(&mut self.world, index, self.random.random_range(first..first + 20));
        let found = self.world.converges(LIMIT);
        self.world.claim(found.is_ok(), || format!("host {}, moved: {found:?}", index + 1));
        self.world.mark(&Mark::Meddled { host: index + 1, since, until: now() });
        self.world.excuse(index, since, now(), "its address changed");
    }

    fn poison(&mut self) {
        let mut keys = vec![];
        for _ in 0..self.random.random_range(1..10) {
            let number: u16 = self.random.random_range(0..1000);
            let bytes: Vec<u8> =
                (0..self.random.random_range(0..300)).map(|_| self.random.random()).collect();
            let key = match self.random.random_bool(0.5) {
                true => format!("{}rubbish-{number}", leases()),
                false => format!("{}10.5.{}.0-24", leases(), 200 + number % 40),
            };
            self.world.poison.insert(key.clone());
            self.world.mark(&Mark::Poison { key: key.clone() });
            self.world.store.put(&key, bytes);
            keys.push(key);
        }
        self.churn(3);
        self.pause(0, 3);
        for key in keys {
            self.world.store.delete(&key);
        }
    }
}

/// What an agent used over time, as a line of the table; what grew too much is added to `broken`.
fn flatness(records: &Records, host: usize, hours: f64, broken: &mut Vec<String>) -> String {
    const MOST_GROWTH: i64 = 1024;
    let samples: Vec<Sample> =
        read::<Sample>(&records.agent(host)).into_iter().filter(|sample| sample.rss > 0).collect();
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        broken.push(format!("host {host} was never looked at"));
        return String::new();
    };
    let quarter = |number: usize| &samples[samples.len() * number / 4..samples.len() * (number + 1) / 4];
    let mean = |number: usize| {
        let rss = quarter(number).iter().map(|sample| sample.rss);
        rss.sum::<u64>() / quarter(number).len().max(1) as u64
    };
    let ends: Vec<String> =
        (0..4).filter_map(|number| Some(quarter(number).last()?.rss.to_string())).collect();
    let growth = mean(3) as i64 - mean(1) as i64;
    if growth > MOST_GROWTH {
        broken.push(format!("host {host}: memory grew by {growth} KiB, {MOST_GROWTH} are allowed"));
    }
    // A connection may just be opened or closed.
    let descriptors = |samples: &[Sample]| samples.iter().map(|sample| sample.descriptors).min().unwrap_or(0);
    let (early, late) = (descriptors(quarter(1)), descriptors(quarter(3)));
    if late > early + 2 {
        broken.push(format!(
            "host {host}: at least {early} descriptors in the second quarter, {late} in the last"
        ));
    }
    let most = samples.iter().map(|sample| sample.descriptors).max().unwrap_or(0);
    let log = last.log as f64 / 1000.0 / hours;
    let cpu = last.cpu.saturating_sub(first.cpu) as f64 / (last.t - first.t) / 10.0;
    format!(
        "| {host} | {} KiB | {growth:+} KiB | {early}, {late}, {most} | {log:.0} kB | {cpu:.2} % |",
        ends.join(", ")
    )
}
