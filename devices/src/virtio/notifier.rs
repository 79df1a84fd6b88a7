//! From a device to its driver: interrupts, ISR status and the need for a reset.
//!
//! Shared by the core (vCPU threads) and the worker (I/O thread), so all of it is atomic and no
//! call waits.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::EventFd;

use crate::counters::{Counter, Values};

/// What an interrupt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vector {
    /// The configuration changed, or the device needs a reset.
    Config,
    /// Buffers of this queue were used.
    Queue(u16),
}

/// The interrupts of one virtio device; each transport implements it.
pub trait VirtioInterrupt: Send + Sync {
    /// Interrupts the driver. Never blocks and never fails towards the device.
    fn signal(&self, vector: Vector);

    /// From now on, has the host's kernel interrupt for `queue` at each event of `event` where the
    /// transport allows that; `None` ends it. Events that stay in `event`, as those of masked vectors
    /// do, are the device's to read and to signal.
    fn direct(&self, queue: u16, event: Option<&EventFd>) {
        let _ = (queue, event);
    }
}

/// ISR status: buffers were used (section 4.1.4.5, 4.2.2).
pub const ISR_QUEUE: u32 = 1;
/// ISR status: the configuration changed.
pub const ISR_CONFIG: u32 = 2;

/// Failures of one device that are logged; a guest can repeat them at will.
const MAX_LOGGED: u32 = 8;

/// The device's side of notifications to the driver.
pub struct Notifier {
    interrupt: Arc<dyn VirtioInterrupt>,
    isr: AtomicU32,
    needs_reset: AtomicBool,
    failures: AtomicU32,
    interrupts: AtomicU64,
    counters: Counters,
    /// Written at each failure and announcement, where somebody wants to know.
    alarm: OnceLock<EventFd>,
}

/// What is counted of any device, beside failures and interrupts for used buffers.
#[derive(Debug, Default)]
struct Counters {
    config_interrupts: Counter,
    message_changes: Counter,
    activate_fails: Counter,
    config_fails: Counter,
}

impl Notifier {
    pub(super) fn new(interrupt: Arc<dyn VirtioInterrupt>, isr: u32, needs_reset: bool) -> Self {
        Self {
            interrupt,
            isr: AtomicU32::new(isr),
            needs_reset: AtomicBool::new(needs_reset),
            failures: AtomicU32::new(0),
            interrupts: AtomicU64::new(0),
            counters: Counters::default(),
            alarm: OnceLock::new(),
        }
    }

    /// Has failures, and what else a device announces, told by `alarm`; a second one is left aside.
    pub fn set_alarm(&self, alarm: EventFd) {
        let _ = self.alarm.set(alarm);
    }

    /// Buffers of `queue` were used.
    pub fn used(&self, queue: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        self.interrupt.signal(Vector::Queue(queue));
    }

    /// [`VirtioInterrupt::direct`].
    pub(super) fn direct(&self, queue: u16, event: Option<&EventFd>) {
        self.interrupt.direct(queue, event);
    }

    /// The configuration space changed.
    pub fn config_changed(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.counters.config_interrupts.one();
        self.interrupt.signal(Vector::Config);
    }

    /// The device cannot go on until the driver resets it (section 2.1.2).
    pub fn fail(&self, error: &dyn Error) {
        self.needs_reset.store(true, Ordering::SeqCst);
        if self.failures.fetch_add(1, Ordering::Relaxed) < MAX_LOGGED {
            let source = error.source().map(|s| format!(": {s}"));
            log::warn!(
                "virtio device needs a reset: {error}{}",
                source.unwrap_or_default()
            );
        }
        self.config_changed();
        self.announce();
    }

    /// Something happened that the VMM wants to know.
    pub(super) fn announce(&self) {
        if let Some(alarm) = self.alarm.get() {
            // Full: it was announced often enough.
            let _ = alarm.write(1);
        }
    }

    /// The device cannot be started as its driver set it up.
    pub(super) fn fail_activation(&self, error: &dyn Error) {
        self.counters.activate_fails.one();
        self.fail(error);
    }

    /// The driver wrote to what is not writable of the configuration space.
    pub(super) fn config_refused(&self) {
        self.counters.config_fails.one();
    }

    /// What went wrong, by the names that Firecracker has for it.
    pub fn counters(&self) -> Values {
        let activations = self.counters.activate_fails.get();
        let events = u64::from(self.failures()).saturating_sub(activations);
        vec![
            ("activate_fails", activations),
            ("cfg_fails", self.counters.config_fails.get()),
            ("event_fails", events),
        ]
    }

    /// The guest changes a message.
    pub(super) fn message_changed(&self) {
        self.counters.message_changes.one();
    }

    /// How often the guest changed a message (MSI-X) since it was made.
    pub fn message_changes(&self) -> u64 {
        self.counters.message_changes.get()
    }

    /// Interrupts of any kind since it was made.
    pub fn triggers(&self) -> u64 {
        self.interrupts() + self.counters.config_interrupts.get()
    }

    /// How often the device failed since it was made.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Interrupts for used buffers since it was made.
    pub fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Relaxed)
    }

    /// ISR status.
    pub fn isr(&self) -> u32 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Whether the device waits for its driver to reset it (section 2.1.2).
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Clears `bits` of the ISR status and returns what it was.
    pub(super) fn acknowledge(&self, bits: u32) -> u32 {
        self.isr.fetch_and(!bits, Ordering::SeqCst)
    }

    pub(super) fn reset(&self) {
        self.set(0, false);
    }

    pub(super) fn set(&self, isr: u32, needs_reset: bool) {
        self.isr.store(isr, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }
}
