//! When to renew our own lease; told the time, never asking for it.
//!
//! A term is 24 hours and renewing is one small message that no peer sees, so
//! it is sent every hour rather than once at the end: an outage of the store
//! then finds nearly the whole term ahead of it. `--subnet-lease-renew-margin`
//! stays what it is in flannel, the latest moment before the end. A reservation
//! has no end, and is looked at as often.

use std::time::{Duration, Instant};

use crate::lease::Expiry;

/// How often a lease is renewed when its margin does not ask for more.
const USUAL: Duration = Duration::from_secs(3600);

/// How long after a failure the next attempt is made (flannel waits as long).
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// The timer of one lease, as data.
#[derive(Clone, Copy, Debug)]
pub struct LeaseKeeper {
    margin: Duration,
    expiry: Expiry,
    next: Instant,
}

impl LeaseKeeper {
    /// Starts keeping a lease that was given to us `now`.
    pub fn new(margin: Duration, expiry: Expiry, now: Instant) -> Self {
        let mut keeper = Self { margin, expiry, next: now };
        keeper.renewed(expiry, now);
        keeper
    }

    /// When to renew next.
    pub fn next_renewal(&self) -> Instant {
        self.next
    }

    /// When the lease ends.
    pub fn expiry(&self) -> Expiry {
        self.expiry
    }

    /// The lease has been renewed and ends at `expiry` now.
    pub fn renewed(&mut self, expiry: Expiry, now: Instant) {
        self.expiry = expiry;
        self.next = match expiry {
            Expiry::Never => now + USUAL,
            Expiry::At(end) => {
                let left = end.saturating_duration_since(now);
                // A term shorter than the margin would be renewed without a pause.
                let latest = left.checked_sub(self.margin).unwrap_or(left / 2);
                now + latest.min(USUAL)
            }
        };
    }

    /// Renewing failed `now`.
    pub fn failed(&mut self, now: Instant) {
        self.next = now + AFTER_FAILURE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    // The tests need some instant to count from.
    #[allow(clippy::disallowed_methods)]
    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_day_s_lease_is_renewed_every_hour() {
        let now = now();

        let keeper = LeaseKeeper::new(HOUR, Expiry::At(now + 24 * HOUR), now);

        assert_eq!(keeper.next_renewal(), now + HOUR);
    }

    #[test]
    fn the_margin_is_the_latest_moment() {
        let now = now();

        let keeper = LeaseKeeper::new(HOUR * 239 / 10, Expiry::At(now + 24 * HOUR), now);

        assert_eq!(keeper.next_renewal(), now + HOUR / 10);
    }

    #[test]
    fn a_term_shorter_than_the_margin_is_renewed_half_way() {
        let now = now();

        let keeper = LeaseKeeper::new(HOUR, Expiry::At(now + HOUR / 2), now);

        assert_eq!(keeper.next_renewal(), now + HOUR / 4);
    }

    #[test]
    fn a_reservation_is_looked_at_every_hour() {
        let now = now();

        let keeper = LeaseKeeper::new(HOUR, Expiry::Never, now);

        assert_eq!(keeper.next_renewal(), now + HOUR);
    }

    #[test]
    fn after_a_failure_it_is_tried_again_in_a_minute() {
        let now = now();
        let mut keeper = LeaseKeeper::new(HOUR, Expiry::At(now + 24 * HOUR), now);

        keeper.failed(now + HOUR);

        assert_eq!(keeper.next_renewal(), now + HOUR + AFTER_FAILURE);
    }
}
