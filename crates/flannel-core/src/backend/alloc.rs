//! A lease and nothing else: for hosts whose routes somebody else makes.

use super::{Backend, Node};
use crate::lease::{Lease, LeaseAttrs};
use crate::state::{HostState, LinkName, MacAddr, Object};
use crate::underlay::Underlay;

/// Plans nothing.
#[derive(Clone, Copy, Debug)]
pub struct Alloc;

impl Backend for Alloc {
    fn kind(&self) -> &'static str {
        "alloc"
    }

    fn links(&self) -> Vec<LinkName> {
        vec![]
    }

    fn mtu(&self, node: &Node) -> u32 {
        node.underlay.mtu
    }

    fn check(&self, _underlay: &Underlay) -> Result<(), String> {
        Ok(())
    }

    fn attributes(&self, underlay: &Underlay, _observed: &HostState, _random: MacAddr) -> LeaseAttrs {
        // Flannel publishes no type here (`pkg/backend/alloc/alloc.go`).
        underlay.attributes("")
    }

    fn plan_node(&self, _node: &Node) -> HostState {
        HostState::default()
    }

    fn plan_peer(&self, _node: &Node, _peer: &Lease) -> Result<Vec<Object>, String> {
        Ok(vec![])
    }
}
