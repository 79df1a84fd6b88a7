//! The registers of one virtio device: status machine (sections 2.1, 3.1), feature negotiation
//! (2.2), queue set-up (2.7), configuration space and its generation (2.5), reset (2.4).
//!
//! Called by transports on vCPU threads and by the VMM for pause, resume and save. One private
//! mutex, held while the backend starts or stops: that waits for the host's I/O to drain, never
//! for the guest. The I/O thread does not take it; it talks through the [`Notifier`].
//!
//! Queue registers are written only between FEATURES_OK and DRIVER_OK, and only until the queue
//! is ready; every other write is dropped, so what was checked at activation stays true.

mod reg;
mod state;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::reg::{Half, Reg, Ring};
use self::state::DRIVER_BITS;
pub use self::state::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, QueueCfg, QueueError,
    RestoreError, VirtioState,
};
use super::Memory;
use super::device::{ConfigSpace, Traits};
use super::notifier::{ISR_CONFIG, Notifier, VirtioInterrupt};
use super::worker::{Backend, Retired, Start};
use crate::lock;

/// Features that the core implements for every device, unless that withholds them.
pub const CORE_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Kicks that come through the transport before the backend hears of it.
const MANY_KICKS: u32 = 4000;

/// A core could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The saved state does not fit.
    #[error("virtio device cannot be restored")]
    Restore(#[from] RestoreError),
    /// No event file descriptor for a queue.
    #[error("cannot create an eventfd for a virtio queue")]
    Kick(#[source] io::Error),
}

/// What a core is made of.
pub struct Parts {
    /// The device's traits.
    pub traits: Traits,
    /// The device's configuration space.
    pub config: Arc<dyn ConfigSpace>,
    /// Where the device and its queues live while running.
    pub backend: Box<dyn Backend>,
    /// The transport's interrupts.
    pub interrupt: Arc<dyn VirtioInterrupt>,
    /// Guest RAM.
    pub memory: Memory,
}

struct Inner {
    status: u8,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    queues: Vec<QueueCfg>,
    backend: Box<dyn Backend>,
    running: bool,
}

/// The core of one virtio device.
pub struct VirtioCore {
    traits: Traits,
    features: u64,
    config: Arc<dyn ConfigSpace>,
    memory: Memory,
    kicks: Arc<[EventFd]>,
    slow_kicks: AtomicU32,
    notifier: Arc<Notifier>,
    base_generation: u32,
    inner: Mutex<Inner>,
}

impl VirtioCore {
    /// Makes a device from its parts and a saved state, or [`VirtioState::default`]. It does not
    /// run before [`resume`](Self::resume), or before a driver starts it.
    pub fn new(parts: Parts, state: VirtioState) -> Result<Self, NewError> {
        let Parts {
            traits,
            config,
            backend,
            interrupt,
            memory,
        } = parts;
        let features = traits.features | CORE_FEATURES & !traits.withheld;
        let queues = check(&state, &traits, features, &memory)?;
        let kicks = traits
            .queues
            .iter()
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK))
            .collect::<io::Result<Arc<[EventFd]>>>()
            .map_err(NewError::Kick)?;
        let needs_reset = state.status & NEEDS_RESET != 0;
        Ok(Self {
            notifier: Arc::new(Notifier::new(interrupt, state.isr, needs_reset)),
            base_generation: state.generation,
            traits,
            features,
            config,
            memory,
            kicks,
            slow_kicks: AtomicU32::new(0),
            inner: Mutex::new(Inner::new(&state, queues, backend)),
        })
    }

    /// What the device is.
    pub fn traits(&self) -> &Traits {
        &self.traits
    }

    /// One event file descriptor per queue: written to, it kicks the queue. KVM writes them for
    /// the guest where they are registered as ioeventfds.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Interrupts, ISR status and failures.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Reads a register.
    pub fn read(&self, reg: Reg) -> u32 {
        let inner = lock(&self.inner);
        let queue = inner.selected();
        match reg {
            Reg::DeviceId => self.traits.id,
            Reg::DeviceFeatures => half(self.features, inner.device_features_sel),
            Reg::DeviceFeaturesSel => inner.device_features_sel,
            Reg::DriverFeatures => half(inner.driver_features, inner.driver_features_sel),
            Reg::DriverFeaturesSel => inner.driver_features_sel,
            Reg::NumQueues => self.traits.queues.len() as u32,
            Reg::QueueSel => inner.queue_sel,
            Reg::QueueSizeMax => {
                let max = queue.and_then(|(i, _)| self.traits.queues.get(i));
                max.copied().unwrap_or(0).into()
            }
            Reg::QueueSize => queue.map_or(0, |(_, q)| q.size.into()),
            Reg::QueueReady => queue.map_or(0, |(_, q)| q.ready.into()),
            Reg::QueueAddr(ring, half) => queue.map_or(0, |(_, q)| half.of(*q.ring(ring))),
            Reg::QueueNotify | Reg::InterruptAck => 0,
            Reg::InterruptStatus => self.notifier.isr(),
            Reg::Status => self.status(&inner).into(),
            Reg::ConfigGeneration => self.generation(),
            Reg::ShmSel => inner.shm_sel,
            Reg::ShmLen(half) => self.shm(&inner).map_or(u32::MAX, |(_, len)| half.of(len)),
            Reg::ShmBase(half) => self.shm(&inner).map_or(u32::MAX, |(addr, _)| half.of(addr)),
        }
    }

    /// Writes a register. What cannot be written, or not now, is dropped.
    pub fn write(&self, reg: Reg, value: u32) {
        if reg == Reg::QueueNotify {
            return self.kick(value);
        }
        let mut inner = lock(&self.inner);
        match reg {
            Reg::DeviceFeaturesSel => inner.device_features_sel = value,
            Reg::DriverFeaturesSel => inner.driver_features_sel = value,
            Reg::DriverFeatures => inner.accept_features(value),
            Reg::QueueSel => inner.queue_sel = value,
            Reg::QueueSize => inner.configure(|q| q.size = u16::try_from(value).unwrap_or(0)),
            Reg::QueueReady if value == 1 => inner.configure(|q| q.ready = true),
            Reg::QueueReady => inner.unready(),
            Reg::QueueAddr(ring, half) => inner.configure(|q| half.set(q.ring_mut(ring), value)),
            Reg::InterruptAck => {
                self.notifier.acknowledge(value);
            }
            Reg::Status => self.set_status(&mut inner, value),
            Reg::ShmSel => inner.shm_sel = value,
            Reg::DeviceId
            | Reg::DeviceFeatures
            | Reg::NumQueues
            | Reg::QueueSizeMax
            | Reg::QueueNotify
            | Reg::InterruptStatus
            | Reg::ConfigGeneration
            | Reg::ShmLen(_)
            | Reg::ShmBase(_) => {}
        }
    }

    /// Reads and clears the ISR status, as PCI has it (section 4.1.4.5).
    pub fn take_isr(&self) -> u32 {
        self.notifier.acknowledge(u32::MAX)
    }

    /// Reads the configuration space; bytes behind its end are zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.config.read(offset, data);
    }

    /// Writes the configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        if !self.config.write(offset, data) {
            self.notifier.config_refused();
        }
    }

    /// Stops the device: queues and host I/O are at rest when this returns. vCPUs stand still
    /// before and until [`resume`](Self::resume), or a driver could start it again.
    pub fn pause(&self) {
        lock(&self.inner).stop();
    }

    /// Lets a device go on that a driver had started. Interrupts are repeated, since one may have
    /// been on its way when the device was saved; a driver takes one too many.
    pub fn resume(&self) {
        let mut inner = lock(&self.inner);
        if inner.running || !may_run(self.status(&inner)) {
            return;
        }
        self.start(&mut inner);
        for (index, queue) in inner.queues.iter().enumerate() {
            if queue.ready {
                self.notifier.used(index as u16);
            }
        }
        if self.notifier.isr() & ISR_CONFIG != 0 {
            self.notifier.config_changed();
        }
    }

    /// The state, from which [`new`](Self::new) makes the same device. A running device is
    /// stopped for it and goes on, unless it had failed.
    pub fn save(&self) -> VirtioState {
        let mut inner = lock(&self.inner);
        let running = inner.running;
        inner.stop();
        let device = inner.backend.save();
        let Inner {
            status: _,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            ref queues,
            backend: _,
            running: _,
        } = *inner;
        let state = VirtioState {
            status: self.status(&inner),
            isr: self.notifier.isr(),
            generation: self.generation(),
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            queues: queues.clone(),
            device,
        };
        if running && may_run(state.status) {
            self.start(&mut inner);
        }
        state
    }

    /// Goes back to `state`, which this device or the one that it was cloned from once saved, and stands
    /// still until [`resume`](Self::resume). So do the vCPUs.
    ///
    /// # Errors
    /// A state of another device, and a device that cannot do that: nothing is changed but that it
    /// stands still.
    pub fn restore(&self, state: &VirtioState) -> Result<(), RestoreError> {
        let queues = check(state, &self.traits, self.features, &self.memory)?;
        let mut inner = lock(&self.inner);
        inner.stop();
        if !inner.backend.restore(&state.device) {
            return Err(RestoreError::InPlace);
        }
        let needs_reset = state.status & NEEDS_RESET != 0;
        self.notifier.set(state.isr, needs_reset);
        inner.load(state, queues);
        Ok(())
    }

    /// Takes the device away for good: its I/O is finished and what it had of the host closed when this
    /// returns. Whoever still has the registers finds a device that does not start.
    pub fn retire(&self) {
        let mut inner = lock(&self.inner);
        inner.stop();
        // The device goes with its backend.
        inner.backend = Box::new(Retired);
    }

    fn status(&self, inner: &Inner) -> u8 {
        let needs_reset = self.notifier.needs_reset();
        inner.status | if needs_reset { NEEDS_RESET } else { 0 }
    }

    fn generation(&self) -> u32 {
        self.base_generation.wrapping_add(self.config.generation())
    }

    fn shm(&self, inner: &Inner) -> Option<(u64, u64)> {
        let regions = &self.traits.shm;
        let region = regions.iter().find(|r| u32::from(r.id) == inner.shm_sel)?;
        Some((region.addr, region.len))
    }

    /// Kicks a queue where no ioeventfd took the write.
    fn kick(&self, queue: u32) {
        let Some(kick) = self.kicks.get(queue as usize) else {
            return;
        };
        // Only a counter at its maximum refuses, and then the queue is kicked already.
        let _ = kick.write(1);
        // Counted until then only, so that it never comes to it again.
        if self.slow_kicks.load(Ordering::Relaxed) <= MANY_KICKS
            && self.slow_kicks.fetch_add(1, Ordering::Relaxed) == MANY_KICKS
        {
            lock(&self.inner).backend.many_kicks(&self.kicks);
        }
    }

    fn set_status(&self, inner: &mut Inner, value: u32) {
        let value = value as u8;
        if value == 0 {
            return self.reset(inner);
        }
        let old = inner.status;
        let mut new = value & DRIVER_BITS;
        // Section 2.1.1: the driver does not clear bits.
        if old & !new != 0 {
            return;
        }
        let negotiated = inner.driver_features & !self.features == 0
            && inner.driver_features >> VIRTIO_F_VERSION_1 & 1 != 0;
        let known = new & (ACKNOWLEDGE | DRIVER) == ACKNOWLEDGE | DRIVER;
        if old & FEATURES_OK == 0 && !(negotiated && known) {
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        inner.status = new;
        if new & FAILED != 0 {
            inner.stop();
        } else if new & !old & DRIVER_OK != 0 {
            self.activate(inner);
        }
    }

    fn reset(&self, inner: &mut Inner) {
        inner.stop();
        inner.backend.reset();
        self.notifier.reset();
        let Inner {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            queues,
            backend: _,
            running: _,
        } = inner;
        *status = 0;
        *driver_features = 0;
        for sel in [device_features_sel, driver_features_sel, queue_sel, shm_sel] {
            *sel = 0;
        }
        *queues = reset_queues(&self.traits);
    }

    /// The driver is ready: checks the queues and hands them to the backend.
    fn activate(&self, inner: &mut Inner) {
        let ram = self.memory.memory();
        let queues = inner.queues.iter().zip(&self.traits.queues).enumerate();
        for (index, (queue, max)) in queues {
            if queue.ready
                && let Err(error) = queue.check(index, *max, &ram)
            {
                return self.notifier.fail_activation(&error);
            }
        }
        self.start(inner);
    }

    fn start(&self, inner: &mut Inner) {
        let queues = inner.queues.iter();
        let start = Start {
            queues: queues.map(|q| q.ready.then_some(*q)).collect(),
            features: inner.driver_features,
            memory: self.memory.clone(),
            notifier: Arc::clone(&self.notifier),
            kicks: Arc::clone(&self.kicks),
        };
        match inner.backend.start(start) {
            Ok(()) => inner.running = true,
            Err(error) => self.notifier.fail_activation(&error),
        }
    }
}

impl Inner {
    fn new(state: &VirtioState, queues: Vec<QueueCfg>, backend: Box<dyn Backend>) -> Self {
        let mut inner = Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            shm_sel: 0,
            queues: Vec::new(),
            backend,
            running: false,
        };
        inner.load(state, queues);
        inner
    }

    /// Takes the registers of a state, and its `queues`, which were checked.
    fn load(&mut self, state: &VirtioState, queues: Vec<QueueCfg>) {
        self.status = state.status & DRIVER_BITS;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.shm_sel = state.shm_sel;
        self.queues = queues;
    }

    fn selected(&self) -> Option<(usize, &QueueCfg)> {
        let index = self.queue_sel as usize;
        self.queues.get(index).map(|queue| (index, queue))
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & (FEATURES_OK | DRIVER_OK) != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => Half::Low.set(&mut self.driver_features, value),
            1 => Half::High.set(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Changes the selected queue if it can be changed now.
    fn configure(&mut self, change: impl FnOnce(&mut QueueCfg)) {
        if self.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        let queue = self.queues.get_mut(self.queue_sel as usize);
        if let Some(queue) = queue.filter(|q| !q.ready) {
            change(queue);
        }
    }

    /// Takes the selected queue out of use (section 4.2.2.2), as a driver does that gives up before it
    /// is ready. Afterwards there is reset.
    fn unready(&mut self) {
        if self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
            && let Some(queue) = self.queues.get_mut(self.queue_sel as usize)
        {
            queue.ready = false;
        }
    }

    /// Takes the queues back.
    fn stop(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        for (queue, stopped) in self.queues.iter_mut().zip(self.backend.stop()) {
            if let Some(stopped) = stopped {
                *queue = stopped;
            }
        }
    }
}

impl QueueCfg {
    fn ring(&self, ring: Ring) -> &u64 {
        match ring {
            Ring::Desc => &self.desc,
            Ring::Avail => &self.avail,
            Ring::Used => &self.used,
        }
    }

    fn ring_mut(&mut self, ring: Ring) -> &mut u64 {
        match ring {
            Ring::Desc => &mut self.desc,
            Ring::Avail => &mut self.avail,
            Ring::Used => &mut self.used,
        }
    }
}

/// The half of `value` that `select` names; zero where there is none.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => Half::Low.of(value),
        1 => Half::High.of(value),
        _ => 0,
    }
}

fn reset_queues(traits: &Traits) -> Vec<QueueCfg> {
    let queues = traits.queues.iter();
    queues.map(|max| QueueCfg::reset(*max)).collect()
}

/// Whether a device of this status runs: its driver is ready, and neither side has given up.
fn may_run(status: u8) -> bool {
    status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
}

/// Checks a saved state and returns its queues.
fn check(
    state: &VirtioState,
    traits: &Traits,
    features: u64,
    memory: &Memory,
) -> Result<Vec<QueueCfg>, RestoreError> {
    let status = state.status;
    let impossible = status & !(DRIVER_BITS | NEEDS_RESET) != 0
        || status & DRIVER_OK != 0 && status & FEATURES_OK == 0;
    if impossible {
        return Err(RestoreError::Status { status });
    }
    let surplus = state.driver_features & !features;
    if status & FEATURES_OK != 0 && surplus != 0 {
        return Err(RestoreError::Features { features: surplus });
    }
    if state.queues.is_empty() {
        return Ok(reset_queues(traits));
    }
    if state.queues.len() != traits.queues.len() {
        return Err(RestoreError::Queues {
            saved: state.queues.len(),
            device: traits.queues.len(),
        });
    }
    // A driver may have set up a broken queue, which only counts when the device is to run.
    if may_run(status) {
        let ram = memory.memory();
        for (index, (queue, max)) in state.queues.iter().zip(&traits.queues).enumerate() {
            if queue.ready {
                queue.check(index, *max, &ram)?;
            }
        }
    }
    Ok(state.queues.clone())
}
