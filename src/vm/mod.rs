//! One virtual machine: KVM objects, guest RAM, devices, vCPU threads.
//!
//! [`Vm::build`] makes it, parked; [`Vm::start`] lets it run. What ends it arrives once, in the
//! [`ExitLatch`]. The owner is the vmm thread. Dropping a `Vm` stops and joins its vCPUs, then its
//! devices, before guest memory goes.

pub mod build;
mod cpu;
mod exit;
pub mod fork;
pub mod frame;
mod host;
mod hotplug;
pub mod irq;
pub mod kernel_cache;
pub mod limits;
pub mod memory;
mod messages;
pub mod reset;
pub mod shell;
pub mod slots;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arch::memory::GuestMemory;
use arch::state::{Context, StateError, VmState};
use arch::vm::IrqchipMode;
use arch::vmgenid::VMGENID_SIZE;
use kvm_ioctls::VmFd;

pub use build::BuildError;
pub use exit::{ExitLatch, VmExit};
pub use fork::{Fork, VmForkError};
pub use frame::Host;
pub use host::{Ahead, KVM_PATH, KvmOpenError};
pub use hotplug::PlugError;
pub use limits::LimitError;
pub use shell::{Shape, ShapeError, Shell};

use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestRegionMmap};

use crate::board::Board;
use crate::snapshot::uffd::watch::Watched;
use crate::snapshot::{MachineState, Plugged};
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

/// A machine's state cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM.
    #[error(transparent)]
    State(#[from] StateError),
    /// A vCPU that is gone, and the machine with it.
    #[error("vCPU {index} has ended: there is no machine to save")]
    Ended {
        /// Its index.
        index: usize,
    },
}

/// A built virtual machine.
pub struct Vm {
    // Declared in the order in which they must go.
    vcpus: Vec<VcpuHandle>,
    board: Board,
    exit: Arc<ExitLatch>,
    host: frame::Host,
    mode: IrqchipMode,
    fd: Arc<VmFd>,
    memory: GuestMemory,
    slots: slots::DeviceSlots,
    /// The snapshot whose memory files RAM is a private mapping of.
    made_of: Option<[u8; 16]>,
    /// RAM is no longer that.
    rebased: AtomicBool,
    /// vCPUs are not parked.
    running: AtomicBool,
    /// Brings its memory; until its threads have ended.
    handler: Option<Watched>,
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
        self.running.store(true, Ordering::Relaxed);
        self.board.devices.resume();
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
        self.running.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// The snapshot whose memory files RAM is a private mapping of, if it is that.
    fn made_of(&self) -> Option<[u8; 16]> {
        self.made_of
            .filter(|_| !self.rebased.load(Ordering::Relaxed))
    }

    /// RAM was mapped anew from other files: it does not go back to those that the machine was made of.
    pub fn rebased(&self) {
        self.rebased.store(true, Ordering::Relaxed);
    }

    /// The machine's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether RAM is in reserved huge pages.
    pub fn is_reserved(&self) -> bool {
        let reserved = |region: &GuestRegionMmap| region.is_hugetlbfs() == Some(true);
        self.memory.iter().any(reserved)
    }

    /// Why the guest's memory cannot be written as it is now while the guest goes on, if so; beside RAM that is
    /// shared or in reserved huge pages.
    pub fn not_copied(&self) -> Option<&'static str> {
        if self.handler.is_some() {
            Some("the guest's memory is brought when it is touched")
        } else if !self.slots.plugged().is_empty() {
            Some("the guest has hot-pluggable memory")
        } else {
            None
        }
    }

    /// Memory of devices that belongs to the guest alone.
    pub fn plugged(&self) -> Vec<Plugged<'_>> {
        self.slots.plugged()
    }

    /// Brings the devices to rest, their I/O finished, and says how the machine is. It is paused, and
    /// goes on with [`start`](Self::start).
    ///
    /// # Errors
    /// Where KVM does not tell; the machine can go on.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        // What devices finish now may interrupt a vCPU, whose state comes after.
        self.board.devices.pause();
        let context = Context::new(&self.host.kvm, &self.host.capabilities)?;
        let context = Arc::new(context);
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let state = vcpu.save(&context).ok_or(SaveError::Ended { index })?;
            vcpus.push(state?);
        }
        Ok(MachineState {
            vm: VmState::save(&self.fd, self.mode)?,
            vcpus,
            board: self.board.save(),
        })
    }

    /// Tells the paused guest that it goes on from an old state, see [`Board::announce_generation`].
    ///
    /// # Errors
    /// When guest memory has no room for the id.
    pub fn announce_generation(&self, id: [u8; VMGENID_SIZE]) -> Result<(), GuestMemoryError> {
        self.board.announce_generation(&self.memory, id)
    }

    /// Gets every vCPU out of the guest and ends its thread; then brings the devices to rest.
    pub fn stop(&mut self) {
        if let Some(handler) = &self.handler {
            handler.ending();
        }
        for vcpu in &self.vcpus {
            vcpu.request_stop();
        }
        self.vcpus.clear();
        self.board.devices.stop();
        self.handler = None;
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}
