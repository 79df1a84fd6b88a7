//! From the configuration to what each virtio device is made of: host files are opened here.
//!
//! Runs before the machine is built, so that a disk that cannot be used is the first thing said.

use std::sync::Arc;

use devices::virtio::block::{
    BlockOptions, Cache, Disk, DiskError, DiskOptions, EngineKind, Format,
};
use devices::virtio::limiter::{BucketConfig, Limiter, LimiterConfig};
use devices::virtio::registry::DeviceConfig;

use crate::config::{self, CacheType, Drive, IoEngine, RateLimiter, Spec, TokenBucket};

/// A virtio device to attach.
#[derive(Debug)]
pub struct Plan {
    /// What people call it.
    pub id: String,
    /// What it is made of.
    pub config: DeviceConfig,
}

/// Opens what the devices of `spec` need.
///
/// # Errors
/// A disk that cannot be opened or locked, or is no disk.
pub fn plan(spec: &Spec) -> Result<Vec<Plan>, DiskError> {
    let config = spec.config();
    let mut plans = Vec::new();
    // The root first: without an agent, the kernel expects it there.
    let roots = config.drives.iter().filter(|drive| drive.is_root_device);
    let others = config.drives.iter().filter(|drive| !drive.is_root_device);
    for drive in roots.chain(others) {
        plans.push(disk(drive, spec.machine().vcpu_count)?);
    }
    if config.entropy.is_some() {
        plans.push(Plan {
            id: "entropy".to_string(),
            config: DeviceConfig::Entropy,
        });
    }
    Ok(plans)
}

fn disk(drive: &Drive, vcpus: u16) -> Result<Plan, DiskError> {
    let disk = Disk::open(&DiskOptions {
        path: drive.path_on_host.clone(),
        format: match drive.format {
            config::Format::Raw => Format::Raw,
        },
        read_only: drive.is_read_only,
        cache: match drive.cache_type {
            CacheType::Writeback => Cache::Writeback,
            CacheType::Unsafe => Cache::Unsafe,
            CacheType::None => Cache::None,
        },
        logical_block_size: drive.logical_block_size,
        physical_block_size: drive.physical_block_size,
    })?;
    let options = BlockOptions {
        engine: match drive.io_engine {
            IoEngine::Auto => EngineKind::Auto,
            IoEngine::Async => EngineKind::IoUring,
            IoEngine::Sync => EngineKind::Sync,
        },
        queues: drive.num_queues.unwrap_or(vcpus),
        serial: drive.drive_id.clone(),
        limiter: drive
            .rate_limiter
            .map(|limits| Arc::new(Limiter::new(limiter(limits)))),
        ..BlockOptions::default()
    };
    Ok(Plan {
        id: drive.drive_id.clone(),
        config: DeviceConfig::Block(disk, options),
    })
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
