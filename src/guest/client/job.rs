//! The host's side of one command in the guest: the main one, or one of those beside it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use agent_protocol::{
    FromGuest, FromHost, HOST_WINDOW, MAX_PAYLOAD, OVERHEAD, Start, StartError, WinSize,
};
use devices::console::clean;

use super::{AgentEvent, AgentFailure, ProtocolError, RequestError, StartRequest};

/// Largest piece of input in one frame.
const PIECE: usize = MAX_PAYLOAD;
/// Bytes of input held here; what the guest may have on its way comes on top.
pub const STDIN_BUFFER: usize = 32 * 1024;
/// Of Linux on every processor.
const SIGHUP: u8 = 1;
/// Signals waiting to be sent; more are dropped.
pub const MAX_SIGNALS: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Start is being sent or executed.
    Starting,
    /// Started has come.
    Running,
    /// Exited or Failed has come.
    Ended,
}

/// What waits to be sent, with room for another frame as [`fits`](Self::fits) says.
pub struct Outgoing {
    bytes: Vec<u8>,
    capacity: usize,
}

impl Outgoing {
    /// Nothing yet; at most so many bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(capacity),
            capacity,
        }
    }

    /// What waits.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The first `n` bytes are gone.
    pub fn sent(&mut self, n: usize) {
        self.bytes.drain(..n.min(self.bytes.len()));
    }

    /// Begins with what waited elsewhere, however much it is.
    pub fn restore(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Whether there is room for any frame.
    pub fn fits(&self) -> bool {
        self.bytes.len() + PIECE + OVERHEAD <= self.capacity
    }

    /// Adds a message about the command `job`.
    pub fn send(&mut self, job: u8, message: FromHost<'_>) {
        let at = self.bytes.len();
        self.bytes.resize(at + PIECE + OVERHEAD, 0);
        let room = self.bytes.get_mut(at..).unwrap_or_default();
        let n = message.encode_for(job, room).unwrap_or_default();
        self.bytes.truncate(at + n);
    }
}

/// One command.
pub struct Job {
    pub(super) number: u8,
    pub(super) state: State,
    pub(super) start: Vec<u8>,
    pub(super) start_sent: usize,
    pub(super) stdin: Vec<u8>,
    pub(super) stdin_eof: bool,
    pub(super) eof_sent: bool,
    pub(super) signals: Vec<u8>,
    pub(super) resize: Option<WinSize>,
    /// Input bytes that the guest takes now, and the most that it ever does.
    pub(super) credit: u32,
    pub(super) guest_window: u32,
    /// The most output bytes that may be on their way here.
    pub(super) window: u32,
    /// Output bytes received and not consumed.
    pub(super) unconsumed: u32,
    /// Output bytes consumed and not yet granted again.
    pub(super) owed: u32,
    /// Nobody listens to it any more.
    orphaned: bool,
}

impl Job {
    /// The window of a command of which the guest knows nothing yet.
    pub fn waiting(&self) -> Option<u32> {
        let untold = self.state == State::Starting && self.start_sent == 0;
        untold.then_some(self.guest_window)
    }

    /// The command of `request`, of which the guest takes so many bytes of input at once.
    pub fn new(
        number: u8,
        request: &StartRequest,
        guest_window: u32,
    ) -> Result<Self, RequestError> {
        let bytes = |list: &[OsString]| list.iter().map(|s| s.as_bytes().to_vec()).collect();
        let (argv, env): (Vec<Vec<u8>>, Vec<Vec<u8>>) = (bytes(&request.argv), bytes(&request.env));
        let cwd = request.cwd.as_deref().map(OsStr::as_bytes);
        let layout = Start {
            window: HOST_WINDOW,
            tty: request.tty,
            cwd: cwd.unwrap_or_default().to_vec(),
            argv: &argv,
            env: &env,
        };
        let length = layout.encoded_len().map_err(request_error)?;
        let mut start = vec![0; length];
        layout.encode(&mut start).map_err(request_error)?;
        Ok(Self {
            start,
            ..Self::empty(number, guest_window)
        })
    }

    /// A command of which nothing is known.
    pub(super) fn empty(number: u8, guest_window: u32) -> Self {
        Self {
            number,
            state: State::Starting,
            start: Vec::new(),
            start_sent: 0,
            stdin: Vec::new(),
            stdin_eof: false,
            eof_sent: false,
            signals: Vec::new(),
            resize: None,
            credit: guest_window,
            guest_window,
            window: HOST_WINDOW,
            unconsumed: 0,
            owed: 0,
            orphaned: false,
        }
    }

    /// Tells it that nobody listens any more, as a terminal would that is gone. What it still says is
    /// thrown away.
    pub fn hang_up(&mut self) {
        self.orphaned = true;
        self.stdin_eof();
        self.signal(SIGHUP);
    }

    /// Whether nobody listens to it.
    pub fn is_orphaned(&self) -> bool {
        self.orphaned
    }

    /// Its number.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The guest takes so many bytes of input at once.
    pub fn set_guest_window(&mut self, window: u32) {
        (self.guest_window, self.credit) = (window, window);
    }

    /// The most bytes of input that the guest takes at once.
    pub fn guest_window(&self) -> u32 {
        self.guest_window
    }

    /// Whether its Start is not sent yet.
    pub fn is_starting(&self) -> bool {
        self.start_sent < self.start.len()
    }

    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// Whether Exited or Failed has come.
    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// What a message about it means.
    pub fn on_message(
        &mut self,
        message: FromGuest<'_>,
    ) -> Result<Option<AgentEvent>, ProtocolError> {
        use State::{Ended, Running, Starting};
        let event = match (message, self.state) {
            (FromGuest::Started { pid }, Starting) if !self.is_starting() => {
                self.state = Running;
                AgentEvent::Started { pid }
            }
            (FromGuest::Stdout(bytes), Running) => {
                self.take_output(bytes)?;
                AgentEvent::Stdout(bytes.to_vec())
            }
            (FromGuest::Stderr(bytes), Running) => {
                self.take_output(bytes)?;
                AgentEvent::Stderr(bytes.to_vec())
            }
            (FromGuest::Exited(exit), Running) => {
                self.state = Ended;
                AgentEvent::Exited(exit)
            }
            (FromGuest::Failed { stage, errno, text }, Starting | Running) => {
                self.state = Ended;
                AgentEvent::Failed(AgentFailure {
                    stage,
                    errno,
                    text: clean(text),
                })
            }
            (FromGuest::Credit(n), _) => {
                // Never more than the window, whatever the guest says.
                self.credit = self.credit.saturating_add(n).min(self.guest_window);
                return Ok(None);
            }
            (message, _) => {
                return Err(ProtocolError::OutOfPlace {
                    message: super::name(&message),
                });
            }
        };
        Ok(Some(event))
    }

    fn take_output(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        // A frame's payload has at most 4096 bytes.
        let total = self.unconsumed + self.owed + bytes.len() as u32;
        if total > self.window {
            return Err(ProtocolError::Window {
                excess: total - self.window,
            });
        }
        self.unconsumed += bytes.len() as u32;
        if self.orphaned {
            self.consumed(bytes.len());
        }
        Ok(())
    }

    /// So many bytes of output may be on their way from now on, if it were less.
    pub fn widen(&mut self, window: u32) {
        self.owed += window - self.window;
        self.window = window;
    }

    /// So many bytes of output have been written.
    pub fn consumed(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let bytes = bytes.min(self.unconsumed);
        self.unconsumed -= bytes;
        self.owed += bytes;
    }

    /// Input; returns how many bytes were accepted, 0 when there is no room.
    pub fn stdin(&mut self, bytes: &[u8]) -> usize {
        if !self.wants_stdin() {
            return 0;
        }
        let n = bytes.len().min(STDIN_BUFFER - self.stdin.len());
        self.stdin.extend(bytes.iter().take(n));
        n
    }

    /// There is room for input, and the command may still read it.
    pub fn wants_stdin(&self) -> bool {
        !self.has_ended() && !self.stdin_eof && self.stdin.len() < STDIN_BUFFER
    }

    /// There is no more input.
    pub fn stdin_eof(&mut self) {
        self.stdin_eof = true;
    }

    /// The terminal has a new size. Of several, the last is sent.
    pub fn resize(&mut self, size: WinSize) {
        self.resize = Some(size);
    }

    /// Sends a signal to the command's process group, once it runs.
    pub fn signal(&mut self, signal: u8) {
        if self.signals.len() < MAX_SIGNALS {
            self.signals.push(signal);
        }
    }

    /// The one grant that goes before everything else, where it is worth a frame.
    pub fn grant(&mut self, out: &mut Outgoing) -> bool {
        // Not for every byte: a frame costs more than it grants. The rest of the window still moves.
        let due = self.owed > 0 && self.owed >= self.window / 4;
        if due {
            let owed = std::mem::take(&mut self.owed);
            out.send(self.number, FromHost::Credit(owed));
        }
        due
    }

    /// Sends one message if there is one to send. `may_start` says whether a Start may go on.
    pub fn send_next(&mut self, out: &mut Outgoing, may_start: bool) -> bool {
        if self.has_ended() {
            return false;
        }
        let room = PIECE.min(self.credit as usize);
        if self.is_starting() {
            return may_start && self.send_start(room, out);
        }
        let message = if !self.signals.is_empty() {
            FromHost::Signal(self.signals.remove(0))
        } else if let Some(size) = self.resize.take() {
            FromHost::Resize(size)
        } else if !self.stdin.is_empty() && room > 0 {
            let n = self.stdin.len().min(room);
            self.credit -= n as u32;
            let piece: Vec<u8> = self.stdin.drain(..n).collect();
            out.send(self.number, FromHost::Stdin(&piece));
            return true;
        } else if self.stdin_eof && !self.eof_sent && self.stdin.is_empty() {
            self.eof_sent = true;
            FromHost::StdinEof
        } else {
            return false;
        };
        out.send(self.number, message);
        true
    }

    fn send_start(&mut self, room: usize, out: &mut Outgoing) -> bool {
        let end = self.start.len().min(self.start_sent + room);
        let Some(bytes) = self.start.get(self.start_sent..end) else {
            return false;
        };
        if bytes.is_empty() {
            return false;
        }
        self.credit -= bytes.len() as u32;
        let last = end == self.start.len();
        out.send(self.number, FromHost::Start { last, bytes });
        self.start_sent = end;
        true
    }
}

fn request_error(error: StartError) -> RequestError {
    match error {
        StartError::Empty | StartError::Malformed => RequestError::Empty,
        StartError::Nul => RequestError::Nul,
        StartError::TooMany(count) => RequestError::TooMany { count },
        StartError::TooLong(bytes) => RequestError::TooLong { bytes },
    }
}
