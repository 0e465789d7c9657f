//! How long we insist on the place of our jump against somebody who does too.

use std::time::Duration;

use flannel_core::firewall::iptables::Place;
use tokio::time::Instant;

/// So often in a row we move.
const MOVES: usize = 5;

/// What is further apart is not in a row: dockerd moves its jumps each time it starts.
const ROW: Duration = Duration::from_secs(60);

/// For so long we then let the others have their way.
const REST: Duration = Duration::from_secs(600);

#[derive(Clone, Debug, Default)]
pub(super) struct Insistence {
    moves: Vec<Instant>,
    rests_until: Option<Instant>,
}

impl Insistence {
    /// Where our jump should stand now.
    pub(super) fn place(&self, now: Instant) -> Place {
        if self.rests_until.is_some_and(|until| now < until) { Place::Anywhere } else { Place::BeforeOthers }
    }

    /// Takes in that our jump was moved; whether that was the last time for a while.
    pub(super) fn moved(&mut self, now: Instant) -> bool {
        self.moves.retain(|moved| now.duration_since(*moved) < ROW);
        self.moves.push(now);
        let is_last = self.moves.len() >= MOVES;
        if is_last {
            self.moves.clear();
            self.rests_until = Some(now + REST);
        }
        is_last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_five_moves_in_a_row_the_others_have_their_way_for_a_while() {
        let (mut insistence, start) = (Insistence::default(), Instant::now());

        let moves: Vec<bool> = (0..5).map(|_| insistence.moved(start)).collect();

        assert_eq!(moves, [false, false, false, false, true]);
        assert_eq!(insistence.place(start), Place::Anywhere);
        assert_eq!(insistence.place(start + REST), Place::BeforeOthers);
    }

    #[test]
    fn moves_that_are_far_apart_go_on() {
        let (mut insistence, start) = (Insistence::default(), Instant::now());

        assert!(!(0..100).any(|number| insistence.moved(start + number * ROW / 4)));
    }
}
