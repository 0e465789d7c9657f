//! How long we insist on the place of our jump against somebody who does too.
//!
//! dockerd puts its jumps first each time it starts, and may be started many
//! times; it does not answer us, and we go before it each time. Somebody who
//! does answer would have us write for ever:
//!
//! ```text
//!   five moves at once ──▶ one a second ──▶ after sixty in a row, none for ten minutes
//! ```

use std::time::Duration;

use flannel_core::firewall::iptables::Place;
use tokio::time::Instant;

/// So many moves in a row cost no wait.
const AT_ONCE: usize = 5;

/// Between the others, at least.
const PAUSE: Duration = Duration::from_secs(1);

/// After so many in a row the others have their way.
const MOST: usize = 60;

/// For so long.
const REST: Duration = Duration::from_secs(600);

/// A row ends with so long a time without a move.
const QUIET: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Default)]
pub(super) struct Insistence {
    in_a_row: usize,
    last: Option<Instant>,
    waits_until: Option<Instant>,
}

impl Insistence {
    /// Where our jump should stand now.
    pub(super) fn place(&self, now: Instant) -> Place {
        if self.waits_until.is_some_and(|until| now < until) { Place::Anywhere } else { Place::BeforeOthers }
    }

    /// When we insist again.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        self.waits_until
    }

    /// Takes in that our jump was moved; whether that was the last time for a while.
    pub(super) fn moved(&mut self, now: Instant) -> bool {
        if self.last.is_some_and(|last| now.duration_since(last) >= QUIET) {
            self.in_a_row = 0;
        }
        self.last = Some(now);
        self.in_a_row += 1;
        let is_last = self.in_a_row >= MOST;
        self.waits_until = match self.in_a_row {
            MOST.. => Some(now + REST),
            AT_ONCE.. => Some(now + PAUSE),
            _ => None,
        };
        if is_last {
            self.in_a_row = 0;
        }
        is_last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long it takes until our jump may be moved again, after so many moves, each as soon as it may be.
    fn wait_after(moves: usize) -> (Duration, bool) {
        let (mut insistence, mut now, mut is_last) = (Insistence::default(), Instant::now(), false);
        for _ in 0..moves {
            now = insistence.waits_until().unwrap_or(now);
            assert_eq!(insistence.place(now), Place::BeforeOthers);
            is_last = insistence.moved(now);
        }
        let until = insistence.waits_until().unwrap_or(now);
        assert_eq!(insistence.place(until), Place::BeforeOthers);
        (until - now, is_last)
    }

    #[test]
    fn moves_in_a_row_come_ever_more_slowly_and_end() {
        assert_eq!(wait_after(4), (Duration::ZERO, false));
        assert_eq!(wait_after(5), (PAUSE, false));
        assert_eq!(wait_after(59), (PAUSE, false));
        assert_eq!(wait_after(60), (REST, true));
        assert_eq!(wait_after(61), (Duration::ZERO, false));
    }

    #[test]
    fn while_we_wait_the_jump_stays_anywhere() {
        let (mut insistence, now) = (Insistence::default(), Instant::now());

        for _ in 0..5 {
            insistence.moved(now);
        }

        assert_eq!(insistence.place(now), Place::Anywhere);
    }

    #[test]
    fn moves_that_are_far_apart_are_no_row() {
        let (mut insistence, start) = (Insistence::default(), Instant::now());

        assert!(!(0..1000).any(|number| insistence.moved(start + number * QUIET)));
    }
}
