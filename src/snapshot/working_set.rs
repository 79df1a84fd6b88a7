//! Which pages of RAM a guest touched after it was loaded, and having them there the next time.
//!
//! The list is in a file beside the memory file, in the container of state files. It says nothing of
//! what is in the pages, so the worst of a wrong one is time lost. The vmm thread records it; a
//! thread of its own brings the pages, so that neither the load nor the guest waits for all of them.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use arch::memory::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::format::{Kind, Reader, Writer};
use super::image::MAX_RUN;
use super::pages::{PAGE, Pagemap, Which};
use super::publish::Unpublished;
use super::{SnapshotError, ram, read_file};
use crate::sandbox::thread::{Role, ThreadError, spawn};

/// Offsets and lengths in the memory file's layout, in order.
const TOUCHED: Kind = Kind::mandatory("touched", 1);
/// Runs that are closer are one: a page more costs less than a call.
const GAP: u64 = 8 * PAGE;

/// Pages of RAM, as offsets in the memory file's layout and lengths, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<(u64, u64)>,
}

/// Where the working set of the snapshot with this memory file is.
pub fn path(memory: &Path) -> PathBuf {
    let mut name = OsString::from(memory.file_name().unwrap_or_default());
    name.push(".working-set");
    memory.with_file_name(name)
}

impl WorkingSet {
    /// What of `memory`, a private mapping of files, was touched so far.
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub fn of(memory: &GuestMemory) -> io::Result<Self> {
        let pagemap = Pagemap::open()?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (region, here) in memory.iter().zip(ram::regions(memory)) {
            let range = (region.as_ptr() as u64, region.len());
            pagemap.runs(Which::Populated, range, |start, len| {
                let start = here.offset + start;
                match runs.last_mut() {
                    // Not across regions.
                    Some((first, before))
                        if *first >= here.offset && start - (*first + *before) <= GAP =>
                    {
                        *before = start + len - *first;
                    }
                    _ => runs.push((start, len)),
                }
                Ok::<(), io::Error>(())
            })?;
        }
        Ok(Self { runs })
    }

    /// Bytes of it.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(_, len)| len).sum()
    }

    /// Its pages, as offsets in the memory file's layout and lengths, in order.
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// Whether nothing was touched.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Writes it to `path`, as that of the snapshot `id`.
    ///
    /// # Errors
    /// [`SnapshotError`]; what was there before still is.
    pub fn save(&self, path: &Path, id: [u8; 16]) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Write {
            path: path.to_owned(),
            source,
        };
        let mut writer = Writer::new(id);
        let value = writer.value(TOUCHED, &self.runs);
        value.map_err(SnapshotError::Encode)?;
        let mut file = Unpublished::new(path).map_err(failed)?;
        io::Write::write_all(file.file(), &writer.finish()).map_err(failed)?;
        file.sync().map_err(failed)?;
        file.publish().map(drop).map_err(failed)
    }

    /// Reads that of the snapshot `id` at `path`, if there is one.
    ///
    /// # Errors
    /// [`SnapshotError`] of a file that is there and is none of this snapshot.
    pub fn open(path: &Path, id: [u8; 16]) -> Result<Option<Self>, SnapshotError> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_file(path)?;
        let format = |source| SnapshotError::Format {
            path: path.to_owned(),
            source,
        };
        let reader = Reader::new(&bytes).map_err(format)?;
        let runs: Vec<(u64, u64)> = reader.value(TOUCHED).map_err(format)?;
        let wrong = |why| SnapshotError::State {
            path: path.to_owned(),
            why,
        };
        if reader.id() != id {
            return Err(wrong("it is of another snapshot"));
        }
        let mut behind = 0;
        for (start, len) in &runs {
            let page = start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && *len > 0;
            match start.checked_add(*len) {
                Some(end) if page && *start >= behind => behind = end,
                _ => return Err(wrong("its pages are not in order")),
            }
        }
        Ok(Some(Self { runs }))
    }

    /// Has the kernel bring these pages of `memory`, on a thread of its own.
    ///
    /// # Errors
    /// Without a thread left.
    pub fn prefetch(self, memory: GuestMemory) -> Result<Prefetch, ThreadError> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = spawn(Role::Prefetch, move || self.bring(&memory, &flag))?;
        Ok(Prefetch {
            stop,
            thread: Some(thread),
        })
    }

    fn bring(&self, memory: &GuestMemory, stop: &AtomicBool) {
        // The disk is to have all of it to do at once, then page tables get what came.
        for advice in [libc::MADV_WILLNEED, libc::MADV_POPULATE_READ] {
            if let Err(error) = self.advise(memory, advice, stop) {
                return log::debug!("the working set is not brought: {error}");
            }
        }
    }

    fn advise(&self, memory: &GuestMemory, advice: i32, stop: &AtomicBool) -> io::Result<()> {
        let regions: Vec<_> = memory.iter().zip(ram::regions(memory)).collect();
        for (start, len) in &self.runs {
            for (region, here) in &regions {
                let mut at = *start.max(&here.offset);
                let to = (start + len).min(here.offset + here.len);
                while at < to {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    let piece = (to - at).min(MAX_RUN);
                    let host = region.as_ptr().wrapping_add((at - here.offset) as usize);
                    // SAFETY: within the region's mapping, which `memory` keeps; neither advice
                    // changes content.
                    if unsafe { libc::madvise(host.cast(), piece as usize, advice) } != 0 {
                        return Err(io::Error::last_os_error());
                    }
                    at += piece;
                }
            }
        }
        Ok(())
    }
}

/// A thread that brings pages, until it is dropped or done.
#[derive(Debug)]
pub struct Prefetch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that brings the working set panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_was_written_and_nothing_else_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("memory"));
        assert_eq!(path, dir.path().join("memory.working-set"));
        assert_eq!(WorkingSet::open(&path, [1; 16]).unwrap(), None);
        let set = WorkingSet {
            runs: vec![(0, PAGE), (PAGE, 2 * PAGE), (1 << 30, PAGE)],
        };
        set.save(&path, [1; 16]).unwrap();
        assert_eq!(set.len(), 4 * PAGE);
        assert_eq!(WorkingSet::open(&path, [1; 16]).unwrap(), Some(set));
        let error = WorkingSet::open(&path, [2; 16]).unwrap_err();
        assert!(error.to_string().contains("another snapshot"), "{error}");
        for runs in [
            vec![(PAGE, PAGE), (0, PAGE)],
            vec![(0, 5)],
            vec![(u64::MAX - PAGE + 1, PAGE)],
        ] {
            WorkingSet { runs }.save(&path, [1; 16]).unwrap();
            let error = WorkingSet::open(&path, [1; 16]).unwrap_err();
            assert!(error.to_string().contains("not in order"), "{error}");
        }
        std::fs::write(&path, "none").unwrap();
        WorkingSet::open(&path, [1; 16]).unwrap_err();
    }

    #[test]
    fn pages_that_are_brought_are_there() {
        let machine = crate::config::MachineConfig {
            mem_size_mib: 16,
            ..crate::config::MachineConfig::default()
        };
        let memory = crate::vm::memory::map(&machine).unwrap();
        assert!(WorkingSet::of(&memory).unwrap().is_empty());
        // The last is beyond all memory.
        let set = WorkingSet {
            runs: vec![(3 * PAGE, 2 * PAGE), (8 << 20, 4 << 20), (1 << 40, PAGE)],
        };
        set.bring(&memory, &AtomicBool::new(false));
        let found = WorkingSet::of(&memory).unwrap();
        assert_eq!(found.runs, set.runs[..2]);
    }
}
