//! Mappings of guest RAM that something else has taken the place of: unmapping a GiB takes tens of
//! milliseconds, moving its page tables away a fraction of one.

use std::fs::File;
use std::io;

use arch::memory::GuestMemory;
use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::fork::seal;
use super::ram::overlay;

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
    fn move_away(region: &GuestRegionMmap) -> Option<Self> {
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

    /// Takes its pages from `region` and maps `len` bytes of `file` from `offset` on there instead, copy-on-write.
    ///
    /// # Errors
    /// Of mmap: `region` has its pages as before.
    ///
    /// # Safety
    /// Nobody reads or writes `region` meanwhile.
    pub unsafe fn replace(
        region: &GuestRegionMmap,
        file: &File,
        offset: u64,
    ) -> io::Result<Option<Self>> {
        let retired = Self::move_away(region);
        // SAFETY: all of one region's mapping; the rest is the caller's.
        let laid = unsafe { overlay(region.as_ptr(), region.len(), file, offset) };
        match (laid, retired) {
            (Ok(()), retired) => Ok(retired),
            (Err(error), Some(retired)) => {
                retired.put_back(region)?;
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Gives `region`, whose they were, its pages again.
    fn put_back(self, region: &GuestRegionMmap) -> io::Result<()> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, to) = (self.address as *mut _, region.as_ptr());
        // SAFETY: the pages are this value's own, and go where they came from.
        let moved = unsafe { libc::mremap(from, self.len, self.len, flags, to) };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The addresses are no longer this value's.
        std::mem::forget(self);
        Ok(())
    }
}

/// Empties the file in memory that `memory` was a mapping of, and seals it: what the guest gives back from now on
/// is not looked for there.
///
/// # Errors
/// Of the file, or where there is none.
pub fn give_up(memory: &GuestMemory) -> io::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let mut files = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or(io::ErrorKind::InvalidInput)?;
        fallocate(file.file(), hole, file.start() as i64, region.len() as i64)?;
        files.push(file.file());
    }
    files.into_iter().try_for_each(seal)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    use super::*;
    use crate::config::{MachineConfig, MemoryBacking};

    fn region() -> GuestRegionMmap {
        let mapping = MmapRegionBuilder::new(4 << 20)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        region.write_obj(7_u8, MemoryRegionAddress(5000)).unwrap();
        region
    }

    fn byte(region: &GuestRegionMmap) -> u8 {
        region.read_obj(MemoryRegionAddress(5000)).unwrap()
    }

    #[test]
    fn a_file_takes_the_place_of_pages() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        let region = region();
        // SAFETY: nobody else has the region.
        let retired = unsafe { Retired::replace(&region, &file, 0) }.unwrap();
        assert!(retired.is_some());
        assert_eq!(byte(&region), 0);
    }

    #[test]
    fn pages_that_nothing_takes_the_place_of_are_there_again() {
        // No file that can be mapped.
        let directory = File::open("/").unwrap();
        let region = region();
        // SAFETY: as above.
        let error = unsafe { Retired::replace(&region, &directory, 0) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert_eq!(byte(&region), 7);
        region.write_obj(8_u8, MemoryRegionAddress(5000)).unwrap();
        assert_eq!(byte(&region), 8);
    }

    #[test]
    fn a_file_that_is_given_up_is_empty_and_stays_so() {
        let config = MachineConfig {
            mem_size_mib: 8,
            memory_backing: MemoryBacking::Memfd,
            ..MachineConfig::default()
        };
        let memory = crate::vm::memory::map(&config).unwrap();
        memory.write_obj(7_u8, GuestAddress(5000)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.metadata().unwrap().blocks() > 0);
        give_up(&memory).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        assert!(give_up(&memory).is_err());
    }
}
