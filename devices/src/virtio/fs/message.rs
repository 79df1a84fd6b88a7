//! FUSE messages: what a request says, and where its data lies in the guest.
//!
//! `unsafe` is for the vectored reads and writes that move file data between the host's kernel and
//! guest RAM without a copy here.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use fuse_abi::os::{fuse_ext_header, fuse_ext_type, fuse_in_header, fuse_out_header};
use rustix::io::{Errno, Result};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Segment, for_slices, read_at, total, write_at};

/// Bytes of a request's header.
pub(super) const IN_HEADER: usize = size_of::<fuse_in_header>();
/// Bytes of a reply's header.
pub(super) const OUT_HEADER: usize = size_of::<fuse_out_header>();
/// Most bytes of file data in one request.
pub(super) const MAX_DATA: u32 = 1 << 20;
/// Most bytes of a request without file data: the largest extended attribute with its name.
pub(super) const MAX_BODY: usize = 128 << 10;
/// Most buffers of one system call.
const IOV_MAX: usize = 1024;

/// Why a request is not answered as it would like to be.
#[derive(Debug)]
pub(super) enum Fault {
    /// The guest gets this error.
    Errno(Errno),
    /// The driver broke the device.
    Device(DeviceError),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<DeviceError> for Fault {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

/// What is left to be read of a request behind its header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Body<'a>(pub &'a [u8]);

impl<'a> Body<'a> {
    /// The next structure.
    pub fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// The next string.
    pub fn string(&mut self) -> Result<&'a CStr> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        let len = string.to_bytes_with_nul().len();
        self.0 = self.0.get(len..).unwrap_or_default();
        Ok(string)
    }

    /// Splits the extensions off, whose length is in the header in units of 8 bytes, and says
    /// which supplementary group a new file may need.
    pub fn supplementary_group(&mut self, units: u16) -> Result<Option<u32>> {
        let len = usize::from(units) * 8;
        let at = self.0.len().checked_sub(len).ok_or(Errno::INVAL)?;
        let (body, mut rest) = self.0.split_at(at);
        self.0 = body;
        while !rest.is_empty() {
            let mut extension = Body(rest);
            let header: fuse_ext_header = extension.take()?;
            if header.type_ == fuse_ext_type::FUSE_EXT_GROUPS as u32 {
                let count: u32 = extension.take()?;
                return match count {
                    0 => Ok(None),
                    1 => extension.take().map(Some),
                    _ => Err(Errno::INVAL),
                };
            }
            let size = usize::try_from(header.size).map_err(|_| Errno::INVAL)?;
            let size = size.max(1).next_multiple_of(8);
            rest = rest.get(size..).ok_or(Errno::INVAL)?;
        }
        Ok(None)
    }
}

/// A request's buffers in guest RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers<'a> {
    pub ram: &'a GuestRam,
    /// The request.
    pub readable: &'a [Segment],
    /// Room for the reply.
    pub writable: &'a [Segment],
}

impl Buffers<'_> {
    /// Bytes that a reply may have behind its header.
    pub fn room(&self) -> usize {
        let room = usize::try_from(total(self.writable)).unwrap_or(usize::MAX);
        room.saturating_sub(OUT_HEADER)
    }

    /// Bytes of the request, as far as there are.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> std::result::Result<usize, DeviceError> {
        read_at(self.ram, self.readable, offset as u64, data)
    }

    /// Writes to the reply.
    pub fn write(&self, offset: usize, data: &[u8]) -> std::result::Result<(), DeviceError> {
        write_at(self.ram, self.writable, offset as u64, data).map(drop)
    }

    /// Fills the reply behind its header with `len` bytes of a file at `offset`; fewer where the
    /// file ends.
    pub fn read_file(
        &self,
        fd: impl AsFd,
        offset: u64,
        len: u32,
    ) -> std::result::Result<u32, Fault> {
        let call = |fd: BorrowedFd<'_>, iov: &[libc::iovec], offset| {
            // SAFETY: the kernel writes to guest RAM, which `self.ram` keeps mapped and which no
            // reference in this process points to.
            unsafe { libc::preadv64(fd.as_raw_fd(), iov.as_ptr(), iov.len() as i32, offset) }
        };
        self.transfer(fd, self.writable, OUT_HEADER, offset, len, call)
    }

    /// Writes `len` bytes of the request from byte `at` on to a file at `offset`.
    pub fn write_file(
        &self,
        fd: impl AsFd,
        at: usize,
        offset: u64,
        len: u32,
    ) -> std::result::Result<u32, Fault> {
        let call = |fd: BorrowedFd<'_>, iov: &[libc::iovec], offset| {
            // SAFETY: the kernel reads guest RAM, which `self.ram` keeps mapped.
            unsafe { libc::pwritev64(fd.as_raw_fd(), iov.as_ptr(), iov.len() as i32, offset) }
        };
        self.transfer(fd, self.readable, at, offset, len, call)
    }

    fn transfer(
        &self,
        fd: impl AsFd,
        segments: &[Segment],
        at: usize,
        offset: u64,
        len: u32,
        call: impl Fn(BorrowedFd<'_>, &[libc::iovec], i64) -> isize,
    ) -> std::result::Result<u32, Fault> {
        let mut iovecs = Vec::with_capacity(segments.len());
        for_slices(self.ram, segments, at as u64, len.into(), |slice| {
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            Ok(())
        })?;
        let mut done = 0;
        for chunk in iovecs.chunks(IOV_MAX) {
            let wanted: usize = chunk.iter().map(|iovec| iovec.iov_len).sum();
            let at = offset.checked_add(done).ok_or(Errno::INVAL)?;
            let at = i64::try_from(at).map_err(|_| Errno::INVAL)?;
            match usize::try_from(call(fd.as_fd(), chunk, at)) {
                Ok(n) => {
                    done += n as u64;
                    if n < wanted {
                        break;
                    }
                }
                Err(_) if done > 0 => break,
                Err(_) => return Err(last_error().into()),
            }
        }
        Ok(done as u32)
    }
}

pub(super) fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
