//! Memory that is plugged while the guest runs.

use serde::{Deserialize, Serialize};

use super::mib;

/// A memory device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplug {
    /// Most MiB that can be plugged.
    #[serde(alias = "total", deserialize_with = "mib")]
    pub total_size_mib: u64,
    /// MiB of a block, which is plugged as a whole.
    #[serde(alias = "block", default = "two", deserialize_with = "mib")]
    pub block_size_mib: u64,
    /// The total is a multiple of so many MiB. bulle has one memory slot whatever it is.
    #[serde(alias = "slot", default = "section", deserialize_with = "mib")]
    pub slot_size_mib: u64,
    /// MiB that the guest is to plug at first.
    #[serde(alias = "requested", default, deserialize_with = "mib")]
    pub requested_size_mib: u64,
}

fn two() -> u64 {
    2
}

fn section() -> u64 {
    128
}
