//! virtio 1.2: one core, two transports, and the devices.
//!
//! A [`core::VirtioCore`] holds the registers of one device; a transport ([`transport::mmio`],
//! [`transport::pci`]) is a table of offsets over it and runs on vCPU threads. While a driver runs
//! the device, the device and its queues live in a [`worker::Worker`] on an I/O thread; they come
//! back when it stops. Device code sees [`device::VirtioDevice`] and [`io::Io`], nothing else.
//! Section numbers are those of "Virtual I/O Device (VIRTIO) Version 1.2".

mod active;
pub mod balloon;
pub mod block;
pub mod console;
pub mod core;
pub mod device;
mod discard;
pub mod entropy;
pub mod fs;
pub mod io;
mod iovecs;
pub mod limiter;
pub mod mem;
pub mod net;
pub mod notifier;
pub mod pace;
mod piece;
pub mod pmem;
mod poll;
pub mod registry;
pub mod rtc;
pub mod transport;
pub mod uds;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod conformance;
#[cfg(any(test, feature = "test-util"))]
pub mod driver;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest RAM as it is at one moment.
pub type GuestRam = GuestMemoryMmap<()>;

/// Guest RAM through hot-plug: shared by all devices, replaced as a whole.
pub type Memory = GuestMemoryAtomic<GuestRam>;
