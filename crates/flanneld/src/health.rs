//! `/healthz` and `/readyz`: what the agent knows of itself, told as it is.
//!
//! Alive means that the process answers. Ready means that the lease is held,
//! the kernel was last seen as it should be, the interface between the hosts is
//! there, the traffic rules stand, the subnet file is written and no bridge is on
//! a subnet that is not ours any more; it is taken back when one of them no longer
//! holds. A peer that the kernel refuses, a store that is away and peers that are
//! held are told of on the page and do not make the host unready: one bad key, or
//! one bad hour of the store, would make every host so.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::any;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// How one part of the agent is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// Not there yet, or not any more; a phrase for the operator.
    Pending(String),
    /// As it should be but for something that does not keep the host from its work; a phrase for the operator.
    Flawed(String),
    /// As it should be.
    Good,
}

/// What readiness rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Our lease is held.
    pub lease: Aspect,
    /// What we go by is what the store says, not what this host remembers.
    pub memory: Aspect,
    /// The store answers.
    pub store: Aspect,
    /// Nobody is held who vanished from the store.
    pub peers: Aspect,
    /// The kernel was as it should be when last looked at.
    pub host: Aspect,
    /// The interface between the hosts is there.
    pub underlay: Aspect,
    /// The traffic rules stand.
    pub rules: Aspect,
    /// The subnet file is written.
    pub file: Aspect,
    /// No bridge is left on a subnet that we had to give up.
    pub bridge: Aspect,
}

impl Default for Status {
    fn default() -> Self {
        let pending = |what: &str| Aspect::Pending(what.into());
        Self {
            lease: pending("no lease yet"),
            memory: Aspect::Good,
            store: Aspect::Good,
            peers: Aspect::Good,
            host: pending("the kernel has not been brought in step yet"),
            underlay: Aspect::Good,
            rules: pending("the traffic rules have not been checked yet"),
            file: pending("the subnet file is not written yet"),
            bridge: Aspect::Good,
        }
    }
}

impl Status {
    /// What keeps the host from being ready, a phrase each.
    pub fn pending(&self) -> Vec<&str> {
        let pending = self.aspects().into_iter().filter_map(|aspect| match aspect {
            Aspect::Pending(phrase) => Some(phrase.as_str()),
            Aspect::Flawed(_) | Aspect::Good => None,
        });
        pending.collect()
    }

    /// What is not as it should be and does not keep the host from being ready.
    pub fn flaws(&self) -> Vec<&str> {
        let flaws = self.aspects().into_iter().filter_map(|aspect| match aspect {
            Aspect::Flawed(phrase) => Some(phrase.as_str()),
            Aspect::Pending(_) | Aspect::Good => None,
        });
        flaws.collect()
    }

    fn aspects(&self) -> [&Aspect; 9] {
        let Self { lease, memory, store, peers, host, underlay, rules, file, bridge } = self;
        [lease, memory, store, peers, host, underlay, rules, file, bridge]
    }
}

/// Serves both pages for as long as it is polled.
///
/// # Errors
/// The socket broke.
pub async fn serve(listener: TcpListener, status: watch::Receiver<Status>) -> std::io::Result<()> {
    let pages = Router::new()
        .route("/healthz", any(|| async { "flanneld is running" }))
        .route("/readyz", any(readyz))
        .with_state(status);
    axum::serve(listener, pages).await
}

/// Opens the socket that the pages are served on.
///
/// # Errors
/// The address is not ours or the port is taken.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

async fn readyz(State(status): State<watch::Receiver<Status>>) -> (StatusCode, String) {
    let status = status.borrow().clone();
    // The first line is flannel's; the reasons follow.
    match (status.pending(), status.flaws()) {
        (pending, flaws) if pending.is_empty() && flaws.is_empty() => {
            (StatusCode::OK, "flanneld is ready".into())
        }
        (pending, flaws) if pending.is_empty() => {
            (StatusCode::OK, format!("flanneld is ready\n{}\n", flaws.join("\n")))
        }
        (pending, flaws) => {
            let reasons = [pending, flaws].concat().join("\n");
            (StatusCode::SERVICE_UNAVAILABLE, format!("flanneld is not ready yet\n{reasons}\n"))
        }
    }
}
