//! Commands to devices of a machine that runs, each kept in the configuration that it changes.

use std::path::Path;
use std::time::Duration;

use devices::virtio::balloon::{BalloonHandle, PAGE};
use devices::virtio::block::BlockHandle;
use devices::virtio::limiter::LimiterConfig;
use devices::virtio::mem::MemHandle;
use devices::virtio::registry::DeviceHandle;
use devices::virtio::vhost_user::VhostUserHandle;

use crate::board::attach::Devices;
use crate::board::plan::{self, limits};
use crate::config::{Config, RateLimiter};
use crate::control::{
    ActionError, BalloonStatistics, BalloonUpdate, DriveUpdate, HintingStart, HintingStatus,
    MemoryHotplugStatus, MemoryHotplugUpdate, NetworkUpdate, PmemUpdate, Reply, StatisticsUpdate,
    chain, no_balloon,
};

/// 4 KiB pages of a MiB.
const PAGES: u32 = (1 << 20) / PAGE as u32;

/// Changes a disk.
pub fn drive(
    devices: &Devices,
    config: &mut Config,
    update: &DriveUpdate,
) -> Result<Reply, ActionError> {
    let id = &update.drive_id;
    if let Some(disk) = vhost_user(devices, id) {
        if update.path_on_host.is_some() || update.rate_limiter.is_some() {
            return Err(ActionError::OtherBackend { id: id.clone() });
        }
        let sectors = disk.reread().map_err(|error| failed(&error))?;
        log::info!("disk '{id}' has {sectors} sectors");
        return Ok(Reply::Done);
    }
    let Some(disk) = disk(devices, id) else {
        return Err(no_device("block", id));
    };
    if update.path_on_host.is_none() && update.rate_limiter.is_none() {
        return Err(ActionError::NothingToChange {
            kind: "block",
            id: id.clone(),
        });
    }
    if let Some(path) = &update.path_on_host {
        let sectors = image(config, id, &disk, path)?;
        log::info!("disk '{id}' has {sectors} sectors");
    }
    let mut drives = config.drives.iter_mut();
    let Some(drive) = drives.find(|drive| drive.drive_id == *id) else {
        return Err(no_device("block", id));
    };
    if let Some(path) = &update.path_on_host {
        drive.path_on_host.clone_from(path);
    }
    if let Some(update) = &update.rate_limiter {
        let mut limits = drive.rate_limiter.clone().unwrap_or_default();
        let changes = changes(id, &limits, update)?;
        disk.limiter().update(changes);
        disk.limits_changed().map_err(|error| failed(&error))?;
        merge(&mut limits, update);
        drive.rate_limiter = Some(limits);
    }
    Ok(Reply::Done)
}

/// Reads the size of a disk's image again, or gives it another: the size in sectors.
fn image(config: &Config, id: &str, disk: &BlockHandle, path: &Path) -> Result<u64, ActionError> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut drives = config.drives.clone();
    let changed = drives.iter_mut().find(|drive| drive.drive_id == id);
    let changed = changed.ok_or_else(|| no_device("block", id))?;
    if real(path) == real(&changed.path_on_host) {
        return disk.resize().map_err(|error| failed(&error));
    }
    path.clone_into(&mut changed.path_on_host);
    let image = plan::disk::open(changed);
    plan::disk::tell_apart(&drives.iter().collect::<Vec<_>>()).map_err(|error| failed(&error))?;
    let image = image.map_err(|error| failed(&error))?;
    disk.exchange(image).map_err(|error| failed(&error))
}

/// What a limiter is told.
fn changes(
    id: &str,
    limits: &RateLimiter,
    update: &RateLimiter,
) -> Result<LimiterConfig, ActionError> {
    let wrong = |why| ActionError::Limits {
        id: id.to_owned(),
        why,
    };
    if update.group.is_some() {
        return Err(wrong("a group is joined before the start"));
    }
    if limits.group.is_some() {
        return Err(wrong(
            "it shares them with its group, whose limits are set before the start",
        ));
    }
    Ok(limits::limits(update))
}

/// Takes the buckets of `update` over; one without size or refill time is none from then on.
fn merge(limits: &mut RateLimiter, update: &RateLimiter) {
    let limited = |bucket: &crate::config::TokenBucket| bucket.size > 0 && bucket.refill_time > 0;
    if let Some(bucket) = update.bandwidth {
        limits.bandwidth = Some(bucket).filter(limited);
    }
    if let Some(bucket) = update.ops {
        limits.ops = Some(bucket).filter(limited);
    }
}

/// Changes the limits of a network interface.
pub fn network(
    devices: &Devices,
    config: &mut Config,
    update: &NetworkUpdate,
) -> Result<Reply, ActionError> {
    let id = &update.iface_id;
    let handle = devices
        .list()
        .iter()
        .find_map(|device| match &device.handle {
            DeviceHandle::Net(handle) if device.id == *id => Some(handle.clone()),
            _ => None,
        });
    let mut all = config.network_interfaces.iter_mut();
    let (Some(net), Some(handle)) = (all.find(|net| net.iface_id == *id), handle) else {
        return Err(no_device("network", id));
    };
    let [rx, tx] = handle.limiters();
    let directions = [
        (&update.rx_rate_limiter, &mut net.rx_rate_limiter, rx),
        (&update.tx_rate_limiter, &mut net.tx_rate_limiter, tx),
    ];
    // Both are looked at before either changes.
    let mut todo = Vec::new();
    for (update, present, limiter) in directions {
        let Some(update) = update else { continue };
        let Some(limiter) = limiter else {
            return Err(ActionError::Limits {
                id: id.clone(),
                why: "with vhost=on the host's kernel moves its frames, without limits",
            });
        };
        let limits = present.clone().unwrap_or_default();
        todo.push((changes(id, &limits, update)?, update, present, limiter));
    }
    if todo.is_empty() {
        return Err(ActionError::NothingToChange {
            kind: "network",
            id: id.clone(),
        });
    }
    for (changes, update, present, limiter) in todo {
        limiter.update(changes);
        merge(present.get_or_insert_default(), update);
    }
    handle.limits_changed().map_err(|error| failed(&error))?;
    Ok(Reply::Done)
}

/// Changes the limits of persistent memory.
pub fn pmem(
    devices: &Devices,
    config: &mut Config,
    update: &PmemUpdate,
) -> Result<Reply, ActionError> {
    let id = &update.id;
    let list = devices.list();
    let pace = list.iter().find_map(|device| match &device.handle {
        DeviceHandle::Pmem(handle) if device.id == *id => handle.pace(),
        _ => None,
    });
    let mut settings = config.pmem.iter_mut();
    let (Some(pmem), Some(pace)) = (settings.find(|pmem| pmem.id == *id), pace) else {
        return Err(no_device("pmem", id));
    };
    let Some(update) = &update.rate_limiter else {
        return Err(ActionError::NothingToChange {
            kind: "pmem",
            id: id.clone(),
        });
    };
    let mut limits = pmem.rate_limiter.clone().unwrap_or_default();
    let changes = changes(id, &limits, update)?;
    pace.limiter().update(changes);
    pace.limits_changed().map_err(|error| failed(&error))?;
    merge(&mut limits, update);
    pmem.rate_limiter = Some(limits);
    Ok(Reply::Done)
}

/// Sets the balloon's size.
pub fn balloon_size(
    devices: &Devices,
    config: &mut Config,
    update: BalloonUpdate,
) -> Result<Reply, ActionError> {
    let (balloon, mib) = (balloon(devices)?, config.machine_config.mem_size_mib);
    if update.amount_mib >= mib {
        return Err(ActionError::BalloonSize { mib });
    }
    balloon.set_target(update.amount_mib as u32 * PAGES)?;
    if let Some(balloon) = &mut config.balloon {
        balloon.amount_mib = update.amount_mib;
    }
    Ok(Reply::Done)
}

/// The balloon, and what the guest says of its memory.
pub fn balloon_statistics(devices: &Devices) -> Result<Reply, ActionError> {
    let balloon = balloon(devices)?;
    let guest = balloon.statistics()?.unwrap_or_default();
    let status = balloon.status();
    Ok(Reply::Statistics(Box::new(BalloonStatistics {
        target_pages: status.target_pages,
        actual_pages: status.actual_pages,
        target_mib: status.target_pages / PAGES,
        actual_mib: status.actual_pages / PAGES,
        guest,
    })))
}

/// Sets how often the guest is asked for statistics.
pub fn balloon_interval(
    devices: &Devices,
    config: &mut Config,
    update: StatisticsUpdate,
) -> Result<Reply, ActionError> {
    let balloon = balloon(devices)?;
    let seconds = update.stats_polling_interval_s;
    let Some(settings) = &mut config.balloon else {
        return Err(no_balloon());
    };
    if (seconds == 0) != (settings.stats_polling_interval_s == 0) {
        return Err(ActionError::StatisticsSwitch);
    }
    if seconds > 0 {
        balloon.set_interval(Duration::from_secs(seconds.into()))?;
        settings.stats_polling_interval_s = seconds;
    }
    Ok(Reply::Done)
}

/// Asks the guest for its free pages.
pub fn start_hinting(devices: &Devices, start: HintingStart) -> Result<Reply, ActionError> {
    balloon(devices)?.start_hinting(start.acknowledge_on_stop)?;
    Ok(Reply::Done)
}

/// How far that is.
pub fn hinting(devices: &Devices) -> Result<Reply, ActionError> {
    let hinting = balloon(devices)?.hinting()?;
    Ok(Reply::Hinting(HintingStatus {
        host_cmd: hinting.host_cmd,
        guest_cmd: hinting.guest_cmd,
    }))
}

/// Gives the guest its pages back.
pub fn stop_hinting(devices: &Devices) -> Result<Reply, ActionError> {
    balloon(devices)?.stop_hinting()?;
    Ok(Reply::Done)
}

/// How much memory is plugged.
pub fn plugged(devices: &Devices, config: &Config) -> Result<Reply, ActionError> {
    let (mem, settings) = memory(devices, config)?;
    let status = mem.status();
    Ok(Reply::MemoryHotplug(MemoryHotplugStatus {
        total_size_mib: status.total >> 20,
        slot_size_mib: settings.slot_size_mib,
        block_size_mib: status.block >> 20,
        plugged_size_mib: status.plugged >> 20,
        requested_size_mib: status.requested >> 20,
    }))
}

/// Sets how much memory is to be plugged.
pub fn plug(
    devices: &Devices,
    config: &mut Config,
    update: MemoryHotplugUpdate,
) -> Result<Reply, ActionError> {
    let mib = update.requested_size_mib;
    let (mem, _) = memory(devices, config)?;
    // Too much to count is more than there is in any case.
    mem.set_requested(mib.saturating_mul(1 << 20))?;
    if let Some(settings) = &mut config.memory_hotplug {
        settings.requested_size_mib = mib;
    }
    Ok(Reply::Done)
}

fn balloon(devices: &Devices) -> Result<BalloonHandle, ActionError> {
    let list = devices.list();
    let handle = list.iter().find_map(|device| match &device.handle {
        DeviceHandle::Balloon(handle) => Some(handle.clone()),
        _ => None,
    });
    handle.ok_or_else(no_balloon)
}

fn memory(
    devices: &Devices,
    config: &Config,
) -> Result<(MemHandle, crate::config::MemoryHotplug), ActionError> {
    let list = devices.list();
    let handle = list.iter().find_map(|device| match &device.handle {
        DeviceHandle::Mem(handle) => Some(handle.clone()),
        _ => None,
    });
    handle
        .zip(config.memory_hotplug)
        .ok_or(ActionError::NoDevice {
            kind: "memory hotplug",
            id: None,
        })
}

fn disk(devices: &Devices, id: &str) -> Option<BlockHandle> {
    devices
        .list()
        .iter()
        .find_map(|device| match &device.handle {
            DeviceHandle::Block(handle) if device.id == id => Some(handle.clone()),
            _ => None,
        })
}

fn vhost_user(devices: &Devices, id: &str) -> Option<VhostUserHandle> {
    let list = devices.list();
    list.iter().find_map(|device| match &device.handle {
        DeviceHandle::VhostUserBlock(handle) if device.id == id => Some(handle.clone()),
        _ => None,
    })
}

fn no_device(kind: &'static str, id: &str) -> ActionError {
    let id = Some(id.to_owned());
    ActionError::NoDevice { kind, id }
}

fn failed(error: &dyn std::error::Error) -> ActionError {
    let text = chain(error);
    ActionError::Failed { text }
}
