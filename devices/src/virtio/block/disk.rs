//! A disk image or block device of the host.
//!
//! The format is always said and never guessed from the content, which the guest writes: raw is
//! the only one. Owned by the I/O thread; all calls may wait for the host's disk.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::lock::{Holder, LockError, lock, unlock};

#[cfg(test)]
mod tests;

/// Bytes of a sector, the unit of all virtio block requests.
pub const SECTOR: u64 = 512;
/// Bytes written at once where zeros must be written out.
const ZERO_CHUNK: usize = 1 << 20;

/// What the content of a disk means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk, as they are.
    #[default]
    Raw,
}

/// What the host does with writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// The host's page cache; a flush of the guest reaches the disk.
    #[default]
    Writeback,
    /// The host's page cache; flushes are ignored. What the guest wrote is lost when the host
    /// fails, not when the VMM does.
    Unsafe,
    /// No page cache (O_DIRECT); a flush of the guest reaches the disk.
    None,
}

/// How to open a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Image file or block device.
    pub path: PathBuf,
    /// Meaning of its content.
    pub format: Format,
    /// The guest cannot write.
    pub read_only: bool,
    /// What happens to writes.
    pub cache: Cache,
    /// Logical block size in bytes, a power of two from 512 to 4096; by default what the host
    /// needs.
    pub logical_block_size: Option<u32>,
    /// Physical block size in bytes, a power of two from the logical one to 1 MiB; by default the
    /// host's.
    pub physical_block_size: Option<u32>,
}

/// A disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Not there, or no permission.
    #[error("cannot open disk {path:?}")]
    Open {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file system has no O_DIRECT.
    #[error(
        "disk {path:?} is on a file system that cannot do without the host's page cache \
         (no O_DIRECT); use another cache mode than `none`"
    )]
    Direct {
        /// As given.
        path: PathBuf,
    },
    /// Opened, but does not answer.
    #[error(
        "cannot find out the kind or the size of disk {path:?}; see whether the host can read it \
         (`dd if=… of=/dev/null`), and what its kernel log says"
    )]
    Examine {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe …
    #[error("disk {path:?} is neither a regular file nor a block device")]
    Kind {
        /// As given.
        path: PathBuf,
    },
    /// Its end would be lost.
    #[error(
        "disk {path:?} has {size} bytes, not a multiple of its block size of {block}; \
         extend it with `truncate -s %{block}`"
    )]
    Size {
        /// As given.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Logical block size in bytes.
        block: u32,
    },
    /// The file system has no locks, or they fail.
    #[error(
        "cannot lock disk {path:?} against other writers; put it on a file system that has locks \
         (NFS: version 4, or mounted with `local_lock=posix`)"
    )]
    Lock {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two would write, or one write what another reads.
    #[error("disk {path:?} is in use by {holder}; stop it, or open the disk read-only in both")]
    Locked {
        /// As given.
        path: PathBuf,
        /// Who uses it.
        holder: Holder,
    },
    /// A block size that cannot be.
    #[error(
        "disk {path:?}: block sizes {logical} (logical) and {physical} (physical) are not powers \
         of two with {least} <= logical <= 4096 and logical <= physical <= 1048576"
    )]
    BlockSize {
        /// As given.
        path: PathBuf,
        /// Logical block size in bytes.
        logical: u32,
        /// Physical block size in bytes.
        physical: u32,
        /// The least that the host can do.
        least: u32,
    },
}

/// An open, locked disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    cache: Cache,
    logical: u32,
    physical: u32,
    /// Alignment of buffers in memory for O_DIRECT, else 1.
    memory_align: usize,
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A ring may keep the file open for a while.
        unlock(&self.file);
    }
}

impl Disk {
    /// Opens and locks a disk.
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        let path = &options.path;
        let direct = match options.cache {
            Cache::None => libc::O_DIRECT,
            Cache::Writeback | Cache::Unsafe => 0,
        };
        // Looked at before it is opened: opening is enough to start some character devices.
        let opened = |source| DiskError::Open {
            path: path.clone(),
            source,
        };
        if !is_disk(&fs::metadata(path).map_err(opened)?) {
            return Err(DiskError::Kind { path: path.clone() });
        }
        // Not to wait for the writer of a pipe that took its place; files do not mind.
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | direct)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL) if direct != 0 => DiskError::Direct { path: path.clone() },
                _ => opened(source),
            })?;
        blocking(&file).map_err(|source| DiskError::Examine {
            path: path.clone(),
            source,
        })?;
        Self::from_file(file, options)
    }

    /// Takes an open file, which must have been opened as `options` say.
    pub fn from_file(mut file: File, options: &DiskOptions) -> Result<Self, DiskError> {
        let path = options.path.clone();
        let examine = |source| DiskError::Examine {
            path: path.clone(),
            source,
        };
        let metadata = file.metadata().map_err(examine)?;
        if !is_disk(&metadata) {
            return Err(DiskError::Kind { path });
        }
        match lock(&file, !options.read_only) {
            Ok(()) => {}
            Err(LockError::Held(holder)) => return Err(DiskError::Locked { path, holder }),
            Err(LockError::Io(source)) => return Err(DiskError::Lock { path, source }),
        }
        let limits = Limits::of(&file, &metadata, options.cache == Cache::None);
        let logical = options.logical_block_size.unwrap_or(limits.logical);
        let default = limits.physical.max(logical);
        let physical = options.physical_block_size.unwrap_or(default);
        let fits = logical.is_power_of_two()
            && physical.is_power_of_two()
            && (limits.logical..=4096).contains(&logical)
            && (logical..=1 << 20).contains(&physical);
        if !fits {
            return Err(DiskError::BlockSize {
                path,
                logical,
                physical,
                least: limits.logical,
            });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(examine)?;
        if size % u64::from(logical) != 0 {
            return Err(DiskError::Size {
                path,
                size,
                block: logical,
            });
        }
        Ok(Self {
            file,
            path,
            read_only: options.read_only,
            cache: options.cache,
            logical,
            physical,
            memory_align: limits.memory,
        })
    }

    /// Size in sectors, now; a part of a block at the end does not count.
    pub fn sectors(&self) -> io::Result<u64> {
        let size = (&self.file).seek(SeekFrom::End(0))?;
        Ok(size / u64::from(self.logical) * (u64::from(self.logical) / SECTOR))
    }

    /// As given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The guest cannot write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What happens to writes.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// Logical block size in bytes.
    pub fn logical_block_size(&self) -> u32 {
        self.logical
    }

    /// Physical block size in bytes.
    pub fn physical_block_size(&self) -> u32 {
        self.physical
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Buffers in memory start and end at multiples of this.
    pub(super) fn memory_align(&self) -> usize {
        self.memory_align
    }

    /// Frees `len` bytes at `offset`; they read as zeros, or as before where the host cannot.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(PUNCH, offset, len) {
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Makes `len` bytes at `offset` zeros, freeing them where `unmap` says so.
    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match self.fallocate(zero_mode(unmap), offset, len) {
            Err(error) if unsupported(&error) => {}
            result => return result,
        }
        match self.fallocate(PUNCH, offset, len) {
            Err(error) if unsupported(&error) => self.write_zeros(offset, len),
            result => result,
        }
    }

    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let chunk = len.min(ZERO_CHUNK as u64) as usize;
        let mut buffer = Aligned::new(chunk, self.memory_align);
        while len > 0 {
            let n = len.min(chunk as u64) as usize;
            let zeros = buffer.get(n);
            std::os::unix::fs::FileExt::write_all_at(&self.file, zeros, offset)?;
            offset += n as u64;
            len -= n as u64;
        }
        Ok(())
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = libc::off64_t::try_from(offset).map_err(invalid)?;
        let len = libc::off64_t::try_from(len).map_err(invalid)?;
        // SAFETY: takes no pointers; the descriptor is open.
        match unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn is_disk(metadata: &Metadata) -> bool {
    metadata.is_file() || metadata.file_type().is_block_device()
}

/// `fallocate` mode that frees.
pub(super) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// `fallocate` mode that zeroes.
pub(super) fn zero_mode(unmap: bool) -> i32 {
    if unmap {
        PUNCH
    } else {
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE
    }
}

pub(super) fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

/// A buffer with an alignment for O_DIRECT.
pub(super) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    /// `len` zeros at a multiple of `align`.
    pub(super) fn new(len: usize, align: usize) -> Self {
        let align = align.max(1);
        let bytes = vec![0; len + align];
        let start = bytes.as_ptr().align_offset(align);
        Self { bytes, start }
    }

    /// The first `len` bytes.
    pub(super) fn get(&mut self, len: usize) -> &mut [u8] {
        let end = self.start.saturating_add(len);
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}

/// Clears O_NONBLOCK, with which io_uring gives up where it should wait.
fn blocking(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: takes no pointers; the descriptor is open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) };
    match flags | set {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the host needs and likes.
struct Limits {
    logical: u32,
    physical: u32,
    memory: usize,
}

impl Limits {
    /// Asks the host. Where it does not know, O_DIRECT takes pages, and the page cache anything.
    fn of(file: &File, metadata: &Metadata, direct: bool) -> Self {
        let mut limits = Self {
            logical: SECTOR as u32,
            physical: 4096,
            memory: 1,
        };
        if direct {
            (limits.logical, limits.memory) = direct_limits(file).unwrap_or((4096, 4096));
        }
        if metadata.file_type().is_block_device() {
            if let Some(size) = block_size(file, libc::BLKSSZGET) {
                limits.logical = limits.logical.max(size);
            }
            if let Some(size) = block_size(file, BLKPBSZGET) {
                limits.physical = size;
            }
        }
        limits.physical = limits.physical.max(limits.logical);
        limits
    }
}

const BLKPBSZGET: libc::Ioctl = 0x127b;

fn block_size(file: &File, request: libc::Ioctl) -> Option<u32> {
    let mut size: libc::c_uint = 0;
    // SAFETY: both requests write one int to the address given.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &mut size) };
    (result == 0 && size.is_power_of_two() && size >= 512).then_some(size)
}

/// Alignment of offsets and of memory for O_DIRECT, from kernels that know (Linux 6.1).
fn direct_limits(file: &File) -> Option<(u32, usize)> {
    // SAFETY: statx is plain data, for which zeros are valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string, and `stat` is writable.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut stat,
        )
    };
    let known = result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let (offset, memory) = (stat.stx_dio_offset_align, stat.stx_dio_mem_align);
    let sane = offset.is_power_of_two() && memory.is_power_of_two() && memory <= 1 << 16;
    (known && sane).then_some((offset.max(SECTOR as u32), memory as usize))
}
