//! A machine goes back in place to the snapshot that it was made of: for tests and functions that run
//! over and over in one guest.
//!
//! RAM is a private mapping of the snapshot's file, so the pages that the process has of its own are those
//! that were written, by whomever; they are written over with what the file has. vCPUs take their
//! registers again, and devices go back to their states with the host's side as it is. Owned by the
//! vmm thread, as the machine.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use arch::memory::GuestMemory;
use arch::state::{ClockPolicy, StateError, VcpuState};
use vm_memory::GuestMemoryError;

use super::build::random;
use super::{PauseError, Vm};
use crate::board;
use crate::snapshot::own::OwnPages;
use crate::snapshot::ram::{self, MapError};
use crate::snapshot::{MachineState, Snapshot};
use crate::vcpu::{Given, Has};

/// A machine does not go back in place.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The pages that it has are not to be told from the snapshot's.
    #[error(
        "The machine was not made of this snapshot's memory files alone, or was saved since: make a new clone"
    )]
    Other,
    /// Memory beside RAM, which nothing tells the changes of.
    #[error(
        "The machine has memory of devices (pmem, hot-pluggable), which does not go back in place: make a new clone"
    )]
    DeviceMemory,
    /// It runs on.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// A vCPU that is gone, and the machine with it.
    #[error("vCPU {index} has ended: the machine does not go back")]
    Ended {
        /// Its index.
        index: usize,
    },
    /// KVM.
    #[error(transparent)]
    State(#[from] StateError),
    /// Devices.
    #[error(transparent)]
    Board(#[from] board::ResetError),
    /// The kernel does not tell which pages were written.
    #[error("Cannot find the pages that the guest has written, in /proc/self/pagemap")]
    Pages(#[source] io::Error),
    /// Generation id and vmclock page.
    #[error("Cannot write the generation id into guest memory")]
    Generation(#[source] GuestMemoryError),
    /// No random numbers.
    #[error("Cannot get random numbers for the guest")]
    Random(#[source] io::Error),
}

/// What machines of one snapshot go back to. Takes addresses as RAM does, and no memory but for small
/// changes of a chain.
#[derive(Debug)]
pub struct Origin {
    id: [u8; 16],
    machine: Arc<MachineState>,
    memory: GuestMemory,
    pages: OwnPages,
}

impl Origin {
    /// Maps the memory of `snapshot` once more.
    ///
    /// # Errors
    /// As at loading.
    pub fn new(snapshot: &Snapshot) -> Result<Self, MapError> {
        Ok(Self {
            id: snapshot.id,
            machine: snapshot.machine.clone(),
            memory: ram::map(snapshot, &snapshot.config.machine_config)?.0,
            pages: OwnPages::new().map_err(MapError::Pages)?,
        })
    }
}

impl Vm {
    /// Goes back to `origin`, the snapshot that the machine was made of, and is paused as it was then, with
    /// a new generation id; its clocks do as `policy` says about the time since. Says how many bytes of RAM
    /// were written back. What devices have on the host stays: disks as they are, what consoles have
    /// put out; connections of sockets end.
    ///
    /// A machine that ended does not go back. One that an error met on its way is of no use, but for
    /// [`ResetError::Other`], [`ResetError::DeviceMemory`] and [`ResetError::Pause`], which change nothing.
    ///
    /// # Errors
    /// [`ResetError`].
    pub fn reset(
        &self,
        origin: &Origin,
        policy: ClockPolicy,
        patience: Duration,
    ) -> Result<u64, ResetError> {
        if self.made_of() != Some(origin.id) {
            return Err(ResetError::Other);
        }
        if !self.slots.is_empty() {
            return Err(ResetError::DeviceMemory);
        }
        if self.is_running() {
            // Those that did park go on.
            self.pause(patience).inspect_err(|_| self.start())?;
        }
        // What they finish now writes to RAM, and interrupts.
        self.board.devices.pause();
        let saved = &origin.machine;
        let shift = saved.vm.shift(policy);
        let given = Given {
            machine: saved.clone(),
            context: self.host.context()?,
            shift,
            same_cpuid: true,
            has: Has::Another,
        };
        let write_back = || origin.pages.write_back(&origin.memory, &self.memory);
        let first = saved.vcpus.iter().any(VcpuState::reads_memory);
        let written = first.then(write_back);
        // The vCPU threads do that while memory and devices go back here.
        let vcpus = self.vcpus.iter();
        let answers: Vec<_> = vcpus.map(|vcpu| vcpu.give(given.clone())).collect();
        let written = written.unwrap_or_else(write_back);
        let board = self.board.restore(&saved.board);
        for (index, answer) in answers.into_iter().enumerate() {
            answer.recv().map_err(|_| ResetError::Ended { index })??;
        }
        let written = written.map_err(ResetError::Pages)?;
        board?;
        saved.vm.restore(&self.fd, &shift)?;
        self.board.set_counter_offset(saved, &shift);
        let id = random().map_err(ResetError::Random)?;
        self.announce_generation(id)
            .map_err(ResetError::Generation)?;
        Ok(written)
    }
}
