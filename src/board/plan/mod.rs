//! From the configuration to what each virtio device is made of: host files are opened here.
//!
//! Runs before the machine is built, so that a device that cannot be had is the first thing said.

pub mod added;
mod addresses;
mod balloon;
mod console;
pub mod disk;
pub mod limits;
mod memory_hotplug;
mod net;
mod passt;
mod pmem;
mod rtc;
mod share;
mod vsock;

use std::path::PathBuf;
use std::sync::Arc;

use devices::mmds::Mmds;
use devices::virtio::block::DiskError;
use devices::virtio::fs::FsError;
use devices::virtio::pmem::PmemError;
use devices::virtio::registry::DeviceConfig;
use devices::virtio::vhost_user::VhostUserError;
use devices::virtio::vsock::VsockError;

pub use self::addresses::AddressError;
use self::addresses::Addresses;
pub use self::console::{ConsoleEnds, PortError, fit};
use self::limits::Limiters;
pub use self::memory_hotplug::RegionError;
pub use self::net::NetError;
pub use self::passt::PasstError;
pub(super) use self::passt::{Families, families};
use super::attach;
use crate::config::{Spec, Transport};

/// A virtio device to attach.
#[derive(Debug)]
pub struct Plan {
    /// What people call it.
    pub id: String,
    /// What it is made of.
    pub config: DeviceConfig,
}

impl Plan {
    /// Guest-physical address of the memory that the device brings, if it does.
    pub fn memory(&self) -> Option<u64> {
        match &self.config {
            DeviceConfig::Pmem(options) => Some(options.address),
            DeviceConfig::Mem(options) => Some(options.address),
            _ => None,
        }
    }
}

/// Something of the host that a device needs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk that another process serves.
    #[error("drive '{id}'")]
    VhostUser {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: VhostUserError,
    },
    /// Memory that is plugged.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// No address for the memory of a device.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// One disk under two names, and not read-only under both.
    #[error(
        "drives '{first}' and '{second}' are the same disk {path:?}, which has one writer or only \
         readers: leave one out, or add ro to both"
    )]
    SameDisk {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// As given for the second.
        path: PathBuf,
    },
    /// More devices than the transport has room for.
    #[error(
        "{count} virtio devices do not fit {}: leave some out{}",
        transport_room(transport),
        if *transport == Transport::Mmio { ", or use --pci" } else { "" }
    )]
    TooMany {
        /// Number there are.
        count: usize,
        /// Where they were to go.
        transport: Transport,
    },
    /// A socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A shared directory.
    #[error(transparent)]
    Share(#[from] FsError),
    /// The virtio console.
    #[error(transparent)]
    Console(#[from] PortError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] NetError),
}

fn transport_room(transport: &Transport) -> String {
    let most = attach::most(*transport);
    match transport {
        Transport::Mmio => format!("the {most} interrupt lines for devices over MMIO"),
        Transport::Pci => format!("the {most} slots of the PCI bus"),
    }
}

/// Files that the devices of `plans` have open while they run, rounded up. Those that open more by
/// themselves, as for each connection, have limits of their own.
pub fn open_files(plans: &[Plan]) -> u64 {
    /// Kicks, timers and the host's side of a device.
    const EACH: u64 = 24;
    let files = plans.iter().map(|plan| match &plan.config {
        // A kick and a ring for each queue.
        DeviceConfig::Block(_, options) => EACH + 2 * u64::from(options.queues),
        DeviceConfig::VhostUserBlock(block, _) => EACH + 2 * u64::from(block.queues()),
        // As for a disk, and a tap's file descriptor for each pair; four more with vhost-net.
        DeviceConfig::Net(options) => EACH + 9 * u64::from(options.backend.pairs()),
        // Two queues for each port, and the host's end.
        DeviceConfig::Console(options) => EACH + 5 * options.ports.len() as u64,
        _ => EACH,
    });
    files.sum()
}

/// Opens what the devices of `spec` need. The guest finds `mmds` on the interfaces that have the
/// metadata service.
pub fn plan(spec: &Spec, mmds: &Arc<Mmds>) -> Result<(Vec<Plan>, ConsoleEnds), PlanError> {
    let config = spec.config();
    let limiters = Limiters::new(config);
    let mut plans = Vec::new();
    // The root first: without an agent, the kernel expects it there.
    let roots = config.drives.iter().filter(|drive| drive.is_root_device);
    let others = config.drives.iter().filter(|drive| !drive.is_root_device);
    let drives: Vec<_> = roots.chain(others).collect();
    disk::tell_apart(&drives)?;
    for drive in drives {
        let limiter = limiters.get(drive.rate_limiter.as_ref());
        plans.push(disk::plan(drive, spec.machine().vcpu_count, limiter)?);
    }
    for (index, interface) in (0..).zip(&config.network_interfaces) {
        let detour = net::metadata(config, interface, mmds);
        plans.push(net::plan(interface, index, &limiters, detour)?);
    }
    if let Some(entropy) = &config.entropy {
        let limiter = limiters.get(entropy.rate_limiter.as_ref());
        plans.push(Plan {
            id: "entropy".to_string(),
            config: DeviceConfig::Entropy(limiter),
        });
    }
    if let Some(vsock) = &config.vsock {
        plans.push(vsock::plan(vsock)?);
    }
    plans.extend(config.rtc.as_ref().map(rtc::plan));
    let mut addresses = Addresses::behind(spec.ram_size());
    // Those that are where they were go first.
    let mut pmems = Vec::with_capacity(config.pmem.len());
    for pmem in &config.pmem {
        let options = pmem::open(pmem)?;
        let fixed = pmem.address.map(|address| {
            addresses.reserve(&pmem.id, address, options.mapping.len())?;
            Ok::<_, AddressError>(address)
        });
        pmems.push((pmem, options, fixed.transpose()?));
    }
    if let Some(memory) = &config.memory_hotplug {
        plans.push(memory_hotplug::plan(memory, spec, &mut addresses)?);
    }
    for (pmem, options, fixed) in pmems {
        let address = match fixed {
            Some(address) => address,
            None => addresses.take(&pmem.id, options.mapping.len())?,
        };
        plans.push(pmem::plan(pmem, options, address, &limiters));
    }
    if let Some(balloon) = &config.balloon {
        plans.push(balloon::plan(balloon, spec));
    }
    plans.extend(share::plan(&config.shares)?);
    let transport = spec.machine().virtio_transport;
    let room = attach::most(transport);
    let mut ends = ConsoleEnds::default();
    // The agent can do without.
    if console::is_asked_for(config) || config.guest.is_some() && plans.len() < room {
        let (plan, console) = console::plan(spec)?;
        plans.push(plan);
        ends = console;
    }
    match plans.len() {
        count if count > room => Err(PlanError::TooMany { count, transport }),
        _ => Ok((plans, ends)),
    }
}
