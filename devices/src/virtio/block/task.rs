//! A request under way: what is left of it, and the guest's buffers as the host sees them.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::request::{HEADER, Range, Status};
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, for_slices};

/// Most buffers of one system call.
const IOV_MAX: usize = 1024;
/// How often a request is repeated that the host interrupts without progress.
const MAX_RETRIES: u32 = 64;

/// Buffers in guest RAM as addresses of this process.
#[derive(Debug, Default)]
struct Buffers {
    /// Behind `next` all are whole; that one may have been cut at its start.
    iovecs: IoVecs,
    next: usize,
}

/// Most requests have one buffer, for which nothing is allocated.
#[derive(Debug)]
enum IoVecs {
    One([libc::iovec; 1]),
    Several(Vec<libc::iovec>),
}

impl Default for IoVecs {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl IoVecs {
    fn push(&mut self, one: libc::iovec) {
        match self {
            Self::One([first]) => *self = Self::Several(vec![*first, one]),
            Self::Several(all) if all.is_empty() => *self = Self::One([one]),
            Self::Several(all) => all.push(one),
        }
    }

    fn all(&self) -> &[libc::iovec] {
        match self {
            Self::One(one) => one,
            Self::Several(all) => all,
        }
    }

    fn get_mut(&mut self, at: usize) -> Option<&mut libc::iovec> {
        match self {
            Self::One(one) => one.get_mut(at),
            Self::Several(all) => all.get_mut(at),
        }
    }
}

// SAFETY: the pointers are only given to the kernel, which may use them from any thread; the
// memory is kept by the `ram` of the task they belong to.
unsafe impl Send for Buffers {}

/// What the host has to do.
#[derive(Debug)]
pub(super) enum Op {
    Read,
    /// With the data on the disk when it is done.
    Write {
        sync: bool,
    },
    Flush,
    Discard(Vec<Range>),
    /// With the zeroes on the disk when it is done.
    Zero {
        ranges: Vec<Range>,
        sync: bool,
    },
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Task {
    pub chain: Chain,
    pub op: Op,
    /// Bytes of guest memory written when all is well, without the status.
    pub produced: u64,
    /// Where on the disk it goes on.
    pub offset: u64,
    /// Bytes left.
    pub left: u64,
    /// Bytes in all, for the account of what is under way.
    pub weight: u64,
    /// When a transfer began.
    pub begun: Option<Instant>,
    buffers: Buffers,
    retries: u32,
    /// Keeps the buffers mapped.
    ram: Arc<GuestRam>,
}

/// What comes after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Another step.
    More,
    /// The end.
    Done(Status),
}

/// Why a request failed, for the log: what the host said in its last step, or nothing where it
/// gave no byte.
pub(super) fn failure(status: Status, code: Option<i32>) -> Option<io::Error> {
    match (status, code) {
        (Status::Ok | Status::Unsupported, _) => None,
        (Status::IoError, Some(code)) => Some(io::Error::from_raw_os_error(code)),
        (Status::IoError, None) => Some(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the disk has become shorter than the guest knows",
        )),
    }
}

impl Task {
    /// A read or write of `len` bytes at `offset` of the disk, from `now` on.
    pub fn transfer(
        chain: Chain,
        op: Op,
        (offset, len): (u64, u64),
        ram: Arc<GuestRam>,
        now: Instant,
    ) -> Result<Self, DeviceError> {
        let (segments, skip) = match op {
            Op::Read => (chain.writable(), 0),
            _ => (chain.readable(), HEADER),
        };
        let mut iovecs = IoVecs::default();
        for_slices(&ram, segments, skip, len, |slice| {
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            Ok(())
        })?;
        Ok(Self {
            produced: if matches!(op, Op::Read) { len } else { 0 },
            chain,
            op,
            offset,
            left: len,
            weight: len,
            begun: Some(now),
            buffers: Buffers { iovecs, next: 0 },
            retries: 0,
            ram,
        })
    }

    /// A request without buffers.
    pub fn control(chain: Chain, op: Op, ram: Arc<GuestRam>) -> Self {
        Self {
            chain,
            op,
            produced: 0,
            offset: 0,
            left: 0,
            weight: 0,
            begun: None,
            buffers: Buffers::default(),
            retries: 0,
            ram,
        }
    }

    /// The buffers of the next step. They stay where they are until [`step`](Self::step).
    pub fn iovecs(&self) -> &[libc::iovec] {
        let rest = self.buffers.iovecs.all().get(self.buffers.next..);
        let rest = rest.unwrap_or_default();
        rest.get(..rest.len().min(IOV_MAX)).unwrap_or_default()
    }

    /// Whether all buffers lie at multiples of `align`.
    pub fn is_aligned(&self, align: usize) -> bool {
        let mut iovecs = self.buffers.iovecs.all().iter();
        align <= 1
            || iovecs.all(|v| {
                (v.iov_base as usize).is_multiple_of(align) && v.iov_len.is_multiple_of(align)
            })
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Takes note of what the host did in one step.
    pub fn step(&mut self, result: io::Result<u64>) -> Step {
        let done = match result {
            Ok(done) => done,
            Err(error) => {
                let again = matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                );
                self.retries += 1;
                return match again && self.retries < MAX_RETRIES {
                    true => Step::More,
                    false => Step::Done(Status::IoError),
                };
            }
        };
        match &mut self.op {
            // The end of the file: someone made it shorter.
            Op::Read | Op::Write { .. } if done == 0 && self.left > 0 => {
                Step::Done(Status::IoError)
            }
            Op::Read | Op::Write { .. } => {
                self.advance(done);
                match self.left {
                    0 => Step::Done(Status::Ok),
                    _ => Step::More,
                }
            }
            Op::Flush => Step::Done(Status::Ok),
            Op::Discard(ranges) | Op::Zero { ranges, .. } => {
                ranges.pop();
                if !ranges.is_empty() {
                    return Step::More;
                }
                if matches!(self.op, Op::Zero { sync: true, .. }) {
                    self.op = Op::Flush;
                    return Step::More;
                }
                Step::Done(Status::Ok)
            }
        }
    }

    fn advance(&mut self, done: u64) {
        let done = done.min(self.left);
        self.offset += done;
        self.left -= done;
        let mut done = done as usize;
        while let Some(first) = self.buffers.iovecs.get_mut(self.buffers.next) {
            if done < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(done);
                first.iov_len -= done;
                return;
            }
            done -= first.iov_len;
            self.buffers.next += 1;
        }
    }
}
