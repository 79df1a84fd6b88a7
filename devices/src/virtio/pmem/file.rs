//! A host file mapped into this process, to become guest memory.
//!
//! The mapping is a multiple of 2 MiB: the file, then anonymous memory. Only KVM reads and writes
//! it, so a file that someone shortens never kills this process; [`Mapping::repair`] puts zeros
//! where it ended.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Mutex;

use super::PmemError;
use crate::lock;
use crate::virtio::block::lock::{LockError, lock as lock_file};

/// The guest's size is a multiple of it, and so is its address.
pub const ALIGN: u64 = 2 << 20;
/// Largest file, which fits every address space.
const MAX_LEN: u64 = 1 << 45;
const PAGE: u64 = 4096;

/// A file of the host in a mapping of its own. Dropping it unmaps.
#[derive(Debug)]
pub struct Mapping {
    file: File,
    path: PathBuf,
    read_only: bool,
    /// What is reserved, more than is used so that the start can be aligned.
    reserved: (usize, usize),
    start: usize,
    len: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Bytes of the file when it was opened.
    size: u64,
    /// Bytes from the start that are the file's.
    valid: u64,
    /// Times that the file had become shorter.
    repairs: u64,
}

impl Mapping {
    /// Opens, locks and maps the file at `path`.
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self, PmemError> {
        let host = |what| {
            let path = path.to_owned();
            move |source| PmemError::Host { path, what, source }
        };
        // Looked at before it is opened, because opening a pipe would wait for its writer.
        let kind = path.metadata().map_err(host("open"))?;
        if !kind.is_file() {
            return Err(PmemError::Kind {
                path: path.to_owned(),
            });
        }
        let mut options = File::options();
        let file = options.read(true).write(!read_only).open(path);
        let file = file.map_err(host("open"))?;
        lock_file(&file, !read_only).map_err(|error| match error {
            LockError::Held(holder) => PmemError::Held {
                path: path.to_owned(),
                holder,
            },
            LockError::Io(source) => host("lock")(source),
        })?;
        let size = file.metadata().map_err(host("examine"))?.len();
        if size == 0 || size > MAX_LEN {
            return Err(PmemError::Size {
                path: path.to_owned(),
                size,
            });
        }
        let len = size.next_multiple_of(ALIGN);
        let reserved = (len + ALIGN) as usize;
        let anywhere = map(None, reserved, libc::PROT_NONE, None).map_err(host("map"))?;
        let mapping = Self {
            start: anywhere.next_multiple_of(ALIGN as usize),
            reserved: (anywhere, reserved),
            file,
            path: path.to_owned(),
            read_only,
            len,
            state: Mutex::new(State {
                size,
                valid: size.next_multiple_of(PAGE),
                repairs: 0,
            }),
        };
        mapping.fill().map_err(host("map"))?;
        Ok(mapping)
    }

    /// The file, then anonymous memory.
    fn fill(&self) -> io::Result<()> {
        let valid = lock(&self.state).valid;
        let at = Some(self.start);
        map(at, valid as usize, self.protection(), Some(&self.file))?;
        self.blank(valid, self.len)
    }

    fn protection(&self) -> libc::c_int {
        match self.read_only {
            true => libc::PROT_READ,
            false => libc::PROT_READ | libc::PROT_WRITE,
        }
    }

    /// Anonymous memory from `from` to `to`.
    fn blank(&self, from: u64, to: u64) -> io::Result<()> {
        if from < to {
            let at = Some(self.start + from as usize);
            map(at, (to - from) as usize, self.protection(), None)?;
        }
        Ok(())
    }

    /// Says so if what the guest writes at the end is not kept.
    pub(super) fn warn_of_tail(&self) {
        let lost = self.len - lock(&self.state).size;
        if !self.read_only && lost > 0 {
            log::warn!(
                "{:?} is {} bytes of memory to the guest, and what the guest writes to the last \
                 {lost} of them is lost; extend it with `truncate -s %{ALIGN}`",
                self.path,
                self.len
            );
        }
    }

    /// Address in this process, a multiple of [`ALIGN`].
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Bytes, a multiple of [`ALIGN`].
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The file, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest may only read it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The file has become shorter, perhaps, which KVM meets as a page that cannot be had: zeros are
    /// there from now on. `seen` is the caller's own count of repairs, 0 at first. False: nothing
    /// changed since the caller's last call, so that is not why.
    pub fn repair(&self, seen: &mut u64) -> io::Result<bool> {
        let mut state = lock(&self.state);
        let valid = self.file.metadata()?.len().next_multiple_of(PAGE);
        if valid < state.valid {
            self.blank(valid, state.valid)?;
            log::error!(
                "{:?} was made shorter while the guest uses it: from byte {valid} on it reads zeros \
                 and keeps nothing",
                self.path
            );
            state.valid = valid;
            state.repairs += 1;
        }
        Ok(std::mem::replace(seen, state.repairs) != state.repairs)
    }

    /// What the guest wrote is on the host's disk when this returns, or it is an error.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let (valid, repairs) = {
            let state = lock(&self.state);
            (state.valid, state.repairs)
        };
        let now = self.file.metadata()?.len().next_multiple_of(PAGE);
        if repairs > 0 || now < valid {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Of mapped pages too.
        self.file.sync_data()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (start, len) = self.reserved;
        // SAFETY: a range that this mapping reserved as a whole and that nobody else may use; the
        // owner keeps it longer than the VM that has it in a slot.
        if unsafe { libc::munmap(start as *mut libc::c_void, len) } != 0 {
            log::error!(
                "{:?} stays mapped: {}",
                self.path,
                io::Error::last_os_error()
            );
        }
    }
}

/// Maps `len` bytes of a file or of anonymous memory: anywhere, or at an address of ours.
fn map(
    at: Option<usize>,
    len: usize,
    protection: libc::c_int,
    file: Option<&File>,
) -> io::Result<usize> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let (kind, fd) = match file {
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
        None => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
        ),
    };
    let hint = at.map_or(ptr::null_mut(), |at| at as *mut libc::c_void);
    // SAFETY: with an address, it lies in what the caller reserved, of which no Rust reference
    // exists; without, the kernel finds a free range.
    let result = unsafe { libc::mmap(hint, len, protection, kind | fixed, fd, 0) };
    match result {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        start => Ok(start as usize),
    }
}
