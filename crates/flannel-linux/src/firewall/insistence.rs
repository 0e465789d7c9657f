//! How long we insist on the place of our jump against somebody who does too.
//!
//! dockerd puts its jumps first each time it starts, and may be started many
//! times; it does not answer us, and we go before it each time. Somebody who
//! does answer would have us write for ever. A fight is one rule that comes back:
//!
//! ```text
//!   five moves at once ──▶ one a second ──▶ after sixty in a row, none for ten minutes
//! ```
//!
//! Other rules are no part of it. dockerd up to 27 puts one of its own above ours
//! for each network that it makes, and on some hosts it makes one a minute.
//!
//! A policy engine may be told to come last, as Calico can be, and looks every
//! minute or two: we go behind its jump once, and when it has gone behind ours
//! again we leave it at that.

use std::collections::BTreeMap;
use std::time::Duration;

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

/// So long a policy engine's jump may stay below ours once we have gone behind it. One
/// that was taken away and appended again, as with a new version, is behind us no longer than that.
const GIVEN_WAY: Duration = Duration::from_secs(3600);

/// The rules for which our jump was moved lately.
#[derive(Clone, Debug, Default)]
pub(super) struct Insistence {
    rows: BTreeMap<String, Row>,
}

/// The moves for one rule.
#[derive(Clone, Debug)]
struct Row {
    moves: usize,
    last: Instant,
    waits_until: Instant,
}

impl Insistence {
    /// The rules that stay where they are now.
    pub(super) fn conceded(&self, now: Instant) -> Vec<String> {
        let waiting = self.rows.iter().filter(|(_, row)| now < row.waits_until);
        waiting.map(|(rule, _)| rule.clone()).collect()
    }

    /// When the first of them does no longer.
    pub(super) fn waits_until(&self, now: Instant) -> Option<Instant> {
        self.rows.values().map(|row| row.waits_until).filter(|until| now < *until).min()
    }

    /// Takes in that our jump was moved for a rule; whether that was the last time for a while.
    pub(super) fn moved(&mut self, rule: &str, now: Instant) -> bool {
        let row = self.row(rule, now);
        row.moves += 1;
        row.waits_until = match row.moves {
            MOST.. => now + REST,
            AT_ONCE.. => now + PAUSE,
            _ => now,
        };
        let is_last = row.moves >= MOST;
        if is_last {
            row.moves = 0;
        }
        is_last
    }

    /// Takes in that our jump has gone behind a policy engine's.
    pub(super) fn gave_way(&mut self, rule: &str, now: Instant) {
        self.row(rule, now).waits_until = now + GIVEN_WAY;
    }

    fn row(&mut self, rule: &str, now: Instant) -> &mut Row {
        self.rows.retain(|_, row| now < row.waits_until || now.duration_since(row.last) < QUIET);
        let new = Row { moves: 0, last: now, waits_until: now };
        let row = self.rows.entry(rule.to_owned()).or_insert(new);
        row.last = now;
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "-A FORWARD -j DROP";
    const ANOTHER: &str = "-A FORWARD -o br-1 -j DOCKER";

    /// How long it takes until our jump may be moved again, after so many moves, each as soon as it may be.
    fn wait_after(moves: usize) -> (Duration, bool) {
        let (mut insistence, mut now, mut is_last) = (Insistence::default(), Instant::now(), false);
        for _ in 0..moves {
            now = insistence.waits_until(now).unwrap_or(now);
            assert_eq!(insistence.conceded(now), [""; 0]);
            is_last = insistence.moved(RULE, now);
        }
        let until = insistence.waits_until(now).unwrap_or(now);
        assert_eq!(insistence.conceded(until), [""; 0]);
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
    fn while_we_wait_the_rule_is_conceded_and_no_other() {
        let (mut insistence, now) = (Insistence::default(), Instant::now());

        for _ in 0..5 {
            insistence.moved(RULE, now);
        }
        insistence.moved(ANOTHER, now);

        assert_eq!(insistence.conceded(now), [RULE]);
    }

    #[test]
    fn who_comes_last_on_purpose_is_gone_behind_once() {
        let (mut insistence, start) = (Insistence::default(), Instant::now());
        let rule = "-A FORWARD -j cali-FORWARD";
        // It looks again each 90 seconds.
        let after = |looks: u32| start + looks * Duration::from_secs(90);

        let moves = (0..39).filter(|looks| {
            let may = insistence.conceded(after(*looks)).is_empty();
            if may {
                insistence.gave_way(rule, after(*looks));
            }
            may
        });

        assert_eq!(moves.count(), 1);
    }

    #[test]
    fn moves_that_are_far_apart_are_no_row() {
        let (mut insistence, start) = (Insistence::default(), Instant::now());

        assert!(!(0..1000).any(|number| insistence.moved(RULE, start + number * QUIET)));
    }

    #[test]
    fn a_rule_for_each_new_network_is_no_row() {
        let (mut insistence, mut now) = (Insistence::default(), Instant::now());

        for number in 0..1000 {
            now += PAUSE;
            assert!(!insistence.moved(&format!("-A FORWARD -o br-{number} -j DOCKER"), now));
            assert_eq!(insistence.conceded(now), [""; 0]);
        }

        // And what is long gone is forgotten.
        assert!(insistence.rows.len() <= 60, "{}", insistence.rows.len());
    }
}
