//! Guest RAM: where it lies and how the guest is told.
//!
//! RAM starts at 0, stops at [`layout::MMIO_HOLE_START`] and goes on at [`layout::MMIO_HOLE_END`].
//! The map handed to the guest (e820 or PVH) is made here once, for both boot protocols.

use std::arch::x86_64::__cpuid;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout;

/// Guest RAM as this crate takes it: mapped regions without dirty tracking.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Smallest RAM size in bytes that a machine may have.
pub const MIN_RAM: u64 = 32 << 20;
/// Largest RAM size in bytes that a machine may have.
pub const MAX_RAM: u64 = 1 << 40;

/// What a range of guest-physical memory is for; the values are those of e820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the guest may use.
    Usable = 1,
    /// Never to be used as RAM.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One range of the memory map given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// What it is for.
    pub kind: MemoryKind,
}

/// RAM regions of a machine with `size` bytes of RAM: one below the MMIO hole, and a second from
/// 4 GiB on when `size` exceeds what fits below.
pub fn ram_regions(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(layout::MMIO_HOLE_START);
    let mut regions = vec![(GuestAddress(0), low as usize)];
    if size > low {
        regions.push((GuestAddress(layout::MMIO_HOLE_END), (size - low) as usize));
    }
    regions
}

/// The memory map of a machine with `size` bytes of RAM ([`MIN_RAM`] or more), sorted by address.
pub fn memory_map(size: u64) -> Vec<MemoryMapEntry> {
    let entry = |start, end, kind| MemoryMapEntry {
        start,
        size: end - start,
        kind,
    };
    let low_end = size.clamp(layout::HIMEM_START, layout::MMIO_HOLE_START);
    let mut map = vec![
        entry(0, layout::EBDA_START, MemoryKind::Usable),
        entry(layout::EBDA_START, layout::RSDP_START, MemoryKind::Reserved),
        entry(layout::RSDP_START, layout::HIMEM_START, MemoryKind::Acpi),
    ];
    if low_end > layout::HIMEM_START {
        map.push(entry(layout::HIMEM_START, low_end, MemoryKind::Usable));
    }
    if size > layout::MMIO_HOLE_START {
        let high = size - layout::MMIO_HOLE_START;
        let end = layout::MMIO_HOLE_END.saturating_add(high);
        map.push(entry(layout::MMIO_HOLE_END, end, MemoryKind::Usable));
    }
    map
}

/// End of the guest-physical addresses that the host's processor has (CPUID leaf 0x8000_0008), which
/// are those of its guests.
pub fn address_limit() -> u64 {
    // Leaf 0x8000_0000 says which leaves there are; every processor with KVM has this one.
    let bits = match __cpuid(0x8000_0000).eax {
        0x8000_0008.. => __cpuid(0x8000_0008).eax & 0xff,
        _ => 36,
    };
    1 << bits.clamp(32, 52)
}

/// Have the host map the page of `address`, and copy it if it is a file's, since it is going to be written: by
/// writing back a byte. Nobody else may write there meanwhile. Nothing is done where there is no RAM.
pub fn touch(memory: &GuestMemory, address: GuestAddress) {
    if let Ok(byte) = memory.read_obj::<u8>(address) {
        // It can be written if it could be read.
        let _ = memory.write_obj(byte, address);
    }
}

/// Total size of `memory` in bytes.
pub(crate) fn total_size(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// End of the RAM that starts at address 0, at most the start of the MMIO hole.
pub(crate) fn low_end(memory: &GuestMemory) -> u64 {
    total_size(memory).min(layout::MMIO_HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn regions_leave_the_hole_free() {
        assert_eq!(ram_regions(MIN_RAM), [(GuestAddress(0), MIN_RAM as usize)]);
        assert_eq!(ram_regions(3 * GIB), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_regions(3 * GIB + 4096),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 * GIB), 4096)]
        );
        let sum: usize = ram_regions(MAX_RAM).iter().map(|region| region.1).sum();
        assert_eq!(sum as u64, MAX_RAM);
    }

    #[test]
    fn map_covers_ram_without_overlap() {
        for size in [
            MIN_RAM,
            128 << 20,
            3 * GIB,
            3 * GIB + 4096,
            8 * GIB,
            MAX_RAM,
        ] {
            let map = memory_map(size);
            assert!(map.iter().all(|entry| entry.size > 0));
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].start + pair[0].size <= pair[1].start)
            );
            let total: u64 = map.iter().map(|entry| entry.size).sum();
            assert_eq!(total, size, "every byte of RAM is named once");
        }
    }

    #[test]
    fn map_names_the_legacy_areas() {
        let map = memory_map(5 * GIB);
        let expected = [
            (0, 0x9_fc00, MemoryKind::Usable),
            (0x9_fc00, 0x4_0400, MemoryKind::Reserved),
            (0xe_0000, 0x2_0000, MemoryKind::Acpi),
            (0x10_0000, 3 * GIB - 0x10_0000, MemoryKind::Usable),
            (4 * GIB, 2 * GIB, MemoryKind::Usable),
        ];
        assert_eq!(
            map,
            expected.map(|(start, size, kind)| MemoryMapEntry { start, size, kind })
        );
    }
}
