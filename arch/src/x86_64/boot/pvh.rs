//! The PVH boot protocol: `hvm_start_info`, memory map, the initrd as module.
//!
//! See xen/include/public/arch-x86/hvm/start_info.h and docs/misc/pvh in Xen.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::{BootError, BootParameters};
use crate::layout;
use crate::memory::{GuestMemory, memory_map};

/// Version 1 has the memory map.
const VERSION: u32 = 1;

/// Writes start info, memory map and module list.
pub(super) fn configure(
    memory: &GuestMemory,
    parameters: &BootParameters<'_>,
) -> Result<(), BootError> {
    let map: Vec<hvm_memmap_table_entry> = memory_map(parameters.ram_size)
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: parameters.rsdp.0,
        memmap_paddr: layout::PVH_MEMMAP_START,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let module = parameters.initrd.map(|(address, size)| hvm_modlist_entry {
        paddr: address.0,
        size,
        ..hvm_modlist_entry::default()
    });
    if module.is_some() {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODLIST_START;
    }
    let mut bytes = BootParams::new(&info, GuestAddress(layout::PVH_INFO_START));
    bytes.set_sections(&map, GuestAddress(layout::PVH_MEMMAP_START));
    if let Some(module) = module {
        bytes.set_modules(&[module], GuestAddress(layout::PVH_MODLIST_START));
    }
    PvhBootConfigurator::write_bootparams(&bytes, memory).map_err(BootError::Configure)
}
