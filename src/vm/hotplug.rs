//! Devices that come and go while the machine exists, with the memory that they bring.

use std::sync::Arc;

use vm_memory::GuestMemoryBackend;

use super::memory::MemoryError;
use super::{Vm, limits};
use crate::board::attach::{AttachError, Attached};
use crate::board::plan::Plan;

/// A device cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The device.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

impl Vm {
    /// Adds the device of `plan`, whose memory is at a free address, and tells the guest.
    ///
    /// # Errors
    /// What KVM, the bus or the device refuses; nothing is changed.
    pub fn plug(&self, plan: Plan) -> Result<Arc<Attached>, PlugError> {
        limits::allow_most_open_files();
        self.slots.add(&self.fd, self.first_slot(), &plan)?;
        let memory = plan.memory();
        let plugged = self.board.plug(plan, (&self.fd, &self.memory));
        if plugged.is_err()
            && let Some(address) = memory
        {
            self.forget_memory(address);
        }
        Ok(plugged?)
    }

    /// Takes away what the guest has ejected, or what was taken off the bus.
    pub fn take_ejected(&self) -> Vec<Arc<Attached>> {
        let gone = self.board.devices.take_ejected();
        for (address, _) in gone.iter().filter_map(|device| device.memory()) {
            self.forget_memory(address);
        }
        gone
    }

    fn forget_memory(&self, address: u64) {
        if let Err(error) = self.slots.remove(&self.fd, self.first_slot(), address) {
            log::error!("the guest keeps the memory of a device that is gone: {error}");
        }
    }

    /// Number of the first slot that is a device's.
    fn first_slot(&self) -> u32 {
        self.memory.num_regions() as u32
    }
}
