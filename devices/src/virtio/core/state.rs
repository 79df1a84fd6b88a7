//! What is saved of a core, and the checks a saved or programmed state must pass.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::QueueState;

use crate::virtio::GuestRam;
use crate::virtio::device::DeviceState;
use crate::virtio::io::in_ram;

/// The driver has seen the device.
pub const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
/// The driver knows how to drive it.
pub const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
/// The driver is ready: queues are frozen and live.
pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Features are negotiated.
pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// The device cannot go on.
pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// The driver gave up.
pub const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// The bits a driver may set.
pub(super) const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// Registers and position of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueCfg {
    /// Size in descriptors.
    pub size: u16,
    /// Set up by the driver.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Index of the next chain to take from the available ring, not wrapped to the size.
    pub next_avail: u16,
    /// Index of the next entry of the used ring, not wrapped to the size.
    pub next_used: u16,
}

/// A queue cannot be used as it was set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Zero, not a power of two or larger than offered.
    #[error("queue {queue}: size {size} is not a power of two up to {max}")]
    Size {
        /// Index of the queue.
        queue: usize,
        /// What the driver wants.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A ring is not aligned (section 2.7).
    #[error("queue {queue}: ring at {addr:#x} is not aligned to {align} bytes")]
    Align {
        /// Index of the queue.
        queue: usize,
        /// Guest physical address.
        addr: u64,
        /// Wanted alignment in bytes.
        align: u64,
    },
    /// A ring is not in RAM.
    #[error("queue {queue}: ring of {len} bytes at {addr:#x} is not in RAM")]
    Ram {
        /// Index of the queue.
        queue: usize,
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

impl QueueCfg {
    /// A queue after reset.
    pub fn reset(max: u16) -> Self {
        Self {
            size: max,
            ..Self::default()
        }
    }

    /// Checks a queue that is ready.
    pub(super) fn check(&self, queue: usize, max: u16, ram: &GuestRam) -> Result<(), QueueError> {
        let size = self.size;
        if !size.is_power_of_two() || size > max {
            return Err(QueueError::Size { queue, size, max });
        }
        // Sizes and alignments of section 2.7; the rings' event fields are included.
        let size = u64::from(size);
        let rings = [
            (self.desc, 16, 16 * size),
            (self.avail, 2, 6 + 2 * size),
            (self.used, 4, 6 + 8 * size),
        ];
        for (addr, align, len) in rings {
            if addr % align != 0 {
                return Err(QueueError::Align { queue, addr, align });
            }
            if !in_ram(ram, addr, len) {
                return Err(QueueError::Ram { queue, addr, len });
            }
        }
        Ok(())
    }

    /// As the queue crate takes it.
    pub(crate) fn to_queue_state(self, event_idx: bool) -> QueueState {
        QueueState {
            max_size: self.size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }
}

/// All of a virtio device as plain data; the default is the state after reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Device status.
    pub status: u8,
    /// ISR status.
    pub isr: u32,
    /// Generation of the configuration space.
    pub generation: u32,
    /// Selector of device features.
    pub device_features_sel: u32,
    /// Selector of driver features.
    pub driver_features_sel: u32,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// Selector of the queue.
    pub queue_sel: u32,
    /// Selector of the shared memory region.
    pub shm_sel: u32,
    /// One per queue of the device; empty for reset.
    pub queues: Vec<QueueCfg>,
    /// The device behind the core, which is built from it before the core is.
    pub device: DeviceState,
}

/// A saved state does not fit the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Another number of queues.
    #[error("saved virtio state has {saved} queues, the device has {device}")]
    Queues {
        /// In the state.
        saved: usize,
        /// Of the device.
        device: usize,
    },
    /// Features that this device has not.
    #[error("saved virtio state has features {features:#x} that the device does not offer")]
    Features {
        /// The surplus bits.
        features: u64,
    },
    /// Status bits that cannot be together.
    #[error("saved virtio device status {status:#x} is impossible")]
    Status {
        /// The status register.
        status: u8,
    },
    /// A device whose host side holds what the state says nothing of.
    #[error("the device cannot go back to a state in place")]
    InPlace,
    /// A live queue is broken.
    #[error("saved virtio queue cannot be used")]
    Queue(#[from] QueueError),
}
