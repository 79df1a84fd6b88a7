//! Frames over a Unix stream socket, as passt and QEMU's `-netdev stream` speak it: in front of each
//! frame its length, four bytes, the most significant first.
//!
//! What is received goes straight into the guest's buffers, with the next frame's length behind it
//! in the same system call. What of a sent frame the socket does not take at once is copied.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{Received, Sent};
use super::header::{HEADER, MAX_FRAME, MIN_FRAME};
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, Segment, read_at, total};
use crate::virtio::iovecs::{IoVecs, send, would_block};

/// Bytes of the length in front of each frame.
const PREFIX: usize = 4;
/// Most bytes of complaints that are logged.
const MAX_COMPLAINTS: u64 = 1024;

/// What comes next from the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// A length, of which so many bytes are here.
    Length(usize),
    /// A frame's bytes; `got` of them are in the guest's buffers.
    Frame { len: u64, got: u64 },
    /// Bytes of a frame that nobody gets.
    Skip(u64),
}

/// A connected socket.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    /// Readable when the socket is writable.
    writable: Epoll,
    prefix: [u8; PREFIX],
    next: Next,
    /// The rest of a frame that was sent in part.
    tail: VecDeque<u8>,
    /// A pipe that does not block, with what the program at the other end complains of.
    complaints: Option<File>,
}

impl Stream {
    /// Takes a connected Unix stream socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let writable = Epoll::new()?;
        let event = EpollEvent::new(EventSet::OUT, 0);
        writable.ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        Ok(Self {
            socket,
            writable,
            prefix: [0; PREFIX],
            next: Next::Length(0),
            tail: VecDeque::new(),
            complaints: None,
        })
    }

    /// Takes the reading end of a pipe that does not block, in which the program at the other end
    /// of the socket leaves its complaints: they are logged when it goes.
    pub fn with_complaints(mut self, pipe: OwnedFd) -> Self {
        self.complaints = Some(pipe.into());
        self
    }

    /// What the program at the other end has complained of, in one line, once.
    pub(super) fn complaints(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        let pipe = self.complaints.take()?;
        // An error is a pipe with nothing more in it.
        let _ = pipe.take(MAX_COMPLAINTS).read_to_end(&mut bytes);
        let all = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = all.lines().map(str::trim).collect();
        let text = lines.join("; ").replace(char::is_control, "?");
        (!text.is_empty()).then_some(text)
    }

    /// Whether the other end is closed, as poll(2) says of it.
    pub(super) fn is_closed(&self) -> bool {
        let mut fd = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: 0,
            revents: 0,
        };
        // SAFETY: one entry, of a descriptor that is open; the call does not wait.
        let ready = unsafe { libc::poll(&raw mut fd, 1, 0) };
        ready > 0 && fd.revents & libc::POLLHUP != 0
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Becomes readable when the socket is writable.
    pub(super) fn writable_fd(&self) -> RawFd {
        self.writable.as_raw_fd()
    }

    /// Whether a part of a frame is in the guest's buffers.
    pub(super) fn is_amid_frame(&self) -> bool {
        matches!(self.next, Next::Frame { .. })
    }

    /// Forgets what is in the guest's buffers, which are going.
    pub(super) fn let_go(&mut self) {
        if let Next::Frame { len, got } = self.next {
            self.next = Next::Skip(len - got);
        }
    }

    /// Receives one frame into `chains`, behind room for a header.
    pub(super) fn receive<'c>(
        &mut self,
        ram: &GuestRam,
        chains: impl Iterator<Item = &'c Chain> + Clone,
    ) -> Result<Received, DeviceError> {
        loop {
            let taken = match self.next {
                Next::Length(PREFIX) => {
                    let len = u64::from(u32::from_be_bytes(self.prefix));
                    if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
                        let error = format!("a frame of {len} bytes");
                        return Ok(Received::Closed(io::Error::other(error)));
                    }
                    let room: u64 = chains.clone().map(|chain| total(chain.writable())).sum();
                    self.next = match HEADER + len <= room {
                        true => Next::Frame { len, got: 0 },
                        false => Next::Skip(len),
                    };
                    continue;
                }
                Next::Skip(0) => {
                    self.next = Next::Length(0);
                    return Ok(Received::Dropped);
                }
                Next::Length(have) => {
                    let mut all = IoVecs::empty();
                    all.host(self.prefix.get_mut(have..).unwrap_or_default());
                    all.recv(self.socket.as_fd())
                }
                Next::Skip(left) => {
                    let mut scratch = [0; 4096];
                    let len = left.min(scratch.len() as u64) as usize;
                    let mut all = IoVecs::empty();
                    all.host(scratch.get_mut(..len).unwrap_or_default());
                    all.recv(self.socket.as_fd())
                }
                Next::Frame { len, got } => {
                    let left = len - got;
                    let mut all = IoVecs::empty();
                    into_chains(&mut all, ram, chains.clone(), HEADER + got, left)?;
                    if all.total() == left {
                        all.host(&mut self.prefix);
                    }
                    all.recv(self.socket.as_fd())
                }
            };
            match taken {
                Ok(0) => {
                    let error = io::ErrorKind::UnexpectedEof.into();
                    return Ok(Received::Closed(error));
                }
                Ok(count) => {
                    if let Some(len) = self.advance(count) {
                        return Ok(Received::Frame(HEADER + len));
                    }
                }
                Err(error) if would_block(&error) => return Ok(Received::Nothing),
                Err(error) => return Ok(Received::Closed(error)),
            }
        }
    }

    /// Notes what came; says how long the frame is that is complete.
    fn advance(&mut self, count: usize) -> Option<u64> {
        let bytes = count as u64;
        match &mut self.next {
            Next::Length(have) => *have += count,
            Next::Skip(left) => *left = left.saturating_sub(bytes),
            Next::Frame { len, got } => {
                let left = *len - *got;
                if bytes < left {
                    *got += bytes;
                    return None;
                }
                let len = *len;
                self.next = Next::Length((bytes - left) as usize);
                return Some(len);
            }
        }
        None
    }

    /// Sends the frame behind the header in `segments`, which has `len` bytes.
    pub(super) fn send(
        &mut self,
        ram: &GuestRam,
        segments: &[Segment],
        len: u64,
    ) -> Result<Sent, DeviceError> {
        if !self.tail.is_empty() && !self.flush().is_ok_and(|done| done) {
            return Ok(Sent::Later);
        }
        let mut prefix = (len as u32).to_be_bytes();
        let mut all = IoVecs::empty();
        all.host(&mut prefix);
        all.guest(ram, segments, HEADER, len)?;
        if all.total() != PREFIX as u64 + len {
            return Ok(Sent::Refused);
        }
        let sent = match all.send(self.socket.as_fd()) {
            Ok(sent) => sent,
            Err(error) if would_block(&error) => return Ok(Sent::Later),
            Err(error) => return Ok(Sent::Closed(error)),
        };
        if sent as u64 == PREFIX as u64 + len {
            return Ok(Sent::All);
        }
        self.tail.extend(prefix.iter().skip(sent));
        let from = sent.saturating_sub(PREFIX) as u64;
        let mut rest = vec![0; (len - from) as usize];
        read_at(ram, segments, HEADER + from, &mut rest)?;
        self.tail.extend(rest);
        Ok(Sent::Part)
    }

    /// Sends what is left of a frame; says whether all of it is gone.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while !self.tail.is_empty() {
            match send(self.socket.as_fd(), self.tail.make_contiguous()) {
                Ok(sent) => drop(self.tail.drain(..sent)),
                Err(error) if would_block(&error) => return Ok(false),
                Err(error) => {
                    self.tail.clear();
                    return Err(error);
                }
            }
        }
        Ok(true)
    }
}

/// Adds up to `len` bytes of the chains' writable parts, from `offset` on.
pub(super) fn into_chains<'m, 'c>(
    all: &mut IoVecs<'m>,
    ram: &'m GuestRam,
    chains: impl Iterator<Item = &'c Chain>,
    mut offset: u64,
    mut len: u64,
) -> Result<(), DeviceError> {
    for chain in chains {
        let size = total(chain.writable());
        if offset >= size {
            offset -= size;
            continue;
        }
        let part = (size - offset).min(len);
        all.guest(ram, chain.writable(), offset, part)?;
        (offset, len) = (0, len - part);
        if len == 0 {
            break;
        }
    }
    Ok(())
}
