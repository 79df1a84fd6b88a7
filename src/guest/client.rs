//! The host's side of the agent protocol (docs/agent-protocol.md): a state machine without I/O.
//!
//! Bytes from the channel go into [`AgentClient::received`], which appends events; bytes for the
//! channel come out of [`AgentClient::outgoing`]. Memory is bounded whatever the guest sends: output
//! is limited by the credit given, input by the room in a small buffer. A guest that breaks the
//! protocol is reported once and not listened to any more.

mod job;
mod talk;
mod types;

use agent_protocol::{
    Decoder, EXTRA_WINDOW, FromGuest, FromHost, MAX_EXTRA, MAX_GUEST_WINDOW, MAX_HOST_WINDOW,
    MAX_PAYLOAD, OVERHEAD, VERSION,
};
pub use agent_protocol::{Exit, Level, Power, Stage, WinSize, features};
use devices::console::clean;
pub use job::Job;
use job::Outgoing;
pub use talk::{JobTalk, Talk, TalkError};
pub use types::{AgentEvent, AgentFailure, ExtraError, ProtocolError, RequestError, StartRequest};

/// Bytes waiting for the channel.
const OUTGOING: usize = 4 * (MAX_PAYLOAD + OVERHEAD);
/// Noise accepted before Hello: firmware or a boot loader may have used the UART.
const MAX_NOISE: u64 = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    AwaitHello,
    Talking,
    Dead,
}

/// The conversation with one agent about one command, and some beside it.
pub struct AgentClient {
    state: State,
    decoder: Box<Decoder>,
    /// See [`features`].
    features: u32,
    main: Job,
    extra: Vec<Job>,
    /// Which command may say something next.
    turn: usize,
    shutdown: Option<Power>,
    /// Addresses that interfaces have, and those that they get.
    addresses: Vec<[[u8; 6]; 2]>,
    widened: bool,
    outgoing: Outgoing,
    /// Nothing is sent, so that the agent waits for its command.
    held: bool,
}

impl AgentClient {
    /// A client that will have `request` run once the agent says Hello.
    ///
    /// # Errors
    /// When the request does not fit the protocol's limits.
    pub fn new(request: &StartRequest) -> Result<Self, RequestError> {
        Ok(Self {
            state: State::AwaitHello,
            decoder: Box::default(),
            features: 0,
            main: Job::new(0, request, 0)?,
            extra: Vec::new(),
            turn: 0,
            shutdown: None,
            addresses: Vec::new(),
            widened: false,
            outgoing: Outgoing::new(OUTGOING),
            held: false,
        })
    }

    /// A client for an agent that said Hello in another process, with these `features`, and takes `window`
    /// bytes of input before it grants more. Nothing waits to be sent before the next call.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn resumed(
        request: &StartRequest,
        features: u32,
        window: u32,
    ) -> Result<Self, RequestError> {
        let mut client = Self::new(request)?;
        (client.state, client.features) = (State::Talking, features);
        client.main.set_guest_window(window.min(MAX_GUEST_WINDOW));
        Ok(client)
    }

    /// Has nothing sent, also after Hello: the agent waits.
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// Whether it does.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// The window of an agent that has said Hello, was told nothing and has said nothing halfway.
    pub fn ready(&self) -> Option<u32> {
        let untold = self.held && self.outgoing.bytes().is_empty() && self.extra.is_empty();
        let ready = self.state == State::Talking && untold && self.decoder.is_empty();
        self.main.waiting().filter(|_| ready)
    }

    /// Takes bytes from the channel and appends what they mean to `events`.
    ///
    /// At most [`HOST_WINDOW`](agent_protocol::HOST_WINDOW) bytes of output, or [`MAX_HOST_WINDOW`] after
    /// [`Self::widen`], are in events that have not been consumed.
    pub fn received(&mut self, mut bytes: &[u8], events: &mut Vec<AgentEvent>) {
        // Apart from self while a frame lies in it.
        let mut decoder = std::mem::take(&mut self.decoder);
        while self.state != State::Dead {
            let noise_allowed = if self.state == State::AwaitHello {
                MAX_NOISE
            } else {
                decoder.skipped()
            };
            let result = decoder.decode(&mut bytes).map(|frame| {
                let job = frame.job();
                match FromGuest::parse(frame) {
                    Ok(message) => self.on_message(job, message),
                    Err(bad) => Err(ProtocolError::Malformed { kind: bad.kind }),
                }
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

    fn on_message(
        &mut self,
        job: u8,
        message: FromGuest<'_>,
    ) -> Result<Option<AgentEvent>, ProtocolError> {
        let talking = self.state == State::Talking;
        let event = match message {
            FromGuest::Hello(hello) if !talking => {
                if hello.version != VERSION {
                    return Err(ProtocolError::Version {
                        guest: hello.version,
                    });
                }
                self.state = State::Talking;
                self.features = hello.features;
                let window = hello.window.min(MAX_GUEST_WINDOW);
                self.main.set_guest_window(window);
                AgentEvent::Hello {
                    features: hello.features,
                    release: clean(hello.release),
                }
            }
            FromGuest::Log { level, text } if talking => AgentEvent::Log {
                level,
                text: clean(text),
            },
            FromGuest::Stopping(power) if talking => AgentEvent::Stopping(power),
            message if talking && job == 0 => return self.main.on_message(message),
            message if talking => return self.on_extra(job, message),
            message => {
                return Err(ProtocolError::OutOfPlace {
                    message: name(&message),
                });
            }
        };
        Ok(Some(event))
    }

    fn on_extra(
        &mut self,
        number: u8,
        message: FromGuest<'_>,
    ) -> Result<Option<AgentEvent>, ProtocolError> {
        let Some(at) = self.extra.iter().position(|job| job.number() == number) else {
            return Err(ProtocolError::OutOfPlace {
                message: name(&message),
            });
        };
        let Some(job) = self.extra.get_mut(at) else {
            return Ok(None);
        };
        let orphaned = job.is_orphaned();
        let event = job.on_message(message)?;
        if job.has_ended() {
            self.extra.remove(at);
        }
        let event = event.filter(|_| !orphaned);
        Ok(event.map(|event| AgentEvent::Extra(number, Box::new(event))))
    }

    /// The channel loses nothing, so more may be on its way. Once.
    pub fn widen(&mut self) {
        if !std::mem::replace(&mut self.widened, true) {
            self.main.widen(MAX_HOST_WINDOW);
            self.fill();
        }
    }

    /// So many bytes of Stdout and Stderr have been written: the guest may send as many more.
    pub fn consumed(&mut self, bytes: usize) {
        self.main.consumed(bytes);
        self.fill();
    }

    /// Bytes for the channel; a bounded number. Report with [`Self::sent`] what it took.
    pub fn outgoing(&self) -> &[u8] {
        self.outgoing.bytes()
    }

    /// The channel took the first `n` bytes of [`Self::outgoing`].
    pub fn sent(&mut self, n: usize) {
        self.outgoing.sent(n);
        self.fill();
    }

    /// Input for the command; returns how many bytes were accepted, 0 when there is no room: read
    /// no more until [`Self::wants_stdin`].
    pub fn stdin(&mut self, bytes: &[u8]) -> usize {
        if !self.wants_stdin() {
            return 0;
        }
        let taken = self.main.stdin(bytes);
        self.fill();
        taken
    }

    /// There is room for input, and the command may still read it.
    pub fn wants_stdin(&self) -> bool {
        self.state != State::Dead && self.main.wants_stdin()
    }

    /// There is no more input.
    pub fn stdin_eof(&mut self) {
        self.main.stdin_eof();
        self.fill();
    }

    /// The terminal has a new size. Of several, the last is sent.
    pub fn resize(&mut self, size: WinSize) {
        self.main.resize(size);
        self.fill();
    }

    /// Sends a signal to the command's process group, once it runs.
    pub fn signal(&mut self, signal: u8) {
        self.main.signal(signal);
        self.fill();
    }

    /// Asks the guest to go down in an orderly way.
    pub fn shutdown(&mut self, power: Power) {
        self.shutdown = Some(power);
        self.fill();
    }

    /// Gives the network interface with the one address the other, before anything else is said. An agent of an older
    /// bulle, without [`features::ADDRESS`], is not told.
    pub fn change_address(&mut self, from: [u8; 6], to: [u8; 6]) {
        self.addresses.push([from, to]);
        self.fill();
    }

    /// The agent has said Hello.
    pub fn is_connected(&self) -> bool {
        self.state == State::Talking
    }

    /// Has another command run beside the main one; returns its number, which its events have.
    ///
    /// # Errors
    /// The main command does not run, the agent knows no others, or there are enough.
    pub fn begin(&mut self, request: &StartRequest) -> Result<u8, ExtraError> {
        if !self.is_connected() || !self.main.is_running() {
            return Err(ExtraError::NotRunning);
        }
        if self.features & features::EXTRA == 0 {
            return Err(ExtraError::Unsupported);
        }
        let is_free = |number: &u8| self.extra.iter().all(|job| job.number() != *number);
        let Some(number) = (1..=MAX_EXTRA as u8).find(is_free) else {
            return Err(ExtraError::TooMany);
        };
        let window = self.main.guest_window().min(EXTRA_WINDOW);
        self.extra.push(Job::new(number, request, window)?);
        self.fill();
        Ok(number)
    }

    /// Does something with the command `number`; `None` once it has ended.
    pub fn with<R>(&mut self, number: u8, act: impl FnOnce(&mut Job) -> R) -> Option<R> {
        let mut extra = self.extra.iter_mut();
        let result = extra.find(|job| job.number() == number).map(act);
        self.fill();
        result
    }

    /// Moves what may be sent now into the outgoing buffer, most urgent first.
    fn fill(&mut self) {
        if self.is_connected() && !self.held {
            while self.outgoing.fits() && self.send_next() {}
        }
    }

    /// Sends one message if there is one to send.
    fn send_next(&mut self) -> bool {
        let out = &mut self.outgoing;
        if self.features & features::ADDRESS != 0
            && let Some([from, to]) = self.addresses.pop()
        {
            out.send(0, FromHost::Address { from, to });
            return true;
        }
        if self.main.grant(out) {
            return true;
        }
        if let Some(power) = self.shutdown.take() {
            out.send(0, FromHost::Shutdown(power));
            return true;
        }
        // The agent takes one Start after the other.
        let starting = self.extra.iter().position(Job::is_starting);
        let count = 1 + self.extra.len();
        for place in 0..count {
            let turn = (self.turn + place) % count;
            let sent = match turn.checked_sub(1) {
                None => self.main.send_next(out, true),
                Some(at) => self
                    .extra
                    .get_mut(at)
                    .is_some_and(|job| job.grant(out) || job.send_next(out, starting == Some(at))),
            };
            if sent {
                self.turn = turn + 1;
                return true;
            }
        }
        false
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
