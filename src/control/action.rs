//! All that may be asked of a microVM.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ExecRequest;
use crate::config::{
    Balloon, BootSource, CustomCpuTemplate, Drive, Entropy, Logger, MachineUpdate, MemoryHotplug,
    Metrics, MmdsConfig, NetworkInterface, Pmem, Publish, RateLimiter, Serial, Vsock,
};

/// One thing asked of a microVM.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Who and in which state it is.
    DescribeInstance,
    /// The version of bulle.
    Version,
    /// The whole configuration.
    GetConfig,
    /// What it has done so far.
    GetStatistics,
    /// The same, and how much of its memory it changed.
    GetMetrics,
    /// Listens to what happens to it from now on.
    Listen,
    /// Runs a command in the guest.
    Exec(ExecRequest),
    /// Reads the guest's console, from what is kept of it on, and types into it.
    ReadConsole,
    /// What is kept of the guest's console.
    GetLog,
    /// Processors and memory.
    GetMachine,
    /// Sets processors and memory.
    PutMachine(MachineUpdate),
    /// Changes some of processors and memory.
    PatchMachine(MachineUpdate),
    /// Sets the CPU template.
    PutCpu(Box<CustomCpuTemplate>),
    /// Sets kernel, initial RAM disk and command line.
    PutBootSource(BootSource),
    /// Adds a disk, or replaces the one of that name.
    PutDrive(Drive),
    /// Gives a disk another image or other limits, or has its size read again.
    PatchDrive(DriveUpdate),
    /// Adds persistent memory, or replaces that of this name.
    PutPmem(Pmem),
    /// Changes the limits of persistent memory.
    PatchPmem(PmemUpdate),
    /// Adds a network interface, or replaces the one of that name.
    PutNetwork(Box<NetworkInterface>),
    /// Changes the limits of a network interface.
    PatchNetwork(NetworkUpdate),
    /// Adds the entropy device.
    PutEntropy(Entropy),
    /// Adds the socket device.
    PutVsock(Vsock),
    /// Says where the first serial port goes.
    PutSerial(Serial),
    /// Adds the balloon.
    PutBalloon(Balloon),
    /// The balloon as it is to be.
    GetBalloon,
    /// Sets the balloon's size.
    PatchBalloon(BalloonUpdate),
    /// What the guest says of its memory.
    GetBalloonStatistics,
    /// Sets how often the guest is asked.
    PatchBalloonStatistics(StatisticsUpdate),
    /// Asks the guest for its free pages.
    StartHinting(HintingStart),
    /// How far that is.
    GetHinting,
    /// Ends it.
    StopHinting,
    /// Adds the memory device.
    PutMemoryHotplug(MemoryHotplug),
    /// How much memory is plugged.
    GetMemoryHotplug,
    /// Sets how much is to be.
    PatchMemoryHotplug(MemoryHotplugUpdate),
    /// Says how the guest reaches the metadata service.
    PutMmdsConfig(MmdsConfig),
    /// Replaces the metadata.
    PutMmds(Value),
    /// Changes some of the metadata (RFC 7396).
    PatchMmds(Value),
    /// The metadata.
    GetMmds,
    /// Takes a device away.
    Unplug(Unplug),
    /// Changes the log.
    PutLogger(Logger),
    /// Says where figures go.
    PutMetrics(Metrics),
    /// Writes figures now.
    FlushMetrics,
    /// Builds the machine and lets it run.
    InstanceStart,
    /// Presses Ctrl-Alt-Del.
    SendCtrlAltDel,
    /// Asks the guest to switch itself off.
    Shutdown,
    /// Stops every vCPU.
    Pause,
    /// Lets every vCPU go on.
    Resume,
    /// Writes beside the memory file which pages the guest touched so far.
    RecordWorkingSet,
    /// Saves a paused microVM.
    CreateSnapshot(SnapshotCreate),
    /// Ends what is being written in the background.
    CancelSnapshot,
    /// Makes a microVM of a saved one.
    LoadSnapshot(SnapshotLoad),
    /// Hands out what copies of the microVM are made of, which goes on.
    Fork(ForkRequest),
}

/// A device that is taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unplug {
    /// Which kind of device.
    pub kind: PluggedKind,
    /// Its name.
    pub id: String,
    /// At once, whatever the guest does with it.
    pub force: bool,
}

/// A kind of device that can come and go while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluggedKind {
    /// A disk.
    Drive,
    /// A network interface.
    Net,
    /// Persistent memory.
    Pmem,
}

impl PluggedKind {
    /// What people call it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Drive => "block",
            Self::Net => "network",
            Self::Pmem => "pmem",
        }
    }

    /// What its virtio devices are called, as by `DeviceConfig::kind`.
    pub fn device(self) -> &'static str {
        match self {
            Self::Drive => "block",
            Self::Net => "net",
            Self::Pmem => "pmem",
        }
    }
}

/// What changes of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Its name.
    pub drive_id: String,
    /// Its image: another one, or the present one, whose size is read again.
    pub path_on_host: Option<PathBuf>,
    /// New limits; a bucket that is absent stays.
    pub rate_limiter: Option<RateLimiter>,
}

/// What changes of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkUpdate {
    /// Its name.
    pub iface_id: String,
    /// New limits of what the guest receives; a bucket that is absent stays.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits of what it sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// What changes of persistent memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    /// Its name.
    pub id: String,
    /// New limits; a bucket that is absent stays.
    pub rate_limiter: Option<RateLimiter>,
}

/// What changes of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// MiB that it is to have.
    pub amount_mib: u64,
}

/// What changes of the guest's statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatisticsUpdate {
    /// Seconds between two of them.
    pub stats_polling_interval_s: u16,
}

/// How free pages are asked for. What else a client says is ignored, as Firecracker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct HintingStart {
    /// The guest gets its pages back when it has hinted all of them.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        let acknowledge_on_stop = yes();
        Self {
            acknowledge_on_stop,
        }
    }
}

fn yes() -> bool {
    true
}

/// What changes of hot-pluggable memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugUpdate {
    /// MiB that the guest is to plug.
    pub requested_size_mib: u64,
}

/// Where a microVM is saved.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// File of the state.
    pub snapshot_path: PathBuf,
    /// File of the memory.
    pub mem_file_path: PathBuf,
    /// How much of the memory.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The guest goes on while it is written. bulle's own.
    #[serde(default)]
    pub background: bool,
    /// It is ended by the end of the connection that asked for it. bulle's own.
    #[serde(default)]
    pub cancellable: bool,
}

/// Who gets what copies are made of. bulle's own.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// Unix socket that somebody listens at.
    pub uds_path: PathBuf,
}

/// How much of a microVM's memory is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What changed.
    Diff,
}

/// What a microVM is made of that was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// File of the state.
    pub snapshot_path: PathBuf,
    /// Where its memory is.
    pub mem_backend: Option<MemoryBackend>,
    /// An older word for a file as `mem_backend`.
    pub mem_file_path: Option<PathBuf>,
    /// An older word for `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Prepares for snapshots of what changes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Lets it run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other interfaces of the host than those it had.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another path than its sockets had.
    pub vsock_override: Option<VsockOverride>,
    /// Other images than its drives had. bulle's own.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Other files than its persistent memory had. bulle's own.
    #[serde(default)]
    pub pmem_overrides: Vec<PmemOverride>,
    /// Other directories than it shared. bulle's own.
    #[serde(default)]
    pub share_overrides: Vec<ShareOverride>,
    /// The guest's clock is set to the host's.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Page size of its memory on the host.
    pub huge_pages: Option<LoadPages>,
    /// When it ends, which pages it touched is written beside the memory file, and the next load has them
    /// brought early. bulle's own.
    #[serde(default)]
    pub record_working_set: bool,
    /// It is ended by the end of the connection that asked for it. bulle's own.
    #[serde(default)]
    pub cancellable: bool,
}

impl SnapshotLoad {
    /// The snapshot in these two files, as it was saved.
    pub fn new(state: PathBuf, memory: PathBuf) -> Self {
        Self {
            snapshot_path: state,
            mem_backend: None,
            mem_file_path: Some(memory),
            enable_diff_snapshots: false,
            track_dirty_pages: false,
            resume_vm: true,
            network_overrides: Vec::new(),
            vsock_override: None,
            drive_overrides: Vec::new(),
            pmem_overrides: Vec::new(),
            share_overrides: Vec::new(),
            clock_realtime: true,
            huge_pages: None,
            record_working_set: false,
            cancellable: false,
        }
    }
}

/// Page size of loaded memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoadPages {
    /// As it was saved.
    Snapshot,
    /// The host's.
    None,
    /// Transparent huge pages.
    Transparent,
    /// Reserved pages.
    #[serde(rename = "2M")]
    Huge2M,
}

/// Where the memory of a saved microVM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What it is.
    pub backend_type: MemoryBackendType,
    /// Its path.
    pub backend_path: PathBuf,
}

/// What has the memory of a saved microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A file.
    File,
    /// A file, of which each page is brought when it is touched. bulle's own.
    Lazy,
    /// A process that serves page faults.
    Uffd,
}

/// Another interface of the host, or another address of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkOverride {
    /// The device.
    pub iface_id: String,
    /// The interface.
    pub host_dev_name: Option<String>,
    /// An inherited file descriptor of one. bulle's own.
    pub fd: Option<u32>,
    /// The guest's Ethernet address. bulle's own.
    pub guest_mac: Option<String>,
    /// Ports of the host, with user-mode networking. bulle's own.
    pub publish: Option<Vec<Publish>>,
}

/// Another image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// The image.
    pub path_on_host: PathBuf,
}

/// Another file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemOverride {
    /// The device.
    pub id: String,
    /// The file.
    pub path_on_host: PathBuf,
}

/// Another directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareOverride {
    /// The share.
    pub tag: String,
    /// The directory.
    pub path_on_host: PathBuf,
}

/// Another path of the sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOverride {
    /// The path.
    pub uds_path: PathBuf,
}
