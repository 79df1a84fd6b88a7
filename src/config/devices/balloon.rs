//! The memory balloon.

use serde::{Deserialize, Serialize};

use super::{mib, seconds};

/// A memory balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// MiB of guest RAM that it has at first.
    #[serde(alias = "size", default, deserialize_with = "mib")]
    pub amount_mib: u64,
    /// It gives pages back before the guest runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Seconds between two statistics of the guest; 0: no statistics.
    #[serde(alias = "stats", default, deserialize_with = "seconds")]
    pub stats_polling_interval_s: u16,
    /// The guest gives free pages back by itself.
    #[serde(alias = "reporting", default)]
    pub free_page_reporting: bool,
    /// The guest gives free pages back when the host asks.
    #[serde(alias = "hinting", default)]
    pub free_page_hinting: bool,
}
