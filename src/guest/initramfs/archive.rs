//! A cpio archive in the "newc" format (Linux: Documentation/driver-api/early-userspace/
//! buffer-format.rst), written in memory.
//!
//! Our own because contents are read from files straight into the archive, and names need not be
//! UTF-8. Beyond the limit nothing is kept, but sizes are still added up for the error's sake.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{InitramfsError, Progress};

const HEADER: usize = 110;
/// Where the eight digits of the file size are.
const SIZE_AT: usize = 6 + 6 * 8;
/// PATH_MAX, with the NUL.
const MAX_NAME: usize = 4096;

/// What a header says beside name and size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    /// File type and permissions, as in `st_mode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u32,
    /// Major and minor number of a device node.
    pub rdev: (u32, u32),
    /// Inode number and number of links, of a file with several.
    pub link: Option<(u32, u32)>,
}

impl Meta {
    fn new(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: 0,
            rdev: (0, 0),
            link: None,
        }
    }
    pub fn directory(permissions: u32) -> Self {
        Self::new(libc::S_IFDIR | permissions)
    }
    pub fn file(permissions: u32) -> Self {
        Self::new(libc::S_IFREG | permissions)
    }
    pub fn symlink() -> Self {
        Self::new(libc::S_IFLNK | 0o777)
    }
}

pub(super) struct Archive<'a> {
    out: Vec<u8>,
    /// Of the whole archive, kept or not.
    size: u64,
    limit: u64,
    next_inode: u32,
    entries: u64,
    progress: Option<&'a dyn Fn(Progress)>,
}

impl<'a> Archive<'a> {
    pub fn new(limit: u64, progress: Option<&'a dyn Fn(Progress)>) -> Self {
        Self {
            out: Vec::new(),
            size: 0,
            limit,
            next_inode: 1,
            entries: 0,
            progress,
        }
    }

    /// A number that no other file in the archive has.
    pub fn new_inode(&mut self) -> u32 {
        let inode = self.next_inode;
        self.next_inode = self.next_inode.wrapping_add(1);
        inode
    }

    /// Adds an entry whose contents are at hand.
    pub fn bytes(&mut self, meta: &Meta, name: &[u8], data: &[u8]) -> Result<(), InitramfsError> {
        let size = checked_size(data.len() as u64, || path_of(name))?;
        self.header(meta, name, size)?;
        self.grow(data.len());
        if self.is_kept() {
            self.out.extend_from_slice(data);
        }
        self.end_entry();
        Ok(())
    }

    /// Adds a regular file with the contents of a file of the host, opened with these flags too.
    pub fn host_file(
        &mut self,
        meta: &Meta,
        name: &[u8],
        path: &Path,
        flags: i32,
    ) -> Result<(), InitramfsError> {
        let read = |source| InitramfsError::Read {
            path: path.to_owned(),
            source,
        };
        let at = self.out.len();
        self.header(meta, name, 0)?;
        // Not stuck on a FIFO that took the file's place since it was seen.
        let flags = flags | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(read)?;
        let expected = file.metadata().map_err(read)?.size();
        checked_size(expected, || path.to_owned())?;
        let room = self.limit.saturating_sub(self.size);
        if expected > room {
            self.size += expected;
            self.out = Vec::new();
        } else if self.is_kept() {
            // A file may grow meanwhile: its size is what was read.
            let n = self.append(&file, expected, room).map_err(read)?;
            let size = checked_size(n, || path.to_owned())?;
            self.size += n;
            if let Some(field) = self.out.get_mut(at + SIZE_AT..at + SIZE_AT + 8) {
                field.copy_from_slice(&hex(size));
            }
        }
        self.end_entry();
        Ok(())
    }

    /// Reads at most one byte more than `room`.
    fn append(&mut self, file: &File, expected: u64, room: u64) -> io::Result<u64> {
        let before = self.out.len();
        // Room for the padding too, so that the buffer need not move for it.
        self.out.reserve(expected as usize + 4);
        file.take(room + 1).read_to_end(&mut self.out)?;
        Ok((self.out.len() - before) as u64)
    }

    /// The finished archive.
    pub fn finish(mut self) -> Result<Vec<u8>, InitramfsError> {
        self.header(&Meta::new(0), b"TRAILER!!!", 0)?;
        self.pad();
        if self.is_kept() {
            Ok(self.out)
        } else {
            Err(InitramfsError::TooLarge {
                size: self.size,
                limit: self.limit,
            })
        }
    }

    fn is_kept(&self) -> bool {
        self.size <= self.limit
    }

    fn grow(&mut self, bytes: usize) {
        self.size += bytes as u64;
        if !self.is_kept() {
            self.out = Vec::new();
        }
    }

    fn header(&mut self, meta: &Meta, name: &[u8], size: u32) -> Result<(), InitramfsError> {
        if name.len() >= MAX_NAME {
            return Err(InitramfsError::NameTooLong {
                path: path_of(name),
            });
        }
        let (inode, links) = match meta.link {
            Some(link) => link,
            None => (self.new_inode(), 1),
        };
        let (major, minor) = meta.rdev;
        // The name is shorter than MAX_NAME. Device numbers of the file system and checksum are 0.
        let name_size = name.len() as u32 + 1;
        let fields = [
            inode, meta.mode, meta.uid, meta.gid, links, meta.mtime, size, 0, 0, major, minor,
            name_size, 0,
        ];
        self.grow(HEADER + name.len() + 1);
        if self.is_kept() {
            self.out.extend_from_slice(b"070701");
            fields
                .iter()
                .for_each(|field| self.out.extend_from_slice(&hex(*field)));
            self.out.extend_from_slice(name);
            self.out.push(0);
        }
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let missing = self.size.next_multiple_of(4) - self.size;
        self.grow(missing as usize);
        if self.is_kept() {
            self.out.resize(self.out.len() + missing as usize, 0);
        }
    }

    fn end_entry(&mut self) {
        self.pad();
        self.entries += 1;
        if let Some(progress) = self.progress {
            progress(Progress {
                entries: self.entries,
                bytes: self.size,
            });
        }
    }
}

fn checked_size(size: u64, path: impl Fn() -> PathBuf) -> Result<u32, InitramfsError> {
    u32::try_from(size).map_err(|_| InitramfsError::FileTooLarge { path: path(), size })
}

fn path_of(name: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsStr::from_bytes(name))
}

fn hex(value: u32) -> [u8; 8] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    std::array::from_fn(|i| DIGITS[(value >> (28 - 4 * i)) as usize & 15])
}
