//! Commands that clients of the API run in the guest, through the agent, beside its first one.
//!
//! Each has a client on a stream of lines of JSON, both ways: [`Line`] from here, [`ExecInput`] from there. Output that the client does not
//! take is not granted to the guest again, so nothing grows, and the command waits as for any slow reader.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::sys::epoll::{Epoll, EpollEvent};
use nix::sys::signal::Signal;
use serde::Serialize;

use super::agent::AgentLink;
use super::duplex::Duplex;
use super::runtime::STREAM;
use crate::config::Guest;
use crate::control::{ActionError, ExecInput, ExecRequest, Stream};
use crate::guest::client::{AgentEvent, Exit, Job, WinSize};

/// Bytes of input taken at once.
const CHUNK: usize = 16 << 10;
/// Most bytes of a line of input.
const MAX_LINE: usize = 256 << 10;
/// Content type of the stream.
const CONTENT_TYPE: &str = "application/x-ndjson";

/// What a client is told.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Line<'a> {
    /// It runs.
    Started { pid: u32 },
    /// Output that is text.
    Stdout(&'a str),
    /// Error output that is text.
    Stderr(&'a str),
    /// Other output.
    StdoutBase64(String),
    /// Other error output.
    StderrBase64(String),
    /// It exited with this code. Nothing follows.
    Exited { code: u8 },
    /// It was killed by this signal. Nothing follows.
    Killed { signal: u8 },
    /// It was not started, with the exit code that a shell gives. Nothing follows.
    Failed { exit_code: u8, text: String },
    /// A line of input that is none.
    Refused { text: String },
}

struct Exec {
    number: u8,
    client: Duplex,
    /// Bytes of output that the client has not taken yet.
    unconsumed: usize,
    /// The beginning of a line of input.
    line: Vec<u8>,
    /// Input that the agent has not taken yet.
    stdin: Vec<u8>,
    stdin_ended: bool,
    ended: bool,
    /// The client went away, and the command was told.
    orphaned: bool,
}

/// All of them.
#[derive(Default)]
pub struct Execs(Vec<Exec>);

impl Execs {
    /// Runs another command, in the environment of `guest`'s.
    pub fn begin(
        &mut self,
        request: &ExecRequest,
        (agent, guest): (Option<&mut AgentLink>, Option<&Guest>),
        ready: &Epoll,
    ) -> Result<Stream, ActionError> {
        let (Some(agent), Some(guest)) = (agent, guest) else {
            return Err(ActionError::NoAgent);
        };
        let (client, stream) = Duplex::new(CONTENT_TYPE)?;
        // What it waits for is said when it is served, which is next.
        let added = ready.add(&client, EpollEvent::empty());
        added.map_err(|errno| ActionError::Failed {
            text: errno.to_string(),
        })?;
        let number = agent.begin(request, guest)?;
        self.0.push(Exec {
            number,
            client,
            unconsumed: 0,
            line: Vec::new(),
            stdin: Vec::new(),
            stdin_ended: !request.stdin,
            ended: false,
            orphaned: false,
        });
        self.serve(agent, ready);
        Ok(stream)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Passes on what there is, both ways.
    pub fn serve(&mut self, agent: &mut AgentLink, ready: &Epoll) {
        for (number, event) in agent.take_extra() {
            let mut running = self.0.iter_mut().filter(|exec| !exec.ended);
            if let Some(exec) = running.find(|exec| exec.number == number) {
                exec.on_event(&event);
            }
        }
        for exec in &mut self.0 {
            exec.serve(agent);
            if exec.orphaned {
                continue;
            }
            let wanted = exec.client.wants(exec.stdin.is_empty());
            let mut event = EpollEvent::new(wanted, STREAM);
            if let Err(errno) = ready.modify(&exec.client, &mut event) {
                log::warn!("a client of a command is not waited for: {errno}");
            }
        }
        self.0
            .retain(|exec| !exec.ended || exec.client.waiting() > 0);
    }
}

impl Exec {
    fn tell(&mut self, line: &Line<'_>) {
        if let Ok(mut text) = serde_json::to_string(line) {
            text.push('\n');
            self.client.push(text.as_bytes());
        }
    }

    fn on_event(&mut self, event: &AgentEvent) {
        match event {
            AgentEvent::Started { pid } => self.tell(&Line::Started { pid: *pid }),
            AgentEvent::Stdout(bytes) => {
                self.unconsumed += bytes.len();
                match std::str::from_utf8(bytes) {
                    Ok(text) => self.tell(&Line::Stdout(text)),
                    Err(_) => self.tell(&Line::StdoutBase64(BASE64.encode(bytes))),
                }
            }
            AgentEvent::Stderr(bytes) => {
                self.unconsumed += bytes.len();
                match std::str::from_utf8(bytes) {
                    Ok(text) => self.tell(&Line::Stderr(text)),
                    Err(_) => self.tell(&Line::StderrBase64(BASE64.encode(bytes))),
                }
            }
            AgentEvent::Exited(exit) => {
                self.ended = true;
                self.tell(&match *exit {
                    Exit::Code(code) => Line::Exited { code },
                    Exit::Signal(signal) => Line::Killed { signal },
                });
            }
            AgentEvent::Failed(failure) => {
                self.ended = true;
                self.tell(&Line::Failed {
                    exit_code: failure.exit_code(),
                    text: failure.to_string(),
                });
            }
            _ => {}
        }
    }

    fn serve(&mut self, agent: &mut AgentLink) {
        self.client.flush();
        self.take_input(agent);
        if self.client.is_gone() && !self.orphaned {
            self.orphaned = true;
            self.stdin_ended = true;
            agent.with(self.number, |job| job.signal(Signal::SIGHUP as u8));
        }
        let taken = std::mem::take(&mut self.stdin);
        let (unconsumed, ended) = (self.unconsumed, self.stdin_ended);
        let drained = self.client.waiting() == 0;
        let left = agent.with(self.number, |job| {
            if drained {
                job.consumed(unconsumed);
            }
            let n = job.stdin(&taken);
            if ended && n == taken.len() {
                job.stdin_eof();
            }
            n
        });
        if drained {
            self.unconsumed = 0;
        }
        // Of a command that has ended nobody reads any more.
        let n = left.unwrap_or(taken.len());
        self.stdin = taken.get(n..).unwrap_or_default().to_vec();
    }

    /// Reads lines of input until there is some for the command.
    fn take_input(&mut self, agent: &mut AgentLink) {
        while self.stdin.is_empty() && !self.client.is_gone() {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                match serde_json::from_slice::<ExecInput>(&line) {
                    Ok(input) => self.on_input(input, agent),
                    Err(error) => self.refuse(error.to_string()),
                }
                continue;
            }
            if self.line.len() > MAX_LINE {
                self.line.clear();
                self.refuse(format!("a line has more than {MAX_LINE} bytes"));
            }
            let bytes = self.client.read(CHUNK);
            if bytes.is_empty() {
                self.stdin_ended |= self.client.has_ended();
                return;
            }
            self.line.extend(bytes);
        }
    }

    fn refuse(&mut self, text: String) {
        self.tell(&Line::Refused { text });
    }

    fn on_input(&mut self, input: ExecInput, agent: &mut AgentLink) {
        let mut to_command = |act: &dyn Fn(&mut Job)| {
            agent.with(self.number, |job| act(job));
        };
        match input {
            ExecInput::Stdin(text) => self.stdin = text.into_bytes(),
            ExecInput::StdinBase64(text) => match BASE64.decode(text) {
                Ok(bytes) => self.stdin = bytes,
                Err(error) => self.refuse(error.to_string()),
            },
            ExecInput::CloseStdin => self.stdin_ended = true,
            ExecInput::Resize { rows, cols } => {
                to_command(&|job| job.resize(WinSize { rows, cols }))
            }
            ExecInput::Signal(signal) => to_command(&|job| job.signal(signal)),
        }
        if self.stdin_ended {
            self.stdin.clear();
        }
    }
}
