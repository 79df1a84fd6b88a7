//! What an action comes to.

use devices::virtio::balloon::Statistics;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Stream, VmStatistics};
use crate::config::{Balloon, Config, MachineConfig};

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
    /// The balloon as it is to be.
    Balloon(Balloon),
    /// The balloon as it is, and what the guest says of its memory.
    Statistics(Box<BalloonStatistics>),
    /// How far hinting is.
    Hinting(HintingStatus),
    /// How much memory is plugged.
    MemoryHotplug(MemoryHotplugStatus),
    /// What the microVM has done so far.
    Vm(Box<VmStatistics>),
    /// Plain text.
    Text(String),
    /// An answer that goes on.
    Stream(Stream),
    /// The metadata; null where there are none.
    Metadata(Value),
}

/// Who and in which state a microVM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its name.
    pub id: String,
    /// What it does.
    pub state: State,
    /// Version of bulle, or of Firecracker where bulle is that.
    pub vmm_version: &'static str,
    /// What serves it; clients of Firecracker look for that name.
    pub app_name: &'static str,
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

/// What a microVM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

/// A balloon, and what the guest says of its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonStatistics {
    /// 4 KiB pages wanted.
    pub target_pages: u32,
    /// 4 KiB pages it has.
    pub actual_pages: u32,
    /// MiB wanted.
    pub target_mib: u32,
    /// MiB it has.
    pub actual_mib: u32,
    /// What the guest says; absent where it does not.
    #[serde(flatten)]
    pub guest: Statistics,
}

/// How far hinting is: 0 stopped, 1 done, else the number of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HintingStatus {
    /// What the host wants.
    pub host_cmd: u32,
    /// What the guest works on.
    pub guest_cmd: u32,
}

/// How much memory is plugged, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryHotplugStatus {
    /// Most that can be.
    pub total_size_mib: u64,
    /// What the total is a multiple of.
    pub slot_size_mib: u64,
    /// What is plugged as a whole.
    pub block_size_mib: u64,
    /// What is plugged.
    pub plugged_size_mib: u64,
    /// What is wanted.
    pub requested_size_mib: u64,
}
