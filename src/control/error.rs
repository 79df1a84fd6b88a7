//! Why an action cannot be done. Sentences that clients of Firecracker look for are Firecracker's.

use std::io;
use std::path::PathBuf;

use arch::cmdline::CmdlineError;
use devices::mmds::MmdsError;
use devices::virtio::balloon::BalloonError;
use devices::virtio::mem::MemError;

use crate::config::{ConfigError, MachineError};
use crate::guest::client::ExtraError;
use crate::telemetry::LogFileError;

/// An action cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// Too early.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// Too late.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// A disk that another process serves, and memory that is no other process's.
    #[error(
        "drive '{id}' with a socket cannot be added: guest memory is private to bulle, and its vhost-user backend \
         needs it shared; start the microVM with memory_backing memfd, or with such a drive"
    )]
    PrivateMemory {
        /// The drive.
        id: String,
    },
    /// What a vhost-user backend decides, or nobody.
    #[error(
        "Unable to patch the block device: Running method expected different backend. Drive '{id}' has its disk from a \
         vhost-user backend: give drive_id only, to have its configuration read again"
    )]
    OtherBackend {
        /// The drive.
        id: String,
    },
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
    /// Words for the kernel that no kernel takes.
    #[error("The kernel command line is invalid: {0}")]
    CommandLine(#[source] CmdlineError),
    /// No such socket.
    #[error(
        "Unable to create the vhost-user block device '{id}': cannot connect to {}: {source}; start its backend first",
        path.display()
    )]
    Socket {
        /// The drive.
        id: String,
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No such image.
    #[error("Unable to create the virtio {kind} device '{id}': cannot open {}: {source}", path.display())]
    File {
        /// Which kind of device.
        kind: &'static str,
        /// Its name.
        id: String,
        /// As asked for.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// A file of the log or of figures.
    #[error(transparent)]
    LogFile(#[from] LogFileError),
    /// Figures that have a place already.
    #[error("Reinitialization of metrics not allowed.")]
    MetricsTwice,
    /// A device that the microVM has not.
    #[error("Device not found: this microVM has no {kind}{}", match id { Some(id) => format!(" '{id}'"), None => String::new() })]
    NoDevice {
        /// Which kind of device.
        kind: &'static str,
        /// Its name, where there may be several.
        id: Option<String>,
    },
    /// A name that another device has.
    #[error("Device ID in use: this microVM has a device '{id}'; give another name")]
    IdInUse {
        /// The name.
        id: String,
    },
    /// Devices come and go over PCI alone.
    #[error("PCI is not enabled: start the microVM with --pci, or bulle api with --enable-pci")]
    NoPci,
    /// A root that comes when the guest has one.
    #[error("A root {kind} device already exists!")]
    SecondRoot {
        /// Which kind of device.
        kind: &'static str,
    },
    /// The guest's root.
    #[error("Cannot unplug root device: the guest runs from '{id}'")]
    UnplugRoot {
        /// The device.
        id: String,
    },
    /// A user-mode network whose addresses would change.
    #[error(
        "'{id}' cannot be unplugged before '{later}', the user-mode network whose addresses follow from its place \
         behind it: unplug that first"
    )]
    UnplugOrder {
        /// The device.
        id: String,
        /// The one behind it.
        later: String,
    },
    /// A guest that cannot let go of a device.
    #[error(
        "the guest cannot give '{id}' up while the microVM is paused: resume it, or force the removal (?force=true)"
    )]
    UnplugPaused {
        /// The device.
        id: String,
    },
    /// A guest that does not let go of a device.
    #[error(
        "the guest has not given '{id}' up within {seconds} s: it is taken away when the guest does; force the \
         removal (?force=true) to have it gone at once"
    )]
    UnplugTimeout {
        /// The device.
        id: String,
        /// How long was waited.
        seconds: u64,
    },
    /// An update without content.
    #[error(
        "Unable to patch the {kind} device '{id}': nothing is to change. Please verify the request arguments."
    )]
    NothingToChange {
        /// Which kind of device.
        kind: &'static str,
        /// Its name.
        id: String,
    },
    /// A balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A balloon that leaves nothing.
    #[error("Requested memory should be less than {mib}MiB")]
    BalloonSize {
        /// RAM of the guest in MiB.
        mib: u64,
    },
    /// Statistics that are to begin or to end.
    #[error(
        "Statistics cannot be enabled or disabled after the start: give an interval from 1 on for a balloon that has them"
    )]
    StatisticsSwitch,
    /// A memory device.
    #[error(transparent)]
    Memory(#[from] MemError),
    /// A rate limiter that cannot be changed so.
    #[error("the limits of '{id}' cannot be changed so: {why}")]
    Limits {
        /// The device.
        id: String,
        /// Why.
        why: &'static str,
    },
    /// A guest without bulle's agent.
    #[error(
        "this guest has no agent of bulle's, which runs commands: start it with `bulle run -- COMMAND`, or with a \
         guest section in its configuration"
    )]
    NoAgent,
    /// A command in the guest.
    #[error(transparent)]
    Exec(#[from] ExtraError),
    /// More at a time than there may be.
    #[error("there are {most} {what} already, which is the most: end one of them first")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        most: usize,
    },
    /// The metadata service.
    #[error("MMDS error: {0}")]
    Mmds(MmdsError),
    /// More metadata than there is room for.
    #[error("MMDS limit exceeded error: {0}")]
    MmdsLimit(MmdsError),
    /// A microVM that runs cannot be saved.
    #[error(
        "Cannot create a snapshot: save/restore unavailable while running; pause the microVM first"
    )]
    SnapshotRunning,
    /// A microVM of which a snapshot is being written.
    #[error(
        "Cannot create a snapshot: one is being written to {} in the background; wait for its end",
        path.display()
    )]
    SnapshotBusy {
        /// Its state file.
        path: PathBuf,
    },
    /// Nothing is being written.
    #[error("No snapshot is being written in the background.")]
    NoSnapshot,
    /// Its caller is gone.
    #[error("The snapshot was cancelled; what was there before still is")]
    Cancelled,
    /// The caller of a load is gone.
    #[error("Loading the snapshot was cancelled; another may be loaded")]
    LoadCancelled,
    /// A microVM of which there is something already.
    #[error("Loading a microVM snapshot not allowed after configuring boot-specific resources.")]
    LoadAfterConfig,
    /// Memory of a snapshot that is in two places, or in none.
    #[error("Cannot load a snapshot: give exactly one of mem_backend and mem_file_path")]
    LoadMemory,
    /// No machine can be made of a snapshot. The text has the causes.
    #[error("Load snapshot error: {text}")]
    Load {
        /// Causes, joined.
        text: String,
    },
    /// The machine cannot be saved. The text has the causes.
    #[error("Create snapshot error: {text}")]
    Save {
        /// Causes, joined.
        text: String,
    },
    /// What the guest touched cannot be recorded. The text has the causes.
    #[error("Record working set error: {text}")]
    WorkingSet {
        /// Causes, joined.
        text: String,
    },
    /// Nobody can have copies of the machine. The text has the causes.
    #[error("Fork error: {text}")]
    Fork {
        /// Causes, joined.
        text: String,
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

impl ActionError {
    /// A word for programs, which stays when the sentence changes.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BeforeStart => "not-started",
            Self::AfterStart | Self::LoadAfterConfig => "started",
            Self::NoKernel => "no-kernel",
            Self::Config(_) | Self::Machine(_) | Self::CommandLine(_) | Self::LoadMemory => {
                "bad-config"
            }
            Self::Kernel(_)
            | Self::Initrd(_)
            | Self::File { .. }
            | Self::Socket { .. }
            | Self::LogFile(_) => "no-file",
            Self::NoDevice { .. } => "no-device",
            Self::IdInUse { .. } => "id-in-use",
            Self::NoPci => "no-pci",
            Self::SecondRoot { .. } | Self::UnplugRoot { .. } | Self::UnplugOrder { .. } => {
                "bad-update"
            }
            Self::UnplugPaused { .. } => "paused",
            Self::UnplugTimeout { .. } => "guest-busy",
            Self::MetricsTwice
            | Self::NothingToChange { .. }
            | Self::OtherBackend { .. }
            | Self::PrivateMemory { .. }
            | Self::BalloonSize { .. }
            | Self::StatisticsSwitch
            | Self::Limits { .. } => "bad-update",
            Self::NoAgent => "no-agent",
            Self::Exec(ExtraError::NotRunning) => "not-ready",
            Self::Exec(ExtraError::Unsupported) => "no-agent",
            Self::Exec(ExtraError::Request(_)) => "bad-config",
            Self::Exec(ExtraError::TooMany) | Self::TooMany { .. } => "too-many",
            Self::Mmds(_) => "no-metadata",
            Self::MmdsLimit(_) => "too-large",
            Self::SnapshotRunning => "not-paused",
            Self::SnapshotBusy { .. } => "busy",
            Self::NoSnapshot => "no-snapshot",
            Self::Cancelled | Self::LoadCancelled => "cancelled",
            Self::Start { .. } => "start-failed",
            Self::Load { .. } => "load-failed",
            Self::Save { .. } | Self::WorkingSet { .. } => "save-failed",
            Self::Fork { .. } => "fork-failed",
            Self::Balloon(_) | Self::Memory(_) | Self::Failed { .. } | Self::Keyboard => {
                "machine-failed"
            }
            Self::Ended => "ended",
        }
    }
}

impl From<MmdsError> for ActionError {
    fn from(error: MmdsError) -> Self {
        match error {
            MmdsError::TooLarge { .. } => Self::MmdsLimit(error),
            MmdsError::NotInitialized => Self::Mmds(error),
        }
    }
}

/// An error with its causes, on one line. A cause that the text has already is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
