//! The Linux 64-bit boot protocol: zero page, RNG seed, identity page tables.
//!
//! See Documentation/arch/x86/{boot,zero-page}.rst.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{
    KASLR_FLAG, LOADED_HIGH, SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::GuestAddress;

use super::{BootError, BootParameters, RNG_SEED_SIZE, write};
use crate::layout;
use crate::memory::{GuestMemory, memory_map};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol of Linux 5.5. From 2.09 on, Linux looks at the setup data.
const VERSION: u16 = 0x020f;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 2 << 20;

/// Page table bits: present, writable.
const TABLE: u64 = 0x3;
/// Page table bits: present, writable, 2 MiB page.
const LARGE_PAGE: u64 = 0x83;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;

/// Writes zero page, setup data and page tables.
pub(super) fn configure(
    memory: &GuestMemory,
    parameters: &BootParameters<'_>,
) -> Result<(), BootError> {
    let seed = setup_data(&parameters.rng_seed);
    write(memory, "RNG seed", layout::SETUP_DATA_START, &seed)?;
    let zero_page = zero_page(parameters);
    let bytes = BootParams::new(&zero_page, GuestAddress(layout::ZERO_PAGE_START));
    LinuxBootConfigurator::write_bootparams(&bytes, memory).map_err(BootError::Configure)?;
    page_tables(memory)
}

fn zero_page(parameters: &BootParameters<'_>) -> boot_params {
    let kernel = parameters.kernel;
    let hdr = kernel.setup_header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        cmdline_size: kernel.cmdline_max as u32,
        ..setup_header::default()
    });
    let mut page = boot_params {
        hdr,
        ..boot_params::default()
    };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.loadflags |= LOADED_HIGH;
    page.hdr.loadflags &= !KASLR_FLAG;
    if kernel.kaslr.is_some() {
        page.hdr.loadflags |= KASLR_FLAG;
    }
    page.hdr.cmd_line_ptr = layout::CMDLINE_START as u32;
    page.hdr.setup_data = layout::SETUP_DATA_START;
    if let Some((address, size)) = parameters.initrd {
        page.hdr.ramdisk_image = address.0 as u32;
        page.ext_ramdisk_image = (address.0 >> 32) as u32;
        page.hdr.ramdisk_size = size as u32;
        page.ext_ramdisk_size = (size >> 32) as u32;
    }
    page.acpi_rsdp_addr = parameters.rsdp.0;
    let map = memory_map(parameters.ram_size);
    page.e820_entries = map.len() as u8;
    let mut table = page.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind as u32,
        };
    }
    page.e820_table = table;
    page
}

/// `struct setup_data`: next, type, length, data.
fn setup_data(seed: &[u8; RNG_SEED_SIZE]) -> Vec<u8> {
    let mut bytes = 0u64.to_le_bytes().to_vec();
    bytes.extend(SETUP_RNG_SEED.to_le_bytes());
    bytes.extend((RNG_SEED_SIZE as u32).to_le_bytes());
    bytes.extend(seed);
    bytes
}

/// Maps the first 4 GiB to themselves.
fn page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let bytes = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
        entries.flat_map(u64::to_le_bytes).collect()
    };
    let pml4 = (layout::PDPT_START | TABLE).to_le_bytes();
    let pdpt = bytes(&mut (0..DIRECTORIES).map(|n| (layout::PD_START + n * 4096) | TABLE));
    let directories = bytes(&mut (0..DIRECTORIES * ENTRIES).map(|n| (n << 21) | LARGE_PAGE));
    write(memory, "page tables", layout::PML4_START, &pml4)?;
    write(memory, "page tables", layout::PDPT_START, &pdpt)?;
    write(memory, "page tables", layout::PD_START, &directories)
}
