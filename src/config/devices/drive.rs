//! Disks.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{RateLimiter, null_is_default};

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name, unique among drives; the guest sees its first [`Drive::SERIAL_LEN`] bytes as the
    /// disk's serial number. Left out on the command line: `disk` and a number.
    #[serde(alias = "id", default)]
    pub drive_id: String,
    /// Image file or block device; empty with `socket`.
    #[serde(
        alias = "path",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "is_empty"
    )]
    pub path_on_host: PathBuf,
    /// In place of it: the socket of a vhost-user backend that has the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Meaning of its content, which is never guessed.
    #[serde(default)]
    pub format: Format,
    /// The guest's root file system is on it.
    #[serde(alias = "root", default)]
    pub is_root_device: bool,
    /// The guest cannot write to it.
    #[serde(alias = "ro", default, deserialize_with = "null_is_default")]
    pub is_read_only: bool,
    /// What the host does with writes.
    #[serde(alias = "cache", default, deserialize_with = "null_is_default")]
    pub cache_type: CacheType,
    /// How requests are carried out.
    #[serde(alias = "engine", default, deserialize_with = "null_is_default")]
    pub io_engine: IoEngine,
    /// Number of queues; absent: as many as vCPUs.
    #[serde(alias = "queues", default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Where the root file system is a partition of it: the partition's UUID, for a guest without agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Logical block size in bytes; absent: 512, or what the host needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_block_size: Option<u32>,
    /// Physical block size in bytes; absent: the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_block_size: Option<u32>,
    /// Limits of bandwidth and operations.
    #[serde(alias = "rate", default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

impl Drive {
    /// Bytes of the name that the guest sees.
    pub const SERIAL_LEN: usize = 20;

    /// A disk with everything else as by default.
    pub fn new(drive_id: impl Into<String>, path_on_host: PathBuf) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host,
            socket: None,
            format: Format::default(),
            is_root_device: false,
            is_read_only: false,
            cache_type: CacheType::default(),
            io_engine: IoEngine::default(),
            num_queues: None,
            partuuid: None,
            logical_block_size: None,
            physical_block_size: None,
            rate_limiter: None,
        }
    }

    /// What the guest sees of the name. Names are ASCII once checked.
    pub fn serial(&self) -> &str {
        let id = self.drive_id.as_str();
        id.get(..Self::SERIAL_LEN).unwrap_or(id)
    }
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// What the content of a disk means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk, as they are.
    #[default]
    Raw,
}

/// What the host does with a disk's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The host's page cache; a flush of the guest reaches the disk.
    #[default]
    #[serde(alias = "writeback")]
    Writeback,
    /// The host's page cache; flushes are ignored.
    #[serde(alias = "unsafe")]
    Unsafe,
    /// No page cache (O_DIRECT); a flush of the guest reaches the disk.
    #[serde(alias = "none")]
    None,
}

/// How a disk's requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// io_uring where the host allows it, else system calls.
    #[default]
    #[serde(alias = "auto")]
    Auto,
    /// io_uring.
    #[serde(alias = "io_uring", alias = "io-uring")]
    Async,
    /// System calls that wait.
    #[serde(alias = "sync")]
    Sync,
}
