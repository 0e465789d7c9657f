//! What etcd does: the simulated one answers as the real one.
//!
//! Random requests go to both, and each answer must be the same, revisions and
//! all. What only the simulated one can be asked stands by itself.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::time::Duration;

use fastrand::Rng;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch};
use flannel_etcd::kv::{
    Answer, Compare, Ended, Entry, Failure, Happened, Kv, KvStream, Op, Page, Range, Refusal, Txn,
};
use flannel_etcd::{Cluster, EtcdStore};
use flannel_tests::etcd::PREFIX;
use flannel_tests::etcd_or_pass;
use flannel_tests::leases::{host, key, subnet};
use flannel_tests::sim_etcd::{SimClient, SimEtcd, Weather};
use tokio::time::{Instant, sleep, timeout};

/// Requests to both.
const REQUESTS: usize = 600;

/// A request that changes nothing outside the store.
#[derive(Debug)]
enum Request {
    Range(Range),
    Txn(Txn),
    Grant(i64),
    KeepAlive(i64),
    Term(i64),
    Revoke(i64),
    Watch(Range),
}

/// An answer, but for what differs between two clusters.
#[derive(Debug, PartialEq)]
enum Answered {
    Page(Vec<Entry>, bool, i64),
    Txn(bool, Vec<Option<Entry>>, i64),
    Whether(bool),
    Term(Option<(i64, usize)>),
    Done,
    Events(Vec<Happened>),
    Refused(i32),
}

async fn answer(kv: &impl Kv, request: &Request) -> Answered {
    let answered = match request {
        Request::Range(range) => kv.range(range.clone()).await.map(|page| {
            let Page { entries, more, moment } = page;
            Answered::Page(entries, more, moment.revision)
        }),
        Request::Txn(txn) => kv.txn(txn.clone()).await.map(|answer| {
            let Answer { succeeded, found, moment } = answer;
            Answered::Txn(succeeded, found, moment.revision)
        }),
        Request::Grant(id) => kv.grant(*id, 3600).await.map(Answered::Whether),
        Request::KeepAlive(id) => kv.keep_alive(*id).await.map(Answered::Whether),
        Request::Term(id) => {
            kv.term(*id).await.map(|term| Answered::Term(term.map(|term| (term.granted, term.keys))))
        }
        Request::Revoke(id) => kv.revoke(*id).await.map(|()| Answered::Done),
        Request::Watch(range) => watched(kv, range).await.map(Answered::Events),
    };
    answered.unwrap_or_else(|failure| match failure {
        Failure::Refused(refusal) => Answered::Refused(refusal.code),
        Failure::Away { words, .. } => panic!("{request:?} had no answer: {words}"),
    })
}

/// All that a watch tells until a key behind the range is written.
async fn watched(kv: &impl Kv, range: &Range) -> Result<Vec<Happened>, Failure> {
    let range = Range { end: Some("zz".into()), ..range.clone() };
    let opened = kv.watch(range.clone()).await;
    let end = Op::Put("z".into(), vec![], 0);
    let last = kv.txn(Txn { then: vec![end], ..Txn::default() }).await?.moment.revision;
    let mut stream = opened?.stream;
    let mut events = vec![];
    loop {
        let portion = match timeout(Duration::from_secs(10), stream.next()).await.expect("events") {
            Ok(portion) => portion,
            // It may be told as the watch is opened, or after.
            Err(Ended::Compacted) => {
                return Err(Failure::Refused(Refusal { code: Refusal::OUT_OF_RANGE, words: String::new() }));
            }
            Err(Ended::Broken(words)) => panic!("{range:?} ended: {words}"),
        };
        for event in portion.events {
            match event {
                Happened::Put(entry) if entry.modified == last => return Ok(events),
                event => events.push(event),
            }
        }
    }
}

struct Chance {
    dice: Rng,
    revision: i64,
    compacted: i64,
}

impl Chance {
    fn key(&mut self) -> Vec<u8> {
        vec![b'a' + self.dice.u8(..6)]
    }

    fn lease(&mut self) -> i64 {
        0x7000 + self.dice.i64(0..4)
    }

    fn range(&mut self) -> Range {
        let (from, end) = (self.key(), self.dice.bool().then(|| self.key()));
        let revision = match self.dice.u8(..4) {
            0 => self.dice.i64(1..self.revision + 3),
            _ => 0,
        };
        Range { from, end, limit: self.dice.i64(..4).max(0), revision }
    }

    fn txn(&mut self) -> Txn {
        let when = (0..self.dice.usize(..3)).map(|_| match self.dice.bool() {
            true => Compare::Absent(self.key()),
            false => Compare::Modified(self.key(), self.dice.i64(self.revision - 5..=self.revision).max(0)),
        });
        let when = when.collect();
        let mut keys: Vec<Vec<u8>> = (0..self.dice.usize(..4)).map(|_| self.key()).collect();
        if self.dice.u8(..10) > 0 {
            keys.sort();
            keys.dedup();
        }
        // Only one: of a transaction that names an etcd lease that is not there, etcd 3.4 does what comes before.
        let lease = if self.dice.u8(..3) == 0 { self.lease() } else { 0 };
        let deletes = lease == 0 && self.dice.bool();
        let then = keys.into_iter().map(|key| match deletes {
            true if self.dice.bool() => Op::Delete(key),
            _ => Op::Put(key, vec![self.dice.u8(..)], lease),
        });
        Txn { when, then: then.collect(), read: vec![self.key(), self.key()] }
    }

    fn request(&mut self) -> Request {
        match self.dice.u8(..16) {
            0..4 => Request::Range(self.range()),
            4..11 => Request::Txn(self.txn()),
            11 => Request::Grant(self.lease()),
            12 => Request::KeepAlive(self.lease()),
            13 => Request::Term(self.lease()),
            14 => Request::Revoke(self.lease()),
            _ => {
                let from = self.dice.i64((self.compacted - 3).max(1)..self.revision + 2);
                // What was deleted in the compacted revision itself is there or not, by etcd's version.
                let from = if from == self.compacted { from + 1 } else { from };
                Request::Watch(Range { from: self.key(), revision: from, ..Range::default() })
            }
        }
    }
}

#[tokio::test]
async fn the_simulated_etcd_answers_as_the_real_one() {
    let etcd = etcd_or_pass!();
    let (real, raw) = (Cluster::connect(&etcd.settings()).await.unwrap(), etcd.raw().await);
    let simulated = SimEtcd::start();
    let client = simulated.client(1);
    let mut chance = Chance { dice: Rng::with_seed(1), revision: 1, compacted: 0 };

    for number in 0..REQUESTS {
        let request = chance.request();
        let (should, is) = (answer(&real, &request).await, answer(&client, &request).await);
        assert_eq!(is, should, "{request:#?}, number {number}, compacted {}", chance.compacted);
        chance.revision = simulated.moment().revision;
        // A read of nothing, for the revision alone.
        let probe = Request::Txn(Txn { read: vec![vec![0]], ..Txn::default() });
        let (should, is) = (answer(&real, &probe).await, answer(&client, &probe).await);
        assert_eq!(is, should, "after {request:#?}, number {number}");
        if chance.dice.u8(..50) == 0 {
            let but = chance.dice.i64(0..5);
            if chance.revision - but > chance.compacted {
                chance.compacted = chance.revision - but;
                raw.compact(chance.compacted).await;
                simulated.compact(but);
            }
        }
    }
}

// What the simulated one can be asked alone.

fn lease_key(number: u8) -> Vec<u8> {
    key(number).into_bytes()
}

async fn hang(client: &SimClient, number: u8, id: i64) {
    assert!(client.grant(id, 60).await.unwrap());
    let put = Op::Put(lease_key(number), host(number).to_json().into(), id);
    assert!(client.txn(Txn { then: vec![put], ..Txn::default() }).await.unwrap().succeeded);
}

fn store(client: &SimClient) -> EtcdStore<SimClient> {
    EtcdStore::over(client.clone(), PREFIX, 10, None)
}

#[tokio::test(start_paused = true)]
async fn an_etcd_lease_that_nobody_keeps_takes_its_keys_along_in_one_revision() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    hang(&client, 1, 7).await;
    etcd.put_leased(&key(2), b"", 8, 60);
    sleep(Duration::from_secs(50)).await;
    client.keep_alive(8).await.unwrap();

    sleep(Duration::from_secs(15)).await;

    let left: Vec<Vec<u8>> = etcd.keys("").into_iter().map(|entry| entry.key).collect();
    assert_eq!(left, [lease_key(2)]);
    assert_eq!(client.term(7).await.unwrap(), None);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(etcd.leases(), []);
}

#[tokio::test(start_paused = true)]
async fn no_etcd_lease_runs_out_while_the_members_are_down() {
    let etcd = SimEtcd::start();
    etcd.put_leased(&key(1), b"", 7, 60);

    etcd.down(true);
    sleep(Duration::from_secs(1000)).await;
    etcd.down(false);
    sleep(Duration::from_secs(50)).await;

    assert_eq!(etcd.leases(), [(7, 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_line_that_is_cut_answers_nothing_and_one_that_is_mended_does() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    client.cut(true);

    let began = Instant::now();
    let cut = client.range(Range::default()).await;
    client.cut(false);

    assert!(matches!(cut, Err(Failure::Away { .. })), "{cut:?}");
    assert!(began.elapsed() >= Duration::from_secs(5));
    client.range(Range::default()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_host_that_stands_still_hears_what_it_asked_when_it_goes_on() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    client.still(true);
    let (asking, began) = (client.clone(), Instant::now());
    let asked = tokio::spawn(async move { asking.range(Range::default()).await });

    sleep(Duration::from_secs(90_000)).await;
    client.still(false);

    asked.await.unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_secs(90_000));
}

#[tokio::test(start_paused = true)]
async fn in_bad_weather_every_request_is_carried_out_or_not_whatever_the_answer_says() {
    let etcd = SimEtcd::start();
    let (client, mut away, mut late) = (etcd.client(1), 0, 0);
    client.weather(Weather { latency: Duration::from_millis(10), trouble: 90, breaks: 90 });

    for number in 0..100_i64 {
        let key = number.to_be_bytes().to_vec();
        let when = vec![Compare::Absent(key.clone())];
        let put = Op::Put(key.clone(), vec![], 0);
        let answer = client.txn(Txn { when, then: vec![put], read: vec![key.clone()] }).await;
        let stands = || etcd.keys("").iter().any(|entry| entry.key == key);
        match answer {
            Ok(answer) => assert!(answer.found[0].is_some() && stands()),
            Err(_) => {
                away += 1;
                let stood = stands();
                sleep(Duration::from_secs(60)).await;
                late += usize::from(!stood && stands());
            }
        }
    }

    assert!(away > 10 && late > 0, "{away} without an answer, {late} of them late");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_loses_nothing_to_whoever_opens_the_next_one() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    client.weather(Weather { latency: Duration::from_millis(10), trouble: 0, breaks: 50 });
    let mut watch = store(&client).watch();
    assert!(matches!(watch.next().await, Ok(LeaseEvent::Snapshot(_))));

    for number in 1..=100 {
        etcd.put(&key(number), host(number).to_json().as_bytes());
    }

    for number in 1..=100 {
        let event = watch.next().await.unwrap();
        assert!(matches!(&event, LeaseEvent::Put(lease) if lease.subnet == subnet(number)), "{event:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_behind_a_member_that_is_late_hears_late_and_everything() {
    let etcd = SimEtcd::start();
    let client = etcd.client(1);
    client.lag(Duration::from_secs(20));
    let mut watch = store(&client).watch();
    assert!(matches!(watch.next().await, Ok(LeaseEvent::Snapshot(_))));
    sleep(Duration::from_secs(60)).await;

    let began = Instant::now();
    etcd.put(&key(1), host(1).to_json().as_bytes());

    assert!(matches!(watch.next().await, Ok(LeaseEvent::Put(_))));
    assert!(began.elapsed() >= Duration::from_secs(20));
}
