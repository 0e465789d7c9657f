//! A constant flow of packets between every two hosts, and what of it got lost.
//!
//! One thread sends and one receives, by sockets that were born in the hosts'
//! namespaces. Each packet carries its pair, a number and the time; one that has
//! not come after [`LATE`] is lost.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flannel_tests::lab::Host;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use crate::record::{Lines, Packets, Time, now};
use crate::world::enter;

const PORT: u16 = 7777;

/// After so many seconds a packet will not come any more.
const LATE: f64 = 2.0;

/// What is lost within so many seconds of the last one lost is told together with it.
const IN_A_ROW: f64 = 0.1;

/// Room for what comes while this machine is busy with something else.
const BUFFER: usize = 16 << 20;

/// The end of the flow at one host.
pub(crate) struct End {
    host: usize,
    address: Ipv4Addr,
    socket: UdpSocket,
}

impl End {
    /// On the first address of a subnet like `10.5.7`.
    pub(crate) fn at(host: &Host, subnet: &str) -> Self {
        let address: Ipv4Addr = format!("{subnet}.1").parse().expect("a subnet is made of numbers");
        let (namespace, number) = (host.namespace.clone(), host.number);
        let bind = move || {
            enter(&namespace);
            let socket = UdpSocket::bind((address, PORT)).expect("the bridge has the address");
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).expect("root may have any buffer");
            socket.set_nonblocking(true).expect("a socket can be told so");
            socket
        };
        let socket = thread::spawn(bind).join().expect("a socket can be made there");
        Self { host: number, address, socket }
    }
}

/// One direction of a pair.
struct Pair {
    from: usize,
    to: usize,
    sent: u64,
    lost: u64,
    /// Those that have not come yet, with their times.
    open: VecDeque<(u64, Time)>,
    /// When the last one came.
    last: Time,
    gap: f64,
    /// Lost in a row: since when, until when and how many.
    row: Option<(Time, Time, u64)>,
}

pub(crate) struct Flow {
    stop: Arc<AtomicBool>,
    pairs: Arc<Mutex<Vec<Pair>>>,
    threads: Vec<JoinHandle<()>>,
    lines: Lines,
}

impl Flow {
    /// Begins to send `rate` packets a second from every end to every other.
    pub(crate) fn start(ends: Vec<End>, rate: u32, lines: Lines) -> Self {
        let numbers: Vec<(usize, usize)> = (0..ends.len())
            .flat_map(|from| (0..ends.len()).map(move |to| (from, to)))
            .filter(|(from, to)| from != to)
            .collect();
        let begin = now();
        let pair = |&(from, to): &(usize, usize)| Pair {
            from: ends[from].host,
            to: ends[to].host,
            sent: 0,
            lost: 0,
            open: VecDeque::new(),
            last: begin,
            gap: 0.0,
            row: None,
        };
        let pairs = Arc::new(Mutex::new(numbers.iter().map(pair).collect::<Vec<_>>()));
        let stop = Arc::new(AtomicBool::new(false));
        let ends = Arc::new(ends);
        let sender = {
            let (ends, pairs, stop, lines) = (ends.clone(), pairs.clone(), stop.clone(), lines.clone());
            thread::spawn(move || send(&ends, &numbers, &pairs, rate, &stop, &lines))
        };
        let receiver = {
            let (pairs, stop) = (pairs.clone(), stop.clone());
            thread::spawn(move || receive(&ends, &pairs, &stop))
        };
        Self { stop, pairs, threads: vec![sender, receiver], lines }
    }

    /// Waits for the last packets and writes the sums.
    pub(crate) fn end(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().expect("neither sender nor receiver panics");
        }
        let mut pairs = self.pairs.lock().expect("nobody panics while holding it");
        for pair in pairs.iter_mut() {
            pair.settle(f64::INFINITY, &self.lines);
            let &mut Pair { from, to, sent, lost, gap, .. } = pair;
            self.lines.write(&Packets::Sum { from, to, sent, lost, gap });
        }
    }
}

impl Pair {
    /// Counts as lost what is older than `limit`.
    fn settle(&mut self, limit: Time, lines: &Lines) {
        while let Some(&(_, at)) = self.open.front().filter(|(_, at)| *at < limit) {
            self.open.pop_front();
            self.lost += 1;
            match &mut self.row {
                Some((_, until, count)) if at - *until < IN_A_ROW => {
                    *until = at;
                    *count += 1;
                }
                row => {
                    if let Some(row) = row.replace((at, at, 1)) {
                        lines.write(&self.line(row));
                    }
                }
            }
        }
        if let Some(row) = self.row.filter(|(_, until, _)| limit - until > 2.0 * LATE) {
            lines.write(&self.line(row));
            self.row = None;
        }
    }

    fn line(&self, (since, until, count): (Time, Time, u64)) -> Packets {
        Packets::Lost { from: self.from, to: self.to, since, until, count }
    }

    fn came(&mut self, number: u64) {
        let at = self.open.iter().position(|(open, _)| *open == number);
        if let Some(at) = at {
            self.open.remove(at);
        }
        let now = now();
        self.gap = self.gap.max(now - self.last);
        self.last = now;
    }
}

fn send(
    ends: &[End],
    numbers: &[(usize, usize)],
    pairs: &Mutex<Vec<Pair>>,
    rate: u32,
    stop: &AtomicBool,
    lines: &Lines,
) {
    let pace = Duration::from_secs(1) / rate;
    let mut due = Instant::now();
    let mut settled = Instant::now();
    while !stop.load(Ordering::SeqCst) {
        for (index, &(from, to)) in numbers.iter().enumerate() {
            let (number, at) = {
                let mut pairs = pairs.lock().expect("nobody panics while holding it");
                let pair = &mut pairs[index];
                pair.sent += 1;
                let at = now();
                pair.open.push_back((pair.sent, at));
                (pair.sent, at)
            };
            let mut packet = [0; 64];
            packet[..8].copy_from_slice(&(index as u64).to_be_bytes());
            packet[8..16].copy_from_slice(&number.to_be_bytes());
            packet[16..24].copy_from_slice(&at.to_be_bytes());
            // Without a route it cannot even be sent, which is as lost as any other.
            drop(ends[from].socket.send_to(&packet, (ends[to].address, PORT)));
        }
        if settled.elapsed() > Duration::from_millis(200) {
            settled = Instant::now();
            let mut pairs = pairs.lock().expect("nobody panics while holding it");
            pairs.iter_mut().for_each(|pair| pair.settle(now() - LATE, lines));
        }
        // What could not be sent in time is not sent in a burst later: that would lose packets by itself.
        due = (due + pace).max(Instant::now());
        thread::sleep(due - Instant::now().min(due));
    }
    // Those on their way still count.
    thread::sleep(Duration::from_millis(500));
}

fn receive(ends: &[End], pairs: &Mutex<Vec<Pair>>, stop: &AtomicBool) {
    let mut packet = [0; 64];
    let mut idle = false;
    // After the last look that found nothing.
    while !(idle && stop.load(Ordering::SeqCst) && is_quiet(pairs)) {
        let mut wait: Vec<PollFd> =
            ends.iter().map(|end| PollFd::new(end.socket.as_fd(), PollFlags::POLLIN)).collect();
        // An error is one of the moment.
        let _ = poll(&mut wait, PollTimeout::from(50u8));
        idle = true;
        for end in ends {
            loop {
                match end.socket.recv(&mut packet) {
                    Ok(64) => {
                        idle = false;
                        let number = |part: &[u8]| u64::from_be_bytes(part.try_into().unwrap_or_default());
                        let (index, number) = (number(&packet[..8]) as usize, number(&packet[8..16]));
                        let mut pairs = pairs.lock().expect("nobody panics while holding it");
                        if let Some(pair) = pairs.get_mut(index) {
                            pair.came(number);
                        }
                    }
                    // A short packet is nobody's we know.
                    Ok(_) => {}
                    // Nothing more, or an error of the moment.
                    Err(_) => break,
                }
            }
        }
    }
}

/// Whether nothing is expected any more: the last packet was sent a while ago.
fn is_quiet(pairs: &Mutex<Vec<Pair>>) -> bool {
    let pairs = pairs.lock().expect("nobody panics while holding it");
    let last = pairs.iter().filter_map(|pair| pair.open.back().map(|(_, at)| *at)).fold(0.0, f64::max);
    now() - last > 0.4
}
