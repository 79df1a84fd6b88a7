//! One virtual machine: KVM objects, guest RAM, devices, vCPU threads.
//!
//! [`Vm::build`] makes it, parked; [`Vm::start`] lets it run. What ends it arrives once, in the
//! [`ExitLatch`]. The owner is the vmm thread. Dropping a `Vm` stops and joins its vCPUs, then its
//! devices, before guest memory goes.

pub mod build;
mod exit;
mod host;
pub mod irq;
pub mod kernel_cache;
pub mod limits;
pub mod memory;
pub mod slots;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arch::memory::GuestMemory;

pub use build::BuildError;
pub use exit::{ExitLatch, VmExit};
pub use host::{KVM_PATH, KvmOpenError};
pub use limits::LimitError;

use crate::board::Board;
use crate::vcpu::VcpuHandle;

/// A vCPU that does not leave the guest.
#[derive(Debug, thiserror::Error)]
#[error(
    "vCPU {index} does not pause within {patience:?}: it waits for the host, perhaps for a reader of the \
     console"
)]
pub struct PauseError {
    index: usize,
    patience: Duration,
}

/// A built virtual machine.
pub struct Vm {
    // Declared in the order in which they must go.
    vcpus: Vec<VcpuHandle>,
    board: Board,
    exit: Arc<ExitLatch>,
    _memory: GuestMemory,
    _slots: slots::DeviceSlots,
}

impl Vm {
    /// The machine's devices, for the host's side.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Its vCPUs; none once it is stopped.
    pub fn vcpus(&self) -> &[VcpuHandle] {
        &self.vcpus
    }

    /// Where the end of the VM is announced.
    pub fn exit(&self) -> &Arc<ExitLatch> {
        &self.exit
    }

    /// Lets every vCPU run: first, or again after [`pause`](Self::pause).
    pub fn start(&self) {
        if let Some(watchdog) = &self.board.watchdog {
            watchdog.resume();
        }
        for vcpu in &self.vcpus {
            vcpu.run();
        }
    }

    /// Gets every vCPU out of the guest, its last access finished. Devices go on
    /// with what they have; the watchdog stands still.
    ///
    /// # Errors
    /// A vCPU thread that waits for somebody else, such as the reader of its console, and does not
    /// answer within `patience`; it parks when that is over.
    pub fn pause(&self, patience: Duration) -> Result<(), PauseError> {
        let deadline = Instant::now() + patience;
        let pausing: Vec<_> = self.vcpus.iter().map(VcpuHandle::request_pause).collect();
        for (index, vcpu) in pausing.into_iter().enumerate() {
            if !vcpu.wait(deadline) {
                return Err(PauseError { index, patience });
            }
        }
        if let Some(watchdog) = &self.board.watchdog {
            watchdog.pause();
        }
        Ok(())
    }

    /// Gets every vCPU out of the guest and ends its thread; then brings the devices to rest.
    pub fn stop(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.request_stop();
        }
        self.vcpus.clear();
        self.board.devices.stop();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}
