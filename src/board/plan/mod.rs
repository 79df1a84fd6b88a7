//! From the configuration to what each virtio device is made of: host files are opened here.
//!
//! Runs before the machine is built, so that a device that cannot be had is the first thing said.

mod disk;

use devices::virtio::block::DiskError;
use devices::virtio::limiter::{BucketConfig, LimiterConfig};
use devices::virtio::registry::DeviceConfig;

use crate::config::{RateLimiter, Spec, TokenBucket};

/// A virtio device to attach.
#[derive(Debug)]
pub struct Plan {
    /// What people call it.
    pub id: String,
    /// What it is made of.
    pub config: DeviceConfig,
}

/// Something of the host that a device needs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Opens what the devices of `spec` need.
pub fn plan(spec: &Spec) -> Result<Vec<Plan>, PlanError> {
    let config = spec.config();
    let mut plans = Vec::new();
    // The root first: without an agent, the kernel expects it there.
    let roots = config.drives.iter().filter(|drive| drive.is_root_device);
    let others = config.drives.iter().filter(|drive| !drive.is_root_device);
    for drive in roots.chain(others) {
        plans.push(disk::plan(drive, spec.machine().vcpu_count)?);
    }
    if config.entropy.is_some() {
        plans.push(Plan {
            id: "entropy".to_string(),
            config: DeviceConfig::Entropy,
        });
    }
    Ok(plans)
}

fn limiter(limits: RateLimiter) -> LimiterConfig {
    let bucket = |bucket: TokenBucket| BucketConfig {
        size: bucket.size,
        refill_time: bucket.refill_time,
        one_time_burst: bucket.one_time_burst,
    };
    LimiterConfig {
        bandwidth: limits.bandwidth.map(bucket),
        ops: limits.ops.map(bucket),
    }
}
