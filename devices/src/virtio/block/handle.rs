//! What the VMM keeps of a block device: figures, a new size, new limits.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::EventFd;

use super::counters::Counters;
use super::exchange::Present;
use super::space::Space;
use crate::counters::Values;
use crate::virtio::limiter::{Limiter, LimiterConfig};

/// The side of a block device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct BlockHandle {
    pub(super) present: Arc<Present>,
    pub(super) space: Arc<Space>,
    pub(super) limiter: Arc<OnceLock<Arc<Limiter>>>,
    pub(super) wake: Arc<EventFd>,
    pub(super) new_limits: Arc<AtomicBool>,
    pub(super) counters: Arc<Counters>,
}

impl BlockHandle {
    /// What the device has done.
    pub fn counters(&self) -> Values {
        self.counters.values()
    }

    /// Looks at the disk's size again, and tells the driver of a new one. Returns it in sectors.
    pub fn resize(&self) -> io::Result<u64> {
        let sectors = self.present.disk().sectors()?;
        if self.space.resize(sectors) {
            self.counters.updates.one();
            self.wake.write(1)?;
        }
        Ok(sectors)
    }

    /// The limiter, which limits nothing if none was configured; after a change of it call
    /// [`limits_changed`](Self::limits_changed).
    pub fn limiter(&self) -> &Arc<Limiter> {
        self.limiter
            .get_or_init(|| Arc::new(Limiter::new(LimiterConfig::default())))
    }

    /// Lets requests go on that wait for old limits.
    pub fn limits_changed(&self) -> io::Result<()> {
        self.new_limits.store(true, Ordering::SeqCst);
        self.wake.write(1)
    }
}
