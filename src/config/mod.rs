//! What a virtual machine is to be, as plain serde data.
//!
//! One set of types serves the command line, the configuration file and `--print-config`; section
//! and field names follow Firecracker's configuration file where it has them. [`Config`] is raw;
//! [`Config::validate`] checks every number and combination and is the only way to a [`Spec`].
//! Depends on nothing else in bulle.

mod devices;
mod list;
mod size;
#[cfg(test)]
mod tests;
mod validate;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use devices::{
    CacheType, Drive, Entropy, Format, IoEngine, RateLimiter, TokenBucket, Transport,
};
pub use list::{ListError, parse_list};
pub use size::{SizeError, parse_bytes, parse_size};
pub use validate::{ConfigError, DriveError, LimitsError, Spec};

/// Fewest MiB of RAM.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Most MiB of RAM: 1 TiB.
pub const MAX_MEMORY_MIB: u64 = 1024 * 1024;
/// Most vCPUs.
pub const MAX_VCPUS: u16 = 254;

/// A whole virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Kernel, initial RAM disk and command line.
    pub boot_source: BootSource,
    /// Processors, memory and interrupt controller.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Disks, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// An entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// What runs in the guest under bulle's agent; absent: the guest is on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// Where the guest's console (COM1) goes; absent: chosen by [`Config::console`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// The VM ends after so many milliseconds; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// Kernel, initial RAM disk and command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// A bzImage or an ELF kernel, told apart by content.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk given by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// Appended to bulle's own part of the kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// How the kernel is entered.
    #[serde(default)]
    pub kernel_entry: KernelEntry,
    /// Whether the kernel unpacked from a bzImage is kept in the user's cache directory.
    #[serde(default = "yes")]
    pub kernel_cache: bool,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum KernelEntry {
    /// The fastest that the image offers.
    #[default]
    Auto,
    /// The PVH entry point of an ELF note.
    Pvh,
    /// The Linux 64-bit entry of an ELF kernel.
    Linux64,
    /// The bzImage's own entry: the guest unpacks itself.
    Bzimage,
}

/// Processors, memory and interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    #[serde(default = "one")]
    pub vcpu_count: u16,
    /// Guest RAM in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    #[serde(default = "default_memory")]
    pub mem_size_mib: u64,
    /// Hardware threads per core, 1 or 2.
    #[serde(default = "one")]
    pub threads_per_core: u16,
    /// Dies in the (single) socket.
    #[serde(default = "one")]
    pub dies: u16,
    /// What backs guest RAM on the host.
    #[serde(default)]
    pub memory_backing: MemoryBacking,
    /// Page size of that backing.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Who emulates the interrupt controllers.
    #[serde(default)]
    pub irqchip: Irqchip,
    /// How the guest reaches its virtio devices.
    #[serde(default)]
    pub virtio_transport: Transport,
}

fn yes() -> bool {
    true
}

fn one() -> u16 {
    1
}

fn default_memory() -> u64 {
    512
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: one(),
            mem_size_mib: default_memory(),
            threads_per_core: one(),
            dies: one(),
            memory_backing: MemoryBacking::default(),
            huge_pages: HugePages::default(),
            irqchip: Irqchip::default(),
            virtio_transport: Transport::default(),
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

/// What runs in the guest under bulle's agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// The guest's root file system.
    #[serde(default)]
    pub root: Root,
    /// Command and arguments; empty: a shell.
    #[serde(default)]
    pub command: Vec<String>,
    /// Environment variables as `KEY=VALUE`, added to the agent's defaults.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory; absent: `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Whether the command gets a terminal; absent: when bulle's own stdin is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<bool>,
    /// The kernel's modules; absent: `/lib/modules/<release>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_dir: Option<PathBuf>,
}

/// The guest's root file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Root {
    /// A minimal tree of the host's static busybox.
    #[default]
    Busybox,
    /// What the user's initrd holds.
    Initrd,
    /// A host directory, copied.
    Directory(PathBuf),
    /// The drive with `is_root_device`, with a tmpfs over it if it is read-only.
    Drive,
}

/// Where the guest's console goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// bulle's own stdin and stdout; with an agent, stderr.
    Tty,
    /// Nowhere, but its last lines are kept for reports.
    Off,
    /// Appended to a file.
    File(PathBuf),
}

impl Config {
    /// A machine that boots `kernel`, with everything else as by default and without an agent.
    pub fn new(kernel: PathBuf) -> Self {
        Self {
            boot_source: BootSource {
                kernel_image_path: kernel,
                initrd_path: None,
                boot_args: None,
                kernel_entry: KernelEntry::default(),
                kernel_cache: true,
            },
            machine_config: MachineConfig::default(),
            drives: Vec::new(),
            entropy: None,
            guest: None,
            console: None,
            timeout_ms: None,
        }
    }

    /// The limiters of all devices, each with what people call its device.
    pub fn rate_limiters(&self) -> impl Iterator<Item = (&str, &RateLimiter)> {
        self.drives.iter().filter_map(|drive| {
            let limiter = drive.rate_limiter.as_ref()?;
            Some((drive.drive_id.as_str(), limiter))
        })
    }

    /// The drive with the guest's root file system.
    pub fn root_drive(&self) -> Option<&Drive> {
        self.drives.iter().find(|drive| drive.is_root_device)
    }

    /// Where the console goes when nothing was asked: to the terminal where the guest is on its
    /// own, nowhere where an agent speaks for it.
    pub fn console(&self) -> Console {
        match (&self.console, &self.guest) {
            (Some(console), _) => console.clone(),
            (None, Some(_)) => Console::Off,
            (None, None) => Console::Tty,
        }
    }
}
