//! Interface name ⇄ index, for as long as one pass.
//!
//! Devices come and go, so nothing is remembered from one pass to the next;
//! within one, ten thousand entries of a device cost a single question.

use std::collections::HashMap;

use flannel_core::state::LinkName;

use crate::netlink::link::{self, SeenLink};
use crate::netlink::socket::{Kernel, NetlinkError};

/// What was asked so far; `None` for what is not there.
#[derive(Default)]
pub(crate) struct Names {
    indexes: HashMap<LinkName, Option<u32>>,
    names: HashMap<u32, Option<LinkName>>,
}

impl Names {
    /// The index of a device.
    pub(crate) fn index(&mut self, kernel: &mut Kernel, name: LinkName) -> Result<Option<u32>, NetlinkError> {
        if let Some(known) = self.indexes.get(&name) {
            return Ok(*known);
        }
        let index = link::by_name(kernel, name)?.map(|seen| seen.index);
        self.indexes.insert(name, index);
        Ok(index)
    }

    /// The name of a device.
    pub(crate) fn name(&mut self, kernel: &mut Kernel, index: u32) -> Result<Option<LinkName>, NetlinkError> {
        if let Some(known) = self.names.get(&index) {
            return Ok(*known);
        }
        let name = link::by_index(kernel, index)?.map(|seen| seen.name);
        self.names.insert(index, name);
        Ok(name)
    }

    /// Takes in a device that was seen.
    pub(crate) fn learn(&mut self, seen: &SeenLink) {
        self.indexes.insert(seen.name, Some(seen.index));
        self.names.insert(seen.index, Some(seen.name));
    }

    /// Forgets a device that was made or removed.
    pub(crate) fn forget(&mut self, name: LinkName) {
        self.indexes.remove(&name);
        self.names.clear();
    }
}
