//! Memory slots beyond RAM: the memory that devices bring, and what to do when it is gone.
//!
//! The vmm thread registers them before the interrupt controller exists, as RAM (see
//! `vm::build`), and those of persistent memory that comes later when it comes; it keeps their mappings
//! longer than the VM has them. vCPU threads ask [`DeviceSlots`] when KVM cannot reach memory.

use std::sync::{Arc, PoisonError, RwLock};

use devices::virtio::mem::Region;
use devices::virtio::pmem::Mapping;
use devices::virtio::registry::DeviceConfig;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};

use super::memory::MemoryError;
use crate::board::plan::Plan;
use crate::snapshot::Plugged;

/// Persistent memory at a guest-physical address.
type Pmem = (u64, Arc<Mapping>);

/// Memory of all devices.
#[derive(Clone, Debug, Default)]
pub struct DeviceSlots {
    /// Hot-pluggable memory, by guest-physical address, in the first slots.
    mem: Arc<[(u64, Arc<Region>)]>,
    /// Persistent memory in those behind them, some of which may be empty.
    pmem: Arc<RwLock<Vec<Option<Pmem>>>>,
}

/// How often each mapping was repaired, as one vCPU knows.
#[derive(Debug, Default)]
pub struct Seen(Vec<u64>);

/// What KVM is told of a slot.
struct Slot {
    number: u32,
    address: u64,
    host: u64,
    size: u64,
    read_only: bool,
}

impl Slot {
    fn of(number: u32, (address, mapping): &Pmem) -> Self {
        Self {
            number,
            address: *address,
            host: mapping.address(),
            size: mapping.len(),
            read_only: mapping.read_only(),
        }
    }

    /// # Safety
    /// The host memory is mapped for as long as the VM has the slot, and no Rust code refers to it.
    unsafe fn set(&self, vm: &VmFd) -> Result<(), MemoryError> {
        if self.read_only && !vm.check_extension(Cap::ReadonlyMem) {
            return Err(MemoryError::ReadOnly);
        }
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags: if self.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: self.address,
            memory_size: self.size,
            userspace_addr: self.host,
        };
        // SAFETY: the caller's.
        let result = unsafe { vm.set_user_memory_region(region) };
        result.map_err(|source| MemoryError::Slot {
            slot: self.number,
            address: self.address,
            size: self.size,
            source,
        })
    }
}

fn pmem_of(plan: &Plan) -> Option<Pmem> {
    match &plan.config {
        DeviceConfig::Pmem(options) => Some((options.address, options.mapping.clone())),
        _ => None,
    }
}

impl DeviceSlots {
    /// What the devices of `plans` bring.
    pub fn of(plans: &[Plan]) -> Self {
        let mem = plans.iter().filter_map(|plan| match &plan.config {
            DeviceConfig::Mem(options) => Some((options.address, options.region.clone())),
            _ => None,
        });
        let pmem = plans.iter().filter_map(pmem_of).map(Some).collect();
        Self {
            mem: mem.collect(),
            pmem: Arc::new(RwLock::new(pmem)),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.mem.is_empty() && self.change(|pmem| pmem.iter().all(Option::is_none))
    }

    /// Registers them with KVM, from slot number `first` on.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn register(&self, vm: &VmFd, first: u32) -> Result<(), MemoryError> {
        for (number, (address, region)) in (first..).zip(self.mem.iter()) {
            let slot = Slot {
                number,
                address: *address,
                host: region.address(),
                size: region.len(),
                read_only: false,
            };
            // SAFETY: the mapping lives as long as `self`, which the VM's owner keeps longer than
            // the VM; it is no memory that Rust code refers to.
            unsafe { slot.set(vm) }?;
        }
        self.change(|pmem| {
            for (number, pmem) in (self.first_pmem(first)..).zip(pmem.iter().flatten()) {
                // SAFETY: as above, and `remove` takes the slot back before the mapping goes.
                unsafe { Slot::of(number, pmem).set(vm) }?;
            }
            Ok(())
        })
    }

    /// Registers the memory that the device of `plan` brings, if it does, where slots of devices begin
    /// at `first`.
    ///
    /// # Errors
    /// What KVM refuses; nothing is changed then.
    pub fn add(&self, vm: &VmFd, first: u32, plan: &Plan) -> Result<(), MemoryError> {
        let Some(added) = pmem_of(plan) else {
            return Ok(());
        };
        self.change(|pmem| {
            let free = pmem.iter().position(Option::is_none);
            let at = free.unwrap_or(pmem.len());
            let number = self.first_pmem(first) + at as u32;
            // SAFETY: as in `register`.
            unsafe { Slot::of(number, &added).set(vm) }?;
            match pmem.get_mut(at) {
                Some(place) => *place = Some(added),
                None => pmem.push(Some(added)),
            }
            Ok(())
        })
    }

    /// Takes back the memory at `address`.
    ///
    /// # Errors
    /// What KVM refuses; it is kept then.
    pub fn remove(&self, vm: &VmFd, first: u32, address: u64) -> Result<(), MemoryError> {
        self.change(|pmem| {
            let is_it = |pmem: &Option<Pmem>| matches!(pmem, Some((at, _)) if *at == address);
            let Some(at) = pmem.iter().position(is_it) else {
                return Ok(());
            };
            let Some(place) = pmem.get_mut(at) else {
                return Ok(());
            };
            if let Some(present) = &*place {
                let gone = Slot {
                    size: 0,
                    ..Slot::of(self.first_pmem(first) + at as u32, present)
                };
                // SAFETY: the slot ends.
                unsafe { gone.set(vm) }?;
            }
            *place = None;
            Ok(())
        })
    }

    fn first_pmem(&self, first: u32) -> u32 {
        first + self.mem.len() as u32
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Option<Pmem>>) -> T) -> T {
        change(&mut self.pmem.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Memory that belongs to the guest alone and has to be saved with it.
    pub fn plugged(&self) -> Vec<Plugged<'_>> {
        let slots = self.mem.iter().map(|(address, region)| Plugged {
            address: *address,
            region,
        });
        slots.collect()
    }

    /// KVM could not reach some memory. True if it can now: the vCPU goes on.
    pub fn repair(&self, seen: &mut Seen) -> bool {
        let pmem = self.pmem.read().unwrap_or_else(PoisonError::into_inner);
        seen.0.resize(pmem.len(), 0);
        let mut repaired = false;
        for (pmem, seen) in pmem.iter().zip(&mut seen.0) {
            let Some((_, mapping)) = pmem else {
                continue;
            };
            // A count of what was there before makes it look once more.
            match mapping.repair(seen) {
                Ok(changed) => repaired |= changed,
                Err(error) => log::error!("cannot repair a device's memory: {error}"),
            }
        }
        repaired
    }
}
