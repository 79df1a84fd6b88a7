//! Which pages of a mapping there is something in, asked of the kernel (/proc/self/pagemap).
//!
//! A page of a private mapping that the guest or a device wrote is the process's own; one that was
//! only read is still the file's. So what changed since a snapshot whose file the guest runs on
//! needs no tracking while it runs. See Documentation/admin-guide/mm/pagemap.rst.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process;
use std::sync::OnceLock;

/// Bytes of a page of the host.
pub const PAGE: u64 = 4096;
/// Bytes of an entry.
const ENTRY: usize = 8;
/// Entries read at once.
const BATCH: usize = 8192;
/// The page is in RAM.
const PRESENT: u64 = 1 << 63;
/// The page is in swap.
const SWAPPED: u64 = 1 << 62;
/// The page is a file's, or of shared anonymous memory.
const SHARED: u64 = 1 << 61;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

impl Scan {
    fn new(which: Which, end: u64) -> Self {
        let not_file = match which {
            Which::Populated => 0,
            Which::Own => PAGE_IS_FILE,
        };
        Self {
            size: size_of::<Self>() as u64,
            end,
            category_inverted: not_file,
            category_mask: not_file,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..Self::default()
        }
    }
}

/// What is asked of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// It has content: all others read as zeros (anonymous memory).
    Populated,
    /// It is the process's own, of a private mapping of a file: all others are as in the file.
    Own,
}

/// The pagemap of this process.
#[derive(Debug)]
pub struct Pagemap(File);

/// That of a process which is going to be without /proc.
static KEPT: OnceLock<(u32, File)> = OnceLock::new();

impl Pagemap {
    /// Keeps that of this process, `file`, for when there is no /proc any more. Its children have none then.
    pub fn keep(file: File) {
        if KEPT.set((process::id(), file)).is_err() {
            log::debug!("this process keeps its pagemap already");
        }
    }

    /// Whether the host tells of pages.
    pub fn is_there() -> bool {
        Self::open().is_ok()
    }

    /// Opens it.
    ///
    /// # Errors
    /// Where there is no /proc, and none was kept.
    pub fn open() -> io::Result<Self> {
        match KEPT.get() {
            Some((owner, file)) if *owner == process::id() => file.try_clone().map(Self),
            _ => File::open("/proc/self/pagemap").map(Self),
        }
    }

    /// Calls `f` with the runs of such pages in `len` bytes from address `start` on, as offsets from
    /// `start` and lengths in bytes, in order. Both are multiples of a page.
    ///
    /// # Errors
    /// Of reading, and those of `f`.
    pub fn runs<E: From<io::Error>>(
        &self,
        which: Which,
        range: (u64, u64),
        mut f: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        match self.scan(which, range, &mut f)? {
            true => Ok(()),
            false => self.read(which, range, f),
        }
    }

    /// Bytes of such pages, as [`runs`](Self::runs) finds them.
    ///
    /// # Errors
    /// Of reading.
    pub fn bytes(&self, which: Which, range: (u64, u64)) -> io::Result<u64> {
        let mut bytes = 0;
        let add = |_, len| {
            bytes += len;
            Ok::<(), io::Error>(())
        };
        self.runs(which, range, add).map(|()| bytes)
    }

    /// Has the kernel look for them, which does not take it longer for memory that nobody touched. False
    /// where it cannot (before Linux 6.7).
    fn scan<E: From<io::Error>>(
        &self,
        which: Which,
        (start, len): (u64, u64),
        f: &mut impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut found = [PageRegion::default(); 256];
        let mut scan = Scan::new(which, start + len);
        let mut at = start;
        let mut run: Option<(u64, u64)> = None;
        while at < start + len {
            scan.start = at;
            (scan.vec, scan.vec_len) = (found.as_mut_ptr() as u64, found.len() as u64);
            // SAFETY: a descriptor of pagemap, and the kernel writes to `scan` and as many of `found`
            // as it says there are.
            let count = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN as _, &mut scan) };
            let Ok(count) = usize::try_from(count) else {
                let error = io::Error::last_os_error();
                return match (error.raw_os_error(), at == start) {
                    (Some(libc::ENOTTY), true) => Ok(false),
                    _ => Err(error.into()),
                };
            };
            for region in found.iter().take(count) {
                match &mut run {
                    Some((_, end)) if *end == region.start => *end = region.end,
                    _ => {
                        let before = run.replace((region.start, region.end));
                        before.map_or(Ok(()), |(from, to)| f(from - start, to - from))?;
                    }
                }
            }
            at = scan.walk_end.max(at + PAGE);
        }
        run.map_or(Ok(()), |(from, to)| f(from - start, to - from))?;
        Ok(true)
    }

    fn read<E: From<io::Error>>(
        &self,
        which: Which,
        (start, len): (u64, u64),
        mut f: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let pages = len / PAGE;
        let mut buffer = vec![0; BATCH * ENTRY];
        let mut run = None;
        let mut page = 0;
        while page < pages {
            let count = (pages - page).min(BATCH as u64) as usize;
            let bytes = buffer.get_mut(..count * ENTRY).unwrap_or_default();
            let at = (start / PAGE + page) * ENTRY as u64;
            self.0.read_exact_at(bytes, at)?;
            let (entries, _) = bytes.as_chunks::<ENTRY>();
            for entry in entries {
                let wanted = is_wanted(which, u64::from_ne_bytes(*entry));
                match (wanted, run) {
                    (true, None) => run = Some(page),
                    (false, Some(first)) => {
                        f(first * PAGE, (page - first) * PAGE)?;
                        run = None;
                    }
                    _ => {}
                }
                page += 1;
            }
        }
        match run {
            Some(first) => f(first * PAGE, (pages - first) * PAGE),
            None => Ok(()),
        }
    }
}

fn is_wanted(which: Which, entry: u64) -> bool {
    match which {
        Which::Populated => entry & (PRESENT | SWAPPED) != 0,
        // In swap: only what is the process's own goes there, or shared memory, which bit 61 tells.
        Which::Own => entry & (PRESENT | SWAPPED) != 0 && entry & SHARED == 0,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    fn map(len: usize, fd: i32) -> *mut u8 {
        let flags = match fd {
            -1 => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            _ => libc::MAP_PRIVATE,
        };
        // SAFETY: a new mapping, where the kernel likes.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        at.cast()
    }

    fn runs(which: Which, at: *mut u8, len: u64) -> Vec<(u64, u64)> {
        let pagemap = Pagemap::open().unwrap();
        let range = (at as u64, len);
        let (mut read, mut scanned) = (Vec::new(), Vec::new());
        let push = |runs: &mut Vec<_>, start, len| {
            runs.push((start / PAGE, len / PAGE));
            Ok::<(), io::Error>(())
        };
        pagemap
            .read(which, range, |start, len| push(&mut read, start, len))
            .unwrap();
        let mut f = |start, len| push(&mut scanned, start, len);
        if pagemap.scan(which, range, &mut f).unwrap() {
            assert_eq!(scanned, read);
        }
        read
    }

    #[test]
    fn what_was_written_is_told_from_what_was_read() {
        let pages = 20_000;
        let len = pages * PAGE;
        let at = map(len as usize, -1);
        // SAFETY: in the mapping.
        let touch = |page: usize| unsafe { at.add(page * PAGE as usize).write_volatile(1) };
        [0, 1, 5, 8191, 8192, 19_999].into_iter().for_each(touch);
        let expected = [(0, 2), (5, 1), (8191, 2), (19_999, 1)];
        assert_eq!(runs(Which::Populated, at, len), expected);
        // SAFETY: mapped above, not used any more.
        unsafe { libc::munmap(at.cast(), len as usize) };

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 16 * PAGE as usize]).unwrap();
        let at = map(16 * PAGE as usize, file.as_raw_fd());
        for page in 0..16 {
            // SAFETY: in the mapping.
            assert_eq!(unsafe { at.add(page * PAGE as usize).read_volatile() }, 7);
        }
        for page in [3, 4, 15] {
            // SAFETY: in the mapping.
            unsafe { at.add(page * PAGE as usize).write_volatile(1) };
        }
        assert_eq!(runs(Which::Own, at, 16 * PAGE), [(3, 2), (15, 1)]);
        // SAFETY: mapped above, not used any more.
        unsafe { libc::munmap(at.cast(), 16 * PAGE as usize) };
    }
}
