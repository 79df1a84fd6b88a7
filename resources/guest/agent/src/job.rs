//! A command on behalf of the host, with the flow control of its input and output: the main one, or one of
//! those beside it.

use agent_protocol::start::StartView;
use agent_protocol::{Exit, FromGuest, FromHost, MAX_PAYLOAD, Stage};
use rustix::event::PollFlags;
use rustix::fd::OwnedFd;
use rustix::process::Pid;

use crate::command::{Command, Input};
use crate::exec::Failure;
use crate::link::Link;

/// Files that one may have to wait for: its input and two outputs.
pub const FILES: usize = 3;

/// A command that runs, or none; `N` bytes of its input are held.
pub struct Job<const N: usize> {
    number: u8,
    /// Input bytes that may be on their way here.
    window: u32,
    command: Option<Command>,
    input: Input<N>,
    /// Output bytes that the host still takes.
    credit: u64,
    /// Input bytes that the host is to be told are consumed.
    owed: u32,
}

impl<const N: usize> Job<N> {
    /// No command yet, of which at most `window` bytes of input come at once.
    pub const fn new(number: u8, window: u32) -> Self {
        Self {
            number,
            window,
            command: None,
            input: Input::new(),
            credit: 0,
            owed: 0,
        }
    }

    /// Whether there is a command.
    pub fn is_running(&self) -> bool {
        self.command.is_some()
    }

    /// Forgets what belonged to a command before.
    pub fn clear(&mut self) {
        self.input.clear();
        (self.credit, self.owed) = (0, 0);
    }

    /// Nobody reads input any more.
    pub fn clear_input(&mut self) {
        self.input.clear();
    }

    /// So many bytes of input are done with.
    pub fn consumed(&mut self, bytes: usize) {
        self.owed += bytes as u32;
    }

    /// The host takes output as `start` says.
    pub fn grant(&mut self, start: &StartView<'_>) {
        self.credit += u64::from(start.window);
    }

    /// Starts it and tells the host; `false` if it cannot be started.
    pub fn start(&mut self, start: &StartView<'_>, link: &mut Link) -> bool {
        match Command::spawn(start) {
            Ok(command) => {
                let pid = command.pid().as_raw_pid() as u32;
                self.command = Some(command);
                link.send_for(self.number, &FromGuest::Started { pid });
                true
            }
            Err(Failure { stage, errno }) => {
                let index = if stage == Stage::Cwd { 0 } else { 1 };
                let text = start.strings().nth(index).unwrap_or_default();
                let text = text.strip_suffix(b"\0").unwrap_or(text);
                let errno = errno.raw_os_error() as u16;
                link.send_for(self.number, &FromGuest::Failed { stage, errno, text });
                false
            }
        }
    }

    /// Acts on a message; `false` if it is out of place.
    pub fn on_message(&mut self, message: FromHost<'_>) -> bool {
        match message {
            FromHost::Stdin(bytes) => return self.input.push(bytes),
            FromHost::StdinEof => self.input.eof = true,
            FromHost::Resize(size) => {
                if let Some(command) = &self.command {
                    command.resize(size);
                }
            }
            FromHost::Signal(signal) => self.signal(signal),
            FromHost::Credit(n) => self.credit = self.credit.saturating_add(u64::from(n)),
            FromHost::Start { .. } | FromHost::Shutdown(_) | FromHost::Address { .. } => {
                return false;
            }
        }
        true
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: u8) {
        if let Some(command) = &self.command {
            command.signal(signal);
        }
    }

    /// Does what needs no waiting: input, credit. How the command ended, once that is all.
    pub fn advance(&mut self, link: &mut Link) -> Option<Exit> {
        let stalled = self.is_stalled(link);
        let mut outcome = None;
        if let Some(command) = &mut self.command {
            self.owed += self.input.pass_to(command) as u32;
            if self.input.eof && self.input.is_empty() {
                command.close_stdin();
            }
            outcome = command.outcome(stalled).ok();
        }
        // Not for every byte: each costs the host an exit. The rest of the window still moves.
        if self.owed >= self.window / 4 && link.send_for(self.number, &FromGuest::Credit(self.owed))
        {
            self.owed = 0;
        }
        if outcome.is_some() {
            self.command = None;
        }
        outcome
    }

    /// Output waits for the host.
    fn is_stalled(&self, link: &Link) -> bool {
        self.credit == 0 || !link.has_room_for_output()
    }

    /// When to look again though nothing has happened, in milliseconds.
    pub fn timeout(&mut self, link: &Link) -> Option<u64> {
        let stalled = self.is_stalled(link);
        self.command.as_mut()?.outcome(stalled).err().flatten()
    }

    /// What to wait for: its input (0) and its outputs (1 and 2).
    pub fn file(&self, index: usize, link: &Link) -> Option<(&OwnedFd, PollFlags)> {
        let command = self.command.as_ref()?;
        match index {
            0 if self.input.is_empty() => None,
            0 => command.stdin().map(|file| (file, PollFlags::OUT)),
            _ if self.is_stalled(link) => None,
            _ => command.output(index - 1).map(|file| (file, PollFlags::IN)),
        }
    }

    /// The process `pid` has ended, if it is this one.
    pub fn on_exit(&mut self, pid: Pid, exit: Exit) {
        if let Some(command) = self.command.as_mut().filter(|c| c.pid() == pid) {
            command.on_exit(exit);
        }
    }

    /// Sends output 0 or 1, as far as the host takes it.
    pub fn pass_output(&mut self, index: usize, link: &mut Link) {
        let mut buffer = [0; MAX_PAYLOAD];
        while !self.is_stalled(link)
            && let Some(command) = &mut self.command
        {
            let room = (self.credit as usize).min(MAX_PAYLOAD);
            let n = command.read(index, &mut buffer[..room]);
            if n == 0 {
                return;
            }
            self.credit -= n as u64;
            let bytes = &buffer[..n];
            let message = if index == 0 {
                FromGuest::Stdout(bytes)
            } else {
                FromGuest::Stderr(bytes)
            };
            link.send_for(self.number, &message);
        }
    }
}
