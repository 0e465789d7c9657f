//! The invariants, checked off-line over what was recorded.
//!
//! ```text
//!   I1  one owner: a subnet's key never goes to another without being deleted; no two live ones overlap
//!   I2  at the end the kernel is what the leases say
//!   I3  what somebody else made is still there
//!   I4  a peer's objects go only after its key has
//!   I5  subnet.env stays as it is
//!   I6  (revisions never go back: not to be seen from outside; the simulation has it)
//!   I7  the password is nowhere
//!   I8  memory, descriptors and log stay within bounds
//!   I9  ready means in step, and a fault shows within ten seconds
//!   I10 the way stands when the agents have ended
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;

use ipnetwork::Ipv4Network;
use serde_json::Value;

use crate::kernel::{self, Heard, Object, Objects};
use crate::peers::{Lease, PREFIX, key_of, leases};
use crate::record::{End, Event, Mark, Packets, Records, Sample, Time, Told, What, read};
use crate::world::{CANARY, contains};

/// What a fault has to be shown within.
const SHOWN_WITHIN: f64 = 10.0;

/// What changed less than so long ago may still be on its way.
const STABLE: f64 = 15.0;

/// The recorder of etcd may lag behind the agents by so much.
const RECORDER: f64 = 5.0;

/// How long a peer's objects may outlive its key: the longest grace, and time to look twice.
const HELD: f64 = 100.0;

/// What agents may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) log: u64,
    /// KiB.
    pub(crate) memory: u64,
    pub(crate) descriptors: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { log: 50_000, memory: 64 << 10, descriptors: 64 }
    }
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// The invariants that were broken, each with its words.
    pub(crate) broken: Vec<String>,
    /// Packets that nothing excuses.
    pub(crate) lost: u64,
    pub(crate) excused: u64,
    pub(crate) sent: u64,
    /// How many seconds it took at most until a host showed a fault.
    pub(crate) shown: Option<f64>,
    /// The most of any agent.
    pub(crate) log: u64,
    pub(crate) memory: u64,
    pub(crate) descriptors: usize,
}

/// Checks the records of one scenario.
pub(crate) fn check(records: &Records, bounds: Bounds) -> Verdict {
    let read = Read::of(records);
    let mut verdict = Verdict::default();
    let rules: [fn(&Read, &mut Vec<String>); 6] =
        [one_owner, converged, foreign, no_spurious_removal, same_file, honest_readiness];
    for rule in rules {
        let before = verdict.broken.len();
        rule(&read, &mut verdict.broken);
        // One broken thing tends to be seen in a hundred places.
        let more = verdict.broken.len().saturating_sub(before + 3);
        if more > 0 {
            verdict.broken.truncate(before + 3);
            verdict.broken.push(format!("… and {more} more of the same"));
        }
    }
    read.faults_are_shown(&mut verdict);
    read.secrets(records, &mut verdict.broken);
    read.bounds(bounds, &mut verdict);
    read.packets(&mut verdict);
    verdict
}

struct Read {
    history: Vec<Event>,
    marks: Vec<Mark>,
    packets: Vec<Packets>,
    end: End,
    hosts: BTreeMap<usize, HostRead>,
    poison: BTreeSet<String>,
}

struct HostRead {
    told: Vec<Told>,
    samples: Vec<Sample>,
    log: Vec<(Time, String)>,
}

impl Read {
    fn of(records: &Records) -> Self {
        let end: End = fs::read_to_string(records.path("end.json"))
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let host = |&number: &usize| {
            let log = fs::read(records.log(number)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log)
                .lines()
                .filter_map(|line| Some((time_of(line)?, line.to_owned())))
                .collect();
            let (told, samples) = (read(&records.kernel(number)), read(&records.agent(number)));
            (number, HostRead { told, samples, log })
        };
        let hosts = end.hosts.keys().map(host).collect();
        let marks: Vec<Mark> = read(&records.marks());
        let poison = marks.iter().filter_map(|mark| match mark {
            Mark::Poison { key } => Some(key.clone()),
            _ => None,
        });
        Self {
            history: read(&records.path("history.jsonl")),
            poison: poison.collect(),
            marks,
            packets: read(&records.path("packets.jsonl")),
            end,
            hosts,
        }
    }

    fn stopped(&self) -> Time {
        let stopped = self.marks.iter().find_map(|mark| match mark {
            Mark::Stopped { t } => Some(*t),
            _ => None,
        });
        stopped.unwrap_or(f64::INFINITY)
    }

    fn unserved(&self, of: usize) -> bool {
        self.marks.iter().any(|mark| matches!(mark, Mark::Unserved { host } if *host == of))
    }

    fn given(&self, key: &str) -> bool {
        self.marks.iter().any(|mark| matches!(mark, Mark::Given { key: given, .. } if given == key))
    }

    /// What was being done then, in words.
    fn doing(&self, at: Time) -> String {
        let said = self.marks.iter().filter_map(|mark| match mark {
            Mark::Said { t, what } if *t <= at => Some((t, what)),
            _ => None,
        });
        match said.max_by(|(one, _), (other, _)| one.total_cmp(other)) {
            Some((t, what)) => format!("{:.1} s into {what:?}", at - t),
            None => "before anything was done".into(),
        }
    }

    /// Whether the scenario itself was at that kernel, a little before or after too.
    fn meddled(&self, of: usize, t: Time) -> bool {
        self.marks.iter().any(|mark| {
            matches!(mark, Mark::Meddled { host, since, until }
                if *host == of && *since - 1.0 <= t && t <= *until + 3.0)
        })
    }

    fn blind(&self, of: usize, t: Time) -> bool {
        self.marks.iter().any(|mark| {
            matches!(mark, Mark::Blind { host, since, until }
                if *host == of && *since - 1.0 <= t && t <= *until + 10.0)
        })
    }

    fn excuse(&self, ends: [usize; 2], from: Time, to: Time) -> Option<&str> {
        self.marks.iter().find_map(|mark| match mark {
            Mark::Excused { host, since, until, why }
                if ends.contains(host) && *since - 0.5 <= from && to <= *until + 0.5 =>
            {
                Some(why.as_str())
            }
            _ => None,
        })
    }

    /// The leases over time, without the poison.
    fn timeline(&self) -> Timeline {
        let mut timeline = Timeline::default();
        for event in &self.history {
            match event.what {
                What::World => timeline.new_world(event.t),
                What::Gap => {}
                What::Put if !self.poison.contains(&event.key) => {
                    if let Some(lease) = Lease::read(&event.key, &event.value) {
                        timeline.put(event.t, lease);
                    }
                }
                What::Put => {}
                What::Delete => timeline.delete(event.t, &event.key),
            }
        }
        timeline
    }

    fn faults_are_shown(&self, verdict: &mut Verdict) {
        for mark in &self.marks {
            let Mark::Fault { t, what, hosts } = mark else { continue };
            for number in hosts {
                let Some(host) = self.hosts.get(number) else { continue };
                let said = host.log.iter().map(|(at, _)| *at);
                let shown = host.samples.iter().filter(|sample| sample.page.is_some()).map(|sample| sample.t);
                let first = said
                    .chain(shown)
                    .filter(|at| at >= t && *at < self.stopped())
                    .fold(f64::INFINITY, f64::min)
                    - t;
                if first > SHOWN_WITHIN {
                    verdict.broken.push(format!("I9: host {number} shows nothing within 10 s of: {what}"));
                }
                verdict.shown = Some(verdict.shown.unwrap_or(0.0).max(first));
            }
        }
    }

    fn secrets(&self, records: &Records, broken: &mut Vec<String>) {
        let entries = fs::read_dir(records.path("")).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()).filter(|path| path.is_file()) {
            if fs::read(&path).is_ok_and(|bytes| contains(&bytes, CANARY.as_bytes())) {
                broken.push(format!("I7: the password is in {}", path.display()));
            }
        }
    }

    fn bounds(&self, bounds: Bounds, verdict: &mut Verdict) {
        let samples = || self.hosts.values().flat_map(|host| &host.samples);
        verdict.log = samples().map(|sample| sample.log).max().unwrap_or(0);
        verdict.memory = samples().map(|sample| sample.rss).max().unwrap_or(0);
        verdict.descriptors = samples().map(|sample| sample.descriptors).max().unwrap_or(0);
        let Verdict { log, memory, descriptors, .. } = *verdict;
        for (what, is, most) in [
            ("bytes of log", log, bounds.log),
            ("KiB of memory", memory, bounds.memory),
            ("descriptors", descriptors as u64, bounds.descriptors as u64),
        ] {
            if is > most {
                verdict.broken.push(format!("I8: {is} {what}, {most} are allowed"));
            }
        }
    }

    fn packets(&self, verdict: &mut Verdict) {
        let stopped = self.stopped();
        let mut worst: BTreeMap<(usize, usize), (u64, Time)> = BTreeMap::new();
        let mut after = 0;
        for packets in &self.packets {
            match *packets {
                Packets::Sum { sent, .. } => verdict.sent += sent,
                Packets::Lost { from, to, since, until, count } => {
                    if self.excuse([from, to], since, until).is_some() {
                        verdict.excused += count;
                        continue;
                    }
                    verdict.lost += count;
                    after += if until >= stopped { count } else { 0 };
                    worst.entry((from, to)).or_insert((0, since)).0 += count;
                }
            }
        }
        if after > 0 {
            verdict.broken.push(format!("I10: {after} packets lost after the agents were stopped"));
        }
        if let Some(((from, to), (count, since))) = worst.iter().max_by_key(|(_, (count, _))| *count) {
            let lost = verdict.lost;
            let doing = self.doing(*since);
            verdict.broken.push(format!(
                "{lost} packets lost, {count} of them from host {from} to {to}, first at {since:.3}, {doing}"
            ));
        }
    }
}

/// The leases over time.
#[derive(Debug, Default)]
struct Timeline {
    /// By key: when it changed, and what it was from then on.
    changes: HashMap<String, Vec<(Time, Option<Lease>)>>,
}

impl Timeline {
    fn put(&mut self, t: Time, lease: Lease) {
        self.changes.entry(lease.key()).or_default().push((t, Some(lease)));
    }

    fn delete(&mut self, t: Time, key: &str) {
        if let Some(changes) = self.changes.get_mut(key) {
            changes.push((t, None));
        }
    }

    fn new_world(&mut self, t: Time) {
        self.changes.values_mut().for_each(|changes| changes.push((t, None)));
    }

    /// Whether there was a moment from `since` to `until` at which `is_so` of what the key said.
    fn ever(&self, key: &str, since: Time, until: Time, is_so: impl Fn(Option<&Lease>) -> bool) -> bool {
        let none = vec![];
        let changes = self.changes.get(key).unwrap_or(&none);
        let before = changes.iter().rev().find(|(t, _)| *t <= since).and_then(|(_, lease)| lease.as_ref());
        let within = changes.iter().filter(|(t, _)| since < *t && *t <= until);
        is_so(before) || within.into_iter().any(|(_, lease)| is_so(lease.as_ref()))
    }

    /// What a key said, if it said the same from `since` to `until`.
    fn steady(&self, key: &str, since: Time, until: Time) -> Option<&Lease> {
        let changes = self.changes.get(key)?;
        if changes.iter().any(|(t, _)| since < *t && *t <= until) {
            return None;
        }
        changes.iter().rev().find(|(t, _)| *t <= since)?.1.as_ref()
    }
}

fn one_owner(read: &Read, broken: &mut Vec<String>) {
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    let mut records: BTreeMap<String, String> = BTreeMap::new();
    let hosts = format!("{PREFIX}/hosts/");
    for event in &read.history {
        if event.what == What::World {
            owners.clear();
            records.clear();
        }
        if event.what == What::Gap {
            broken.push(format!("I1: events up to revision {} were compacted unseen", event.revision));
        }
        let is_record = event.key.starts_with(&hosts) && !event.key.ends_with("/asks");
        let (map, owner) = if is_record {
            let id = serde_json::from_str::<Value>(&event.value).ok();
            (&mut records, id.and_then(|value| value["HostID"].as_str().map(String::from)))
        } else {
            let lease = Lease::read(&event.key, &event.value).filter(|_| !read.poison.contains(&event.key));
            (&mut owners, lease.map(|lease| owner(lease.address)))
        };
        match (event.what, owner) {
            (What::Delete, _) => {
                map.remove(&event.key);
                // The record is nothing without its subnet, if somebody deletes that alone.
                let subnet = event.key.strip_prefix(&leases()).unwrap_or_default();
                records.remove(&format!("{hosts}{subnet}"));
            }
            (What::Put, Some(owner)) => {
                if !is_record && !map.contains_key(&event.key) {
                    overlaps(&event.key, map.keys(), broken);
                }
                let former = map.insert(event.key.clone(), owner.clone());
                if let Some(former) = former.filter(|former| *former != owner && !read.given(&event.key)) {
                    broken.push(format!(
                        "I1: {} went from {former} to {owner} at revision {}",
                        event.key, event.revision
                    ));
                }
            }
            _ => {}
        }
    }
    let mut files: BTreeMap<Ipv4Network, usize> = BTreeMap::new();
    for (number, host) in &read.end.hosts {
        let Some(subnet) = subnet_of(&host.file) else { continue };
        if let Some(other) = files.insert(subnet, *number) {
            broken.push(format!("I1: hosts {other} and {number} both have {subnet}"));
        }
    }
}

/// Peers that exist only as leases change their addresses, and are one owner all the same.
fn owner(address: String) -> String {
    if address.starts_with("172.16.") { "a peer without a host".into() } else { address }
}

fn overlaps<'a>(key: &str, others: impl Iterator<Item = &'a String>, broken: &mut Vec<String>) {
    let network = |key: &str| key.strip_prefix(&leases())?.replace('-', "/").parse::<Ipv4Network>().ok();
    let Some(own) = network(key) else { return };
    for other in others {
        if network(other).is_some_and(|network| network.overlaps(own)) {
            broken.push(format!("I1: {key} overlaps {other}"));
        }
    }
}

fn converged(read: &Read, broken: &mut Vec<String>) {
    let sound = read.end.leases.iter().filter(|(key, _)| !read.poison.contains(*key));
    let list: Vec<Lease> = sound.filter_map(|(key, value)| Lease::read(key, value)).collect();
    for (number, host) in read.end.hosts.iter().filter(|(number, _)| !read.unserved(**number)) {
        let held: Objects = host.held.iter().cloned().collect();
        if let Some(difference) = kernel::difference(&kernel::wanted(&list, &host.address), &held) {
            broken.push(format!("I2: at the end on host {number}: {difference}"));
        }
    }
}

fn foreign(read: &Read, broken: &mut Vec<String>) {
    for key in &read.end.lost_keys {
        broken.push(format!("I3: the foreign key {key} is gone"));
    }
    for (number, host) in &read.end.hosts {
        for object in &host.lost_objects {
            broken.push(format!("I3: gone from host {number}: {object}"));
        }
    }
}

fn no_spurious_removal(read: &Read, broken: &mut Vec<String>) {
    let timeline = read.timeline();
    for (&number, host) in &read.hosts {
        for told in &host.told {
            let Some(Heard::Went(object)) = kernel::heard(&told.line) else { continue };
            if read.meddled(number, told.t) {
                continue;
            }
            let (since, until) = (told.t - HELD, told.t + RECORDER);
            let is_right = match &object {
                Object::Route { subnet, .. } => {
                    timeline.ever(&key_of(subnet), since, until, |lease| lease.is_none())
                }
                Object::Neighbour { address, .. } => {
                    timeline.ever(&key_of(&format!("{address}/24")), since, until, |lease| lease.is_none())
                }
                // Nobody has this MAC at this address, at one moment at least.
                Object::Entry { mac, to } => timeline.changes.keys().all(|key| {
                    timeline.ever(key, since, until, |lease| {
                        lease.is_none_or(|lease| lease.mac != *mac || lease.address != *to)
                    })
                }),
            };
            if !is_right {
                broken.push(format!(
                    "I4: host {number} removed {} while its lease stood, at {:.3}",
                    object.text(),
                    told.t
                ));
            }
        }
    }
}

fn same_file(read: &Read, broken: &mut Vec<String>) {
    for (&number, host) in &read.hosts {
        let moves = |mark: &Mark| matches!(mark, Mark::Moves { host } if *host == number);
        if read.marks.iter().any(moves) {
            continue;
        }
        let files = host.samples.iter().filter_map(|sample| Some((sample.t, sample.file.as_ref()?)));
        let mut files = files.filter(|(_, file)| !file.is_empty());
        let Some((_, first)) = files.next() else { continue };
        for (t, other) in files.filter(|(_, other)| *other != first) {
            let words = [first, other].map(|file| file.replace('\n', " "));
            broken.push(format!(
                "I5: subnet.env of host {number} went from {} to {} at {t:.0}",
                words[0], words[1]
            ));
        }
    }
}

/// Whenever an agent said that it was ready, the peers that had been as they were for a while had all their
/// objects, and those long gone had none.
fn honest_readiness(read: &Read, broken: &mut Vec<String>) {
    let timeline = read.timeline();
    let stopped = read.stopped();
    for (&number, host) in &read.hosts {
        let own = read.end.hosts.get(&number).map(|host| host.address.clone()).unwrap_or_default();
        let mut held = Objects::new();
        let mut told = host.told.iter().peekable();
        let mut is_ready = false;
        // Not by its address alone: that may have been another one.
        let mut own_key = String::new();
        for sample in host.samples.iter().filter(|sample| sample.t < stopped) {
            while let Some(told) = told.next_if(|told| told.t <= sample.t) {
                follow(&mut held, &told.line);
            }
            if let Some(subnet) = sample.file.as_deref().and_then(subnet_of) {
                own_key = key_of(&subnet.to_string());
            }
            // The page was read a moment ago; twice the same is sure.
            let was_ready = std::mem::replace(&mut is_ready, sample.code == 200);
            if !(is_ready && was_ready) || read.meddled(number, sample.t) || read.blind(number, sample.t) {
                continue;
            }
            let (since, until) = (sample.t - STABLE, sample.t + 1.0);
            for key in timeline.changes.keys() {
                let is_wanted =
                    |lease: &&Lease| *key != own_key && lease.address != own && !lease.mac.is_empty();
                let Some(lease) = timeline.steady(key, since, until).filter(is_wanted) else {
                    continue;
                };
                if let Some(object) = lease.objects().iter().find(|object| !held.contains(*object)) {
                    let (t, doing) = (sample.t, read.doing(sample.t));
                    broken.push(format!("I9: host {number} said ready at {t:.3}, {doing}, without {object}"));
                }
            }
            for object in held.iter().filter(|object| object.starts_with("route ")) {
                let subnet = object.split(' ').nth(1).unwrap_or_default();
                let since = sample.t - HELD;
                if !timeline.ever(&key_of(subnet), since, until, |lease| lease.is_some()) {
                    let (t, doing) = (sample.t, read.doing(sample.t));
                    broken.push(format!("I9: host {number} said ready at {t:.3}, {doing}, with {object}"));
                }
            }
        }
        let last = host.samples.iter().rfind(|sample| sample.t < stopped && sample.pid != 0);
        if let Some(last) = last.filter(|last| last.code != 200 && !read.unserved(number)) {
            let page = host
                .samples
                .iter()
                .rev()
                .find_map(|sample| sample.page.clone().filter(|page| !page.is_empty()));
            let page = page.unwrap_or_default().replace('\n', "; ");
            broken.push(format!("I9: host {number} was not ready at the end: {} {page}", last.code));
        }
    }
}

/// The subnet that a subnet.env names.
fn subnet_of(file: &str) -> Option<Ipv4Network> {
    let bridge = file.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))?;
    let bridge: Ipv4Network = bridge.parse().ok()?;
    Ipv4Network::new(bridge.network(), bridge.prefix()).ok()
}

/// Keeps up with what the kernel tells.
fn follow(held: &mut Objects, line: &str) {
    match kernel::heard(line) {
        // What the device's entries do is told by the other program, in its own time.
        Some(Heard::DeviceGone) => held.retain(|object| object.starts_with("entry ")),
        Some(Heard::Came(object)) => {
            // One to a destination, whatever it said before.
            let text = object.text();
            match &object {
                Object::Route { subnet, .. } => {
                    held.retain(|other| !other.starts_with(&format!("route {subnet} ")))
                }
                Object::Neighbour { address, .. } => {
                    held.retain(|other| !other.starts_with(&format!("neighbour {address} ")));
                }
                Object::Entry { mac, .. } => {
                    held.retain(|other| !other.starts_with(&format!("entry {mac} ")))
                }
            }
            held.insert(text);
        }
        Some(Heard::Went(object)) => match &object {
            Object::Route { .. } | Object::Entry { .. } => drop(held.remove(&object.text())),
            Object::Neighbour { address, .. } => {
                held.retain(|other| !other.starts_with(&format!("neighbour {address} ")));
            }
        },
        None => {}
    }
}

/// When a line of an agent's log was written.
fn time_of(line: &str) -> Option<Time> {
    // 2026-01-31T12:34:56.789012Z, perhaps after the codes of a colour.
    let stamp = line.split_whitespace().next()?;
    let stamp = stamp.trim_start_matches(|character: char| !character.is_ascii_digit());
    let (date, clock) = stamp.split_once('T')?;
    let mut date = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut clock = clock.trim_end_matches(|character: char| !character.is_ascii_digit()).split(':');
    let mut part = || clock.next().and_then(|part| part.parse::<f64>().ok());
    let seconds = part()? * 3600.0 + part()? * 60.0 + part()?;
    Some(days(year, month, day) as f64 * 86_400.0 + seconds)
}

/// Days since 1970, in the calendar that is counted from March.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::HostEnd;

    fn put(t: Time, revision: i64, subnet: &str, address: &str) -> Event {
        let lease = Lease { subnet: subnet.into(), address: address.into(), mac: "0e:00:00:00:00:02".into() };
        let (key, value) = (lease.key(), lease.value());
        Event { t, world: 0, revision, what: What::Put, key, value, lease: 0 }
    }

    fn delete(t: Time, revision: i64, subnet: &str) -> Event {
        Event {
            t,
            world: 0,
            revision,
            what: What::Delete,
            key: key_of(subnet),
            value: String::new(),
            lease: 0,
        }
    }

    fn records(history: Vec<Event>) -> Read {
        Read {
            history,
            marks: vec![],
            packets: vec![],
            end: End::default(),
            hosts: BTreeMap::new(),
            poison: BTreeSet::new(),
        }
    }

    fn found(rule: fn(&Read, &mut Vec<String>), read: &Read) -> Vec<String> {
        let mut broken = vec![];
        rule(read, &mut broken);
        broken
    }

    fn with_host(mut read: Read, told: &[(Time, &str)], samples: &[(Time, u16)]) -> Read {
        let told = told.iter().map(|&(t, line)| Told { t, line: line.into() }).collect();
        let samples = samples.iter().map(|&(t, code)| Sample {
            t,
            pid: 1,
            rss: 0,
            descriptors: 0,
            log: 0,
            cpu: 0,
            code,
            page: None,
            file: None,
        });
        let host = HostRead { told, samples: samples.collect(), log: vec![] };
        read.hosts.insert(1, host);
        read
    }

    #[test]
    fn a_key_that_changes_hands_without_a_removal_is_found() {
        let stolen = records(vec![put(1.0, 2, "10.5.1.0/24", "a"), put(2.0, 3, "10.5.1.0/24", "b")]);
        let mut events = stolen.history.clone();
        events.insert(1, delete(1.5, 3, "10.5.1.0/24"));

        assert_eq!(found(one_owner, &stolen).len(), 1);
        assert!(found(one_owner, &records(events)).is_empty());
    }

    #[test]
    fn live_subnets_that_overlap_are_found() {
        let read = records(vec![put(1.0, 2, "10.5.1.0/24", "a"), put(2.0, 3, "10.5.0.0/22", "b")]);

        assert_eq!(found(one_owner, &read).len(), 1);
    }

    #[test]
    fn a_removal_before_its_keys_is_found() {
        const GONE: &str = "Deleted 10.5.1.0/24 via 10.5.1.0 dev flannel.1 proto 76 onlink";
        let history = vec![put(1.0, 2, "10.5.1.0/24", "a"), delete(500.0, 3, "10.5.1.0/24")];

        let early = with_host(records(history.clone()), &[(300.0, GONE)], &[]);
        let late = with_host(records(history), &[(501.0, GONE)], &[]);

        assert_eq!(found(no_spurious_removal, &early).len(), 1);
        assert!(found(no_spurious_removal, &late).is_empty());
    }

    #[test]
    fn ready_without_a_peers_objects_is_found() {
        const LINES: [(Time, &str); 3] = [
            (2.0, "fdb 0e:00:00:00:00:02 dev flannel.1 dst a self permanent"),
            (2.0, "10.5.1.0 dev flannel.1 lladdr 0e:00:00:00:00:02 PERMANENT"),
            (2.0, "10.5.1.0/24 via 10.5.1.0 dev flannel.1 proto 76 onlink"),
        ];
        let history = || records(vec![put(1.0, 2, "10.5.1.0/24", "a")]);
        let ready = [(30.0, 200), (30.5, 200)];

        assert!(found(honest_readiness, &with_host(history(), &LINES, &ready)).is_empty());
        assert_eq!(found(honest_readiness, &with_host(history(), &LINES[1..], &ready)).len(), 1);
        assert_eq!(found(honest_readiness, &with_host(records(vec![]), &LINES, &ready)).len(), 1);
    }

    #[test]
    fn a_host_needs_no_way_to_its_own_subnet_whatever_its_address_was() {
        let history = vec![put(1.0, 2, "10.5.1.0/24", "a"), put(40.0, 3, "10.5.1.0/24", "b")];
        let mut read = with_host(records(history), &[], &[(30.0, 200), (30.5, 200)]);
        read.end.hosts.insert(1, HostEnd { address: "b".into(), ..HostEnd::default() });
        assert_eq!(found(honest_readiness, &read).len(), 1);

        let file = Some("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\n".into());
        read.hosts.get_mut(&1).expect("it is host 1").samples[0].file = file;

        assert!(found(honest_readiness, &read).is_empty());
    }

    #[test]
    fn the_time_of_a_line_is_read() {
        assert_eq!(time_of("1970-01-02T00:00:01.5Z  INFO words"), Some(86_401.5));
        assert_eq!(time_of("2026-11-21T12:22:37Z x"), Some(1_795_263_757.0));
        assert_eq!(time_of("no time"), None);
    }
}
