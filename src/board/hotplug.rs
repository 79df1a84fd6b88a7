//! Virtio devices that come and go while the guest runs, over PCI.
//!
//! A device that comes is announced to the guest, which probes its slot. One that is to go is asked for:
//! its driver lets go of it, the guest ejects the slot, and the vmm thread takes the device away
//! ([`Devices::take_ejected`]). All on the vmm thread, but for the guest's registers
//! (`devices::pci::hotplug`).

use std::sync::Arc;

use devices::virtio::core::Reg;
use devices::virtio::registry::DeviceHandle;
use vmm_sys_util::eventfd::EventFd;

use super::attach::{AttachError, Attached, Devices, Machine, Slot};
use super::plan::Plan;

impl Devices {
    /// Makes the device of `plan`, whose name is free, and puts it on the PCI bus; the guest has to be told.
    ///
    /// # Errors
    /// No PCI bus, no free slot, and what the device refuses. Nothing is changed.
    pub fn plug(&self, plan: Plan, machine: &Machine<'_>) -> Result<Arc<Attached>, AttachError> {
        let Some(pci) = &self.pci else {
            return Err(AttachError::NoPci);
        };
        let mut present = self.present();
        let endpoint = present.endpoint(&plan.config, &mut Vec::new())?;
        let slot = Slot::new(plan, machine, &self.memory, (endpoint, None))?;
        let attached = Arc::new(slot.attach_pci(machine, pci.bus())?);
        if let Some((slot, _)) = attached.function {
            pci.hotplug.add(slot);
        }
        present.list.push(attached.clone());
        Ok(attached)
    }

    /// The device of type `kind` called `id`; others may be called so too.
    pub fn find(&self, kind: &str, id: &str) -> Option<Arc<Attached>> {
        let mut all = self.list().into_iter();
        all.find(|device| (device.kind, device.id.as_str()) == (kind, id))
    }

    /// Asks the guest, which has to be told, to eject `device`.
    pub fn ask_for(&self, device: &Attached) {
        if let (Some(pci), Some((slot, _))) = (&self.pci, &device.function) {
            pci.hotplug.ask_for(*slot);
        }
    }

    /// Takes `device` off the bus, whatever the guest does with it; [`take_ejected`](Self::take_ejected)
    /// has it then.
    pub fn eject(&self, device: &Attached) {
        if let (Some(pci), Some((slot, _))) = (&self.pci, &device.function) {
            pci.hotplug.take(*slot);
        }
    }

    /// Readable when the guest has ejected something; none without PCI.
    pub fn ejected(&self) -> Option<&EventFd> {
        self.pci.as_ref().map(|pci| pci.hotplug.ejected())
    }

    /// Whether a device is off the bus that was not taken away yet.
    pub fn has_ejected(&self) -> bool {
        let present = self.present();
        let pci = self.pci.as_ref();
        pci.is_some_and(|pci| !present.list.iter().all(|device| pci.has(device)))
    }

    /// Takes away the devices that are off the bus, their I/O finished and their files closed.
    pub fn take_ejected(&self) -> Vec<Arc<Attached>> {
        let Some(pci) = &self.pci else {
            return Vec::new();
        };
        // Emptied before the look.
        let _ = pci.hotplug.ejected().read();
        let mut present = self.present();
        let (list, gone) = present.list.drain(..).partition(|device| pci.has(device));
        present.list = list;
        drop(present);
        for device in &gone {
            device.retire();
        }
        gone
    }
}

impl Attached {
    /// Whether a driver in the guest has it.
    pub fn is_driven(&self) -> bool {
        self.core.read(Reg::Status) != 0
    }

    /// The guest-physical range of the memory that it brings, if it does: address and bytes.
    pub fn memory(&self) -> Option<(u64, u64)> {
        // Start and size in the configuration spaces of virtio-pmem and virtio-mem.
        let start = match &self.handle {
            DeviceHandle::Pmem(_) => 0,
            DeviceHandle::Mem(_) => 16,
            _ => return None,
        };
        let at = |offset| {
            let mut value = [0; 8];
            self.core.read_config(offset, &mut value);
            u64::from_le_bytes(value)
        };
        Some((at(start), at(start + 8)))
    }

    fn retire(&self) {
        self.doorbells.disarm(self.core.kicks());
        self.core.retire();
    }
}
