//! Where the bytes of a kernel image come from: a file read piecewise, or memory.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::error::KernelFault;
use crate::memory::GuestMemory;

/// Bytes read at once when a file is opened: enough for every header that decides the format.
const HEAD_SIZE: usize = 4096;

/// A kernel image, its first bytes at hand.
pub(super) struct Source<'a> {
    bytes: Backing<'a>,
    head: Vec<u8>,
    size: u64,
}

enum Backing<'a> {
    File(File),
    Memory(Cow<'a, [u8]>),
}

impl<'a> Source<'a> {
    /// Opens a regular, non-empty file and reads its head.
    pub(super) fn open(path: &Path) -> Result<Self, KernelFault> {
        // Looked at before it is opened, because opening a pipe would wait for its writer.
        let metadata = std::fs::metadata(path).map_err(open_fault)?;
        if metadata.is_dir() {
            return Err(KernelFault::Directory);
        }
        if !metadata.is_file() {
            return Err(KernelFault::NotRegular);
        }
        let file = File::open(path).map_err(open_fault)?;
        let size = metadata.len();
        if size == 0 {
            return Err(KernelFault::Empty);
        }
        let mut head = vec![0; HEAD_SIZE.min(size as usize)];
        file.read_exact_at(&mut head, 0)
            .map_err(|source| KernelFault::Read {
                what: "header",
                source,
            })?;
        Ok(Source {
            bytes: Backing::File(file),
            head,
            size,
        })
    }

    /// Takes an image that is in memory already.
    pub(super) fn memory(bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self, KernelFault> {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Err(KernelFault::Empty);
        }
        let size = bytes.len() as u64;
        Ok(Source {
            bytes: Backing::Memory(bytes),
            head: Vec::new(),
            size,
        })
    }

    /// Image size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The first bytes, [`HEAD_SIZE`] or fewer.
    pub(super) fn head(&self) -> &[u8] {
        match &self.bytes {
            Backing::File(_) => &self.head,
            Backing::Memory(bytes) => bytes.get(..HEAD_SIZE).unwrap_or(bytes),
        }
    }

    /// Checks that `length` bytes at `offset` are there; nothing is allocated before that.
    pub(super) fn check(
        &self,
        what: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<(), KernelFault> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(KernelFault::Truncated {
                    what,
                    end,
                    size: self.size,
                })
            }
        }
    }

    /// Reads `length` bytes at `offset`; `what` names them in errors.
    pub(super) fn read(
        &self,
        what: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<u8>, KernelFault> {
        self.check(what, offset, length)?;
        let range = offset as usize..(offset + length) as usize;
        if let Some(bytes) = self.head().get(range.clone()) {
            return Ok(bytes.to_vec());
        }
        match &self.bytes {
            Backing::Memory(bytes) => Ok(bytes.get(range).unwrap_or_default().to_vec()),
            Backing::File(file) => {
                let mut bytes = vec![0; length as usize];
                file.read_exact_at(&mut bytes, offset)
                    .map_err(|source| KernelFault::Read { what, source })?;
                Ok(bytes)
            }
        }
    }

    /// Copies `length` bytes at `offset` to guest memory, for a file without a detour.
    pub(super) fn copy_to_guest(
        &self,
        memory: &GuestMemory,
        address: u64,
        offset: u64,
        length: u64,
    ) -> Result<(), KernelFault> {
        self.check("segment", offset, length)?;
        let write = |source: GuestMemoryError| KernelFault::Write { address, source };
        match &self.bytes {
            Backing::Memory(bytes) => {
                let range = offset as usize..(offset + length) as usize;
                memory
                    .write_slice(bytes.get(range).unwrap_or_default(), GuestAddress(address))
                    .map_err(write)
            }
            Backing::File(file) => {
                let mut file = file;
                file.seek(SeekFrom::Start(offset))
                    .map_err(|source| KernelFault::Read {
                        what: "segment",
                        source,
                    })?;
                memory
                    .read_exact_volatile_from(GuestAddress(address), &mut file, length as usize)
                    .map_err(write)
            }
        }
    }

    /// The file, if it is one.
    pub(super) fn file(&self) -> Option<&File> {
        match &self.bytes {
            Backing::File(file) => Some(file),
            Backing::Memory(_) => None,
        }
    }
}

fn open_fault(error: std::io::Error) -> KernelFault {
    match error.kind() {
        std::io::ErrorKind::NotFound => KernelFault::Missing,
        std::io::ErrorKind::PermissionDenied => KernelFault::Permission(error),
        _ => KernelFault::Open(error),
    }
}
