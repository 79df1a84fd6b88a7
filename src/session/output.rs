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
    failure: Option<Errno>,
}

impl Output {
    /// Over a descriptor that stays open as long as the process.
    pub fn new(fd: BorrowedFd<'static>) -> Self {
        Self {
            fd,
            waiting: VecDeque::new(),
            closed: false,
            failure: None,
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

    /// Whether its reader went away.
    pub fn has_no_reader(&self) -> bool {
        self.closed && self.failure.is_none()
    }

    /// Whether bytes wait.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Writes what can be written without blocking and says how many bytes left the queue. When
    /// it cannot be written any more, everything is dropped.
    pub fn flush(&mut self) -> usize {
        let before = self.waiting.len();
        while self.is_waiting() && self.is_writable() {
            let (front, _) = self.waiting.as_slices();
            let chunk = front.get(..CHUNK).unwrap_or(front);
            match write(self.fd, chunk) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => {
                    log::debug!("output {} closed: {error}", self.fd.as_raw_fd());
                    self.failure = Some(error).filter(|error| *error != Errno::EPIPE);
                    self.closed = true;
                    self.waiting.clear();
                }
            }
        }
        before - self.waiting.len()
    }

    /// What kept output from being written, beside a reader that went away.
    pub fn failure(&self) -> Option<Errno> {
        self.failure
    }

    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(self.fd, PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// Writes all that waits in `outputs`, however slow their readers, until `patience` is over or one
/// of `interrupts` is readable. Says how many bytes were not taken.
pub fn finish(
    outputs: &mut [Output],
    interrupts: &[BorrowedFd<'_>],
    patience: PollTimeout,
) -> usize {
    loop {
        for output in outputs.iter_mut() {
            output.flush();
        }
        let waiting = outputs.iter().filter(|output| output.is_waiting());
        let mut fds: Vec<PollFd<'_>> = waiting
            .map(|output| PollFd::new(output.fd, PollFlags::POLLOUT))
            .collect();
        if fds.is_empty() {
            return 0;
        }
        let wanted = fds.len();
        fds.extend(
            interrupts
                .iter()
                .map(|fd| PollFd::new(*fd, PollFlags::POLLIN)),
        );
        let ready = match poll(&mut fds, patience) {
            Err(Errno::EINTR) => continue,
            ready => ready.unwrap_or(0),
        };
        let interrupted = fds.iter().skip(wanted).any(|fd| fd.any().unwrap_or(true));
        if ready == 0 || interrupted {
            return outputs.iter().map(|output| output.waiting.len()).sum();
        }
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

/// Reads from stdin; `None` at its end.
pub fn read_input(buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: descriptor 0 is open for the whole life of the process, as those above.
    let fd = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
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
    fn a_slow_reader_gets_everything_unless_interrupted() {
        let (reader, mut output) = pipe();
        output.push(&vec![7; 200_000]);
        let mut outputs = [output];
        let (interrupt, interrupter) = nix::unistd::pipe().unwrap();
        let lost = finish(&mut outputs, &[interrupt.as_fd()], PollTimeout::from(10u16));
        assert!((100_000..200_000).contains(&lost), "{lost}");
        nix::unistd::write(&interrupter, b"x").unwrap();
        assert_eq!(
            finish(&mut outputs, &[interrupt.as_fd()], PollTimeout::NONE),
            lost
        );
        let slow = std::thread::spawn(move || {
            let mut read = Vec::new();
            std::thread::sleep(std::time::Duration::from_millis(50));
            reader.take(200_000).read_to_end(&mut read).unwrap();
            read.len()
        });
        assert_eq!(finish(&mut outputs, &[], PollTimeout::NONE), 0);
        assert_eq!(slow.join().unwrap(), 200_000);
    }

    #[test]
    fn a_full_disk_is_a_failure_and_a_closed_reader_is_none() {
        let full = std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let full: &'static std::fs::File = Box::leak(Box::new(full));
        let mut output = Output::new(full.as_fd());
        output.push(b"x");
        output.flush();
        assert_eq!(output.failure(), Some(Errno::ENOSPC));
        assert!(!output.push(b"y") && !output.has_no_reader());
    }

    #[test]
    fn a_closed_reader_drops_output() {
        // The test harness ignores SIGPIPE, as bulle does.
        let (reader, mut output) = pipe();
        drop(reader);
        output.push(b"x");
        output.flush();
        assert!(!output.is_waiting() && output.has_no_reader());
        assert_eq!(output.failure(), None);
    }
}
