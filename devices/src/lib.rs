//! bulle's device models.
//!
//! No KVM crate is used here: interrupts go out through [`irq::Interrupt`] and
//! [`ioapic::MsiSink`], and what a device wants of the machine comes back as a [`bus::Effect`]. So
//! every device is tested without /dev/kvm.
//!
//! Every device is built by `new(resources, state)` and gives its state back by `save()`: booting
//! is restoring the reset state, which is the state's `Default`.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod bus;
pub mod console;
pub mod counters;
pub mod ioapic;
pub mod irq;
pub mod legacy;
pub mod mmds;
pub mod pci;
pub mod virtio;

mod random;

#[cfg(test)]
mod conformance;

/// Locks a device's registers. Plain data stays usable after a panic elsewhere, so a poisoned lock
/// is taken as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
