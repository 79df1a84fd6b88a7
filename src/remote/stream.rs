//! An answer that goes on, beside this process's own input.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{PATIENCE, RemoteError, failed};

/// Bytes taken at once.
const CHUNK: usize = 16 << 10;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// From the microVM.
    Remote(Vec<u8>),
    /// The microVM ended the stream.
    End,
    /// From stdin; nothing at its end.
    Input(Vec<u8>),
    /// The other descriptor is readable.
    Other,
}

/// A stream with a microVM.
#[derive(Debug)]
pub struct RemoteStream {
    name: String,
    stream: UnixStream,
}

impl RemoteStream {
    pub(super) fn new(name: String, stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(Self { name, stream })
    }

    /// The next bytes; `None` at the end.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>, RemoteError> {
        let mut bytes = vec![0; CHUNK];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(len) => {
                    bytes.truncate(len);
                    return Ok(Some(bytes));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(failed(&self.name, PATIENCE, error)),
            }
        }
    }

    /// Waits for the microVM, for stdin where `listening` says so, and for another descriptor.
    pub fn hear(
        &mut self,
        listening: bool,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<Heard, RemoteError> {
        // SAFETY: descriptor 0 is open for the whole life of the process: Rust's runtime sees to that.
        let stdin = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
        loop {
            let in_or_not = |so: bool| {
                if so {
                    PollFlags::POLLIN
                } else {
                    PollFlags::empty()
                }
            };
            let stream = self.stream.as_fd();
            let mut fds = [
                PollFd::new(stream, PollFlags::POLLIN),
                PollFd::new(if listening { stdin } else { stream }, in_or_not(listening)),
                PollFd::new(other.unwrap_or(stream), in_or_not(other.is_some())),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(&self.name, PATIENCE, errno.into())),
            }
            let [remote, input, other] = fds.map(|fd| fd.any().unwrap_or(false));
            if remote {
                return Ok(self.read()?.map_or(Heard::End, Heard::Remote));
            }
            if other {
                return Ok(Heard::Other);
            }
            if input {
                let mut bytes = vec![0; CHUNK];
                match nix::unistd::read(stdin, &mut bytes) {
                    Ok(len) => {
                        bytes.truncate(len);
                        return Ok(Heard::Input(bytes));
                    }
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    // A terminal that went away is an end as well.
                    Err(_) => return Ok(Heard::Input(Vec::new())),
                }
            }
        }
    }

    /// Sends bytes. A microVM that is gone is found out when it is read.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), RemoteError> {
        match self.stream.write_all(bytes) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(failed(&self.name, PATIENCE, error))
            }
            _ => Ok(()),
        }
    }

    /// Sends no more.
    pub fn finish(&mut self) -> Result<(), RemoteError> {
        match self.stream.shutdown(Shutdown::Write) {
            Err(error) if error.kind() != ErrorKind::NotConnected => {
                Err(failed(&self.name, PATIENCE, error))
            }
            _ => Ok(()),
        }
    }
}

impl AsFd for RemoteStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
