//! How a run ended, and the exit code and message that tell it (docs/exit-codes.md).

use std::fmt;
use std::time::Duration;

use devices::bus::ExitReason;

use crate::control::Event;
use crate::snapshot::uffd::watch::HandlerLost;
use crate::vcpu::Failure;
use crate::vm::VmExit;

/// The guest did not feed its watchdog.
pub const CODE_WATCHDOG: u8 = 120;
/// The guest kernel panicked.
pub const CODE_PANIC: u8 = 121;
/// Triple fault, or KVM could not go on.
pub const CODE_VM_FAILURE: u8 = 122;
/// The guest ended before the command's status was known.
pub const CODE_NO_STATUS: u8 = 123;
/// The time limit was reached.
pub const CODE_TIMEOUT: u8 = 124;
/// bulle itself failed.
pub const CODE_FAILURE: u8 = 125;
/// Added to the number of a signal.
const SIGNAL_BASE: u8 = 128;

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The command exited with this status.
    Exited(u8),
    /// The command was killed by this signal.
    Killed(u8),
    /// The command was never started; the code is 125, 126 or 127.
    NotStarted {
        /// Exit code.
        code: u8,
        /// What the agent says of it.
        text: String,
    },
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest kernel panicked.
    Panicked,
    /// A byte on the debug-exit port.
    DebugExit(u8),
    /// The guest did not feed its watchdog.
    Watchdog,
    /// A vCPU could not go on.
    Failed(Box<Failure>),
    /// Nobody brings the guest's memory any more.
    HandlerLost(HandlerLost),
    /// The time limit was reached.
    Timeout(Duration),
    /// A signal to bulle ended the VM.
    Signal(i32),
    /// The guest switched itself off because it was asked to, before its command ended.
    Stopped,
    /// `Ctrl-A x`.
    Quit,
    /// The agent broke its protocol.
    AgentLost(String),
    /// The machine was saved as it was asked for, and ended.
    Saved,
    /// It could not be saved.
    NotSaved(String),
}

impl From<VmExit> for Outcome {
    fn from(exit: VmExit) -> Self {
        match exit {
            VmExit::Guest(ExitReason::PowerOff) => Self::PowerOff,
            VmExit::Guest(ExitReason::Reset) => Self::Reset,
            VmExit::Guest(ExitReason::Panicked) => Self::Panicked,
            VmExit::Guest(ExitReason::DebugExit(code)) => Self::DebugExit(code),
            VmExit::Guest(ExitReason::Watchdog) => Self::Watchdog,
            VmExit::Failed(failure) => Self::Failed(failure),
            VmExit::HandlerLost(lost) => Self::HandlerLost(lost),
        }
    }
}

impl Outcome {
    /// The exit code. `command` says whether the user named a command, whose status a reset or
    /// `Ctrl-A x` then leaves unknown.
    pub fn exit_code(&self, command: bool) -> u8 {
        match self {
            Self::Exited(code) | Self::DebugExit(code) | Self::NotStarted { code, .. } => *code,
            Self::Killed(signal) => SIGNAL_BASE.saturating_add(*signal),
            Self::PowerOff | Self::Saved => 0,
            Self::Reset | Self::Quit if command => CODE_NO_STATUS,
            Self::Reset | Self::Quit => 0,
            Self::Panicked => CODE_PANIC,
            Self::Watchdog => CODE_WATCHDOG,
            Self::Failed(_) => CODE_VM_FAILURE,
            Self::Timeout(_) => CODE_TIMEOUT,
            Self::Stopped => SIGNAL_BASE + libc::SIGTERM as u8,
            Self::Signal(signal) => SIGNAL_BASE.saturating_add(u8::try_from(*signal).unwrap_or(0)),
            Self::AgentLost(_) | Self::NotSaved(_) | Self::HandlerLost(_) => CODE_FAILURE,
        }
    }

    /// As an event. `command` as in [`exit_code`](Self::exit_code).
    pub fn event(&self, command: bool) -> Event {
        Event::Exited {
            reason: self.reason(),
            exit_code: self.exit_code(command),
            text: self.to_string(),
        }
    }

    /// A word for programs.
    fn reason(&self) -> &'static str {
        match self {
            Self::Exited(_) => "exited",
            Self::Killed(_) => "killed",
            Self::NotStarted { .. } => "not-started",
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::Panicked => "panicked",
            Self::DebugExit(_) => "debug-exit",
            Self::Watchdog => "watchdog",
            Self::Failed(_) => "failed",
            Self::HandlerLost(_) => "handler-lost",
            Self::Timeout(_) => "timeout",
            Self::Signal(_) => "signal",
            Self::Stopped => "stopped",
            Self::Quit => "quit",
            Self::AgentLost(_) => "agent-lost",
            Self::Saved => "saved",
            Self::NotSaved(_) => "not-saved",
        }
    }

    /// Whether the console's last lines help to understand it.
    pub fn wants_console(&self) -> bool {
        matches!(
            self,
            Self::Panicked
                | Self::Watchdog
                | Self::Failed(_)
                | Self::Timeout(_)
                | Self::Reset
                | Self::AgentLost(_)
        )
    }

    /// Whether a person should be told, beside the exit code.
    pub fn is_notable(&self, command: bool) -> bool {
        match self {
            Self::Exited(_)
            | Self::Killed(_)
            | Self::PowerOff
            | Self::DebugExit(_)
            | Self::Saved => false,
            Self::Reset | Self::Quit => command,
            _ => true,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "the command exited with {code}"),
            Self::Killed(signal) => write!(f, "the command was killed by signal {signal}"),
            Self::NotStarted { text, .. } => f.write_str(text),
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest reset itself before the command ended"),
            Self::Panicked => f.write_str("the guest kernel panicked"),
            Self::Watchdog => f.write_str("the guest did not feed its watchdog in time"),
            Self::DebugExit(code) => write!(f, "the guest wrote {code} to the debug-exit port"),
            Self::Failed(failure) => failure.fmt(f),
            Self::HandlerLost(lost) => lost.fmt(f),
            Self::Timeout(limit) => {
                write!(
                    f,
                    "time limit of {} reached",
                    humantime::format_duration(*limit)
                )
            }
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::Stopped => f.write_str("stopped before the command ended"),
            Self::Quit => f.write_str("ended by Ctrl-A x before the command ended"),
            Self::AgentLost(text) => write!(f, "the guest agent was lost: {text}"),
            Self::Saved => f.write_str("saved"),
            Self::NotSaved(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_as_documented() {
        let code = |outcome: Outcome| outcome.exit_code(true);
        assert_eq!(code(Outcome::Exited(37)), 37);
        assert_eq!(code(Outcome::Killed(9)), 137);
        assert_eq!(code(Outcome::PowerOff), 0);
        assert_eq!(code(Outcome::Reset), 123);
        assert_eq!(Outcome::Reset.exit_code(false), 0);
        assert_eq!(code(Outcome::Panicked), 121);
        assert_eq!(code(Outcome::Watchdog), 120);
        assert_eq!(code(Outcome::Timeout(Duration::from_secs(1))), 124);
        assert_eq!(code(Outcome::Signal(15)), 143);
        assert_eq!(code(Outcome::Stopped), 143);
        assert_eq!(code(Outcome::DebugExit(7)), 7);
    }
}
