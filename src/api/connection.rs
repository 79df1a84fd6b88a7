//! One client: bytes in, bytes out, bounded both ways.
//!
//! Nothing is read while answers wait to be taken, so a client that does not read is not served, and
//! costs no more than one request and one answer. Where the server ends a connection, it goes on to read
//! for a while and throws that away, since closing a socket with unread input has the client find an
//! error where the answer's end should be.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::ApiError;
use super::http::{self, CONTINUE, MAX_HEADERS, MAX_LINE, Parsed, Request, Response};
use crate::control::{ActionError, Pending, Reply, Stream};

/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// How long a client has to end its side, once the server has ended its own.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// Bytes of it that are thrown away meanwhile.
const LINGER_BYTES: usize = 4 << 20;

/// A client.
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// `100 Continue` was sent for the request that is coming in.
    told: bool,
    /// Ends when the output is out.
    closing: bool,
    /// Most bytes of a body.
    limit: usize,
    /// What the client is connected to instead of being answered.
    relay: Option<Relay>,
    /// What it waits for.
    waiting: Option<Waiting>,
    /// The client sends nothing more.
    ended: bool,
    /// All is said, and what the client still sends is thrown away.
    linger: Option<Linger>,
}

/// A request that is not answered yet.
pub struct Waiting {
    /// What the vmm thread was asked.
    pub pending: Pending,
    /// Index of its endpoint.
    pub route: usize,
    /// When it came.
    pub begin: Instant,
    /// It says something that will go.
    pub deprecated: bool,
    /// The client goes on with this connection.
    pub keep_alive: bool,
}

/// How much longer a connection is kept that has ended.
struct Linger {
    until: Instant,
    bytes: usize,
}

/// The other end of a stream.
struct Relay {
    stream: Stream,
    /// The client sends no more.
    client_ended: bool,
}

impl Connection {
    /// A client behind `stream`, whose bodies have at most `limit` bytes.
    pub fn new(stream: UnixStream, limit: usize) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            told: false,
            closing: false,
            limit,
            relay: None,
            waiting: None,
            ended: false,
            linger: None,
        })
    }

    /// What it waits for: of its client, and of the stream that it relays. Nothing happens at `none`.
    pub fn poll_fds<'a>(&'a self, none: BorrowedFd<'a>) -> [PollFd<'a>; 2] {
        let if_so = |so: bool, flags| if so { flags } else { PollFlags::empty() };
        let (reads, writes) = (self.output.is_empty(), !self.output.is_empty());
        if let Some(waiting) = &self.waiting {
            // Only its end is told, and once is enough.
            let client = PollFd::new(self.as_fd(), PollFlags::empty());
            return match waiting.pending.is_cancelled() {
                true => [none, none].map(|none| PollFd::new(none, PollFlags::empty())),
                false => [client, PollFd::new(none, PollFlags::empty())],
            };
        }
        let Some(relay) = &self.relay else {
            let client = if_so(reads, PollFlags::POLLIN) | if_so(writes, PollFlags::POLLOUT);
            let nothing = PollFd::new(self.as_fd(), PollFlags::empty());
            return [PollFd::new(self.as_fd(), client), nothing];
        };
        let takes = self.input.is_empty() && !relay.client_ended;
        let client = if_so(takes, PollFlags::POLLIN) | if_so(writes, PollFlags::POLLOUT);
        let stream =
            if_so(reads, PollFlags::POLLIN) | if_so(!self.input.is_empty(), PollFlags::POLLOUT);
        [
            PollFd::new(self.as_fd(), client),
            PollFd::new(relay.stream.end.as_fd(), stream),
        ]
    }

    /// Connects the client with `stream` from here on, after the answer.
    pub fn relay(&mut self, stream: Stream) {
        self.closing = false;
        self.relay = Some(Relay {
            stream,
            client_ended: false,
        });
        self.pass(PollFlags::empty());
    }

    /// Whether it relays a stream.
    pub fn is_relaying(&self) -> bool {
        self.relay.is_some()
    }

    /// Waits for an answer; nothing else of the client's is looked at.
    pub fn wait(&mut self, waiting: Waiting) {
        self.waiting = Some(waiting);
    }

    /// Whether it waits for an answer.
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// The client is gone, or will not take the answer.
    pub fn hang_up(&mut self) {
        if let Some(waiting) = &self.waiting {
            waiting.pending.cancel();
        }
    }

    /// The answer that it waited for, if it is there.
    pub fn take_answer(&mut self) -> Option<(Waiting, Result<Reply, ActionError>)> {
        let result = self.waiting.as_ref()?.pending.take()?;
        Some((self.waiting.take()?, result))
    }

    /// Passes on what there is, both ways, as far as it is taken; never more than a piece of it is held.
    pub fn pass(&mut self, ready: PollFlags) {
        self.write();
        let Some(relay) = &mut self.relay else { return };
        if ready.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) && gone(&self.stream) {
            self.output.clear();
            self.closing = true;
            return;
        }
        let mut chunk = [0; CHUNK];
        if self.output.is_empty() && !self.closing {
            match (&*relay.stream.end).read(&mut chunk) {
                Ok(0) => self.closing = true,
                Ok(len) => self.output.extend(chunk.iter().take(len)),
                Err(error) => self.closing |= !is_passing(&error),
            }
        }
        if self.input.is_empty() && !relay.client_ended {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    relay.client_ended = true;
                    // The other side may be gone, which is found out when it is read.
                    let _ = relay.stream.end.shutdown(Shutdown::Write);
                }
                Ok(len) => self.input.extend(chunk.iter().take(len)),
                Err(error) => self.closing |= !is_passing(&error),
            }
        }
        if !self.input.is_empty() {
            match (&*relay.stream.end).write(&self.input) {
                Ok(len) => drop(self.input.drain(..len)),
                Err(error) if is_passing(&error) => {}
                Err(_) => self.input.clear(),
            }
        }
        self.write();
    }

    /// Whether an answer waits to be taken.
    pub fn is_writing(&self) -> bool {
        !self.output.is_empty()
    }

    /// Reads what there is. `false` where nothing more comes.
    pub fn read(&mut self) -> bool {
        let most = (MAX_HEADERS + 2) * MAX_LINE + self.limit;
        let mut chunk = [0; CHUNK];
        while self.input.len() < most {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(len) => self
                    .input
                    .extend_from_slice(chunk.get(..len).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// The next request, when the answer to the last is out. Bytes that are none are answered here.
    pub fn next(&mut self) -> Option<Request> {
        if self.closing || !self.output.is_empty() || self.is_relaying() || self.is_waiting() {
            return None;
        }
        match http::parse(&self.input, self.limit) {
            Ok(Parsed::Incomplete { wait }) => {
                if wait && !std::mem::replace(&mut self.told, true) {
                    self.output.extend_from_slice(CONTINUE);
                    self.write();
                }
                None
            }
            Ok(Parsed::Request(request, len)) => {
                self.input.drain(..len);
                self.told = false;
                Some(request)
            }
            Err(error) => {
                // Where the next request would begin, nobody knows.
                self.input.clear();
                self.answer(&ApiError::NoRequest(error).response(), true);
                None
            }
        }
    }

    /// Sends an answer, as far as it is taken at once.
    pub fn answer(&mut self, response: &Response, close: bool) {
        self.output.extend(response.bytes(close));
        self.closing |= close;
        self.write();
    }

    /// Sends what waits. A client that is gone is closed.
    pub fn write(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(len) => drop(self.output.drain(..len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.output.clear();
                    self.closing = true;
                }
            }
        }
    }

    /// The client sends nothing more.
    pub fn ends(&mut self) {
        self.ended = true;
    }

    /// Ends with what waits for the client, if it sends nothing more and all of it is answered.
    pub fn close_if_ended(&mut self) {
        self.closing |= self.ended && !self.is_waiting() && !self.is_relaying();
    }

    /// Sends these bytes and ends.
    pub fn refuse(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        self.closing = true;
        self.write();
    }

    /// When what the client still sends is no longer waited for, where all is said.
    pub fn lingers_until(&self) -> Option<Instant> {
        self.linger.as_ref().map(|linger| linger.until)
    }

    /// Whether nothing more is to be done for it. One that is to end ends the server's side here.
    pub fn is_over(&mut self) -> bool {
        if !self.closing || !self.output.is_empty() || self.is_waiting() {
            return false;
        }
        if self.ended {
            return true;
        }
        let linger = self.linger.get_or_insert_with(|| {
            self.relay = None;
            // A client that is gone is found out by reading.
            let _ = self.stream.shutdown(Shutdown::Write);
            Linger {
                until: Instant::now() + LINGER,
                bytes: LINGER_BYTES,
            }
        });
        // One piece at a time: others wait.
        match self.stream.read(&mut [0; CHUNK]) {
            Ok(0) => return true,
            Ok(len) => linger.bytes = linger.bytes.saturating_sub(len),
            Err(error) if is_passing(&error) => {}
            Err(_) => return true,
        }
        linger.bytes == 0 || Instant::now() >= linger.until
    }
}

/// Whether it is only that nothing can be done now.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Whether the other side has closed its end for good.
fn gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
