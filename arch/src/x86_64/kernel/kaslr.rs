//! KASLR on the host: what Linux's decompressor does in the guest.
//!
//! As in arch/x86/boot/compressed/{kaslr,misc}.c: a virtual offset within the kernel's 1 GiB
//! window and, independent of it, a physical base. bulle keeps the physical base below the MMIO
//! hole, because the boot page tables map 4 GiB, and below the initrd.

use super::elf::Elf;

/// `MIN_KERNEL_ALIGN` of 64-bit Linux: its early page tables use 2 MiB pages.
pub(super) const MIN_ALIGNMENT: u64 = 2 << 20;
/// `__START_KERNEL_map`: virtual address of physical address 0 in the kernel's own mapping.
pub(super) const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `KERNEL_IMAGE_SIZE` of a kernel with `CONFIG_RANDOMIZE_BASE`.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// Lowest physical base: memory below is left to devices and to allocations that need it.
const PHYSICAL_MIN: u64 = 16 << 20;

/// Where KASLR has put a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kaslr {
    /// Bytes added to every virtual address of the kernel ("Kernel Offset" in a panic message).
    pub virt_offset: u64,
    /// Guest-physical address of the kernel's first byte.
    pub phys_base: u64,
}

/// Chooses the offsets for `elf`, `image_size` bytes long with its relocations, from `seed`.
///
/// The kernel has to stay below `phys_end`. `None` if the kernel is not linked as Linux is; an
/// address that leaves no choice (a machine with little RAM) stays what it was linked to.
pub(super) fn choose(
    elf: &Elf,
    image_size: u64,
    alignment: u64,
    phys_end: u64,
    seed: u64,
) -> Option<Kaslr> {
    let start = elf.start();
    let linked = elf.segments.first()?.vaddr;
    if linked != START_KERNEL_MAP.checked_add(start)? || !start.is_multiple_of(alignment) {
        return None;
    }
    let in_memory = elf.end() - start;
    let mut random = SplitMix64(seed);

    let size = in_memory.max(image_size);
    let virt_end = KERNEL_IMAGE_SIZE.checked_sub(size)?;
    let virt_slots = virt_end.checked_sub(start)? / alignment + 1;
    let virt_offset = random.below(virt_slots) * alignment;

    let lowest = start.max(PHYSICAL_MIN.next_multiple_of(alignment));
    let room = phys_end
        .checked_sub(in_memory)
        .and_then(|end| end.checked_sub(lowest));
    let phys_base = match room {
        Some(room) => lowest + random.below(room / alignment + 1) * alignment,
        None => start,
    };
    Some(Kaslr {
        virt_offset,
        phys_base,
    })
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators), to draw two
/// independent numbers from one seed.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is at most 2^30 slots: the bias of the remainder is nil.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}
