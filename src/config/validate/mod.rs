//! From a raw [`Config`] to a [`Spec`] that the machine can be built from.

mod balloon;
mod drives;
mod limits;
mod memory_hotplug;
mod mmds;
mod net;
mod pmem;
mod ports;
mod shares;
mod vsock;
mod watchdog;

use std::path::PathBuf;
use std::time::Duration;

pub use balloon::BalloonError;
pub use drives::DriveError;
pub use limits::LimitsError;
pub use memory_hotplug::MemoryHotplugError;
pub use mmds::MmdsConfigError;
pub use net::NetError;
pub use pmem::PmemError;
pub use ports::PortsError;
pub use shares::ShareError;
pub use vsock::VsockError;
pub use watchdog::WatchdogError;

use super::{
    Config, Console, CpuConfig, Guest, HugePages, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB,
    MachineConfig, MemoryBacking, Root,
};

/// A value or a combination that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Number of vCPUs out of range.
    #[error("{count} vCPUs cannot be had: give 1 to {MAX_VCPUS}")]
    Vcpus {
        /// As asked.
        count: u16,
    },
    /// Topology that does not multiply up.
    #[error(
        "{vcpus} vCPUs do not divide into {dies} dies with {threads} threads per core: \
         give threads per core 1 or 2 and a count that is a multiple of dies times threads"
    )]
    Topology {
        /// vCPUs in all.
        vcpus: u16,
        /// Dies.
        dies: u16,
        /// Threads per core.
        threads: u16,
    },
    /// Memory size out of range.
    #[error("{mib} MiB of memory cannot be had: give {MIN_MEMORY_MIB}M to 1T")]
    Memory {
        /// As asked, in MiB.
        mib: u64,
    },
    /// Memory is no multiple of the page size.
    #[error(
        "The memory size (MiB) is either 0, or not a multiple of the configured page size. {mib} MiB of memory is not a \
         multiple of the {page_mib} MiB pages asked for"
    )]
    MemoryPages {
        /// As asked, in MiB.
        mib: u64,
        /// Page size in MiB.
        page_mib: u64,
    },
    /// Environment entry without a name.
    #[error("environment entry '{entry}' has no name: write KEY=VALUE")]
    Env {
        /// As given.
        entry: String,
    },
    /// A NUL byte where the guest needs a C string.
    #[error("{what} holds a NUL byte: '{}'", text.escape_debug())]
    Nul {
        /// Which input.
        what: &'static str,
        /// As given.
        text: String,
    },
    /// Working directory that is not absolute.
    #[error(
        "working directory '{path}' is not absolute: the guest has no other directory to start from"
    )]
    Cwd {
        /// As given.
        path: String,
    },
    /// The user's initrd as root, but none given.
    #[error("the root is to be the initrd, but no initrd is given: add --initrd FILE")]
    NoInitrd,
    /// A template that nobody read.
    #[error(
        "cpu-config names the file {}: give the CPU template itself, unless in a configuration file",
        path.display()
    )]
    CpuFile {
        /// As given.
        path: PathBuf,
    },
    /// A disk.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// Limits that devices share.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// A socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The watchdog.
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Memory that is plugged.
    #[error(transparent)]
    MemoryHotplug(#[from] MemoryHotplugError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// A shared directory.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Named ports.
    #[error(transparent)]
    Ports(#[from] PortsError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The metadata service.
    #[error(transparent)]
    Mmds(#[from] MmdsConfigError),
    /// The root is to be a drive, and none is, or the other way round.
    #[error(
        "the guest's root and the drive with is_root_device go together: set both (on the command \
         line, --root IMAGE does), or neither"
    )]
    RootDrive,
    /// A zero timeout.
    #[error("a timeout of 0 would end the VM before it starts: give at least 1ms, or none")]
    Timeout,
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Spec {
    config: Config,
}

impl Spec {
    /// The configuration as it was given.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Machine section.
    pub fn machine(&self) -> &MachineConfig {
        &self.config.machine_config
    }

    /// Guest RAM in bytes.
    pub fn ram_size(&self) -> u64 {
        self.machine().mem_size_mib << 20
    }

    /// Guest section.
    pub fn guest(&self) -> Option<&Guest> {
        self.config.guest.as_ref()
    }

    /// Where the console goes.
    pub fn console(&self) -> Console {
        self.config.console()
    }

    /// Time limit.
    pub fn timeout(&self) -> Option<Duration> {
        self.config.timeout_ms.map(Duration::from_millis)
    }

    /// The user's initrd.
    pub fn initrd(&self) -> Option<&PathBuf> {
        self.config.boot_source.initrd_path.as_ref()
    }
}

impl Config {
    /// Checks every number and combination; files are not touched.
    /// Guest memory is shared where a vhost-user drive needs it so.
    pub fn validate(mut self) -> Result<Spec, ConfigError> {
        self.machine_config.validate()?;
        if let Some(CpuConfig::File(path)) = &self.cpu_config {
            return Err(ConfigError::CpuFile { path: path.clone() });
        }
        drives::validate(&self)?;
        limits::validate(self.rate_limiters())?;
        vsock::validate(self.vsock.as_ref())?;
        self.watchdog.iter().try_for_each(watchdog::validate)?;
        pmem::validate(&self)?;
        net::validate(&self)?;
        if let Some(mmds) = &self.mmds_config {
            mmds::validate(mmds, &self.network_interfaces)?;
        }
        if let Some(memory) = &self.memory_hotplug {
            memory_hotplug::validate(memory, &self.machine_config)?;
        }
        if let Some(balloon) = &self.balloon {
            balloon::validate(balloon, self.machine_config.mem_size_mib)?;
        }
        shares::validate(&self)?;
        ports::validate(&self.ports)?;
        if let Some(guest) = &self.guest {
            guest.validate()?;
            if (guest.root == Root::Drive) != self.root_drive().is_some() {
                return Err(ConfigError::RootDrive);
            }
            if guest.root == Root::Initrd && self.boot_source.initrd_path.is_none() {
                return Err(ConfigError::NoInitrd);
            }
        }
        if self.timeout_ms == Some(0) {
            return Err(ConfigError::Timeout);
        }
        if self.vhost_user_drives().next().is_some() {
            self.machine_config.memory_backing = MemoryBacking::Memfd;
        }
        Ok(Spec { config: self })
    }
}

impl MachineConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            return Err(ConfigError::Vcpus {
                count: self.vcpu_count,
            });
        }
        let unit = u32::from(self.dies) * u32::from(self.threads_per_core);
        if !(1..=2).contains(&self.threads_per_core)
            || unit == 0
            || !u32::from(self.vcpu_count).is_multiple_of(unit)
        {
            return Err(ConfigError::Topology {
                vcpus: self.vcpu_count,
                dies: self.dies,
                threads: self.threads_per_core,
            });
        }
        let mib = self.mem_size_mib;
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
            return Err(ConfigError::Memory { mib });
        }
        match HugePages::reserved_mib(self.huge_pages) {
            Some(page_mib) if !mib.is_multiple_of(page_mib) => {
                Err(ConfigError::MemoryPages { mib, page_mib })
            }
            _ => Ok(()),
        }
    }
}

impl Guest {
    fn validate(&self) -> Result<(), ConfigError> {
        for entry in &self.env {
            if entry.find('=').is_none_or(|at| at == 0) {
                return Err(ConfigError::Env {
                    entry: entry.clone(),
                });
            }
        }
        let env = self.env.iter().map(|e| ("the environment", e));
        let command = self.command.iter().map(|c| ("the command", c));
        let cwd = self.cwd.iter().map(|c| ("the working directory", c));
        for (what, text) in env.chain(command).chain(cwd) {
            if text.contains('\0') {
                return Err(ConfigError::Nul {
                    what,
                    text: text.clone(),
                });
            }
        }
        match &self.cwd {
            Some(path) if !path.starts_with('/') => Err(ConfigError::Cwd { path: path.clone() }),
            _ => Ok(()),
        }
    }
}
