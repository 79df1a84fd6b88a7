//! Disks: files opened and locked.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use devices::virtio::block::{
    BlockOptions, Cache, Disk, DiskError, DiskOptions, EngineKind, Format,
};
use devices::virtio::limiter::Limiter;
use devices::virtio::registry::DeviceConfig;

use super::{Plan, PlanError};
use crate::config::{self, CacheType, Drive, IoEngine};

/// Opens and locks the image of `drive`.
pub fn open(drive: &Drive) -> Result<Disk, DiskError> {
    Disk::open(&DiskOptions {
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
    })
}

/// Opens and locks `drive`; it has a queue for each of `vcpus` if it does not say otherwise.
pub(super) fn plan(
    drive: &Drive,
    vcpus: u16,
    limiter: Option<Arc<Limiter>>,
) -> Result<Plan, DiskError> {
    let disk = open(drive)?;
    let options = BlockOptions {
        engine: match drive.io_engine {
            IoEngine::Auto => EngineKind::Auto,
            IoEngine::Async => EngineKind::IoUring,
            IoEngine::Sync => EngineKind::Sync,
        },
        queues: drive.num_queues.unwrap_or(vcpus),
        serial: drive.drive_id.clone(),
        limiter,
        ..BlockOptions::default()
    };
    Ok(Plan {
        id: drive.drive_id.clone(),
        config: DeviceConfig::Block(disk, options),
    })
}

/// One file is one disk, unless nobody writes to it. What cannot be looked at is left to `plan`.
pub fn tell_apart(drives: &[&Drive]) -> Result<(), PlanError> {
    let file = |drive: &Drive| {
        let metadata = fs::metadata(&drive.path_on_host).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let files: Vec<_> = drives.iter().map(|drive| (*drive, file(drive))).collect();
    for (index, (drive, inode)) in files.iter().enumerate() {
        let mut earlier = files.iter().take(index);
        let same = earlier.find(|(other, theirs)| {
            inode.is_some() && inode == theirs && !(drive.is_read_only && other.is_read_only)
        });
        if let Some((other, _)) = same {
            return Err(PlanError::SameDisk {
                first: other.drive_id.clone(),
                second: drive.drive_id.clone(),
                path: drive.path_on_host.clone(),
            });
        }
    }
    Ok(())
}
