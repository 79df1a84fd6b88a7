//! Disks: files opened and locked.

use std::sync::Arc;

use devices::virtio::block::{
    BlockOptions, Cache, Disk, DiskError, DiskOptions, EngineKind, Format,
};
use devices::virtio::limiter::Limiter;
use devices::virtio::registry::DeviceConfig;

use super::{Plan, limiter};
use crate::config::{self, CacheType, Drive, IoEngine};

/// Opens and locks `drive`; it has a queue for each of `vcpus` if it does not say otherwise.
pub(super) fn plan(drive: &Drive, vcpus: u16) -> Result<Plan, DiskError> {
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
