//! What may be asked of a microVM and what comes back, whoever asks and however.
//!
//! [`Action`] is the whole public surface. Before the start [`Preboot`] answers, which collects a
//! configuration; after it `session::runtime` does, which has the machine. Both run on the vmm
//! thread; other threads hand their actions over through a [`Caller`]. Names no KVM type.

mod call;
mod preboot;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use call::{Call, Caller, Requests, channel};
pub use preboot::Preboot;

use crate::config::{
    BootSource, Config, ConfigError, Drive, Entropy, HugePages, MachineConfig,
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

/// Processors and memory as they are set or changed: what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineUpdate {
    /// Number of vCPUs.
    pub vcpu_count: Option<u16>,
    /// RAM in MiB.
    pub mem_size_mib: Option<u64>,
    /// Two threads per core.
    pub smt: Option<bool>,
    /// Page size of RAM on the host.
    pub huge_pages: Option<HugePages>,
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

impl MachineUpdate {
    /// `machine` with the changes.
    pub fn apply(&self, machine: &MachineConfig) -> MachineConfig {
        let mut machine = machine.clone();
        machine.vcpu_count = self.vcpu_count.unwrap_or(machine.vcpu_count);
        machine.mem_size_mib = self.mem_size_mib.unwrap_or(machine.mem_size_mib);
        machine.huge_pages = self.huge_pages.unwrap_or(machine.huge_pages);
        if let Some(smt) = self.smt {
            machine.threads_per_core = if smt { 2 } else { 1 };
        }
        machine
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
    /// A machine-config without what it must have.
    #[error("missing field `{field}`: a machine needs its number of vCPUs and its memory")]
    Missing {
        /// Name of the field.
        field: &'static str,
    },
    /// The machine cannot be built. The text has the causes.
    #[error("Start microvm error: {text}")]
    Start {
        /// Causes, joined.
        text: String,
    },
    /// The machine does not do it.
    #[error("{text}")]
    Machine {
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
