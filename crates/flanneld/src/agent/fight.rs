//! Whether somebody else keeps changing what is ours.
//!
//! What is changed once, or ten thousand objects at a stroke, is put right and
//! that is that. Another agent on the same device, or a script in a loop, changes
//! it again each time; then it is put right now and then, and somebody has to be
//! told.

use std::collections::VecDeque;
use std::time::Duration;

use flannel_core::diff::Step;
use tokio::time::Instant;

/// Rounds are counted by the moments of that length in which there was one: a
/// stroke, however many objects it hits, is over in a few.
const MOMENT: Duration = Duration::from_millis(100);

/// For how long a moment counts.
pub(super) const LATE: Duration = Duration::from_secs(10);

/// With so many moments of late it is a fight.
const MANY: usize = 15;

/// With no more than so many it is over.
const FEW: usize = 3;

/// The rounds of late.
#[derive(Debug, Default)]
pub(super) struct Fight {
    moments: VecDeque<Instant>,
    goes_on: bool,
    about: String,
}

impl Fight {
    /// Takes in that something had to be put right, `first` of all.
    pub(super) fn round(&mut self, now: Instant, first: &Step) {
        self.forget(now);
        if self.moments.back().is_none_or(|last| now.duration_since(*last) >= MOMENT) {
            self.moments.push_back(now);
        }
        if self.moments.len() >= MANY && !self.goes_on {
            self.goes_on = true;
            self.about = first.to_string();
        }
    }

    /// Takes in that time has passed.
    pub(super) fn forget(&mut self, now: Instant) {
        self.moments.retain(|moment| now.duration_since(*moment) < LATE);
        self.goes_on &= self.moments.len() > FEW;
    }

    /// Whether there is one.
    pub(super) fn goes_on(&self) -> bool {
        self.goes_on
    }

    /// What had to be done as it began.
    pub(super) fn about(&self) -> &str {
        &self.about
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::state::NexthopId;

    use super::*;

    fn step() -> Step {
        Step::RemoveNexthop(NexthopId(7.try_into().unwrap()))
    }

    #[test]
    fn a_stroke_is_no_fight() {
        let (mut fight, now) = (Fight::default(), Instant::now());

        for millisecond in 0..500 {
            fight.round(now + Duration::from_millis(millisecond), &step());
        }

        assert!(!fight.goes_on());
    }

    #[test]
    fn a_loop_is_one_until_it_ends() {
        let (mut fight, now) = (Fight::default(), Instant::now());

        for round in 0..20 {
            fight.round(now + round * Duration::from_millis(300), &step());
        }
        assert!(fight.goes_on());
        assert_eq!(fight.about(), "remove nexthop 7");

        fight.forget(now + Duration::from_secs(20));
        assert!(!fight.goes_on());
    }

    #[test]
    fn answered_once_a_second_it_is_still_one() {
        let (mut fight, now) = (Fight::default(), Instant::now());

        for round in 0..20 {
            fight.round(now + round * Duration::from_millis(300), &step());
        }
        for second in 6..60 {
            fight.round(now + Duration::from_secs(second), &step());
            assert!(fight.goes_on(), "second {second}");
        }
    }
}
