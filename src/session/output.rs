//! bulle's stdout and stderr as the command's: buffered, never blocking the vmm thread.
//!
//! The descriptors may be shared with other processes, so they are not made non-blocking; instead
//! each write follows a poll and is at most `PIPE_BUF` bytes, which a pipe that polls writable
//! takes at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

const CHUNK: usize = 4096;

/// One output descriptor with what waits for it.
pub struct Output {
    fd: BorrowedFd<'static>,
    waiting: VecDeque<u8>,
    closed: bool,
}

impl Output {
    /// Over a descriptor that stays open as long as the process.
    pub fn new(fd: BorrowedFd<'static>) -> Self {
        Self {
            fd,
            waiting: VecDeque::new(),
            closed: false,
        }
    }

    /// Queues `bytes`; false when nobody reads any more and they are dropped. The agent's window
    /// bounds what can be queued.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        if !self.closed {
            self.waiting.extend(bytes);
        }
        !self.closed
    }

    /// Whether bytes wait.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Writes what can be written without blocking and says how many bytes left the queue. When
    /// nobody reads any more, everything is dropped.
    pub fn flush(&mut self) -> usize {
        self.drain(PollTimeout::ZERO)
    }

    /// Writes all that waits, giving up when the reader takes nothing for `patience`.
    pub fn finish(&mut self, patience: PollTimeout) {
        self.drain(patience);
        if self.is_waiting() {
            log::warn!(
                "{} bytes of output were not taken and are lost",
                self.waiting.len()
            );
        }
    }

    fn drain(&mut self, patience: PollTimeout) -> usize {
        let before = self.waiting.len();
        while self.is_waiting() && self.is_writable(patience) {
            let (front, _) = self.waiting.as_slices();
            let chunk = front.get(..CHUNK).unwrap_or(front);
            match write(self.fd, chunk) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => {
                    log::debug!("output {} closed: {error}", self.fd.as_raw_fd());
                    self.closed = true;
                    self.waiting.clear();
                }
            }
        }
        before - self.waiting.len()
    }

    fn is_writable(&self, patience: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.fd, PollFlags::POLLOUT)];
        poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd
    }
}

impl AsRawFd for Output {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// stdout and stderr of this process.
pub fn standard() -> (Output, Output) {
    // SAFETY: descriptors 1 and 2 are open for the whole life of the process: Rust's runtime
    // opens them on /dev/null when they are not.
    let (out, err) = unsafe { (BorrowedFd::borrow_raw(1), BorrowedFd::borrow_raw(2)) };
    (Output::new(out), Output::new(err))
}

/// Tries to read from stdin's descriptor; `None` at its end.
pub fn read_input(fd: RawFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: the caller owns the descriptor for the whole session.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    match nix::unistd::read(fd, buffer) {
        Ok(0) => Ok(None),
        Ok(count) => Ok(Some(count)),
        Err(Errno::EINTR | Errno::EAGAIN) => Ok(Some(0)),
        // The terminal went away.
        Err(Errno::EIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (std::fs::File, Output) {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let writer: &'static OwnedFd = Box::leak(Box::new(writer));
        (reader.into(), Output::new(writer.as_fd()))
    }

    #[test]
    fn a_full_pipe_blocks_nobody_and_loses_nothing() {
        let (mut reader, mut output) = pipe();
        let bytes: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        output.push(&bytes);
        let written = output.flush();
        assert!(written >= 4096 && written < bytes.len(), "{written}");
        assert!(output.is_waiting());
        let mut read = vec![0; written];
        reader.read_exact(&mut read).unwrap();
        while output.is_waiting() {
            let more = output.flush();
            let start = read.len();
            read.resize(start + more, 0);
            reader.read_exact(&mut read[start..]).unwrap();
        }
        assert_eq!(read, bytes);
    }

    #[test]
    fn a_closed_reader_drops_output() {
        // The test harness ignores SIGPIPE, as bulle does.
        let (reader, mut output) = pipe();
        drop(reader);
        output.push(b"x");
        output.flush();
        assert!(!output.is_waiting());
    }
}
