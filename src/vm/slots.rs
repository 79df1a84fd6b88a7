//! Memory slots beyond RAM: the memory that devices bring, and what to do when it is gone.
//!
//! The vmm thread registers them before the interrupt controller exists, as RAM (see
//! `vm::build`), and keeps their mappings longer than the VM. vCPU threads ask [`DeviceSlots`] when
//! KVM cannot reach memory.

use std::sync::Arc;

use devices::virtio::mem::Region;
use devices::virtio::pmem::Mapping;
use devices::virtio::registry::DeviceConfig;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};

use super::memory::MemoryError;
use crate::board::plan::Plan;
use crate::snapshot::Plugged;

/// Memory of one device in a slot of its own.
#[derive(Clone, Debug)]
struct DeviceSlot {
    /// Guest-physical address.
    address: u64,
    memory: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Pmem(Arc<Mapping>),
    Mem(Arc<Region>),
}

/// Memory of all devices.
#[derive(Clone, Debug, Default)]
pub struct DeviceSlots(Arc<[DeviceSlot]>);

/// How often each mapping was repaired, as one vCPU knows.
#[derive(Debug, Default)]
pub struct Seen(Vec<u64>);

impl DeviceSlots {
    /// What the devices of `plans` bring.
    pub fn of(plans: &[Plan]) -> Self {
        let slots = plans.iter().filter_map(|plan| match &plan.config {
            DeviceConfig::Pmem(options) => Some(DeviceSlot {
                address: options.address,
                memory: Kind::Pmem(options.mapping.clone()),
            }),
            DeviceConfig::Mem(options) => Some(DeviceSlot {
                address: options.address,
                memory: Kind::Mem(options.region.clone()),
            }),
            _ => None,
        });
        Self(slots.collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Registers them with KVM, from slot number `first` on.
    pub fn register(&self, vm: &VmFd, first: u32) -> Result<(), MemoryError> {
        for (slot, device) in (first..).zip(self.0.iter()) {
            let (host, size, read_only) = match &device.memory {
                Kind::Pmem(mapping) => (mapping.address(), mapping.len(), mapping.read_only()),
                Kind::Mem(region) => (region.address(), region.len(), false),
            };
            if read_only && !vm.check_extension(Cap::ReadonlyMem) {
                return Err(MemoryError::ReadOnly);
            }
            let address = device.address;
            let region = kvm_userspace_memory_region {
                slot,
                flags: if read_only { KVM_MEM_READONLY } else { 0 },
                guest_phys_addr: address,
                memory_size: size,
                userspace_addr: host,
            };
            // SAFETY: the mapping lives as long as `self`, which the VM's owner keeps longer than
            // the VM; it is no memory that Rust code refers to.
            let result = unsafe { vm.set_user_memory_region(region) };
            result.map_err(|source| MemoryError::Slot {
                slot,
                address,
                size,
                source,
            })?;
        }
        Ok(())
    }

    /// Memory that belongs to the guest alone and has to be saved with it.
    pub fn plugged(&self) -> Vec<Plugged<'_>> {
        let slots = self.0.iter().filter_map(|slot| match &slot.memory {
            Kind::Pmem(_) => None,
            Kind::Mem(region) => Some(Plugged {
                address: slot.address,
                len: region.len(),
                file: region.file(),
            }),
        });
        slots.collect()
    }

    /// KVM could not reach some memory. True if it can now: the vCPU goes on.
    pub fn repair(&self, seen: &mut Seen) -> bool {
        seen.0.resize(self.0.len(), 0);
        let mut repaired = false;
        for (device, seen) in self.0.iter().zip(&mut seen.0) {
            let Kind::Pmem(mapping) = &device.memory else {
                continue;
            };
            match mapping.repair(seen) {
                Ok(changed) => repaired |= changed,
                Err(error) => log::error!("cannot repair a device's memory: {error}"),
            }
        }
        repaired
    }
}
