//! What a device author writes, and nothing of queues' insides, registers or threads.
//!
//! A [`VirtioDevice`] is owned by one thread at a time: by its backend while stopped, by a worker
//! on an I/O thread while running. What vCPU threads read of it is its [`ConfigSpace`].

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::balloon::BalloonState;
use super::block::BlockState;
use super::console::ConsoleState;
use super::entropy::EntropyState;
use super::fs::FsState;
use super::io::Io;
use super::mem::MemState;
use super::net::NetState;
use super::pmem::PmemState;
use super::rtc::RtcState;
use super::vsock::VsockState;

/// What the core must know of a device before a driver appears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Device ID (section 5).
    pub id: u32,
    /// The device's own feature bits; the core adds those it implements for all.
    pub features: u64,
    /// Largest size of each queue, powers of two up to 32768.
    pub queues: Vec<u16>,
    /// Shared memory regions (section 2.10), by their id.
    pub shm: Vec<ShmRegion>,
    /// Those of the core's feature bits that the device cannot have.
    pub withheld: u64,
}

/// A shared memory region the device offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShmRegion {
    /// `shmid`.
    pub id: u8,
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The device-specific configuration space (section 2.5), read and written on vCPU threads.
///
/// Neither call may wait. Offsets and lengths are the guest's choice.
pub trait ConfigSpace: Send + Sync {
    /// Reads at `offset`; bytes behind the end of the space stay as they are (zero).
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at `offset`; what is not writable is dropped, which it says by `false`.
    fn write(&self, offset: u64, data: &[u8]) -> bool {
        let _ = (offset, data);
        false
    }

    /// Counts changes made by the device (section 2.5.2), from 0 at construction.
    fn generation(&self) -> u32 {
        0
    }
}

/// A device without configuration space.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoConfig;

impl ConfigSpace for NoConfig {
    fn read(&self, _: u64, _: &mut [u8]) {}
}

/// Copies from a configuration structure's bytes, as [`ConfigSpace::read`] wants it.
pub fn read_config(space: &[u8], offset: u64, data: &mut [u8]) {
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    for (to, from) in data.iter_mut().zip(space.iter().skip(offset)) {
        *to = *from;
    }
}

/// A file descriptor of the host that a device waits for, level-triggered. The device keeps it
/// open as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Given back to [`VirtioDevice::on_source`]; below 2³¹.
    pub token: u32,
    /// What to poll.
    pub fd: RawFd,
    /// Wait for writability as well as readability.
    pub writable: bool,
}

impl Source {
    /// Waits until `fd` is readable.
    pub const fn readable(token: u32, fd: RawFd) -> Self {
        Self {
            token,
            fd,
            writable: false,
        }
    }
}

/// A virtio device: its semantics only.
///
/// All calls but [`traits`](Self::traits) and [`config`](Self::config) are made by the thread that
/// owns the device. A device that keeps chains between calls completes them in
/// [`drain`](Self::drain).
pub trait VirtioDevice: Send {
    /// What the device is. Constant.
    fn traits(&self) -> Traits;

    /// The part of the device that vCPU threads see.
    fn config(&self) -> Arc<dyn ConfigSpace>;

    /// Host file descriptors to wait for from the start, besides those of [`Io::watch`]. Constant.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// The driver made chains available in `queue`: pop until there are none. A device that stops
    /// before has the rest held back, without notifications, until it pops to the end.
    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError>;

    /// A source is ready. The device reads its file descriptor so that it is ready no more.
    fn on_source(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let _ = (token, io);
        Ok(())
    }

    /// The queues leave (pause, reset, snapshot): finish all chains that were popped. May wait for
    /// the host, never for the guest.
    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let _ = io;
        Ok(())
    }

    /// The driver reset the device (section 2.4): what it set is forgotten.
    fn reset(&mut self) {}

    /// The state that `new` takes to make the same device again.
    fn save(&self) -> DeviceState;

    /// Goes back to a state that this device, or the one that it was cloned from, once saved. The
    /// queues have left; the host's side stays as it is. False where it cannot: nothing is changed.
    fn restore(&mut self, state: &DeviceState) -> bool {
        let _ = state;
        false
    }
}

/// Saved states of devices, one arm per device type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// As after reset, for any device.
    #[default]
    Reset,
    /// Entropy source.
    Entropy(EntropyState),
    /// Block device.
    Block(BlockState),
    /// Console device.
    Console(ConsoleState),
    /// Socket device.
    Vsock(VsockState),
    /// Shared directory.
    Fs(FsState),
    /// Clock device.
    Rtc(RtcState),
    /// Memory balloon.
    Balloon(BalloonState),
    /// Persistent memory.
    Pmem(PmemState),
    /// Memory device.
    Mem(MemState),
    /// Network device.
    Net(NetState),
}

/// Why a device cannot go on: the core sets `DEVICE_NEEDS_RESET` (section 2.1).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The rings themselves are broken.
    #[error("queue {queue}: the driver broke the rings")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// What the queue found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A descriptor chain breaks the rules.
    #[error("queue {queue}: descriptor chain {head} {fault}")]
    Chain {
        /// Index of the queue.
        queue: usize,
        /// Index of the chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        fault: ChainFault,
    },
    /// A buffer is not in guest RAM.
    #[error("buffer of {len} bytes at guest address {addr:#x} is not in RAM")]
    Memory {
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The host failed the device.
    #[error("the host failed to {what}")]
    Host {
        /// The operation, as in "failed to …".
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl DeviceError {
    pub(crate) fn memory(addr: GuestAddress, len: u64) -> Self {
        Self::Memory { addr: addr.0, len }
    }
}

/// What can be wrong with a descriptor chain (section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// It has no descriptor: its head or its indirect table is outside of what there is.
    Empty,
    /// It does not end: it loops, points outside the table, or is longer than 2³² bytes.
    Endless,
    /// It has more descriptors than allowed.
    TooLong,
    /// A device-readable descriptor follows a device-writable one (section 2.7.4.2).
    Order,
    /// More chains are available than the queue has descriptors.
    TooMany,
    /// It has not the buffers that the device type asks for.
    Layout,
}

impl std::fmt::Display for ChainFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Empty => "has no descriptor",
            Self::Endless => "does not end",
            Self::TooLong => "has too many descriptors",
            Self::Order => "has a readable descriptor behind a writable one",
            Self::TooMany => "is one more than the queue can hold",
            Self::Layout => "lacks a buffer that the device needs",
        })
    }
}
