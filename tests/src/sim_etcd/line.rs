//! The way between one client and etcd, and what happens on it.

use std::collections::VecDeque;
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

/// How a line behaves.
#[derive(Clone, Debug)]
pub struct Weather {
    /// The longest that anything is usually on its way.
    pub latency: Duration,
    /// Of a hundred requests so many meet with something.
    pub trouble: u8,
    /// Of a hundred portions of a watch so many are the last ones of their stream, or are lost with it.
    pub breaks: u8,
}

impl Weather {
    /// Quick, and nothing is lost.
    pub const FAIR: Self = Self { latency: Duration::from_millis(2), trouble: 0, breaks: 0 };
}

/// What becomes of a request, were the line to stay as it is.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It is carried out after the first and answered after the second.
    Answered(Duration, Duration),
    /// It does not arrive.
    Lost,
    /// It is carried out after that, and the answer is lost.
    AnswerLost(Duration),
    /// The client has given up by the time that it is carried out.
    Late(Duration),
    /// etcd asks to be asked later: it has no leader.
    NoLeader,
}

/// One client's line.
pub(super) struct Line {
    pub(super) dice: Rng,
    /// The fates of the next requests, before any dice are thrown.
    pub(super) fates: VecDeque<Fate>,
    pub(super) weather: Weather,
    /// Nothing gets through, and nobody says so.
    pub(super) cut: bool,
    /// The host stands still: nothing leaves it and nothing arrives before it goes on.
    pub(super) still: bool,
    /// What etcd says to this user instead of an answer.
    pub(super) denied: bool,
    /// What keys begin with that this user may not touch.
    pub(super) forbidden: Option<Vec<u8>>,
    /// How far the member that serves its watches is behind.
    pub(super) lag: Duration,
    /// Changes when all streams end.
    pub(super) epoch: usize,
    /// When etcd has last said anything by it.
    pub(super) heard: Option<Instant>,
}

impl Line {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            dice: Rng::with_seed(seed),
            fates: VecDeque::new(),
            weather: Weather::FAIR,
            cut: false,
            still: false,
            denied: false,
            forbidden: None,
            lag: Duration::ZERO,
            epoch: 0,
            heard: None,
        }
    }

    pub(super) fn is_fair(&self) -> bool {
        let quiet = self.weather.trouble == 0 && self.weather.breaks == 0 && self.fates.is_empty();
        quiet && self.lag.is_zero() && !self.cut && !self.still && !self.denied
    }

    pub(super) fn fate(&mut self) -> Fate {
        if let Some(fate) = self.fates.pop_front() {
            return fate;
        }
        let (there, back) = (self.latency(), self.latency());
        if self.dice.u8(..100) >= self.weather.trouble {
            return Fate::Answered(there, back);
        }
        match self.dice.u8(..10) {
            0..3 => Fate::Lost,
            3..6 => Fate::AnswerLost(there),
            // Longer than a request may take by far: a leader that was cut off comes back.
            6 => Fate::Late(Duration::from_millis(self.dice.u64(5_000..60_000))),
            7 => Fate::Late(Duration::from_millis(self.dice.u64(0..10_000))),
            8 => Fate::NoLeader,
            _ => Fate::Answered(there, Duration::from_millis(self.dice.u64(0..5_000))),
        }
    }

    pub(super) fn latency(&mut self) -> Duration {
        let longest = u64::try_from(self.weather.latency.as_micros()).expect("a latency is short");
        Duration::from_micros(self.dice.u64(0..=longest))
    }

    /// How long it takes to notice that nothing gets through.
    pub(super) fn silence(&mut self) -> Duration {
        Duration::from_millis(self.dice.u64(5_000..70_000))
    }

    pub(super) fn breaks(&mut self) -> bool {
        self.dice.u8(..100) < self.weather.breaks
    }
}
