//! The memory behind a hot-pluggable region: a memory file, mapped twice.
//!
//! KVM has one mapping, in which only plugged blocks are the file's; the others are zeros that
//! cannot be written and take no memory. The devices' view of guest RAM has mappings of its own, of
//! plugged blocks only, so that nothing of this process ever meets memory that went away.
//!
//! The content of blocks that were plugged when the machine was saved may be elsewhere, and come when it is
//! touched by way of KVM's mapping, which a [`Pager`] sees to.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::{Arc, OnceLock};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

/// Alignment of the mapping, as large as a block is at least.
const ALIGN: u64 = 2 << 20;
/// Bytes of a page of ordinary memory.
const PAGE: u64 = 4096;

/// Has the content of saved blocks come when it is touched.
pub trait Pager: std::fmt::Debug + Send + Sync {
    /// Devices have `len` bytes at address `host` of this process from now on, the ones that KVM has at `kvm`.
    ///
    /// # Errors
    /// Where faults there cannot be told; the devices do not get it then.
    fn shown(&self, host: u64, len: u64, kvm: u64) -> io::Result<()>;

    /// The `len` bytes at `kvm` are no memory any more: nobody is to wait for them.
    fn gone(&self, kvm: u64, len: u64);
}

/// What comes when it is touched.
#[derive(Debug)]
struct Absent {
    pieces: Vec<Range<u64>>,
    pager: Arc<dyn Pager>,
}

/// Memory that is plugged block by block. Dropping it unmaps.
#[derive(Debug)]
pub struct Region {
    file: Arc<File>,
    /// Bytes of a host page.
    page: u64,
    /// What is reserved, more than is used so that the start can be aligned.
    reserved: (usize, usize),
    start: usize,
    len: u64,
    absent: OnceLock<Absent>,
}

impl Region {
    /// `len` bytes of pages of `page` bytes: 4 KiB, or reserved ones of 2 MiB or 1 GiB. `len` is a
    /// multiple of 2 MiB and of `page`.
    pub fn new(len: u64, page: u64) -> io::Result<Self> {
        let huge = match page {
            PAGE => 0,
            _ => libc::MFD_HUGETLB | page.trailing_zeros() << libc::MFD_HUGE_SHIFT,
        };
        let align = ALIGN.max(page);
        if len == 0 || !len.is_multiple_of(align) || !page.is_power_of_two() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the name is a C string and the call touches no memory of ours.
        let fd = unsafe {
            libc::memfd_create(c"bulle-plugged-memory".as_ptr(), libc::MFD_CLOEXEC | huge)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create has just given us this descriptor.
        let file = Arc::new(unsafe { File::from_raw_fd(fd) });
        file.set_len(len)?;
        let total = len
            .checked_add(align)
            .and_then(|total| usize::try_from(total).ok());
        let total = total.ok_or(io::ErrorKind::InvalidInput)?;
        let start = map(None, total, None)?;
        Ok(Self {
            file,
            page,
            reserved: (start, total),
            start: start.next_multiple_of(align as usize),
            len,
            absent: OnceLock::new(),
        })
    }

    /// Bytes of a page.
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Plugs the bytes of `pieces` before there is a device, which is going to find them plugged; `pager` has their
    /// content come. Only once.
    ///
    /// # Errors
    /// For what is not in the region, and what the host refuses.
    pub fn plug_absent(&self, pieces: Vec<Range<u64>>, pager: Arc<dyn Pager>) -> io::Result<()> {
        for piece in &pieces {
            self.plug(piece.clone())?;
        }
        let set = self.absent.set(Absent { pieces, pager });
        set.map_err(|_| io::ErrorKind::AlreadyExists.into())
    }

    /// Has all come that is to come when it is touched, so that [`file`](Self::file) has it.
    pub fn bring(&self) {
        let pieces = self.absent.get().map(|absent| &absent.pieces[..]);
        for piece in pieces.unwrap_or_default() {
            for at in piece.clone().step_by(self.page as usize) {
                let byte = (self.start + at as usize) as *const u8;
                // SAFETY: in KVM's mapping, as it was when it was plugged, all of which can be read as long as
                // there is the region.
                let _ = unsafe { byte.read_volatile() };
            }
        }
    }

    /// Address in this process of what KVM maps.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The file in memory that has the content: nothing is where nothing is plugged.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The guest can use the bytes of `range` from now on.
    pub(super) fn plug(&self, range: Range<u64>) -> io::Result<()> {
        self.map(range, Some(&self.file))
    }

    /// As [`plug`](Self::plug), of blocks that were plugged when the machine was saved.
    pub(super) fn plug_saved(&self, range: Range<u64>) -> io::Result<()> {
        let absent = self.absent.get();
        match absent.is_some_and(|absent| absent.pieces.contains(&range)) {
            true => Ok(()),
            false => self.plug(range),
        }
    }

    /// The bytes of `range` read as zeros from now on, cannot be written, and are the host's.
    pub(super) fn unplug(&self, range: Range<u64>) -> io::Result<()> {
        self.map(range.clone(), None)?;
        if let Some(absent) = self.absent.get() {
            let host = self.start as u64 + range.start;
            absent.pager.gone(host, range.end - range.start);
        }
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (start, len) = (
            range.start as libc::off_t,
            (range.end - range.start) as libc::off_t,
        );
        // SAFETY: touches no memory of this process but what guests and devices share, which is
        // volatile to all of it.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), flags, start, len) };
        if result != 0 {
            // Nobody reaches it any more, which is what counts.
            let error = io::Error::last_os_error();
            log::warn!("the host does not take unplugged memory back: {error}");
        }
        Ok(())
    }

    /// Writes `data` to the file from byte `at` on.
    ///
    /// # Errors
    /// For what is not in the region, and of the file.
    pub fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let end = at
            .checked_add(data.len() as u64)
            .filter(|end| *end <= self.len)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if self.page == PAGE || data.is_empty() {
            return self.file.write_all_at(data, at);
        }
        // Reserved huge pages are written to by way of mappings only.
        let first = at - at % self.page;
        let len = (end.next_multiple_of(self.page) - first) as usize;
        let start = map(None, len, Some((&self.file, first)))?;
        // SAFETY: within the mapping just made, whose pages are reserved, and which nobody else knows.
        unsafe {
            let to = (start as *mut u8).add((at - first) as usize);
            ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
        }
        unmap(start, len);
        Ok(())
    }

    fn map(&self, range: Range<u64>, file: Option<&File>) -> io::Result<()> {
        if range.start >= range.end || range.end > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = self.start + range.start as usize;
        let len = (range.end - range.start) as usize;
        map(Some(at), len, file.map(|file| (file, range.start))).map(drop)
    }

    /// A mapping of its own of the bytes of `range`, as guest RAM at `address`.
    pub(super) fn view(&self, range: Range<u64>, address: u64) -> io::Result<GuestRegionMmap> {
        let file = FileOffset::from_arc(Arc::clone(&self.file), range.start);
        let region = MmapRegionBuilder::new((range.end - range.start) as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_hugetlbfs(self.page > PAGE)
            .with_file_offset(file)
            .build()
            .map_err(io::Error::other)?;
        if let Some(absent) = self.absent.get() {
            let (host, kvm) = (region.as_ptr() as u64, self.start as u64 + range.start);
            absent.pager.shown(host, range.end - range.start, kvm)?;
        }
        GuestRegionMmap::new(region, GuestAddress(address))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // Reserved as a whole by this region, and nobody else may use it; the owner keeps it longer than the VM that
        // has it in a slot.
        let (start, len) = self.reserved;
        unmap(start, len);
    }
}

/// Unmaps what [`map`] mapped and nobody uses any more.
fn unmap(start: usize, len: usize) {
    // SAFETY: a mapping of this module's, to which no reference is left.
    if unsafe { libc::munmap(start as *mut libc::c_void, len) } != 0 {
        let error = io::Error::last_os_error();
        log::error!("plugged memory stays mapped: {error}");
    }
}

/// Maps `len` bytes: anywhere, or at an address of ours; of a file from an offset on, or zeros that
/// cannot be written.
fn map(at: Option<usize>, len: usize, file: Option<(&File, u64)>) -> io::Result<usize> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (kind, protection, fd, offset) = match file {
        // Reserved huge pages are taken now, or the guest would be without them later.
        Some((file, offset)) => (
            libc::MAP_SHARED,
            libc::PROT_READ | libc::PROT_WRITE,
            file.as_raw_fd(),
            offset as libc::off_t,
        ),
        None => (anonymous, libc::PROT_READ, -1, 0),
    };
    let hint = at.map_or(ptr::null_mut(), |at| at as *mut libc::c_void);
    // SAFETY: with an address, it lies in what the caller reserved, of which no Rust reference
    // exists; without, the kernel finds a free range.
    let result = unsafe { libc::mmap(hint, len, protection, kind | fixed, fd, offset) };
    match result {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        start => Ok(start as usize),
    }
}
