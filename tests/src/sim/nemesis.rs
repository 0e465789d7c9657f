//! What goes wrong.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use flannel_core::backend::from_config;
use flannel_core::key::subnet_key;
use flannel_core::state::{Key, RouteKey};
use tokio::time::sleep;

use super::checks::{attributes, subnet};
use super::host::Host;
use super::{Cluster, PREFIX, RECORDS, SUBNETS};
use crate::sim_etcd::{By, Fate, Weather};

const HOUR: Duration = Duration::from_secs(3600);

/// What is to happen later.
#[derive(Default)]
pub(super) struct Later {
    queue: BTreeMap<(Duration, usize), Act>,
    number: usize,
}

impl Later {
    fn push(&mut self, at: Duration, act: Act) {
        self.number += 1;
        self.queue.insert((at, self.number), act);
    }
}

/// Something that is done.
#[derive(Clone, Copy, Debug)]
enum Act {
    Start(usize),
    Kill(usize),
    Reboot(usize),
    Reinstall(usize),
    Still(usize, bool),
    Move(usize),
    /// A host is given the address of another.
    Twin(usize, usize),
    /// Two hosts exchange addresses.
    Swap(usize, usize),
    /// What happens to a line.
    Cut(usize, bool),
    Weather(usize, u8),
    Lag(usize, u64),
    Denied(usize, bool),
    Fates(usize),
    /// What happens to etcd.
    Down(bool),
    NoSpace(bool),
    BreakStreams,
    Elect,
    Compact(i64),
    Wipe,
    Save,
    Restore(bool, u64),
    /// What a hand does to keys.
    DeleteOwn(usize),
    DeleteRecord(usize),
    RevokeOwn(usize),
    DeleteAll,
    DeleteRecords,
    Reserve(usize),
    Bend(usize),
    Steal(usize),
    TakeExpired(usize),
    Ask(usize),
    Junk(u8),
    Foreign(u8),
    ForeignLeaves,
    NoConfig(bool),
    /// What happens to a kernel.
    Meddle(usize),
    Refuse(usize, bool),
    Illegible(usize),
}

impl Cluster {
    /// Starts the hosts, and then does them one harm after the other.
    pub(super) async fn harass(&mut self) -> Result<(), String> {
        for place in 0..self.hosts.len() {
            let at = Duration::from_millis(self.dice.u64(0..2000));
            self.later.push(at, Act::Start(place));
        }
        for place in 0..self.hosts.len() {
            if self.dice.u8(..3) == 0 {
                let trouble = self.dice.u8(1..=30);
                self.act(Act::Weather(place, trouble)).await;
            }
        }
        for _ in 0..self.dice.usize(..8) {
            let number = self.dice.u8(..);
            self.act(Act::Foreign(number)).await;
        }
        for _ in 0..self.dice.usize(3..=14) {
            let pause = self.a_while();
            self.pass(pause).await;
            self.harm().await;
            for (place, host) in self.hosts.iter_mut().enumerate() {
                if let Some(words) = host.ended().await {
                    return Err(format!("the agent of client {place} has ended: {words}"));
                }
            }
        }
        let pause = self.a_while();
        self.pass(pause).await;
        Ok(())
    }

    /// Ends all that has been done to the cluster and its hosts.
    pub(super) fn heal(&mut self) {
        self.etcd.say(By::Hand, "everything is mended");
        self.later.queue.clear();
        self.etcd.down(false);
        self.etcd.no_space(false);
        for host in &mut self.hosts {
            host.client.make_fair();
            host.still(false);
            host.refuse(false);
            host.network.kernel().broken.clear();
        }
        self.put_config();
        for place in 0..self.hosts.len() {
            let address = self.hosts[place].address();
            if self.hosts[..place].iter().any(|other| other.address() == address) {
                self.move_away(place);
            }
        }
        self.make_room();
        self.hosts.iter_mut().for_each(Host::start);
    }

    /// A hand takes away what no agent may: leases beside that of a host which name its address,
    /// if they are reserved or have no record any more. The agents warn of them.
    pub(super) fn clear_away(&self) {
        for entry in self.etcd.keys(SUBNETS) {
            let address = attributes(&entry).and_then(|attrs| attrs.public_ip);
            let holder = self.hosts.iter().find(|host| Some(host.address()) == address);
            let (Some(host), Some(subnet)) = (holder, subnet(&entry.key)) else { continue };
            let record = self.etcd.keys(&format!("{RECORDS}{}", subnet_key(&subnet))).into_iter().next();
            let is_recorded = record.is_some_and(|record| record.lease == entry.lease);
            let is_another = host.subnet().is_some_and(|own| own != subnet);
            if is_another && (entry.lease == 0 || !is_recorded) {
                self.etcd.delete(&String::from_utf8_lossy(&entry.key));
            }
        }
    }

    /// Where there is room for our hosts and hardly for anybody else, the others go.
    fn make_room(&mut self) {
        if self.tight {
            let lives = |address| self.hosts.iter().any(|host| Some(host.address()) == address);
            for entry in self.etcd.keys(SUBNETS) {
                if !lives(attributes(&entry).and_then(|attrs| attrs.public_ip)) {
                    self.etcd.delete(&String::from_utf8_lossy(&entry.key));
                }
            }
        }
    }

    async fn pass(&mut self, time: Duration) {
        if time > HOUR {
            // Whoever waits for a subnet asks every few seconds, which would take us long, too.
            self.make_room();
        }
        let until = self.etcd.now() + time;
        while let Some(((at, _), act)) = self
            .later
            .queue
            .first_key_value()
            .map(|(at, act)| (*at, *act))
            .filter(|((at, _), _)| *at <= until)
        {
            self.later.queue.pop_first();
            sleep(at.saturating_sub(self.etcd.now())).await;
            self.act(act).await;
        }
        sleep(until.saturating_sub(self.etcd.now())).await;
    }

    /// Mostly seconds, now and then an hour or a day.
    fn a_while(&mut self) -> Duration {
        let dice = &mut self.dice;
        let milliseconds = match dice.u8(..40) {
            0..14 => dice.u64(0..300),
            14..28 => dice.u64(0..10_000),
            28..36 => dice.u64(0..120_000),
            36..39 => dice.u64(0..3_600_000),
            _ => dice.u64(0..26 * 3_600_000),
        };
        Duration::from_millis(milliseconds)
    }

    fn within(&mut self, milliseconds: u64) -> Duration {
        Duration::from_millis(self.dice.u64(0..milliseconds))
    }

    /// Does something, and has it end in a while if it is of that kind.
    async fn harm(&mut self) {
        const MINUTE: u64 = 60_000;
        const DAY_AND_MORE: u64 = 30 * 60 * MINUTE;
        let (place, other) = (self.dice.usize(..self.hosts.len()), self.dice.usize(..self.hosts.len()));
        let dice = &mut self.dice;
        let (act, ends) = match dice.u8(..53) {
            0..3 => (Act::Kill(place), Some((Act::Start(place), MINUTE))),
            3 => (Act::Kill(place), Some((Act::Start(place), DAY_AND_MORE))),
            4..6 => (Act::Reboot(place), Some((Act::Start(place), MINUTE))),
            6 => (Act::Reinstall(place), Some((Act::Start(place), MINUTE))),
            7 => (Act::Still(place, true), Some((Act::Still(place, false), 5 * MINUTE))),
            8 => (Act::Still(place, true), Some((Act::Still(place, false), DAY_AND_MORE))),
            9..11 => (Act::Move(place), None),
            11 => (Act::Twin(place, other), None),
            12..14 => (Act::Cut(place, true), Some((Act::Cut(place, false), 2 * MINUTE))),
            14..16 => (Act::Weather(place, dice.u8(5..=60)), Some((Act::Weather(place, 0), 2 * MINUTE))),
            16 => (Act::Lag(place, dice.u64(1..30)), Some((Act::Lag(place, 0), MINUTE))),
            17 => (Act::Denied(place, true), Some((Act::Denied(place, false), 2 * MINUTE))),
            18..20 => (Act::Fates(place), None),
            20..22 => (Act::Down(true), Some((Act::Down(false), 2 * MINUTE))),
            22 => (Act::NoSpace(true), Some((Act::NoSpace(false), 2 * MINUTE))),
            23 => (Act::BreakStreams, None),
            24 => (Act::Elect, None),
            25..27 => (Act::Compact(dice.i64(0..4)), None),
            27 => (Act::Wipe, None),
            28 => (Act::Save, Some((Act::Restore(dice.bool(), dice.u64(..3)), MINUTE))),
            29 => (Act::DeleteOwn(place), None),
            30 => (Act::DeleteRecord(place), None),
            31 => (Act::RevokeOwn(place), None),
            32..34 => (Act::DeleteAll, None),
            34 => (Act::DeleteRecords, None),
            35 => (Act::Reserve(place), None),
            36 => (Act::Bend(place), None),
            37 => (Act::Steal(place), None),
            38 => (Act::TakeExpired(place), None),
            39 => (Act::Ask(place), None),
            40..42 => (Act::Junk(dice.u8(..)), None),
            42..45 => (Act::Foreign(dice.u8(..)), None),
            45 => (Act::ForeignLeaves, None),
            46..48 => (Act::Meddle(dice.usize(..)), None),
            50 => (Act::NoConfig(true), Some((Act::NoConfig(false), MINUTE))),
            51..53 => (Act::Swap(place, other), None),
            48 => (Act::Refuse(place, true), Some((Act::Refuse(place, false), MINUTE))),
            _ => (Act::Illegible(place), None),
        };
        self.act(act).await;
        if let Some((end, longest)) = ends {
            let at = self.etcd.now() + self.within(longest);
            self.later.push(at, end);
        }
    }

    async fn act(&mut self, act: Act) {
        self.etcd.say(By::Hand, format!("{act:?}"));
        let etcd = self.etcd.clone();
        match act {
            Act::Start(place) => self.host(place).start(),
            Act::Kill(place) => self.host(place).kill().await,
            Act::Reboot(place) => {
                self.host(place).kill().await;
                self.host(place).reboot();
            }
            Act::Reinstall(place) => {
                self.host(place).kill().await;
                self.host(place).reinstall();
                self.past.losses.push((self.etcd.now(), place));
            }
            Act::Still(place, still) => self.host(place).still(still),
            Act::Move(place) => self.move_away(place),
            Act::Twin(place, other) => {
                let address = self.host(other).address();
                if self.fenced {
                    self.past.twins.push((self.etcd.now(), address));
                    self.host(place).move_to(address);
                }
            }
            Act::Swap(place, other) => {
                let addresses = [self.host(place).address(), self.host(other).address()];
                if self.fenced && addresses[0] != addresses[1] {
                    let now = self.etcd.now();
                    self.past.twins.extend(addresses.map(|address| (now, address)));
                    self.host(place).move_to(addresses[1]);
                    self.host(other).move_to(addresses[0]);
                }
            }
            Act::Cut(place, cut) => self.host(place).client.cut(cut),
            Act::Weather(place, trouble) => self.host(place).client.weather(match trouble {
                0 => Weather::FAIR,
                trouble => Weather { latency: Duration::from_millis(200), trouble, breaks: trouble },
            }),
            Act::Lag(place, seconds) => self.host(place).client.lag(Duration::from_secs(seconds)),
            Act::Denied(place, denied) => self.host(place).client.denied(denied),
            Act::Fates(place) => {
                let fates: Vec<Fate> = (0..self.dice.usize(1..6)).map(|_| self.fate()).collect();
                self.host(place).client.fates(fates);
            }
            Act::Down(down) => etcd.down(down),
            Act::NoSpace(full) => etcd.no_space(full),
            Act::BreakStreams => etcd.break_streams(),
            Act::Elect => etcd.elect(),
            Act::Compact(but) => etcd.compact(but),
            Act::Wipe => {
                etcd.wipe();
                self.put_config();
            }
            Act::Save => etcd.save(),
            Act::Restore(same_cluster, terms) => {
                etcd.restore(same_cluster, terms);
                // It may have been saved before there was one.
                self.put_config();
            }
            Act::DeleteAll => {
                etcd.delete(if self.dice.bool() { SUBNETS } else { PREFIX });
                self.put_config();
            }
            Act::DeleteRecords => etcd.delete(RECORDS),
            Act::Junk(kind) => self.put_junk(kind),
            Act::Foreign(number) => {
                if let Some(key) = self.free_key(number) {
                    self.put_foreign(&key, number);
                }
            }
            Act::ForeignLeaves => {
                if let Some(key) = self.foreign.pop() {
                    etcd.delete(&key);
                }
            }
            Act::NoConfig(none) => match none {
                true => etcd.delete(&format!("{PREFIX}/config")),
                false => self.put_config(),
            },
            Act::DeleteOwn(place)
            | Act::DeleteRecord(place)
            | Act::RevokeOwn(place)
            | Act::Reserve(place)
            | Act::Bend(place)
            | Act::Steal(place)
            | Act::TakeExpired(place)
            | Act::Ask(place) => self.touch(place, act),
            Act::Meddle(number) => self.meddle(number),
            Act::Refuse(place, refusing) => self.host(place).refuse(refusing),
            Act::Illegible(place) => {
                let reason = "no buffer space".to_owned();
                let times = self.dice.usize(1..4);
                self.host(place).network.kernel().broken.extend(std::iter::repeat_n(reason, times));
            }
        }
        self.look();
    }

    /// Does something to the lease that a host has or had.
    fn touch(&mut self, place: usize, act: Act) {
        let etcd = self.etcd.clone();
        let Some(subnet) = self.host(place).subnet() else { return };
        let (key, record) =
            (format!("{SUBNETS}{}", subnet_key(&subnet)), format!("{RECORDS}{}", subnet_key(&subnet)));
        let entry = etcd.keys(&key).into_iter().next();
        match (act, entry) {
            (Act::TakeExpired(_), None) => self.put_foreign(&key, 7),
            (Act::DeleteOwn(_), Some(_)) => etcd.delete(&key),
            (Act::DeleteRecord(_), Some(_)) => etcd.delete(&record),
            (Act::RevokeOwn(_), Some(entry)) => etcd.revoke(entry.lease),
            (Act::Reserve(_), Some(entry)) if entry.lease != 0 => etcd.put(&key, &entry.value),
            (Act::Reserve(_), Some(entry)) => {
                let id = self.lease_of_a_hand();
                etcd.put_leased(&key, &entry.value, id, 86_400);
            }
            (Act::Bend(place), Some(entry)) => {
                // Whoever has it, says something else.
                let value = self.value(self.hosts[place].address(), 0x77);
                if attributes(&entry)
                    .is_some_and(|attrs| attrs.public_ip == Some(self.hosts[place].address()))
                {
                    etcd.bend(&key, value.as_bytes());
                }
            }
            (Act::Steal(_), Some(_)) => self.put_foreign(&key, 8),
            (Act::Ask(_), Some(_)) => etcd.put(&format!("{record}/asks"), br#"{"HostID":"x","BootID":"y"}"#),
            _ => {}
        }
    }

    fn fate(&mut self) -> Fate {
        let short = Duration::from_millis(self.dice.u64(0..100));
        match self.dice.u8(..8) {
            0..2 => Fate::Lost,
            2..4 => Fate::AnswerLost(short),
            4 => Fate::Late(Duration::from_millis(self.dice.u64(5_000..60_000))),
            5 => Fate::Answered(short, Duration::from_millis(self.dice.u64(0..5_000))),
            6 => Fate::NoLeader,
            _ => Fate::Answered(short, short),
        }
    }

    /// To an address that nobody else has.
    fn move_away(&mut self, place: usize) {
        let first = u8::try_from(20 + 20 * place).expect("there are few hosts");
        let address = loop {
            let address = Ipv4Addr::new(192, 168, 0, first + self.dice.u8(..20));
            if !self.hosts.iter().any(|host| host.address() == address) {
                break address;
            }
        };
        self.host(place).move_to(address);
    }

    /// Takes note of which hosts have nothing to suffer.
    fn look(&mut self) {
        let etcd = self.etcd.is_well();
        let wells = self.hosts.iter().map(|host| etcd && host.is_well()).collect();
        self.past.wells.push((self.etcd.now(), wells));
    }

    fn host(&mut self, place: usize) -> &mut Host {
        self.hosts.get_mut(place).expect("a place is that of a host")
    }

    pub(super) fn put_config(&mut self) {
        // Each history has revisions of its own: in a real one others write, too.
        self.etcd.busy(self.dice.i64(0..1000));
        self.etcd.put(&format!("{PREFIX}/config"), self.config.text.as_bytes());
    }

    /// A subnet of the network that nobody has.
    fn free_key(&self, number: u8) -> Option<String> {
        let number = match self.tight {
            true => 1 + number % 7,
            false => number.max(1),
        };
        let key = format!("{SUBNETS}10.5.{number}.0-24");
        Some(key).filter(|key| self.etcd.keys(key).is_empty())
    }

    fn value(&self, address: Ipv4Addr, mac: u8) -> String {
        let (backend, _) = from_config(&self.config).expect("a backend");
        let data = match backend.links().is_empty() {
            true => String::new(),
            false => format!(r#","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:ff:{mac:02x}"}}"#),
        };
        format!(r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"{}"{data}}}"#, backend.kind())
    }

    /// A Go flanneld takes a subnet.
    fn put_foreign(&mut self, key: &str, number: u8) {
        let value = self.value([192, 168, 1, number].into(), number);
        let id = self.lease_of_a_hand();
        self.etcd.put_leased(key, value.as_bytes(), id, 86_400);
        self.foreign.push(key.to_owned());
    }

    /// Something that is no lease, or none that anybody should go by.
    fn put_junk(&mut self, kind: u8) {
        let good = self.value([192, 168, 1, 200].into(), 200);
        let key = |name: &str| format!("{SUBNETS}{name}");
        let free = self.free_key(kind).unwrap_or_else(|| key("10.5.77.0-24"));
        let (key, value) = match kind % 12 {
            0 => (key("junk"), "junk".to_owned()),
            1 => (key("10.5.0.0-16"), good),
            2 => (key("0.0.0.0-0"), good),
            3 => (free, "{".into()),
            4 => (key("10.9.0.0-24"), good),
            5 => (free, self.value([127, 0, 0, 1].into(), 201)),
            6 => (free, good.replace("0e:00:00:00:ff", "01:00:00:00:ff")),
            7 => (key("10.5.3.0-25"), good),
            8 => (free, "x".repeat(100_000)),
            9 => (free, good.replace("\"VNI\":1", "\"VNI\":9")),
            10 => (free, "[".repeat(10_000)),
            _ => (key("10.5.4.7-24"), good),
        };
        self.etcd.put(&key, value.as_bytes());
        self.foreign.push(key);
    }

    fn lease_of_a_hand(&mut self) -> i64 {
        self.later.number += 1;
        0xf0_0000 + i64::try_from(self.later.number).expect("little happens")
    }

    /// Somebody takes an object out of a kernel, which tells of it or does not.
    fn meddle(&mut self, number: usize) {
        let number_of_hosts = self.hosts.len();
        let host = self.host(number % number_of_hosts);
        let routes: Vec<RouteKey> = host.network.kernel().state.routes.keys().copied().collect();
        let Some(route) = routes.get(number / number_of_hosts % routes.len().max(1)) else { return };
        match number % 3 {
            0 => drop(host.network.kernel().state.routes.remove(route)),
            _ => host.network.meddle(Key::Route(*route), None),
        }
    }
}
