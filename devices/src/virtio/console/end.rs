//! The host's ends of a port: file descriptors, or pipes inside the VMM.
//!
//! Owned by the I/O thread once the device has them. No call waits: file descriptors are made
//! non-blocking, on an open file of our own where others may share the one given.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use super::pipe::{HostPort, PipeEnd};
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Segment, read_at, total, write_at};
use crate::virtio::iovecs::{IoVecs, send, would_block, write};
use crate::virtio::poll::Poller;
use crate::virtio::uds::Listener;

/// How long a device that goes away waits for a reader that does not read, in milliseconds.
const FLUSH_MS: i32 = 1000;
/// Most bytes taken from a pipe for one buffer of the guest.
const MAX_READ: usize = 64 * 1024;

/// Events of an end, from its token on.
const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const CLIENTS: u64 = 2;

/// One file descriptor of a port.
#[derive(Debug)]
struct HostFd {
    fd: OwnedFd,
    socket: bool,
    /// Nothing says yet that it would block.
    ready: bool,
    /// A socket whose other side is gone.
    hung_up: bool,
}

/// Where a port's bytes come from.
#[derive(Debug)]
enum Input {
    None,
    Fd(HostFd),
    Pipe,
}

/// Where a port's bytes go to.
#[derive(Debug)]
enum Output {
    None,
    Fd(HostFd, VecDeque<u8>),
    Pipe,
}

/// The host's side of a port.
#[derive(Debug)]
pub struct PortEnd {
    input: Input,
    output: Output,
    pipe: Option<PipeEnd>,
    listener: Option<Listener>,
    /// A client may wait for the listener.
    waiting: bool,
}

/// What came of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Got {
    Bytes(u32),
    /// Nothing for now.
    Wait,
    /// Nothing any more.
    End,
}

impl PortEnd {
    /// Nobody: the guest sees the port closed.
    pub fn closed() -> Self {
        Self {
            input: Input::None,
            output: Output::None,
            pipe: None,
            listener: None,
            waiting: false,
        }
    }

    /// The clients of a stream socket, one after the other; the next is accepted when the guest
    /// was told that the one before is gone. Between them the guest sees the port closed.
    pub fn clients(listener: Listener) -> Self {
        let mut end = Self::closed();
        end.listener = Some(listener);
        end
    }

    /// File descriptors: what the guest reads comes from `input`, what it writes goes to `output`.
    /// Files, pipes, terminals and sockets.
    ///
    /// They are used without blocking. Terminals and pipes are opened anew where that is allowed,
    /// so that other processes that share them see no change; else `O_NONBLOCK` is set on them.
    pub fn fds(input: Option<OwnedFd>, output: Option<OwnedFd>) -> io::Result<Self> {
        let input = input.map(|fd| HostFd::new(fd, false)).transpose()?;
        let output = output.map(|fd| HostFd::new(fd, true)).transpose()?;
        let mut end = Self::closed();
        end.input = input.map_or(Input::None, Input::Fd);
        end.output = output.map_or(Output::None, |fd| Output::Fd(fd, VecDeque::new()));
        Ok(end)
    }

    /// One file descriptor for both directions: a connected stream socket, or a pty's master.
    pub fn stream(fd: OwnedFd) -> io::Result<Self> {
        Self::fds(Some(fd.try_clone()?), Some(fd))
    }

    /// An end inside this process, with room for `capacity` bytes in each direction.
    pub fn pipe(capacity: usize) -> io::Result<(HostPort, Self)> {
        let (host, end) = HostPort::pair(capacity)?;
        let mut this = Self::closed();
        (this.input, this.output) = (Input::Pipe, Output::Pipe);
        this.pipe = Some(end);
        Ok((host, this))
    }

    /// Whether anybody is there.
    pub(super) fn is_open(&self) -> bool {
        match &self.pipe {
            Some(pipe) => !pipe.from_guest.is_closed(),
            None => !matches!((&self.input, &self.output), (Input::None, Output::None)),
        }
    }

    /// Waits for the end's events: input under `token`, output and clients under the next two.
    pub(super) fn register(&self, poller: &Poller, token: u64) -> io::Result<()> {
        let (input, output) = (token + INPUT, token + OUTPUT);
        if let Some(listener) = &self.listener {
            poller.add(listener, token + CLIENTS)?;
        }
        if let Some(pipe) = &self.pipe {
            poller.add(&pipe.to_guest.data, input)?;
            poller.add(&pipe.from_guest.room, output)?;
        }
        if let Input::Fd(fd) = &self.input {
            poller.add(&fd.fd, input)?;
        }
        if let Output::Fd(fd, _) = &self.output {
            poller.add(&fd.fd, output)?;
        }
        Ok(())
    }

    /// Clients may wait.
    pub(super) fn clients_ready(&mut self) {
        self.waiting = true;
    }

    /// Accepts the next client if there is none now; says whether it did.
    pub(super) fn accept(&mut self, poller: &Poller, token: u64) -> bool {
        while self.waiting && !self.is_open() {
            let client = self.listener.as_ref().map(Listener::accept);
            let Some(Ok(client)) = client else {
                self.waiting = false;
                return false;
            };
            // One that the host has no file descriptors for is let go.
            if let Ok((input, output)) = Self::client(client, poller, token) {
                self.input = Input::Fd(input);
                self.output = Output::Fd(output, VecDeque::new());
                return true;
            }
        }
        false
    }

    fn client(client: OwnedFd, poller: &Poller, token: u64) -> io::Result<(HostFd, HostFd)> {
        let input = HostFd::new(client.try_clone()?, false)?;
        let output = HostFd::new(client, true)?;
        poller.add(&input.fd, token + INPUT)?;
        poller.add(&output.fd, token + OUTPUT)?;
        Ok((input, output))
    }

    /// The input's event came.
    pub(super) fn input_ready(&mut self, hung_up: bool) {
        if let Input::Fd(fd) = &mut self.input {
            fd.ready = true;
            fd.hung_up = hung_up && fd.socket;
        }
    }

    /// The output's event came: writes what waits. Whether anything got away.
    pub(super) fn output_ready(&mut self, hung_up: bool) -> bool {
        let ended = matches!(self.input, Input::None);
        match &mut self.output {
            // Its input ended before, and now nobody is there at all.
            Output::Fd(fd, _) if hung_up && ended && fd.socket => {
                self.output = Output::None;
                true
            }
            Output::Fd(fd, waiting) => {
                fd.ready = true;
                match fd.flush(waiting) {
                    Ok(progress) => progress,
                    Err(_) => {
                        self.output = Output::None;
                        true
                    }
                }
            }
            Output::Pipe => true,
            Output::None => false,
        }
    }

    /// Writes what can be written at once and forgets the rest; says how much that was.
    pub(super) fn abandon(&mut self) -> u64 {
        self.output_ready(false);
        match &mut self.output {
            Output::Fd(_, waiting) => std::mem::take(waiting).len() as u64,
            Output::None | Output::Pipe => 0,
        }
    }

    /// Fills `segments`, which are not empty.
    pub(super) fn fill(
        &mut self,
        ram: &GuestRam,
        segments: &[Segment],
    ) -> Result<Got, DeviceError> {
        let got = match (&mut self.input, &self.pipe) {
            (Input::Fd(fd), _) => fd.fill(ram, segments)?,
            (Input::Pipe, Some(pipe)) => {
                let max = total(segments).min(MAX_READ as u64) as usize;
                match pipe.to_guest.read(max) {
                    None => Got::End,
                    Some(bytes) if bytes.is_empty() => Got::Wait,
                    Some(bytes) => Got::Bytes(write_at(ram, segments, 0, &bytes)? as u32),
                }
            }
            _ => Got::Wait,
        };
        if got == Got::End {
            let input = std::mem::replace(&mut self.input, Input::None);
            let gone = matches!(input, Input::Fd(HostFd { hung_up: true, .. }));
            if gone || self.pipe.is_some() {
                self.output = Output::None;
            }
        }
        Ok(got)
    }

    /// Takes bytes of `segments` from `offset` on, of which `limit` may wait here; says how many.
    /// With nobody there, all are taken.
    pub(super) fn push(
        &mut self,
        ram: &GuestRam,
        segments: &[Segment],
        offset: u64,
        limit: usize,
    ) -> Result<u64, DeviceError> {
        let len = total(segments).saturating_sub(offset);
        let taken = match (&mut self.output, &self.pipe) {
            (Output::Fd(fd, waiting), _) => fd.push(waiting, ram, segments, offset, limit)?,
            (Output::Pipe, Some(pipe)) => pipe.push(ram, segments, offset)?,
            _ => None,
        };
        if taken.is_none() {
            self.output = Output::None;
        }
        Ok(taken.unwrap_or(len))
    }
}

impl Drop for PortEnd {
    /// What the guest wrote reaches a reader that reads.
    fn drop(&mut self) {
        let Output::Fd(fd, waiting) = &mut self.output else {
            return;
        };
        while !waiting.is_empty() {
            let mut poll = libc::pollfd {
                fd: fd.fd.as_raw_fd(),
                events: libc::POLLOUT,
                revents: 0,
            };
            // SAFETY: one valid structure for the length of the call.
            if unsafe { libc::poll(&mut poll, 1, FLUSH_MS) } != 1 {
                return;
            }
            fd.ready = true;
            if !fd.flush(waiting).unwrap_or(false) {
                return;
            }
        }
    }
}

impl HostFd {
    fn new(fd: OwnedFd, output: bool) -> io::Result<Self> {
        let file = File::from(fd);
        let meta = file.metadata()?;
        let kind = meta.file_type();
        let socket = kind.is_socket();
        // A pty's master is not itself when opened anew.
        let shared = kind.is_fifo() || file.is_terminal() && meta.rdev() != libc::makedev(5, 2);
        let own = if shared { reopen(&file, output) } else { None };
        let fd = match own {
            Some(own) => OwnedFd::from(own),
            None => {
                if !socket {
                    set_nonblocking(&file)?;
                }
                OwnedFd::from(file)
            }
        };
        Ok(Self {
            fd,
            socket,
            ready: true,
            hung_up: false,
        })
    }

    fn fill(&mut self, ram: &GuestRam, segments: &[Segment]) -> Result<Got, DeviceError> {
        if !self.ready {
            return Ok(Got::Wait);
        }
        let iovecs = IoVecs::new(ram, segments, 0, u32::MAX.into())?;
        let read = match self.socket {
            true => iovecs.recv(self.fd.as_fd()),
            false => iovecs.read(self.fd.as_fd()),
        };
        Ok(match read {
            Ok(0) => Got::End,
            Ok(count) => Got::Bytes(count as u32),
            // A pty whose other side is closed may be opened again.
            Err(e) if would_block(&e) || e.raw_os_error() == Some(libc::EIO) => {
                self.ready = false;
                Got::Wait
            }
            Err(_) => Got::End,
        })
    }

    /// Writes what can be written; `None` where nobody reads any more.
    fn push(
        &mut self,
        waiting: &mut VecDeque<u8>,
        ram: &GuestRam,
        segments: &[Segment],
        offset: u64,
        limit: usize,
    ) -> Result<Option<u64>, DeviceError> {
        let len = total(segments).saturating_sub(offset);
        let mut done = 0;
        while waiting.is_empty() && self.ready && done < len {
            let iovecs = IoVecs::new(ram, segments, offset + done, len - done)?;
            let written = match self.socket {
                true => iovecs.send(self.fd.as_fd()),
                false => iovecs.write(self.fd.as_fd()),
            };
            match written {
                Ok(0) => return Ok(None),
                Ok(count) => done += count as u64,
                Err(error) if would_block(&error) => self.ready = false,
                Err(error) if is_full(&error) => return Ok(Some(len)),
                Err(_) => return Ok(None),
            }
        }
        let room = limit.saturating_sub(waiting.len()) as u64;
        let mut rest = vec![0; (len - done).min(room) as usize];
        done += read_at(ram, segments, offset + done, &mut rest)? as u64;
        waiting.extend(rest);
        Ok(Some(done))
    }

    /// Writes what waits. Whether anything got away.
    fn flush(&mut self, waiting: &mut VecDeque<u8>) -> io::Result<bool> {
        let before = waiting.len();
        while self.ready && !waiting.is_empty() {
            let (first, _) = waiting.as_slices();
            let written = match self.socket {
                true => send(self.fd.as_fd(), first),
                false => write(self.fd.as_fd(), first),
            };
            match written {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(waiting.drain(..count)),
                Err(error) if would_block(&error) => {
                    self.ready = false;
                }
                Err(error) if is_full(&error) => waiting.clear(),
                Err(error) => return Err(error),
            }
        }
        Ok(waiting.len() < before)
    }
}

/// Whether the host has no room for a file: what is written then is lost.
fn is_full(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    matches!(code, Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

/// The same terminal or pipe as an open file of our own.
fn reopen(file: &File, output: bool) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::OpenOptions::new()
        .read(!output)
        .write(output)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .ok()
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is involved.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
