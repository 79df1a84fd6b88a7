//! Processors, memory and interrupt controller.

use serde::{Deserialize, Serialize};

use super::Transport;
#[cfg(doc)]
use super::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// Processors, memory and interrupt controller. In JSON it is a [`MachineUpdate`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MachineUpdate", into = "MachineUpdate")]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u16,
    /// Guest RAM in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub mem_size_mib: u64,
    /// Hardware threads per core, 1 or 2.
    pub threads_per_core: u16,
    /// Dies in the (single) socket.
    pub dies: u16,
    /// What backs guest RAM on the host.
    pub memory_backing: MemoryBacking,
    /// Page size of that backing.
    pub huge_pages: HugePages,
    /// Who emulates the interrupt controllers.
    pub irqchip: Irqchip,
    /// How the guest reaches its virtio devices.
    pub virtio_transport: Transport,
    /// A CPU template of bulle's; one of the user's has the configuration itself, and only one of the
    /// two is there.
    pub cpu_template: Option<CpuTemplate>,
    /// After a snapshot the guest runs on its memory file, so that snapshots of what changes follow.
    pub track_dirty_pages: bool,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 512,
            threads_per_core: 1,
            dies: 1,
            memory_backing: MemoryBacking::default(),
            huge_pages: HugePages::default(),
            irqchip: Irqchip::default(),
            virtio_transport: Transport::default(),
            cpu_template: None,
            track_dirty_pages: false,
        }
    }
}

/// A machine as it is written down, set or changed: what is absent is as by default, or stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineUpdate {
    /// Number of vCPUs.
    pub vcpu_count: Option<u16>,
    /// Guest RAM in MiB.
    pub mem_size_mib: Option<u64>,
    /// Two hardware threads per core: another word for `threads_per_core`.
    pub smt: Option<bool>,
    /// Hardware threads per core.
    pub threads_per_core: Option<u16>,
    /// Dies in the socket.
    pub dies: Option<u16>,
    /// What backs guest RAM.
    pub memory_backing: Option<MemoryBacking>,
    /// Page size of that backing.
    pub huge_pages: Option<HugePages>,
    /// Who emulates the interrupt controllers.
    pub irqchip: Option<Irqchip>,
    /// How the guest reaches its virtio devices.
    pub virtio_transport: Option<Transport>,
    /// Prepares for snapshots of what changes.
    pub track_dirty_pages: Option<bool>,
    /// A CPU template of bulle's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
}

/// Static CPU templates, by Firecracker's names; `arch` says what each changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// The host's features, which is what a machine has that names no template.
    None,
    /// Intel from Skylake to Ice Lake as Ivy Bridge.
    C3,
    /// The same as Haswell.
    T2,
    /// As `T2`, for snapshots that move between Skylake and Cascade Lake.
    T2S,
    /// Intel from Cascade Lake on with the features of `T2A`.
    T2CL,
    /// AMD Milan with the features of `T2CL`.
    T2A,
    /// Of ARM, on which bulle does not run.
    V1N1,
}

/// A machine that says two things, or asks for what is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// Two words for one number, and two numbers.
    #[error("smt and threads_per_core contradict each other: give one of them")]
    Threads,
    /// A template that no host of bulle's can have.
    #[error("The CPU template V1N1 is for ARM, and this is x86_64: choose another, or None")]
    Arm,
}

impl MachineUpdate {
    /// `machine` with the changes.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn apply(&self, machine: &MachineConfig) -> Result<MachineConfig, MachineError> {
        let smt = self.smt.map(|smt| if smt { 2 } else { 1 });
        let threads = match (smt, self.threads_per_core) {
            (Some(smt), Some(threads)) if smt != threads => return Err(MachineError::Threads),
            (smt, threads) => threads.or(smt),
        };
        let vcpu_count = self.vcpu_count.unwrap_or(machine.vcpu_count);
        let threads = threads.unwrap_or(machine.threads_per_core);
        // A single vCPU may be said to have two threads, as in Firecracker, and has one.
        let alone = vcpu_count == 1 && self.threads_per_core.is_none();
        let cpu_template = match self.cpu_template {
            Some(CpuTemplate::V1N1) => return Err(MachineError::Arm),
            Some(CpuTemplate::None) => None,
            other => other.or(machine.cpu_template),
        };
        Ok(MachineConfig {
            vcpu_count,
            mem_size_mib: self.mem_size_mib.unwrap_or(machine.mem_size_mib),
            threads_per_core: if alone { 1 } else { threads },
            dies: self.dies.unwrap_or(machine.dies),
            memory_backing: self.memory_backing.unwrap_or(machine.memory_backing),
            huge_pages: self.huge_pages.unwrap_or(machine.huge_pages),
            irqchip: self.irqchip.unwrap_or(machine.irqchip),
            virtio_transport: self.virtio_transport.unwrap_or(machine.virtio_transport),
            cpu_template,
            track_dirty_pages: self.track_dirty_pages.unwrap_or(machine.track_dirty_pages),
        })
    }
}

impl TryFrom<MachineUpdate> for MachineConfig {
    type Error = MachineError;

    fn try_from(update: MachineUpdate) -> Result<Self, MachineError> {
        update.apply(&Self::default())
    }
}

impl From<MachineConfig> for MachineUpdate {
    fn from(machine: MachineConfig) -> Self {
        Self {
            vcpu_count: Some(machine.vcpu_count),
            mem_size_mib: Some(machine.mem_size_mib),
            // A number that no machine has is told by the one word only.
            smt: match machine.threads_per_core {
                1 => Some(false),
                2 => Some(true),
                _ => None,
            },
            threads_per_core: Some(machine.threads_per_core),
            dies: Some(machine.dies),
            memory_backing: Some(machine.memory_backing),
            huge_pages: Some(machine.huge_pages),
            irqchip: Some(machine.irqchip),
            virtio_transport: Some(machine.virtio_transport),
            track_dirty_pages: Some(machine.track_dirty_pages),
            cpu_template: machine.cpu_template,
        }
    }
}

/// What backs guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum MemoryBacking {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd, mapped shared.
    Memfd,
}

/// Page size of guest RAM on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum HugePages {
    /// Whatever the host does by default.
    #[default]
    #[value(name = "none")]
    None,
    /// Transparent huge pages, by `madvise`.
    #[value(name = "transparent")]
    Transparent,
    /// Reserved 2 MiB pages (hugetlbfs).
    #[serde(rename = "2M")]
    #[value(name = "2M")]
    Huge2M,
    /// Reserved 1 GiB pages (hugetlbfs).
    #[serde(rename = "1G")]
    #[value(name = "1G")]
    Huge1G,
}

impl HugePages {
    /// Page size in MiB, where reserved pages are used.
    pub fn reserved_mib(self) -> Option<u64> {
        match self {
            Self::None | Self::Transparent => None,
            Self::Huge2M => Some(2),
            Self::Huge1G => Some(1024),
        }
    }
}

/// Who emulates the interrupt controllers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Irqchip {
    /// Local APICs in KVM, I/O APIC in bulle; no PIC and no PIT. Starts and ends fastest.
    #[default]
    Split,
    /// All in KVM, with PIC and PIT, for guests that need those.
    Kernel,
}
