//! bulle's device models.
//!
//! No KVM crate is used here: interrupts go out through [`irq::Interrupt`], and what a device
//! wants of the machine comes back as an [`bus::Effect`]. So every device is tested without
//! /dev/kvm.

pub mod bus;
pub mod irq;
