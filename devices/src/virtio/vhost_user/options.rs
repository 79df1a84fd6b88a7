//! What a vhost-user block device is made from, and why it could not be made.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long a backend may take for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Runs on a thread of its own what ends by itself, within [`PATIENCE`].
pub type Spawn = fn(Box<dyn FnOnce() + Send>) -> io::Result<()>;

/// What is asked of a backend.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// The socket on which it listens.
    pub socket: PathBuf,
    /// The guest's flushes reach it; otherwise the guest sends none.
    pub flush: bool,
    /// Number of queues; absent: as many as the backend has, up to one for each vCPU.
    pub queues: Option<u16>,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Makes the threads that see to it that no conversation takes longer than [`PATIENCE`].
    pub spawn: Spawn,
}

/// A vhost-user block device could not be made, or its backend does not do its part.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody there.
    #[error(
        "no vhost-user backend can be reached at the socket {path:?}: start it first, have it listen there, \
         and permit bulle's user to write to the socket"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody there who is too old, or something else.
    #[error(
        "the vhost-user backend at {path:?} lacks {what}: use one for virtio 1 block devices that has it"
    )]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// A feature.
        what: &'static str,
    },
    /// Fewer queues than asked for.
    #[error(
        "{wanted} queues cannot be had of the vhost-user backend at {path:?}, which has {most}: give as \
         many, or leave num_queues out"
    )]
    Queues {
        /// The socket.
        path: PathBuf,
        /// As asked.
        wanted: u16,
        /// What it has.
        most: u64,
    },
    /// An answer that is none, or no answer.
    #[error(
        "the vhost-user backend at {path:?} failed to {what}: look at what it says itself, and start \
         it and the VM again"
    )]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What it was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// RAM that another process cannot map.
    #[error(
        "guest memory is private to bulle, so that the vhost-user backend at {path:?} cannot have it: \
         start the VM with memory_backing memfd"
    )]
    Private {
        /// The socket.
        path: PathBuf,
    },
    /// The host failed.
    #[error("cannot {what} for a vhost-user block device")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}
