//! Peers that vanished from the store at once: held, asked about, and let go.
//!
//! ```text
//!   many vanish ──▶ held ──the grace is over──▶ asked ──still gone──▶ let go
//!                    │ ▲                         │
//!          they are  ▼ └───────── no answer ─────┘
//!            back, one by one or all
//! ```

use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::host::{Firewall, Network};
use flannel_core::store::{LeaseEvent, LeaseStore, Snapshot, StoreError};
use tokio::time::Instant;

use super::{Agent, Input, LONGEST_WAIT};
use crate::health::Aspect;
use crate::lease::delays;

/// Whether those who are held are still gone.
pub(super) struct Question {
    /// The answer is on its way.
    asked: bool,
    /// There was no answer: when to ask again, and why there was none.
    again: Option<(Instant, String)>,
    delays: Box<dyn Iterator<Item = Duration> + Send>,
}

impl Default for Question {
    fn default() -> Self {
        Self { asked: false, again: None, delays: Box::new(delays()) }
    }
}

impl<S: LeaseStore, N: Network, F: Firewall> Agent<S, N, F> {
    /// When the store is to be asked about those who are held.
    pub(super) fn question_due(&self) -> Option<Instant> {
        let due = Instant::from_std(self.guard.due().filter(|_| !self.question.asked)?);
        Some(self.question.again.as_ref().map_or(due, |(again, _)| due.max(*again)))
    }

    pub(super) fn ask_store(&mut self) {
        self.question.asked = true;
        let (store, asked) = (self.parts.store.clone(), Instant::now());
        self.spawn(async move { Input::Listed(asked, store.list().await) });
    }

    pub(super) async fn take_answer(&mut self, asked: Instant, answer: Result<Snapshot, StoreError>) {
        self.question.asked = false;
        match answer {
            Ok(list) => {
                self.question = Question::default();
                if let Some(event) = self.guard.confirm(&list, asked.into_std()) {
                    if let LeaseEvent::RemovedTogether(gone) = &event {
                        self.said.let_go(gone.len());
                    }
                    self.believe(event).await;
                }
            }
            Err(error) => {
                self.said.unanswered(&error);
                let wait = self.question.delays.next().unwrap_or(LONGEST_WAIT);
                self.question.again = Some((Instant::now() + wait, chain(&error)));
            }
        }
        self.tell_held(0);
    }

    /// Tells whether anybody is held, `new` of them since just now.
    pub(super) fn tell_held(&mut self, new: usize) {
        let (held, grace) = (self.guard.count(), self.parts.options.removal_grace);
        if held == 0 && self.question.again.take().is_some() {
            // What comes next is another question.
            self.question.delays = Box::new(delays());
        }
        self.said.held(held, new, self.view.count_peers(self.own()), grace);
        let aspect = match &self.question.again {
            _ if held == 0 => Aspect::Good,
            None => Aspect::Flawed(format!(
                "holding {held} peers that vanished from etcd at once; what is still gone after {grace:?} is believed"
            )),
            Some((_, why)) => Aspect::Flawed(format!(
                "holding {held} peers that vanished from etcd at once; it cannot be asked whether they are gone: {why}"
            )),
        };
        self.parts.status.send_if_modified(|status| {
            let news = status.peers != aspect;
            status.peers = aspect;
            news
        });
    }
}
