//! A client on the other side of a stream: bytes both ways, bounded by who uses it, never blocking.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;

use crate::control::{ActionError, Stream, chain};

/// Both ends of a stream, neither of which blocks.
pub fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

/// Whether the other side has not closed its end.
pub fn is_there(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready == 0)
}

/// A client. Dropping it ends the stream, after what the socket has taken.
#[derive(Debug)]
pub struct Duplex {
    stream: UnixStream,
    out: Vec<u8>,
    /// Nothing more comes.
    ended: bool,
    /// Nothing more is taken.
    gone: bool,
}

impl Duplex {
    /// A client and its end of the stream, whose bytes are of that type.
    pub fn new(content_type: &'static str) -> Result<(Self, Stream), ActionError> {
        let (stream, theirs) = pair().map_err(|error: io::Error| ActionError::Failed {
            text: chain(&error),
        })?;
        let client = Self {
            stream,
            out: Vec::new(),
            ended: false,
            gone: false,
        };
        let end = Arc::new(theirs);
        Ok((client, Stream { content_type, end }))
    }

    /// Bytes that wait to be taken.
    pub fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Queues bytes, and sends what is taken at once.
    pub fn push(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
        self.flush();
    }

    /// Sends what is taken at once.
    pub fn flush(&mut self) {
        while !self.out.is_empty() && !self.gone {
            match self.stream.write(&self.out) {
                Ok(len) => drop(self.out.drain(..len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.gone = true,
            }
        }
        if self.gone {
            self.out.clear();
        }
    }

    /// What has come, at most `room` bytes of it.
    pub fn read(&mut self, room: usize) -> Vec<u8> {
        let mut bytes = vec![0; room];
        let mut len = 0;
        while !self.ended {
            let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            match self.stream.read(rest) {
                Ok(0) => self.ended = true,
                Ok(more) => len += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.ended = true,
            }
        }
        bytes.truncate(len);
        bytes
    }

    /// Whether nothing more comes.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether nobody is there any more. Who only sends no more still is.
    pub fn is_gone(&self) -> bool {
        self.gone || self.ended && !is_there(&self.stream)
    }

    /// What to wait for, if `reads` says that more is wanted of it.
    pub fn wants(&self, reads: bool) -> EpollFlags {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLIN, reads && !self.ended);
        wanted.set(EpollFlags::EPOLLOUT, !self.out.is_empty());
        wanted
    }
}

impl AsFd for Duplex {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
