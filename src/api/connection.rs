//! One client: bytes in, bytes out, bounded both ways.
//!
//! Nothing is read while answers wait to be taken, so a client that does not read is not served, and
//! costs no more than one request and one answer.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;

use super::http::{self, CONTINUE, MAX_HEADERS, MAX_LINE, Parsed, Request, Response};

/// Bytes read at once.
const CHUNK: usize = 16 << 10;

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
        })
    }

    /// What it waits for.
    pub fn waits_for(&self) -> PollFlags {
        match self.is_writing() {
            false => PollFlags::POLLIN,
            true => PollFlags::POLLOUT,
        }
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
        if self.closing || !self.output.is_empty() {
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
                self.answer(&Response::no_request(&error), true);
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

    /// The client sends nothing more; what waits for it still goes out.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Whether nothing more is to be done for it.
    pub fn is_over(&self) -> bool {
        self.closing && self.output.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
