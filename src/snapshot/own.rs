//! The pages of guest RAM that are the process's own, written over with what they were made from.

use std::io;

use arch::memory::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::pages::{Pagemap, Which};

/// Tells which they are.
#[derive(Debug)]
pub struct OwnPages(Pagemap);

impl OwnPages {
    /// Asks the kernel for access to it.
    ///
    /// # Errors
    /// Where there is no /proc.
    pub fn new() -> io::Result<Self> {
        Pagemap::open().map(Self)
    }

    /// Writes what `from` has to the pages of `to` that are the process's own; both are private mappings of
    /// the same files. Nobody uses `to` meanwhile. Says how many bytes that were.
    ///
    /// # Errors
    /// Where the kernel does not tell, and for memory of another layout, of which nothing is written.
    pub fn write_back(&self, from: &GuestMemory, to: &GuestMemory) -> io::Result<u64> {
        let layout = |memory: &GuestMemory| {
            let regions = memory.iter();
            let regions = regions.map(|region| (region.start_addr(), region.len()));
            regions.collect::<Vec<_>>()
        };
        if layout(from) != layout(to) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut written = 0;
        for (from, to) in from.iter().zip(to.iter()) {
            let (source, target) = (from.as_ptr().cast_const(), to.as_ptr());
            let copy = |start: u64, len: u64| {
                let (start, bytes) = (start as usize, len as usize);
                // SAFETY: both regions have the range, as was just compared, and are different
                // mappings; no vCPU runs and devices are at rest.
                unsafe {
                    target
                        .add(start)
                        .copy_from_nonoverlapping(source.add(start), bytes)
                };
                written += len;
                Ok::<(), io::Error>(())
            };
            let range = (target as u64, to.len());
            self.0.runs(Which::Own, range, copy)?;
        }
        Ok(written)
    }
}
