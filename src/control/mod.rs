//! What may be asked of a microVM and what comes back, whoever asks and however.
//!
//! [`Action`] is the whole public surface. Before the start [`Preboot`] answers, which collects a
//! configuration; after it `session::runtime` does, which has the machine. Both run on the vmm
//! thread; other threads hand their actions over through a [`Caller`]. Names no KVM type.

mod call;
mod preboot;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

pub use call::{Call, Caller, Requests, channel};
pub use preboot::Preboot;

use crate::config::{
    BootSource, Config, ConfigError, Drive, Entropy, MachineConfig, MachineError, MachineUpdate,
};

/// One thing asked of a microVM.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Who and in which state it is.
    DescribeInstance,
    /// The version of bulle.
    Version,
    /// The whole configuration.
    GetConfig,
    /// Processors and memory.
    GetMachine,
    /// Sets processors and memory.
    PutMachine(MachineUpdate),
    /// Changes some of processors and memory.
    PatchMachine(MachineUpdate),
    /// Sets kernel, initial RAM disk and command line.
    PutBootSource(BootSource),
    /// Adds a disk, or replaces the one of that name.
    PutDrive(Drive),
    /// Adds the entropy device.
    PutEntropy(Entropy),
    /// Builds the machine and lets it run.
    InstanceStart,
    /// Presses Ctrl-Alt-Del.
    SendCtrlAltDel,
    /// Stops every vCPU.
    Pause,
    /// Lets every vCPU go on.
    Resume,
}

/// What an action comes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It is done.
    Done,
    /// Who and in which state the microVM is.
    Instance(Instance),
    /// A version.
    Version(&'static str),
    /// Processors and memory.
    Machine(MachineConfig),
    /// The whole configuration.
    Config(Box<Config>),
}

/// Who and in which state a microVM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its name.
    pub id: String,
    /// What it does.
    pub state: State,
    /// Version of bulle.
    pub vmm_version: &'static str,
    /// What serves it; clients of Firecracker look for that name.
    pub app_name: &'static str,
}

/// What a microVM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum State {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

impl Instance {
    /// The microVM `id`, not started.
    pub fn new(id: String) -> Self {
        Self {
            id,
            state: State::NotStarted,
            vmm_version: env!("CARGO_PKG_VERSION"),
            app_name: "Firecracker",
        }
    }
}

/// An action cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// Too early.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// Too late.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// No kernel.
    #[error("Start microvm error: Cannot start microvm without kernel configuration.")]
    NoKernel,
    /// A value or combination.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Processors and memory.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No such kernel.
    #[error("The kernel file cannot be opened: {0}")]
    Kernel(#[source] io::Error),
    /// No such initial RAM disk.
    #[error("The initrd file cannot be opened due to invalid path or invalid permissions. {0}")]
    Initrd(#[source] io::Error),
    /// No such image.
    #[error("Unable to create the virtio block device '{id}': cannot open {}: {source}", path.display())]
    Drive {
        /// Name of the drive.
        id: String,
        /// As asked for.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The machine cannot be built. The text has the causes.
    #[error("Start microvm error: {text}")]
    Start {
        /// Causes, joined.
        text: String,
    },
    /// The machine does not do it.
    #[error("{text}")]
    Failed {
        /// Causes, joined.
        text: String,
    },
    /// Ctrl-Alt-Del that nobody reads.
    #[error("the guest does not read its keyboard: Ctrl-Alt-Del is lost")]
    Keyboard,
    /// The microVM ended before it answered.
    #[error("the microVM ended")]
    Ended,
}

/// How long a pause may take.
pub const PAUSE_PATIENCE: Duration = Duration::from_secs(30);

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
