//! What may be asked of a microVM and what comes back, whoever asks and however.
//!
//! [`Action`] is the whole public surface. Before the start [`Preboot`] answers, which collects a
//! configuration; after it `session::runtime` does, which has the machine. Both run on the vmm
//! thread; other threads hand their actions over through a [`Caller`]. Names no KVM type.

mod action;
mod call;
mod error;
mod event;
mod exec;
mod preboot;
mod reply;
mod statistics;

use std::time::Duration;

pub use action::{
    Action, BalloonUpdate, DriveOverride, DriveUpdate, ForkRequest, HintingStart, LoadPages,
    MemoryBackend, MemoryBackendType, MemoryHotplugUpdate, NetworkOverride, NetworkUpdate,
    PluggedKind, PmemOverride, PmemUpdate, ShareOverride, SnapshotCreate, SnapshotLoad,
    SnapshotType, StatisticsUpdate, Unplug, VsockOverride,
};
pub use call::{Call, Caller, Pending, Requests, channel};
pub use error::{ActionError, chain};
pub use event::{Event, Stream};
pub use exec::{ExecInput, ExecRequest, TerminalSize};
pub use preboot::{DEFAULT_MEMORY_MIB, Preboot, no_balloon, startable};
pub use reply::{BalloonStatistics, HintingStatus, Instance, MemoryHotplugStatus, Reply, State};
pub use statistics::{
    DeviceStatistics, ProcessStatistics, SnapshotState, SnapshotStatistics, VcpuStatistics,
    VmStatistics,
};

/// How long a pause may take.
pub const PAUSE_PATIENCE: Duration = Duration::from_secs(30);
