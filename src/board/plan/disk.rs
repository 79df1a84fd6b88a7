//! Disks: files opened and locked.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use devices::virtio::block::{
    BlockOptions, Cache, Disk, DiskError, DiskOptions, EngineKind, Format,
};
use devices::virtio::limiter::Limiter;
use devices::virtio::registry::DeviceConfig;
use devices::virtio::vhost_user::{VhostUserBlock, VhostUserOptions};

use super::{Plan, PlanError};
use crate::config::{self, CacheType, Drive, IoEngine};
use crate::sandbox::thread::{Role, spawn};

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
) -> Result<Plan, PlanError> {
    if let Some(socket) = &drive.socket {
        return connect(drive, socket, vcpus);
    }
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

/// Connects to the vhost-user backend that listens at `socket` for `drive`.
fn connect(drive: &Drive, socket: &Path, vcpus: u16) -> Result<Plan, PlanError> {
    let id = drive.drive_id.clone();
    let block = VhostUserBlock::new(&VhostUserOptions {
        socket: socket.to_owned(),
        flush: drive.cache_type != CacheType::Unsafe,
        queues: drive.num_queues,
        vcpus,
        spawn: |body| {
            let thread = spawn(Role::Backend, body);
            thread.map(drop).map_err(io::Error::other)
        },
    });
    match block {
        Ok((block, handle)) => Ok(Plan {
            id,
            config: DeviceConfig::VhostUserBlock(Box::new(block), handle),
        }),
        Err(source) => Err(PlanError::VhostUser { id, source }),
    }
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
