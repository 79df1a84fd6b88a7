//! One connection of the guest: requests in, answers out, one at a time.

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};

use super::http;
use super::store::Mmds;

/// Most bytes of a request.
pub const MAX_REQUEST: usize = 4096;
/// Bytes of answers that the guest has not acknowledged.
const UNACKNOWLEDGED: usize = 8192;
/// The service's port.
pub(super) const PORT: u16 = 80;
/// A guest that acknowledges nothing for so long has gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection that is there or waited for.
#[derive(Debug)]
pub(super) struct Connection {
    pub handle: SocketHandle,
    /// When something happened last.
    pub used: Instant,
    /// It is there.
    open: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that the socket has.
    sent: usize,
    /// It ends with `output`.
    last: bool,
}

/// A socket that listens.
pub(super) fn socket() -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(MAX_REQUEST), buffer(UNACKNOWLEDGED));
    socket.set_timeout(Some(PATIENCE));
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    listen(&mut socket);
    socket
}

/// Has a socket wait for the next connection.
pub(super) fn listen(socket: &mut Socket<'_>) {
    if let Err(error) = socket.listen(PORT) {
        // Only for port 0 and for a socket that is open.
        log::error!("the metadata service has lost a socket: {error}");
    }
}

impl Connection {
    /// Over the socket with this handle.
    pub fn new(handle: SocketHandle) -> Self {
        Self {
            handle,
            used: Instant::ZERO,
            open: false,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            last: false,
        }
    }

    /// Goes on with requests and answers; says whether anything changed.
    pub fn serve(&mut self, socket: &mut Socket<'_>, mmds: &Mmds, now: Instant) -> bool {
        match socket.state() {
            State::Listen => {
                // Also one that was reset before it was there.
                self.forget(mmds);
                return false;
            }
            // What comes late for the last connection is answered with a reset.
            State::Closed | State::TimeWait => {
                self.forget(mmds);
                listen(socket);
                return true;
            }
            _ => {}
        }
        if !std::mem::replace(&mut self.open, true) {
            self.used = now;
            mmds.counters().connections_created.add(1);
        }
        let changed = self.send(socket) | self.receive(socket) | self.answer(socket, mmds);
        if changed {
            self.used = now;
        }
        if self.output.is_empty() && (self.last || !socket.may_recv()) && socket.may_send() {
            socket.close();
            return true;
        }
        changed
    }

    /// Nothing of the connection is left.
    fn forget(&mut self, mmds: &Mmds) {
        if self.open {
            mmds.counters().connections_destroyed.add(1);
        }
        *self = Self::new(self.handle);
    }

    fn send(&mut self, socket: &mut Socket<'_>) -> bool {
        let rest = self.output.get(self.sent..).unwrap_or_default();
        let count = socket.send_slice(rest).unwrap_or(0);
        self.sent += count;
        if self.sent >= self.output.len() {
            (self.output, self.sent) = (Vec::new(), 0);
        }
        count > 0
    }

    fn receive(&mut self, socket: &mut Socket<'_>) -> bool {
        let room = MAX_REQUEST - self.input.len();
        let taken = socket.recv(|bytes| {
            let count = bytes.len().min(room);
            let bytes = bytes.get(..count).unwrap_or_default();
            self.input.extend_from_slice(bytes);
            (count, count)
        });
        taken.is_ok_and(|count| count > 0)
    }

    fn answer(&mut self, socket: &mut Socket<'_>, mmds: &Mmds) -> bool {
        if self.last || !self.output.is_empty() || self.input.is_empty() {
            return false;
        }
        match http::answer(mmds, &self.input) {
            Some(answer) => {
                self.input.drain(..answer.taken.min(self.input.len()));
                self.output = answer.bytes;
                self.last = answer.last;
                true
            }
            None if self.input.len() == MAX_REQUEST => {
                socket.abort();
                true
            }
            None => false,
        }
    }
}
