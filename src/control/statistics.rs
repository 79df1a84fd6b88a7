//! What a microVM has done so far, for people and programs that watch it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::State;

/// What a microVM has done since its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatistics {
    /// What it does.
    pub state: State,
    /// Microseconds since its start; 0 before.
    pub uptime_us: u64,
    /// Each vCPU.
    pub vcpus: Vec<VcpuStatistics>,
    /// Each virtio device.
    pub devices: Vec<DeviceStatistics>,
    /// bulle's process.
    pub process: ProcessStatistics,
    /// The snapshot that was written in the background last, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotStatistics>,
    /// Pages of RAM, of 4 KiB, that are the guest's own: what it used, or of a snapshot what it changed. Only where
    /// they are counted, which takes as long as there are many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirtied_pages: Option<u64>,
}

/// A snapshot that is written in the background.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStatistics {
    /// How far it is.
    pub state: SnapshotState,
    /// Its state file.
    pub path: PathBuf,
    /// Microseconds that the guest stood still for it.
    pub pause_us: u64,
    /// Bytes of memory that are written, as far as it was told.
    #[serde(default)]
    pub written_bytes: u64,
    /// Bytes of memory that are to be written; 0: that was not told yet.
    #[serde(default)]
    pub total_bytes: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why the guest stood still until it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waited: Option<String>,
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotState {
    /// It is being written.
    Writing,
    /// It is there.
    Saved,
    /// It is not, and what was there before still is.
    Failed,
}

/// What a vCPU has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStatistics {
    /// Processor time of its thread, in microseconds: guest and host.
    pub cpu_time_us: u64,
    /// Exits to bulle, by reason.
    pub exits: BTreeMap<String, u64>,
}

/// What a device has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatistics {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: String,
    /// It waits for its driver to reset it.
    pub needs_reset: bool,
    /// Totals since the start, by name.
    pub totals: BTreeMap<String, u64>,
    /// Values of this moment, by name.
    pub values: BTreeMap<String, u64>,
}

/// What bulle's process takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatistics {
    /// Processor time in microseconds, of all threads.
    pub cpu_time_us: u64,
    /// Memory that it has, guest's included, in bytes; absent without /proc.
    pub rss_bytes: Option<u64>,
    /// Threads; absent without /proc.
    pub threads: Option<u64>,
    /// Open files; absent without /proc.
    pub open_files: Option<u64>,
}

impl VmStatistics {
    /// Before the start.
    pub fn not_started() -> Self {
        Self {
            state: State::NotStarted,
            uptime_us: 0,
            vcpus: Vec::new(),
            devices: Vec::new(),
            process: ProcessStatistics::now(),
            snapshot: None,
            dirtied_pages: None,
        }
    }
}

impl ProcessStatistics {
    /// Of this process, now.
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from);
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_ascii_whitespace().next()?.parse().ok()
        };
        // The one that lists them is among them.
        let files = std::fs::read_dir("/proc/self/fd").map(|files| files.count() as u64 - 1);
        Self {
            cpu_time_us: time.map_or(0, |time| time.as_micros() as u64),
            rss_bytes: field("VmRSS:").map(|kib| kib << 10),
            threads: field("Threads:"),
            open_files: files.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself() {
        let _file = std::fs::File::open("/dev/null").unwrap();
        let process = ProcessStatistics::now();
        assert!(process.rss_bytes.unwrap() > 1 << 20);
        assert!(process.threads.unwrap() >= 2);
        assert!(process.open_files.unwrap() >= 4);
    }
}
