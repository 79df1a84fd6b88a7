//! What happens to a microVM, for whoever listens.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::State;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Always the first: what the microVM does when somebody begins to listen.
    State {
        /// What it does.
        state: State,
    },
    /// Its vCPUs began to run.
    Started,
    /// Its vCPUs stand still.
    Paused,
    /// Its vCPUs go on.
    Resumed,
    /// The guest kernel panicked.
    Panicked,
    /// A virtio device cannot go on before its driver resets it.
    DeviceError {
        /// Its name.
        device: String,
        /// How often that happened so far.
        failures: u32,
    },
    /// A network device lost the host's side: the guest sees a link that is down.
    LinkDown {
        /// Its name.
        device: String,
    },
    /// It has the host's side again.
    LinkUp {
        /// Its name.
        device: String,
    },
    /// A snapshot is being written; at most ten times a second.
    SnapshotProgress {
        /// Its state file.
        path: PathBuf,
        /// Bytes of memory that are written.
        written_bytes: u64,
        /// Bytes of memory that will be.
        total_bytes: u64,
    },
    /// A snapshot is being read, of which a machine is made; at most ten times a second, and at the end.
    LoadProgress {
        /// Its state file.
        path: PathBuf,
        /// Bytes of memory that are read.
        read_bytes: u64,
        /// Bytes of memory that will be.
        total_bytes: u64,
    },
    /// A snapshot that was written in the background is there.
    SnapshotSaved {
        /// Its state file.
        path: PathBuf,
    },
    /// A snapshot could not be written in the background; what was there before still is.
    SnapshotFailed {
        /// Its state file.
        path: PathBuf,
        /// Why.
        error: String,
    },
    /// A device came while it ran.
    DeviceAdded {
        /// Its name.
        device: String,
    },
    /// A device went while it ran.
    DeviceRemoved {
        /// Its name.
        device: String,
    },
    /// It ended. Nothing follows.
    Exited {
        /// A word for programs.
        reason: &'static str,
        /// The exit code of bulle's process.
        exit_code: u8,
        /// A sentence.
        text: String,
    },
    /// The listener was too slow and is not told anything more.
    Lagging,
}

impl Event {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::State { .. } => "state",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::Panicked => "panicked",
            Self::DeviceError { .. } => "device_error",
            Self::LinkDown { .. } => "link_down",
            Self::LinkUp { .. } => "link_up",
            Self::SnapshotProgress { .. } => "snapshot_progress",
            Self::LoadProgress { .. } => "load_progress",
            Self::SnapshotSaved { .. } => "snapshot_saved",
            Self::SnapshotFailed { .. } => "snapshot_failed",
            Self::DeviceAdded { .. } => "device_added",
            Self::DeviceRemoved { .. } => "device_removed",
            Self::Exited { .. } => "exited",
            Self::Lagging => "lagging",
        }
    }
}

/// An answer that goes on: bytes both ways until one side closes its end.
#[derive(Clone, Debug)]
pub struct Stream {
    /// What comes, as HTTP calls it.
    pub content_type: &'static str,
    /// The caller's end, which does not block.
    pub end: Arc<UnixStream>,
}

impl PartialEq for Stream {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.end, &other.end)
    }
}
