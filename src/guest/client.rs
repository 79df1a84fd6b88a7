//! The host's side of the agent protocol (docs/agent-protocol.md): a state machine without I/O.
//!
//! Bytes from the channel go into [`AgentClient::received`], which appends events; bytes for the
//! channel come out of [`AgentClient::outgoing`]. Memory is bounded whatever the guest sends: output
//! is limited by the credit given, input by the room in a small buffer. A guest that breaks the
//! protocol is reported once and not listened to any more.

mod types;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use agent_protocol::{
    Decoder, FromGuest, FromHost, HOST_WINDOW, MAX_GUEST_WINDOW, MAX_HOST_WINDOW, MAX_PAYLOAD,
    OVERHEAD, Start, StartError, VERSION,
};
pub use agent_protocol::{Exit, Level, Power, Stage, WinSize, features};
use devices::console::clean;
pub use types::{AgentEvent, AgentFailure, ProtocolError, RequestError, StartRequest};

/// Largest piece of input in one frame.
const PIECE: usize = MAX_PAYLOAD;
/// Bytes of input held here; what the guest may have on its way comes on top.
const STDIN_BUFFER: usize = 32 * 1024;
/// Bytes waiting for the channel.
const OUTGOING: usize = 4 * (PIECE + OVERHEAD);
/// Signals waiting to be sent; more are dropped.
const MAX_SIGNALS: usize = 32;
/// Noise accepted before Hello: firmware or a boot loader may have used the UART.
const MAX_NOISE: u64 = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    AwaitHello,
    /// Start is being sent or executed.
    Starting,
    Running,
    /// Exited or Failed has come.
    Ended,
    Dead,
}

/// The conversation with one agent about one command.
pub struct AgentClient {
    state: State,
    decoder: Box<Decoder>,
    start: Vec<u8>,
    start_sent: usize,
    stdin: Vec<u8>,
    stdin_eof: bool,
    eof_sent: bool,
    signals: Vec<u8>,
    resize: Option<WinSize>,
    shutdown: Option<Power>,
    /// Input bytes that the guest takes now, and the most that it ever does.
    credit: u32,
    guest_window: u32,
    /// The most output bytes that may be on their way here.
    window: u32,
    /// Output bytes received and not consumed.
    unconsumed: u32,
    /// Output bytes consumed and not yet granted again.
    owed: u32,
    outgoing: Vec<u8>,
}

impl AgentClient {
    /// A client that will have `request` run once the agent says Hello.
    ///
    /// # Errors
    /// When the request does not fit the protocol's limits.
    pub fn new(request: &StartRequest) -> Result<Self, RequestError> {
        let bytes = |list: &[OsString]| list.iter().map(|s| s.as_bytes().to_vec()).collect();
        let (argv, env): (Vec<Vec<u8>>, Vec<Vec<u8>>) = (bytes(&request.argv), bytes(&request.env));
        let cwd = request
            .cwd
            .as_deref()
            .map(OsStr::as_bytes)
            .unwrap_or_default()
            .to_vec();
        let layout = Start {
            window: HOST_WINDOW,
            tty: request.tty,
            cwd,
            argv: &argv,
            env: &env,
        };
        let length = layout.encoded_len().map_err(request_error)?;
        let mut start = vec![0; length];
        layout.encode(&mut start).map_err(request_error)?;
        Ok(Self {
            state: State::AwaitHello,
            decoder: Box::default(),
            start,
            start_sent: 0,
            stdin: Vec::new(),
            stdin_eof: false,
            eof_sent: false,
            signals: Vec::new(),
            resize: None,
            shutdown: None,
            credit: 0,
            guest_window: 0,
            window: HOST_WINDOW,
            unconsumed: 0,
            owed: 0,
            outgoing: Vec::with_capacity(OUTGOING),
        })
    }

    /// Takes bytes from the channel and appends what they mean to `events`.
    ///
    /// At most [`HOST_WINDOW`] bytes of output, or [`MAX_HOST_WINDOW`] after [`Self::widen`], are in events that have not been consumed.
    pub fn received(&mut self, mut bytes: &[u8], events: &mut Vec<AgentEvent>) {
        // Apart from self while a frame lies in it.
        let mut decoder = std::mem::take(&mut self.decoder);
        while self.state != State::Dead {
            let noise_allowed = if self.state == State::AwaitHello {
                MAX_NOISE
            } else {
                decoder.skipped()
            };
            let result = decoder
                .decode(&mut bytes)
                .map(|frame| match FromGuest::parse(frame) {
                    Ok(message) => self.on_message(message),
                    Err(bad) => Err(ProtocolError::Malformed { kind: bad.kind }),
                });
            let noise = decoder.skipped();
            match result {
                _ if noise > noise_allowed => {
                    self.die(ProtocolError::Noise { bytes: noise }, events)
                }
                Some(Ok(event)) => events.extend(event),
                Some(Err(error)) => self.die(error, events),
                None => break,
            }
        }
        self.decoder = decoder;
        self.fill();
    }

    fn die(&mut self, error: ProtocolError, events: &mut Vec<AgentEvent>) {
        if self.state != State::Dead {
            self.state = State::Dead;
            self.outgoing.clear();
            events.push(AgentEvent::ProtocolError(error));
        }
    }

    fn on_message(&mut self, message: FromGuest<'_>) -> Result<Option<AgentEvent>, ProtocolError> {
        use State::{AwaitHello, Ended, Running, Starting};
        let started = self.start_sent == self.start.len();
        let event = match (message, self.state) {
            (FromGuest::Hello(hello), AwaitHello) => {
                if hello.version != VERSION {
                    return Err(ProtocolError::Version {
                        guest: hello.version,
                    });
                }
                self.state = Starting;
                self.guest_window = hello.window.min(MAX_GUEST_WINDOW);
                self.credit = self.guest_window;
                AgentEvent::Hello {
                    features: hello.features,
                    release: clean(hello.release),
                }
            }
            (FromGuest::Started { pid }, Starting) if started => {
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
            (FromGuest::Log { level, text }, Starting | Running | Ended) => AgentEvent::Log {
                level,
                text: clean(text),
            },
            (FromGuest::Stopping(power), Starting | Running | Ended) => AgentEvent::Stopping(power),
            (FromGuest::Credit(n), Starting | Running | Ended) => {
                // Never more than the window, whatever the guest says.
                self.credit = self.credit.saturating_add(n).min(self.guest_window);
                return Ok(None);
            }
            (message, _) => {
                return Err(ProtocolError::OutOfPlace {
                    message: name(&message),
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
        Ok(())
    }

    /// The channel loses nothing, so more may be on its way. Once.
    pub fn widen(&mut self) {
        self.owed += MAX_HOST_WINDOW - self.window;
        self.window = MAX_HOST_WINDOW;
        self.fill();
    }

    /// So many bytes of Stdout and Stderr have been written: the guest may send as many more.
    pub fn consumed(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .min(self.unconsumed);
        self.unconsumed -= bytes;
        self.owed += bytes;
        self.fill();
    }

    /// Bytes for the channel; a bounded number. Report with [`Self::sent`] what it took.
    pub fn outgoing(&self) -> &[u8] {
        &self.outgoing
    }

    /// The channel took the first `n` bytes of [`Self::outgoing`].
    pub fn sent(&mut self, n: usize) {
        self.outgoing.drain(..n.min(self.outgoing.len()));
        self.fill();
    }

    /// Input for the command; returns how many bytes were accepted, 0 when there is no room: read
    /// no more until [`Self::wants_stdin`].
    pub fn stdin(&mut self, bytes: &[u8]) -> usize {
        if !self.wants_stdin() {
            return 0;
        }
        let n = bytes.len().min(STDIN_BUFFER - self.stdin.len());
        self.stdin.extend_from_slice(&bytes[..n]);
        self.fill();
        n
    }

    /// There is room for input, and the command may still read it.
    pub fn wants_stdin(&self) -> bool {
        self.state < State::Ended && !self.stdin_eof && self.stdin.len() < STDIN_BUFFER
    }

    /// There is no more input.
    pub fn stdin_eof(&mut self) {
        self.stdin_eof = true;
        self.fill();
    }

    /// The terminal has a new size. Of several, the last is sent.
    pub fn resize(&mut self, size: WinSize) {
        self.resize = Some(size);
        self.fill();
    }

    /// Sends a signal to the command's process group, once it runs.
    pub fn signal(&mut self, signal: u8) {
        if self.signals.len() < MAX_SIGNALS {
            self.signals.push(signal);
        }
        self.fill();
    }

    /// Asks the guest to go down in an orderly way.
    pub fn shutdown(&mut self, power: Power) {
        self.shutdown = Some(power);
        self.fill();
    }

    /// The agent has said Hello.
    pub fn is_connected(&self) -> bool {
        self.state > State::AwaitHello && self.state < State::Dead
    }

    /// Moves what may be sent now into the outgoing buffer, most urgent first.
    fn fill(&mut self) {
        if self.is_connected() {
            while self.outgoing.len() + PIECE + OVERHEAD <= OUTGOING && self.send_next() {}
        }
    }

    /// Sends one message if there is one to send.
    fn send_next(&mut self) -> bool {
        // Not for every byte: a frame costs more than it grants. The rest of the window still moves.
        if self.owed >= self.window / 4 {
            let owed = std::mem::take(&mut self.owed);
            return self.send(FromHost::Credit(owed));
        }
        if let Some(power) = self.shutdown.take() {
            return self.send(FromHost::Shutdown(power));
        }
        if self.state == State::Ended {
            return false;
        }
        let room = PIECE.min(self.credit as usize);
        if self.start_sent < self.start.len() {
            return self.send_start(room);
        }
        if !self.signals.is_empty() {
            let signal = self.signals.remove(0);
            return self.send(FromHost::Signal(signal));
        }
        if let Some(size) = self.resize.take() {
            return self.send(FromHost::Resize(size));
        }
        if !self.stdin.is_empty() && room > 0 {
            let n = self.stdin.len().min(room);
            self.credit -= n as u32;
            let piece = self.stdin.get(..n).unwrap_or_default().to_vec();
            self.stdin.drain(..n);
            return self.send(FromHost::Stdin(&piece));
        }
        if self.stdin_eof && !self.eof_sent && self.stdin.is_empty() {
            self.eof_sent = true;
            return self.send(FromHost::StdinEof);
        }
        false
    }

    fn send_start(&mut self, room: usize) -> bool {
        if room == 0 {
            return false;
        }
        let end = self.start.len().min(self.start_sent + room);
        let start = std::mem::take(&mut self.start);
        let bytes = &start[self.start_sent..end];
        self.credit -= bytes.len() as u32;
        self.send(FromHost::Start {
            last: end == start.len(),
            bytes,
        });
        self.start = start;
        self.start_sent = end;
        true
    }

    fn send(&mut self, message: FromHost<'_>) -> bool {
        let at = self.outgoing.len();
        self.outgoing.resize(at + PIECE + OVERHEAD, 0);
        let n = message.encode(&mut self.outgoing[at..]).unwrap_or_default();
        self.outgoing.truncate(at + n);
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

fn name(message: &FromGuest<'_>) -> &'static str {
    match message {
        FromGuest::Hello(_) => "Hello",
        FromGuest::Started { .. } => "Started",
        FromGuest::Stdout(_) => "Stdout",
        FromGuest::Stderr(_) => "Stderr",
        FromGuest::Exited(_) => "Exited",
        FromGuest::Failed { .. } => "Failed",
        FromGuest::Log { .. } => "Log",
        FromGuest::Stopping(_) => "Stopping",
        FromGuest::Credit(_) => "Credit",
    }
}

#[cfg(test)]
mod tests;
