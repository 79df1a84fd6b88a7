//! Where the initrd goes.

use vm_memory::GuestAddress;

use super::BootError;
use crate::kernel::LoadedKernel;
use crate::layout;

const PAGE: u64 = 4096;

/// Address for an initrd of `size` bytes: as high as RAM below the MMIO hole and the kernel allow,
/// page-aligned, and not in the kernel's way. With `ram_size` bytes of RAM.
pub fn initrd_address(
    kernel: &LoadedKernel,
    ram_size: u64,
    size: u64,
) -> Result<GuestAddress, BootError> {
    let ram_end = ram_size.min(layout::MMIO_HOLE_START);
    let limit = layout::MMIO_HOLE_START.min(kernel.initrd_max.saturating_add(1));
    let top = ram_end.min(limit);
    // Highest page-aligned start with which the initrd ends at `end` or before.
    let below = |end: u64| end.checked_sub(size).map(|start| start / PAGE * PAGE);

    let above_kernel = below(top).filter(|start| *start >= kernel.end);
    let under_kernel =
        || below(top.min(kernel.start)).filter(|start| *start >= layout::HIMEM_START);
    if let Some(start) = above_kernel.or_else(under_kernel) {
        return Ok(GuestAddress(start));
    }
    let need = kernel.end.saturating_add(size).saturating_add(PAGE);
    Err(if need > limit {
        BootError::InitrdOverLimit { size, limit }
    } else {
        BootError::InitrdTooLarge {
            size,
            ram: ram_size,
            kernel: kernel.end - kernel.start,
            need,
        }
    })
}
