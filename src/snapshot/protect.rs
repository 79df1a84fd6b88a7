//! Guest RAM that is written to a file while the guest goes on, where no child process has it as it is: shared
//! memory and reserved huge pages.
//!
//! All of it is write-protected by userfaultfd while the machine stands still, which is a mark in page tables.
//! Then a thread writes one chunk after the other and takes its protection away; whoever writes to one
//! before waits until it is in the file, which is next. Nothing may give memory back to the host
//! meanwhile. At the end of the userfaultfd, however that comes, all of RAM is as it was. The vmm thread
//! makes it, the writer's thread owns it.

use std::io;

use arch::memory::GuestMemory;
use vm_memory::GuestMemoryBackend;

use super::image::ImageWriter;
use super::ram::{self, Origin, Part};
use super::uffd::{Event, Mode, Uffd, UffdError, feature};

/// Bytes that are written and unprotected at once, in pages of the host's size.
const CHUNK: u64 = 256 << 10;

/// A piece of a region that is protected as a whole.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// Address in this process.
    host: u64,
    len: u64,
    /// Offset in the memory file.
    offset: u64,
    done: bool,
}

/// RAM as it is at one moment.
pub struct Protected {
    uffd: Uffd,
    /// Keeps the mappings.
    memory: GuestMemory,
    /// All of RAM, in the order of its regions and without a gap in any.
    chunks: Vec<Chunk>,
    /// Where there is something, as offsets in the memory file and ends, in order.
    data: Vec<(u64, u64)>,
}

/// A userfaultfd that can protect shared memory and reserved huge pages.
///
/// # Errors
/// [`UffdError`], of kernels before 5.19 and of users that may not have one.
pub fn open() -> Result<Uffd, UffdError> {
    Uffd::new(feature::PAGEFAULT_FLAG_WP | feature::WP_HUGETLBFS_SHMEM)
}

impl Protected {
    /// Protects all of `memory`, in pages of `page` bytes, which comes from `origin` and which nobody writes
    /// to now.
    ///
    /// # Errors
    /// Where the kernel does not protect it, or does not tell what there is.
    pub fn new(
        uffd: Uffd,
        (memory, page): (&GuestMemory, u64),
        origin: &Origin,
    ) -> io::Result<Self> {
        let size = CHUNK.max(page);
        let (mut chunks, mut data) = (Vec::new(), Vec::new());
        for (region, here) in memory.iter().zip(ram::regions(memory)) {
            let host = region.as_ptr() as u64;
            for (start, len) in ram::runs(region, here, origin, Part::All)? {
                data.push((here.offset + start, here.offset + start + len));
            }
            // SAFETY: all of one region of guest RAM, whose content stays.
            let registered = unsafe { uffd.register((host, here.len), Mode::WriteProtected) };
            registered.map_err(io::Error::other)?;
            uffd.protect(host, here.len, true)?;
            chunks.extend((0..here.len).step_by(size as usize).map(|at| Chunk {
                host: host + at,
                len: size.min(here.len - at),
                offset: here.offset + at,
                done: false,
            }));
        }
        Ok(Self {
            uffd,
            memory: memory.clone(),
            chunks,
            data,
        })
    }

    /// RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Writes all of it to `writer`, and lets it be written to meanwhile.
    ///
    /// # Errors
    /// Of the file, where the writer's watch ends it, and of userfaultfd.
    pub fn write(&mut self, writer: &mut ImageWriter<'_>) -> io::Result<()> {
        writer.expect(self.data.iter().map(|(from, to)| to - from).sum());
        for index in 0..self.chunks.len() {
            self.write_awaited(writer)?;
            if self.chunks.get(index).is_some_and(|chunk| !chunk.done) {
                self.write_chunk(index, writer)?;
            }
        }
        Ok(())
    }

    /// Writes what others wait for.
    fn write_awaited(&mut self, writer: &mut ImageWriter<'_>) -> io::Result<()> {
        while let Some(event) = self.uffd.next()? {
            let Event::Fault(host) = event else {
                continue;
            };
            let has = |chunk: &Chunk| (chunk.host..chunk.host + chunk.len).contains(&host);
            if let Some(index) = self.chunks.iter().position(has) {
                self.write_chunk(index, writer)?;
            }
        }
        Ok(())
    }

    fn write_chunk(&mut self, index: usize, writer: &mut ImageWriter<'_>) -> io::Result<()> {
        let Some(chunk) = self.chunks.get_mut(index) else {
            return Ok(());
        };
        if chunk.done {
            // Whoever waits for it came before that, and looks again.
            return self.uffd.wake(chunk.host, chunk.len);
        }
        chunk.done = true;
        let chunk = *chunk;
        let end = chunk.offset + chunk.len;
        let first = self.data.partition_point(|(_, to)| *to <= chunk.offset);
        let runs = self.data.iter().skip(first);
        for (from, to) in runs.take_while(|(from, _)| *from < end) {
            let (from, to) = ((*from).max(chunk.offset), (*to).min(end));
            let host = (chunk.host + (from - chunk.offset)) as *const u8;
            // SAFETY: within a region's mapping, which `memory` keeps. Whoever writes to it waits for
            // the end of its protection, below.
            let bytes = unsafe { std::slice::from_raw_parts(host, (to - from) as usize) };
            writer.write(from, bytes, true)?;
        }
        self.uffd.protect(chunk.host, chunk.len, false)
    }
}
