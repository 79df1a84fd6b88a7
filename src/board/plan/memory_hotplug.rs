//! The memory device's part of the plan.

use std::io;
use std::sync::Arc;

use devices::virtio::mem::{MemOptions, Region};
use devices::virtio::registry::DeviceConfig;

use super::addresses::Addresses;
use super::{Plan, PlanError};
use crate::config::{MemoryHotplug, Spec};

/// Its memory cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "Cannot reserve {mib} MiB of hot-pluggable memory: the host's limit on address space is lower (ulimit -v)"
)]
pub struct RegionError {
    mib: u64,
    #[source]
    source: io::Error,
}

pub(super) fn plan(
    memory: &MemoryHotplug,
    spec: &Spec,
    addresses: &mut Addresses,
) -> Result<Plan, PlanError> {
    let id = "memory-hotplug";
    let mib = memory.total_size_mib;
    let page = match spec.machine().huge_pages.reserved_mib() {
        Some(mib) => mib << 20,
        None => 4096,
    };
    let region = Region::new(mib << 20, page).map_err(|source| RegionError { mib, source })?;
    Ok(Plan {
        id: id.to_string(),
        config: DeviceConfig::Mem(MemOptions {
            address: addresses.take(id, region.len())?,
            region: Arc::new(region),
            block: memory.block_size_mib << 20,
            requested: memory.requested_size_mib << 20,
            memory: None,
        }),
    })
}
