//! What the VMM keeps of a vhost-user block device: figures, and the way to a new configuration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::link::Link;
use super::options::VhostUserError;
use super::space::Space;
use crate::counters::{Counter, Values};
use crate::lock;

/// What happened, and how long it took when it happened last.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub activate_fails: Counter,
    pub config_fails: Counter,
    init_us: AtomicU64,
    activate_us: AtomicU64,
    config_us: AtomicU64,
}

fn note(micros: &AtomicU64, took: Duration) {
    let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    micros.store(took, Ordering::Relaxed);
}

impl Counters {
    pub fn initialised(&self, took: Duration) {
        note(&self.init_us, took);
    }

    pub fn activated(&self, took: Duration) {
        note(&self.activate_us, took);
    }
}

/// The side of a vhost-user block device that the VMM keeps.
#[derive(Clone)]
pub struct VhostUserHandle {
    pub(super) link: Arc<Mutex<Link>>,
    pub(super) space: Arc<Space>,
    pub(super) wake: Arc<EventFd>,
    pub(super) counters: Arc<Counters>,
}

impl std::fmt::Debug for VhostUserHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostUserHandle").finish_non_exhaustive()
    }
}

impl VhostUserHandle {
    /// Asks the backend for the configuration space again and tells the driver. Returns the capacity in
    /// sectors. Waits for the backend, for [`PATIENCE`](super::PATIENCE) at most.
    ///
    /// # Errors
    /// Of the backend.
    pub fn reread(&self) -> Result<u64, VhostUserError> {
        let begun = Instant::now();
        let link = lock(&self.link).clone();
        let config = link.config();
        let config = config.inspect_err(|_| self.counters.config_fails.one())?;
        self.space.update(config);
        let woken = self.wake.write(1);
        woken.map_err(|source| VhostUserError::Host {
            what: "wake the I/O thread",
            source,
        })?;
        note(&self.counters.config_us, begun.elapsed());
        Ok(self.space.capacity())
    }

    /// What the device has done.
    pub fn counters(&self) -> Values {
        let micros = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let counters = &self.counters;
        vec![
            ("activate_fails", counters.activate_fails.get()),
            ("cfg_fails", counters.config_fails.get()),
            ("init_time_us", micros(&counters.init_us)),
            ("activate_time_us", micros(&counters.activate_us)),
            ("config_change_time_us", micros(&counters.config_us)),
        ]
    }
}
