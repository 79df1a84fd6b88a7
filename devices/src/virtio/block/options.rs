//! What a block device is made from, and why it could not be made.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::virtio::limiter::Limiter;

/// Most queues of a block device.
pub const MAX_QUEUES: u16 = 256;

/// How requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// io_uring where the host has it, else system calls that wait.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// System calls that wait.
    Sync,
}

/// What a block device is besides its disk.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// How requests are carried out.
    pub engine: EngineKind,
    /// Number of queues, 1 to [`MAX_QUEUES`]; as many as vCPUs is best.
    pub queues: u16,
    /// Size of each queue, a power of two from 2 to 32768.
    pub queue_size: u16,
    /// Device ID, of which the guest sees 20 bytes.
    pub serial: String,
    /// Limits, shared with all devices that have the same limiter.
    pub limiter: Option<Arc<Limiter>>,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            engine: EngineKind::default(),
            queues: 1,
            queue_size: 256,
            serial: String::new(),
            limiter: None,
        }
    }
}

/// A block device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// An image that cannot take another's place.
    #[error(
        "image {path:?} cannot take the place of the present one: the guest knows the disk's block size \
         and whether it can write, which have to stay"
    )]
    Unlike {
        /// As given.
        path: PathBuf,
    },
    /// A number of queues that cannot be.
    #[error(
        "{queues} queues of size {size}: want 1 to 256 queues of a power of two from 2 to 32768"
    )]
    Queues {
        /// Wanted number.
        queues: u16,
        /// Wanted size.
        size: u16,
    },
    /// No io_uring on this host, or not allowed.
    #[error("io_uring is not available; use the engine `sync`, or `auto`")]
    IoUring(#[source] io::Error),
    /// Less of a disk than the saved driver knows.
    #[error(
        "disk {path:?} has {sectors} sectors of 512 bytes, and had {saved} when the machine was saved"
    )]
    Shrunk {
        /// The disk.
        path: PathBuf,
        /// What it has.
        sectors: u64,
        /// What the driver was told.
        saved: u64,
    },
    /// Another access than the saved driver knows.
    #[error(
        "disk {path:?} can{} be written, unlike when the machine was saved",
        if *.read_only { "not" } else { "" }
    )]
    Access {
        /// The disk.
        path: PathBuf,
        /// Whether it can be read only.
        read_only: bool,
    },
    /// The disk, a timer or an eventfd of the host failed.
    #[error("cannot {what} for a block device")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is saved of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The driver wants the write cache.
    pub writeback: bool,
    /// Sectors that the driver was told of; `None` before there was a driver.
    pub capacity: Option<u64>,
    /// The driver cannot write; `None` before there was a driver.
    pub read_only: Option<bool>,
}

impl Default for BlockState {
    fn default() -> Self {
        Self {
            writeback: true,
            capacity: None,
            read_only: None,
        }
    }
}

impl BlockState {
    /// Whether a disk is one that the saved driver can go on with.
    pub(super) fn check(
        &self,
        path: &Path,
        sectors: u64,
        read_only: bool,
    ) -> Result<(), BlockError> {
        let path = || path.to_path_buf();
        if let Some(saved) = self.capacity.filter(|saved| *saved > sectors) {
            return Err(BlockError::Shrunk {
                path: path(),
                sectors,
                saved,
            });
        }
        if self.read_only.is_some_and(|saved| saved != read_only) {
            let path = path();
            return Err(BlockError::Access { path, read_only });
        }
        Ok(())
    }
}
