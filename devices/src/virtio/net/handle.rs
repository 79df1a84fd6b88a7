//! The side of a network device that the VMM keeps.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::counters::{Counters, Traffic};
use super::space::Space;
use crate::counters::Values;
use crate::virtio::limiter::Limiter;

/// The side of a network device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct NetHandle {
    pub(super) counters: Arc<Counters>,
    pub(super) limiters: [Option<Arc<Limiter>>; 2],
    pub(super) wake: Arc<EventFd>,
    pub(super) space: Arc<Space>,
}

impl NetHandle {
    /// What the guest received and sent.
    pub fn traffic(&self) -> [Traffic; 2] {
        [self.counters.rx.traffic(), self.counters.tx.traffic()]
    }

    /// What the device has done.
    pub fn counters(&self) -> Values {
        self.counters.values()
    }

    /// How often the link went down or up; it was up first.
    pub fn link_changes(&self) -> u32 {
        self.space.link_changes()
    }

    /// The limiters for receiving and sending; after [`Limiter::set`] call
    /// [`limits_changed`](Self::limits_changed).
    pub fn limiters(&self) -> &[Option<Arc<Limiter>>; 2] {
        &self.limiters
    }

    /// Lets frames go on that wait for old limits.
    pub fn limits_changed(&self) -> io::Result<()> {
        self.wake.write(1)
    }
}
