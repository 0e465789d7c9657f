//! When to give in: somebody else wants our device otherwise.
//!
//! Setting it back works against an accident. Against another program that sets
//! it again each time it is a fight that nobody wins, with an outage per round.
//! One gives in once: to a program that wants something else each time there is
//! no giving in.

use std::collections::VecDeque;
use std::time::Duration;

use flannel_core::state::MacAddr;
use tokio::time::Instant;

/// How often something is set back.
const ROUNDS: usize = 3;

/// Rounds that lie further apart than this have nothing to do with each other.
const TOGETHER: Duration = Duration::from_secs(600);

/// The rounds of late.
#[derive(Debug, Default)]
pub(super) struct Tug {
    mac: Rounds,
    mtu: Rounds,
}

#[derive(Debug, Default)]
struct Rounds {
    set_back: VecDeque<Instant>,
    given_in: Option<Instant>,
}

impl Tug {
    /// Whether the device is to keep the MAC that it `is` given.
    pub(super) fn lost_mac(&mut self, is: MacAddr, should: MacAddr, now: Instant) -> bool {
        // One that no peer could send to is never given in to.
        is != should && is.is_unicast() && self.mac.are_lost(now)
    }

    /// Whether the device is to keep the MTU that it `is` given, in bytes.
    pub(super) fn lost_mtu(&mut self, is: u32, should: u32, now: Instant) -> bool {
        is != should && self.mtu.are_lost(now)
    }
}

impl Rounds {
    /// Counts a round; whether it is one too many.
    fn are_lost(&mut self, now: Instant) -> bool {
        let is_late = |moment: &Instant| now.duration_since(*moment) < TOGETHER;
        self.set_back.retain(is_late);
        if self.set_back.len() < ROUNDS || self.given_in.as_ref().is_some_and(is_late) {
            self.set_back.truncate(ROUNDS - 1);
            self.set_back.push_back(now);
            return false;
        }
        self.set_back.clear();
        self.given_in = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: MacAddr = MacAddr([0x0e, 0, 0, 0, 0, 1]);
    const THEIRS: MacAddr = MacAddr([0x0e, 0, 0, 0, 0, 2]);

    #[test]
    fn the_fourth_round_is_lost_and_then_none_for_ten_minutes() {
        let (mut tug, now) = (Tug::default(), Instant::now());

        let lost: Vec<usize> = (0..20).filter(|_| tug.lost_mac(THEIRS, OURS, now)).collect();
        let lost_later: Vec<usize> = (0..20).filter(|_| tug.lost_mac(THEIRS, OURS, now + TOGETHER)).collect();

        assert_eq!((lost, lost_later), (vec![3], vec![3]));
    }

    #[test]
    fn rounds_far_apart_are_accidents() {
        let (mut tug, now) = (Tug::default(), Instant::now());

        let lost = (0..9).any(|round| tug.lost_mtu(1300, 1450, now + round * TOGETHER));

        assert!(!lost);
    }

    #[test]
    fn what_is_as_it_should_be_is_no_round() {
        let (mut tug, now) = (Tug::default(), Instant::now());

        for _ in 0..9 {
            assert!(!tug.lost_mac(OURS, OURS, now) && !tug.lost_mtu(1450, 1450, now));
        }
        assert!(!tug.lost_mac(THEIRS, OURS, now));
    }

    #[test]
    fn a_mac_that_is_no_device_s_is_never_given_in_to() {
        let (mut tug, now) = (Tug::default(), Instant::now());

        assert!(!(0..9).any(|_| tug.lost_mac(MacAddr([0x01, 0, 0, 0, 0, 2]), OURS, now)));
    }
}
