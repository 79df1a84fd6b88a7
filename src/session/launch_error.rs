//! Why a run never came to an outcome.

use std::io;

use arch::kernel::KernelError;

use super::console::ConsoleFileError;
use crate::board::plan::PlanError;
use crate::control::ActionError;
use crate::guest::client::{RequestError, TalkError};
use crate::guest::prepare::PrepareError;
use crate::registry::RegistryError;
use crate::snapshot::template::TemplateError;
use crate::telemetry::LogFileError;
use crate::vm::BuildError;

/// A run that never came to an outcome.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The kernel cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// What goes into the guest cannot be prepared.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The command does not fit the agent's protocol.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A device lacks something of the host.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// File of figures.
    #[error(transparent)]
    LogFile(#[from] LogFileError),
    /// The name.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Console file.
    #[error(transparent)]
    Console(#[from] ConsoleFileError),
    /// The host's side of the session.
    #[error("Cannot set up the session: {what}")]
    Session {
        /// Which part.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// A command for a guest without agent.
    #[error(
        "The snapshot's guest has no agent of bulle's that could run a command: leave the command out"
    )]
    NoAgent,
    /// A command for a guest that has one.
    #[error(
        "The snapshot's guest was saved with its command, which goes on: leave yours out, and run it with bulle exec"
    )]
    Busy,
    /// A conversation with the agent.
    #[error("The snapshot cannot be used")]
    Talk(#[from] TalkError),
    /// A snapshot.
    #[error(transparent)]
    Load(#[from] ActionError),
    /// What a clone is made of.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The event loop.
    #[error("The event loop failed")]
    Loop(#[source] event_manager::Error),
}

/// Something of the host's side does not work.
pub fn session(what: &'static str, source: io::Error) -> LaunchError {
    LaunchError::Session { what, source }
}
