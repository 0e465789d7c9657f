//! The events of a watch, until its line fails.

use std::time::Duration;

use flannel_etcd::kv::{Ended, Happened, KvStream, Moment, Portion, Range};
use tokio::time::{Instant, sleep};

use super::world::{World, is_in, revision_of};
use super::{SimClient, State, until};

/// How often etcd tells how far it has come when it has nothing else to tell.
const PROGRESS: Duration = Duration::from_secs(3600);

/// A watch of a simulated etcd.
pub struct SimStream {
    client: SimClient,
    range: Range,
    /// Everything before that revision has been told.
    next: i64,
    /// And so many events of that revision.
    told: usize,
    /// A revision of which etcd has forgotten what was deleted.
    forgotten: i64,
    /// The last portion.
    heard: Instant,
    /// When it will be noticed that nothing gets through.
    noticed: Option<Instant>,
    /// How often the line's streams had ended, and the data directory been replaced, as it was opened.
    of: (usize, usize),
    broken: bool,
}

/// What a look comes to.
enum Look {
    Told(Portion, Duration),
    Over(Ended),
    /// Nothing before that moment.
    Nothing(Option<Instant>),
}

impl SimStream {
    pub(super) fn new(client: SimClient, range: Range, now: Moment, replaced: usize, compacted: i64) -> Self {
        let next = if range.revision == 0 { now.revision + 1 } else { range.revision };
        let of = (client.with_line(|line| line.epoch), replaced);
        Self {
            client,
            range,
            next,
            told: 0,
            // So it is until August 2024 (etcd-io/etcd#18089), though a watch may begin there.
            forgotten: compacted,
            heard: Instant::now(),
            noticed: None,
            of,
            broken: false,
        }
    }

    fn look(&mut self, State { world, lines, down, .. }: &mut State) -> Look {
        let (now, began) = (Instant::now(), self.client.etcd.inner.began);
        let line = lines.get_mut(self.client.number).expect("there are as many lines as clients");
        if line.still {
            return Look::Nothing(None);
        }
        if line.cut {
            let noticed = *self.noticed.get_or_insert_with(|| now + line.silence());
            return match now < noticed {
                true => Look::Nothing(Some(noticed)),
                false => Look::Over(Ended::Broken("the watch has fallen silent".into())),
            };
        }
        self.noticed = None;
        if self.broken || *down || self.of != (line.epoch, world.replaced) {
            return Look::Over(Ended::Broken("the watch was closed".into()));
        }
        // What is told as it happens has no need of the history; what is read later has.
        if self.next < self.forgotten || self.next < world.compacted && line.dice.u8(..4) == 0 {
            return Look::Over(Ended::Compacted);
        }
        let term = world.moment.term;
        let (mut events, later) = self.pending(world, now.duration_since(began).saturating_sub(line.lag));
        if events.is_empty() {
            let progress = self.heard + PROGRESS;
            let later = later.map(|at| began + at + line.lag);
            if now < progress || later.is_some() {
                return Look::Nothing(Some(later.unwrap_or(progress)));
            }
            return Look::Told(Portion { events, up_to: Some(self.next - 1), term }, line.latency());
        }
        if line.breaks() {
            if line.dice.bool() {
                return Look::Over(Ended::Broken("the connection was reset".into()));
            }
            self.broken = true;
        }
        if line.dice.u8(..5) == 0 {
            // Cut anywhere: even in the middle of one revision, as with many events.
            events.truncate(line.dice.usize(1..=events.len()));
        }
        self.take_note(&events);
        Look::Told(Portion { events, up_to: None, term }, line.latency())
    }

    /// What is to be told of what happened until then, and when more happened.
    /// With nothing to tell, the history has been told up to there.
    fn pending(&mut self, world: &World, until: Duration) -> (Vec<Happened>, Option<Duration>) {
        let after = world.log.partition_point(|(_, happened)| revision_of(happened) < self.next);
        let (mut events, mut told, mut seen) = (vec![], 0, self.next - 1);
        for (at, happened) in world.log.get(after..).unwrap_or_default() {
            if *at > until {
                return (events, Some(*at));
            }
            seen = revision_of(happened);
            let key = match happened {
                Happened::Put(entry) => &entry.key,
                Happened::Deleted(key, _) => key,
            };
            let is_forgotten = seen == self.forgotten && matches!(happened, Happened::Deleted(..));
            if is_in(&self.range, key) && !is_forgotten {
                if seen == self.next && told < self.told {
                    told += 1;
                } else {
                    events.push(happened.clone());
                }
            }
        }
        if events.is_empty() {
            (self.next, self.told) = (seen.max(self.next - 1).max(world.moment.revision) + 1, 0);
        }
        (events, None)
    }

    fn take_note(&mut self, events: &[Happened]) {
        for event in events {
            let revision = revision_of(event);
            if revision != self.next {
                (self.next, self.told) = (revision, 0);
            }
            self.told += 1;
        }
    }
}

impl KvStream for SimStream {
    async fn next(&mut self) -> Result<Portion, Ended> {
        let etcd = self.client.etcd.clone();
        loop {
            let mut news = std::pin::pin!(etcd.inner.news.notified());
            news.as_mut().enable();
            let look = self.look(&mut etcd.state());
            match look {
                Look::Told(portion, latency) => {
                    sleep(latency).await;
                    self.heard = Instant::now();
                    self.client.hear();
                    return Ok(portion);
                }
                Look::Over(ended) => return Err(ended),
                Look::Nothing(later) => tokio::select! {
                    biased;
                    () = &mut news => {}
                    () = until(later) => {}
                },
            }
        }
    }
}
