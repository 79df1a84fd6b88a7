//! The host's end of a network device: a tap interface or a stream socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use super::header::{HEADER, Header, MIN_FRAME};
use super::stream::{Stream, into_chains};
use super::tap::Tap;
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, Segment};
use crate::virtio::iovecs::{IoVecs, would_block};

/// Where frames come from and go to.
#[derive(Debug)]
pub enum NetBackend {
    /// A tap interface of the host.
    Tap(Tap),
    /// A program of the host behind a Unix stream socket.
    Stream(Box<Stream>),
}

/// What a look for a frame brought.
#[derive(Debug)]
pub(super) enum Received {
    /// A frame; so many bytes with its header.
    Frame(u64),
    /// A frame that did not fit.
    Dropped,
    /// None for now.
    Nothing,
    /// None ever again.
    Closed(io::Error),
}

/// What became of a frame.
#[derive(Debug)]
pub(super) enum Sent {
    /// The host has it.
    All,
    /// The host has a part, and gets the rest first.
    Part,
    /// The host cannot take it now.
    Later,
    /// The host does not take it.
    Refused,
    /// The host takes none ever again.
    Closed(io::Error),
}

impl NetBackend {
    /// A stream socket.
    pub fn stream(socket: std::os::fd::OwnedFd) -> io::Result<Self> {
        Ok(Self::Stream(Box::new(Stream::new(socket)?)))
    }

    /// A stream socket, and the reading end of a pipe that does not block, with what the program at
    /// its other end complains of.
    pub fn stream_with_complaints(
        socket: std::os::fd::OwnedFd,
        pipe: std::os::fd::OwnedFd,
    ) -> io::Result<Self> {
        let stream = Stream::new(socket)?.with_complaints(pipe);
        Ok(Self::Stream(Box::new(stream)))
    }

    /// What the program at the other end has complained of; once.
    pub(super) fn complaints(&mut self) -> Option<String> {
        match self {
            Self::Tap(_) => None,
            Self::Stream(stream) => stream.complaints(),
        }
    }

    /// Whether the program at the other end is gone.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.is_closed())
    }

    /// Pairs of queues that it has.
    pub fn pairs(&self) -> u16 {
        match self {
            Self::Tap(tap) => tap.queues(),
            Self::Stream(_) => 1,
        }
    }

    /// Feature bits for the work that it takes over.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Tap(tap) => tap.features(),
            Self::Stream(_) => 0,
        }
    }

    /// Becomes readable when there are frames for a pair of queues.
    pub(super) fn fd(&self, pair: usize) -> Option<RawFd> {
        match self {
            Self::Tap(tap) => tap.fd(pair).map(|fd| fd.as_raw_fd()),
            Self::Stream(stream) => Some(stream.fd().as_raw_fd()),
        }
    }

    /// Becomes readable when frames can be sent again; `None` where that does not end.
    pub(super) fn writable_fd(&self) -> Option<RawFd> {
        match self {
            Self::Tap(_) => None,
            Self::Stream(stream) => Some(stream.writable_fd()),
        }
    }

    /// Makes it fit the features that were negotiated.
    pub(super) fn configure(&self, has: impl Fn(u32) -> bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.configure(has),
            Self::Stream(_) => Ok(()),
        }
    }

    /// Whether a part of a frame is in the guest's buffers.
    pub(super) fn is_amid_frame(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.is_amid_frame())
    }

    /// Has the host use the first `active` pairs, where `before` were used.
    pub(super) fn use_pairs(&self, before: u16, active: u16) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.use_queues(before, active),
            Self::Stream(_) => Ok(()),
        }
    }

    /// The guest's buffers are going.
    pub(super) fn let_go(&mut self) {
        if let Self::Stream(stream) = self {
            stream.let_go();
        }
    }

    /// Receives one frame with its header into `chains`, up to `want` bytes. A stream leaves the
    /// header as it is.
    pub(super) fn receive<'c>(
        &mut self,
        pair: usize,
        ram: &GuestRam,
        chains: impl Iterator<Item = &'c Chain> + Clone,
        want: u64,
    ) -> Result<Received, DeviceError> {
        match self {
            Self::Stream(stream) => stream.receive(ram, chains),
            Self::Tap(tap) => match tap.fd(pair) {
                Some(fd) => from_tap(fd, ram, chains, want),
                None => Ok(Received::Nothing),
            },
        }
    }

    /// Sends the frame of `len` bytes behind the header in `segments`, with `header` instead.
    pub(super) fn send(
        &mut self,
        pair: usize,
        ram: &GuestRam,
        segments: &[Segment],
        (mut header, len): (Header, u64),
    ) -> Result<Sent, DeviceError> {
        let fd = match self {
            Self::Stream(stream) => return stream.send(ram, segments, len),
            Self::Tap(tap) => tap.fd(pair),
        };
        let Some(fd) = fd else {
            return Ok(Sent::Refused);
        };
        let mut all = IoVecs::empty();
        all.host(&mut header);
        all.guest(ram, segments, HEADER, len)?;
        if all.total() != HEADER + len {
            return Ok(Sent::Refused);
        }
        // A tap is full, down or does not like the frame: a network that loses one.
        Ok(match all.write(fd) {
            Ok(_) => Sent::All,
            Err(_) => Sent::Refused,
        })
    }

    /// Sends what was left of a frame; says whether more can be sent.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Tap(_) => Ok(true),
            Self::Stream(stream) => stream.flush(),
        }
    }
}

fn from_tap<'c>(
    fd: BorrowedFd<'_>,
    ram: &GuestRam,
    chains: impl Iterator<Item = &'c Chain>,
    want: u64,
) -> Result<Received, DeviceError> {
    let mut all = IoVecs::empty();
    into_chains(&mut all, ram, chains, 0, want)?;
    let room = all.total();
    // Filled by a frame that is too long, of which the tap would say nothing.
    let mut beyond = [0];
    all.host(&mut beyond);
    Ok(match all.read(fd) {
        Ok(len) if len as u64 > room || (len as u64) < HEADER + MIN_FRAME => Received::Dropped,
        Ok(len) => Received::Frame(len as u64),
        Err(error) if would_block(&error) => Received::Nothing,
        Err(error) => Received::Closed(error),
    })
}
