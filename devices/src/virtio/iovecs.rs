//! Buffers in guest RAM given to the host's kernel, without a copy in between.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::GuestRam;
use super::device::DeviceError;
use super::io::{Segment, for_slices};

/// Most pieces of guest RAM in one system call, so that two of the device's own fit beside them.
const MAX_GUEST: usize = 1022;

/// Pieces of guest RAM, and of the device's own memory, as one system call takes them. Calls may do less than all.
#[derive(Debug)]
pub(super) struct IoVecs<'m> {
    iovecs: Vec<libc::iovec>,
    ram: PhantomData<&'m GuestRam>,
}

impl<'m> IoVecs<'m> {
    /// Up to `len` bytes of `segments` from `offset` on.
    pub fn new(
        ram: &'m GuestRam,
        segments: &[Segment],
        offset: u64,
        len: u64,
    ) -> Result<Self, DeviceError> {
        let mut all = Self::empty();
        all.guest(ram, segments, offset, len)?;
        Ok(all)
    }

    /// Nothing yet.
    pub fn empty() -> Self {
        Self {
            iovecs: Vec::new(),
            ram: PhantomData,
        }
    }

    /// Appends up to `len` bytes of `segments` from `offset` on.
    pub fn guest(
        &mut self,
        ram: &'m GuestRam,
        segments: &[Segment],
        offset: u64,
        len: u64,
    ) -> Result<(), DeviceError> {
        for_slices(ram, segments, offset, len, |slice| {
            if self.iovecs.len() < MAX_GUEST {
                self.iovecs.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Appends memory of the device's own.
    pub fn host(&mut self, bytes: &'m mut [u8]) {
        self.iovecs.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.iovecs.iter().map(|piece| piece.iov_len as u64).sum()
    }

    /// Writes them to `fd`.
    pub fn write(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (at, count) = self.raw();
        // SAFETY: the vectors point into memory that is borrowed and so stays mapped.
        check(|| unsafe { libc::writev(fd.as_raw_fd(), at, count) })
    }

    /// Fills them from `fd`.
    pub fn read(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (at, count) = self.raw();
        // SAFETY: the vectors point into memory that is borrowed and so stays mapped; as
        // shared volatile memory it may change at any time.
        check(|| unsafe { libc::readv(fd.as_raw_fd(), at, count) })
    }

    /// Sends them as one message to a socket, without waiting or a signal.
    pub fn send(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as for `write`; the message is only read and lives as long as the call.
        check(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags) })
    }

    /// Receives into them from a socket, without waiting.
    pub fn recv(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: as for `read`; the message lives as long as the call.
        check(|| unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, flags) })
    }

    fn raw(&self) -> (*const libc::iovec, i32) {
        (self.iovecs.as_ptr(), self.iovecs.len() as i32)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: all of `msghdr` may be zero: no address, no buffers, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.iovecs.as_ptr().cast_mut();
        message.msg_iovlen = self.iovecs.len() as _;
        message
    }
}

/// Calls until no signal interrupts.
fn check(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Writes to a file descriptor.
pub(super) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: readable bytes of the length given.
    check(|| unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
}

/// Sends to a socket without waiting or a signal.
pub(super) fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: readable bytes of the length given.
    check(|| unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// Whether a call that did not succeed has to be repeated when the file descriptor is ready.
pub(super) fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
