//! Shared directories.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A directory of the host that the guest has over virtio-fs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Name that the guest mounts, unique among shares, at most [`Share::MAX_TAG`] bytes. Left out
    /// on the command line: `share` and a number.
    #[serde(alias = "id", default)]
    pub tag: String,
    /// The directory.
    #[serde(alias = "path")]
    pub path_on_host: PathBuf,
    /// Where the agent mounts it, at most [`Share::MAX_MOUNT_POINT`] bytes; `/` makes it the
    /// guest's root. Absent: the guest mounts it itself.
    #[serde(alias = "mount", default, skip_serializing_if = "Option::is_none")]
    pub mount_point: Option<String>,
    /// The guest cannot change it.
    #[serde(alias = "ro", default)]
    pub is_read_only: bool,
    /// What the guest may remember of files.
    #[serde(alias = "cache", default)]
    pub cache_type: ShareCache,
    /// Let the guest gather writes. Nobody on the host must write to the same files.
    #[serde(default)]
    pub writeback: bool,
    /// Whose files the guest creates, and as whose it sees them.
    #[serde(default)]
    pub ownership: ShareOwnership,
}

impl Share {
    /// Longest tag in bytes.
    pub const MAX_TAG: usize = 36;
    /// Longest mount point in bytes.
    pub const MAX_MOUNT_POINT: usize = 255;

    /// Whether it is the guest's root.
    pub fn is_root(&self) -> bool {
        self.mount_point.as_deref() == Some("/")
    }
}

/// What the guest may remember of a share's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareCache {
    /// Nothing: each access comes to the host.
    None,
    /// Data until the file is opened again or seen to be changed; names and attributes for a
    /// second.
    #[default]
    Auto,
    /// All, for a day: only for what nobody changes on the host.
    Always,
}

/// Whose files the guest creates on a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareOwnership {
    /// `guest` where bulle may act as other users, else `squash`.
    #[default]
    Auto,
    /// Users are the same on both sides. Needs root, or its capabilities.
    Guest,
    /// bulle's user and group are root in the guest, and the other way round.
    Squash,
    /// Owners as they are; what the guest creates belongs to bulle's user.
    Host,
}
