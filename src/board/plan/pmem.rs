//! Persistent memory's part of the plan.

use devices::virtio::pmem::{PmemError, PmemOptions};
use devices::virtio::registry::DeviceConfig;

use super::Plan;
use super::limits::Limiters;
use crate::config::Pmem;

/// Opens, locks and maps the file.
pub(super) fn open(pmem: &Pmem) -> Result<PmemOptions, PmemError> {
    PmemOptions::open(&pmem.path_on_host, pmem.read_only)
}

/// What was opened, at `address` of the guest.
pub(super) fn plan(pmem: &Pmem, options: PmemOptions, address: u64, limiters: &Limiters) -> Plan {
    let limiter = limiters.get(pmem.rate_limiter.as_ref());
    Plan {
        id: pmem.id.clone(),
        config: DeviceConfig::Pmem(PmemOptions {
            address,
            limiter,
            ..options
        }),
    }
}
