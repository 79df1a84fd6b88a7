//! Persistent memory's part of the plan.

use devices::virtio::pmem::PmemOptions;
use devices::virtio::registry::DeviceConfig;

use super::addresses::Addresses;
use super::limits::Limiters;
use super::{Plan, PlanError};
use crate::config::Pmem;

pub(super) fn plan(
    pmem: &Pmem,
    addresses: &mut Addresses,
    limiters: &Limiters,
) -> Result<Plan, PlanError> {
    let mut options = PmemOptions::open(&pmem.path_on_host, pmem.read_only)?;
    options.address = addresses.take(&pmem.id, options.mapping.len())?;
    options.limiter = limiters.get(pmem.rate_limiter.as_ref());
    Ok(Plan {
        id: pmem.id.clone(),
        config: DeviceConfig::Pmem(options),
    })
}
