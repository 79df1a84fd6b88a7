//! Persistent memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// A file of the host as memory of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Name, unique among them. Left out on the command line: `pmem` and a number.
    #[serde(default)]
    pub id: String,
    /// The file.
    #[serde(alias = "path")]
    pub path_on_host: PathBuf,
    /// The guest's root file system is on it.
    #[serde(alias = "root", default)]
    pub root_device: bool,
    /// The guest cannot write to it.
    #[serde(alias = "ro", default)]
    pub read_only: bool,
    /// Guest-physical address, a multiple of 1 GiB behind RAM; bulle chooses one where there is none. One
    /// that the machine has is there when devices have come or gone while it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// Limits of flushes, each of which counts as the whole file.
    #[serde(alias = "rate", default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
