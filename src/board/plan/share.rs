//! Shared directories: looked at, and given their part of the open files.

use devices::virtio::fs::{CachePolicy, FsError, FsOptions, MIN_FDS, Ownership};
use devices::virtio::registry::DeviceConfig;

use super::Plan;
use crate::config::{Share, ShareCache, ShareOwnership};
use crate::vm::limits;

/// Most open files of a share: more do not make it faster.
const MAX_FDS: u64 = 1 << 16;

/// Checks every one of `shares`. All of them together may have half of the files that this process
/// may have open.
pub(super) fn plan(shares: &[Share]) -> Result<Vec<Plan>, FsError> {
    if shares.is_empty() {
        return Ok(Vec::new());
    }
    let fds = limits::allow_most_open_files() / 2 / shares.len() as u64;
    let fds = fds.clamp(MIN_FDS.into(), MAX_FDS);
    shares.iter().map(|share| one(share, fds as u32)).collect()
}

fn one(share: &Share, fds: u32) -> Result<Plan, FsError> {
    let options = FsOptions {
        read_only: share.is_read_only,
        cache: match share.cache_type {
            ShareCache::None => CachePolicy::None,
            ShareCache::Auto => CachePolicy::Auto,
            ShareCache::Always => CachePolicy::Always,
        },
        writeback: share.writeback,
        ownership: match share.ownership {
            ShareOwnership::Auto => Ownership::Auto,
            ShareOwnership::Guest => Ownership::Guest,
            ShareOwnership::Squash => Ownership::Squash,
            ShareOwnership::Host => Ownership::Host,
        },
        max_fds: Some(fds),
        ..FsOptions::new(share.tag.clone(), share.path_on_host.clone())
    };
    options.check()?;
    Ok(Plan {
        id: share.tag.clone(),
        config: DeviceConfig::Fs(options),
    })
}
