//! What a virtual machine is to be, as plain serde data.
//!
//! One set of types serves the command line, the configuration file and `--print-config`; section
//! and field names follow Firecracker's configuration file where it has them. [`Config`] is raw;
//! [`Config::validate`] checks every number and combination and is the only way to a [`Spec`].
//! Depends on nothing else in bulle.

mod cpu;
mod devices;
mod list;
mod machine;
mod paths;
mod size;
mod telemetry;
#[cfg(test)]
mod tests;
mod validate;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use cpu::{
    Bitmap, CpuConfig, CpuidModifier, CpuidRegister, CpuidRegisterModifier, CustomCpuTemplate,
    KvmCapability, MsrModifier,
};
pub use devices::{
    AGENT_PORT, Balloon, CacheType, Drive, Entropy, Format, IoEngine, LeapSeconds, MemoryHotplug,
    MmdsConfig, MmdsVersion, NetMode, NetworkInterface, Pmem, Port, PortTo, Protocol, Publish,
    RateLimiter, Rtc, Serial, Share, ShareCache, ShareOwnership, TokenBucket, Transport, USER_MTU,
    UserNetwork, Vsock, Watchdog, WatchdogAction, parse_mac, parse_net,
};
pub use list::{ListError, parse_list};
pub use machine::{
    CpuTemplate, HugePages, Irqchip, MachineConfig, MachineError, MachineUpdate, MemoryBacking,
};
pub use size::{SizeError, parse_bytes, parse_size};
pub use telemetry::{Level, LogFormat, Logger, Metrics};
pub use validate::{
    ConfigError, DriveError, LimitsError, MmdsConfigError, PortsError, ShareError, Spec,
    VsockError, WatchdogError,
};

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
    /// A CPU template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfig>,
    /// Disks, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// Shared directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
    /// Network interfaces, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// An entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// A socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A clock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtc: Option<Rtc>,
    /// A watchdog timer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// Persistent memory, in the order in which the guest finds it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<Pmem>,
    /// Memory that is plugged while the guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<MemoryHotplug>,
    /// A memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Named ports of the virtio console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// The first serial port, for guests without agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// bulle's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// bulle's figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// What runs in the guest under bulle's agent; absent: the guest is on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// Where the guest's console goes; absent: chosen by [`Config::console`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// The log says how long the guest took to boot, when the guest says that it has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub boot_timer: bool,
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

fn yes() -> bool {
    true
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
    /// A host directory, copied into guest memory.
    Directory(PathBuf),
    /// The share that is mounted on `/`, with a tmpfs over it if it is read-only.
    Share,
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
    /// As `Tty`, but over the virtio console (hvc0); COM1 has the kernel's messages as well, and
    /// its last lines are kept for reports.
    Hvc0,
    /// As `File`, but over the virtio console (hvc0).
    #[serde(rename = "hvc0-file")]
    Hvc0File(PathBuf),
}

impl Console {
    /// Whether it is on the virtio console.
    pub fn is_hvc0(&self) -> bool {
        matches!(self, Self::Hvc0 | Self::Hvc0File(_))
    }
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
            cpu_config: None,
            drives: Vec::new(),
            shares: Vec::new(),
            network_interfaces: Vec::new(),
            mmds_config: None,
            entropy: None,
            vsock: None,
            rtc: None,
            watchdog: None,
            pmem: Vec::new(),
            memory_hotplug: None,
            balloon: None,
            ports: Vec::new(),
            serial: None,
            logger: None,
            metrics: None,
            guest: None,
            console: None,
            boot_timer: false,
            timeout_ms: None,
        }
    }

    /// Has the processors be as `template` says, in place of what was said before.
    pub fn set_cpu(&mut self, template: CustomCpuTemplate) {
        self.cpu_config = Some(CpuConfig::Template(template));
        self.machine_config.cpu_template = None;
    }

    /// The limiters of all devices, each with what people call its device.
    pub fn rate_limiters(&self) -> impl Iterator<Item = (&str, &RateLimiter)> {
        let drives = self.drives.iter();
        let drives = drives.map(|drive| (drive.drive_id.as_str(), &drive.rate_limiter));
        let nets = self.network_interfaces.iter().flat_map(|net| {
            let limiters = [&net.rx_rate_limiter, &net.tx_rate_limiter];
            limiters.map(|limiter| (net.iface_id.as_str(), limiter))
        });
        let pmem = self.pmem.iter();
        let pmem = pmem.map(|pmem| (pmem.id.as_str(), &pmem.rate_limiter));
        let entropy = self.entropy.iter();
        let entropy = entropy.map(|entropy| ("entropy", &entropy.rate_limiter));
        drives
            .chain(nets)
            .chain(pmem)
            .chain(entropy)
            .filter_map(|(id, limiter)| Some((id, limiter.as_ref()?)))
    }

    /// The networks of the interfaces in mode `user`.
    pub fn user_networks(&self) -> impl Iterator<Item = UserNetwork> {
        let interfaces = (0..).zip(&self.network_interfaces);
        interfaces.filter_map(|(index, interface)| interface.user_network(index))
    }

    /// The drives that other processes serve by vhost-user.
    pub fn vhost_user_drives(&self) -> impl Iterator<Item = &Drive> {
        self.drives.iter().filter(|drive| drive.socket.is_some())
    }

    /// The drive with the guest's root file system.
    pub fn root_drive(&self) -> Option<&Drive> {
        self.drives.iter().find(|drive| drive.is_root_device)
    }

    /// The share that is the guest's root file system.
    pub fn root_share(&self) -> Option<&Share> {
        self.shares.iter().find(|share| share.is_root())
    }

    /// Where the console goes when nothing was asked: to the terminal where the guest is on its
    /// own, nowhere where an agent speaks for it.
    pub fn console(&self) -> Console {
        let serial = || self.serial.as_ref()?.serial_out_path.clone();
        match (&self.console, &self.guest) {
            (Some(console), _) => console.clone(),
            (None, Some(_)) => Console::Off,
            (None, None) => serial().map_or(Console::Tty, Console::File),
        }
    }
}
