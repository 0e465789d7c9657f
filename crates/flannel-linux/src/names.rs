//! Interface name → index, for as long as one pass.
//!
//! Devices come and go, so nothing is remembered here from one pass to the next;
//! within one, ten thousand entries of a device cost a single question, and none
//! if the monitor watches the device.

use std::collections::HashMap;

use flannel_core::state::LinkName;

use crate::netlink::link;
use crate::netlink::socket::{Kernel, NetlinkError};

/// What was asked so far; `None` for what is not there.
#[derive(Default)]
pub(crate) struct Names {
    indexes: HashMap<LinkName, Option<u32>>,
}

impl Names {
    /// The index of a device.
    pub(crate) fn index(&mut self, kernel: &mut Kernel, name: LinkName) -> Result<Option<u32>, NetlinkError> {
        if let Some(known) = self.indexes.get(&name) {
            return Ok(*known);
        }
        // The monitor is told when a device that concerns us comes or goes.
        let index = match kernel.monitor.index_of(name) {
            Some(index) => Some(index),
            None => link::by_name(kernel, name)?.map(|seen| seen.index),
        };
        self.indexes.insert(name, index);
        Ok(index)
    }

    /// Forgets a device that was made or removed.
    pub(crate) fn forget(&mut self, name: LinkName) {
        self.indexes.remove(&name);
    }
}
