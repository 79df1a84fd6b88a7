//! Mappings of guest RAM that something else has taken the place of: unmapping a GiB takes tens of
//! milliseconds, moving its page tables away a fraction of one.

use std::io;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

/// Page tables are moved whole where both ends are alike in the bits below.
const TABLE: usize = 1 << 30;

/// The pages that a region had. Dropping it, which takes long and may be on any thread, unmaps them.
#[derive(Debug)]
pub struct Retired {
    address: usize,
    len: usize,
}

impl Retired {
    /// Takes its pages from `region`, whose addresses stay reserved and have to be mapped anew. `None`
    /// where the kernel does not do that (before Linux 5.13): mapping anew then takes longer.
    pub fn move_away(region: &GuestRegionMmap) -> Option<Self> {
        let (from, len) = (region.as_ptr() as usize, region.len() as usize);
        let address = reserve(from, len).ok()?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: the target was reserved just now, for nothing else. The pages of guest RAM, which
        // is volatile to all of this process, go there; its addresses remain mapped.
        let moved = unsafe { libc::mremap(from as *mut _, len, len, flags, address) };
        let retired = Self { address, len };
        // Where it failed, dropping this frees the reservation.
        (moved != libc::MAP_FAILED).then_some(retired)
    }
}

/// Reserves addresses for `len` bytes that are like `like` within a page table.
fn reserve(like: usize, len: usize) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let total = len + TABLE;
    // SAFETY: a new mapping, where the kernel likes.
    let all = unsafe { libc::mmap(std::ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
    if all == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let all = all as usize;
    let start = all + (like.wrapping_sub(all) & (TABLE - 1));
    for (from, to) in [(all, start), (start + len, all + total)] {
        if from < to {
            // SAFETY: part of what was just reserved and nobody uses.
            unsafe { libc::munmap(from as *mut _, to - from) };
        }
    }
    Ok(start)
}

impl Drop for Retired {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and nothing points into it.
        unsafe { libc::munmap(self.address as *mut _, self.len) };
    }
}
