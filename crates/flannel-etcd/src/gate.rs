//! Credentials that etcd has refused are not shown to it again and again.
//!
//! Each try costs etcd a password hash and its operator a line in the log, and
//! an agent has many reasons to try. So after a refusal there is one try in a
//! while, by whoever comes first, and the others hear what the last one heard.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::kv::Refusal;

/// Between two tries, at least.
const PAUSE: Duration = Duration::from_secs(5);

/// What stands between the calls and an authentication.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<Option<Closed>>);

#[derive(Debug)]
struct Closed {
    refusal: Refusal,
    /// When the next one may try.
    until: Instant,
}

impl Gate {
    /// Whether a try may be made `now`.
    ///
    /// # Errors
    /// It may not, for this reason.
    pub(crate) fn pass(&self, now: Instant) -> Result<(), Refusal> {
        match self.state().as_mut() {
            Some(closed) if now < closed.until => Err(closed.refusal.clone()),
            Some(closed) => {
                closed.until = now + PAUSE;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A try has been refused.
    pub(crate) fn close(&self, refusal: Refusal, now: Instant) {
        *self.state() = Some(Closed { refusal, until: now + PAUSE });
    }

    /// A try has succeeded.
    pub(crate) fn open(&self) {
        *self.state() = None;
    }

    fn state(&self) -> MutexGuard<'_, Option<Closed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_refusal_one_try_is_made_in_a_while_and_the_others_hear_the_same() {
        let (gate, now) = (Gate::default(), Instant::now());
        let refusal = Refusal { code: 3, words: "no".into() };

        assert_eq!((gate.pass(now), gate.pass(now)), (Ok(()), Ok(())), "nothing is known against us");
        gate.close(refusal.clone(), now);
        assert_eq!(gate.pass(now), Err(refusal.clone()));
        assert_eq!((gate.pass(now + PAUSE), gate.pass(now + PAUSE)), (Ok(()), Err(refusal)));
        gate.open();
        assert_eq!(gate.pass(now), Ok(()));
    }
}
