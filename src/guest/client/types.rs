//! What goes into an [`AgentClient`] and what comes out of it.

use std::ffi::OsString;
use std::io;

use agent_protocol::{
    Exit, Level, MAX_EXTRA, MAX_START, MAX_STRINGS, Power, Stage, VERSION, WinSize,
};

#[cfg(doc)]
use super::{AgentClient, features};

/// What to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartRequest {
    /// Program and arguments; the program is looked for in the environment's PATH.
    pub argv: Vec<OsString>,
    /// The whole environment, `NAME=value` each.
    pub env: Vec<OsString>,
    /// Working directory; `/` if `None`.
    pub cwd: Option<OsString>,
    /// Run on a pseudo-terminal of this size; stderr then comes as stdout.
    pub tty: Option<WinSize>,
}

/// Why a command cannot be sent to a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No program.
    #[error("no command is given; name a program to run in the guest")]
    Empty,
    /// A string with NUL.
    #[error("an argument, environment variable or the working directory contains a NUL byte")]
    Nul,
    /// Too many strings.
    #[error(
        "the command has {count} arguments and environment variables; at most {MAX_STRINGS} fit"
    )]
    TooMany {
        /// Arguments and variables together.
        count: usize,
    },
    /// Too many bytes.
    #[error("the command and its environment have {bytes} bytes; at most {MAX_START} fit")]
    TooLong {
        /// Length with overhead.
        bytes: usize,
    },
}

/// Why a command does not run beside the main one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtraError {
    /// There is no main one.
    #[error("the guest's first command does not run: try again once it does, and before it ends")]
    NotRunning,
    /// The agent is of an older bulle.
    #[error("the agent in this guest runs one command only: it is that of an older bulle")]
    Unsupported,
    /// There are enough.
    #[error(
        "{MAX_EXTRA} commands run beside the first already, which is the most: end one of them first"
    )]
    TooMany,
    /// The command does not fit.
    #[error(transparent)]
    Request(#[from] RequestError),
}

/// The guest broke the protocol. Nothing more will come from it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Another version.
    #[error(
        "the guest's agent speaks version {guest} of the protocol, this bulle {VERSION}; use the agent of this bulle"
    )]
    Version {
        /// Its version.
        guest: u16,
    },
    /// Bytes that are not frames.
    #[error(
        "{bytes} bytes on the agent's channel are not from the agent; is a console of the guest on it too?"
    )]
    Noise {
        /// How many so far.
        bytes: u64,
    },
    /// An intact frame without meaning.
    #[error("the guest's agent sent an unknown or malformed message of kind {kind:#04x}")]
    Malformed {
        /// The frame's kind.
        kind: u8,
    },
    /// A message at the wrong time.
    #[error("the guest's agent sent {message} out of place")]
    OutOfPlace {
        /// Its name.
        message: &'static str,
    },
    /// More output than credit.
    #[error("the guest's agent sent {excess} bytes of output more than it may")]
    Window {
        /// Bytes too many.
        excess: u32,
    },
}

/// Why the agent could not run the command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentFailure {
    /// What it was doing.
    pub stage: Stage,
    /// Linux error number, 0 if none.
    pub errno: u16,
    /// The path or sentence it is about.
    pub text: String,
}

impl AgentFailure {
    /// The exit code a shell would give: 127 not found, 126 not executable; 125 for other failures.
    pub fn exit_code(&self) -> u8 {
        let not_found = [libc::ENOENT, libc::ENOTDIR].contains(&i32::from(self.errno));
        match self.stage {
            Stage::Interpreter => 127,
            Stage::Exec if not_found => 127,
            Stage::Exec => 126,
            _ => 125,
        }
    }
}

impl std::fmt::Display for AgentFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { stage, errno, text } = self;
        let reason = io::Error::from_raw_os_error(i32::from(*errno));
        match stage {
            Stage::Protocol => write!(f, "{text}"),
            Stage::Pipe => write!(f, "the guest cannot make pipes for {text}: {reason}"),
            Stage::Pty => write!(f, "the guest cannot make a terminal for {text}: {reason}"),
            Stage::Fork => write!(f, "the guest cannot make a process for {text}: {reason}"),
            Stage::Cwd => write!(
                f,
                "cannot change to directory {text} in the guest: {reason}"
            ),
            Stage::Exec if self.exit_code() == 127 => write!(f, "{text}: not found in the guest"),
            Stage::Exec => write!(f, "{text}: cannot execute in the guest: {reason}"),
            Stage::Root => write!(f, "the guest has no root file system: {text}: {reason}"),
            Stage::Interpreter => write!(
                f,
                "{text}: its interpreter or dynamic loader is not found in the guest"
            ),
        }
    }
}

/// What the guest told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentEvent {
    /// The agent is up.
    Hello {
        /// See [`features`].
        features: u32,
        /// The guest kernel's release.
        release: String,
    },
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Output; acknowledge with [`AgentClient::consumed`] when it is written.
    Stdout(Vec<u8>),
    /// Error output; acknowledge with [`AgentClient::consumed`] when it is written.
    Stderr(Vec<u8>),
    /// The command ended and all its output has come.
    Exited(Exit),
    /// The command could not be run.
    Failed(AgentFailure),
    /// A note.
    Log {
        /// How important.
        level: Level,
        /// The note.
        text: String,
    },
    /// The guest goes down without the command having ended by itself.
    Stopping(Power),
    /// About the command beside the main one that has this number.
    Extra(u8, Box<AgentEvent>),
    /// The guest broke the protocol; the last event.
    ProtocolError(ProtocolError),
}
