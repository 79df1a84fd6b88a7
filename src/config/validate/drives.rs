//! Disks: names, queues, at most one root.

use std::path::Path;

use crate::config::{CacheType, Config, Drive, IoEngine};

/// A disk that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DriveError {
    /// A drive's name that cannot be one.
    #[error("drive id '{}' cannot be used: give letters, digits, '.', '-' and '_'", id.escape_debug())]
    DriveId {
        /// As given.
        id: String,
    },
    /// Two drives of one name.
    #[error(
        "drive ids '{first}' and '{second}' are the same in their first {} bytes, which is all \
         that the guest sees: give each drive its own id",
        Drive::SERIAL_LEN
    )]
    DriveIds {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// A number of queues that no disk has.
    #[error("drive '{id}' cannot have {queues} queues: give 1 to 256")]
    Queues {
        /// The drive.
        id: String,
        /// As asked.
        queues: u16,
    },
    /// A partition that cannot be named on a command line.
    #[error(
        "partuuid '{}' of drive '{id}' cannot be used: give hexadecimal digits and '-', and set \
         is_root_device", partuuid.escape_debug()
    )]
    Partition {
        /// The drive.
        id: String,
        /// As given.
        partuuid: String,
    },
    /// No disk, or two.
    #[error(
        "drive '{id}' needs either path_on_host (an image or a block device) or socket (that of a vhost-user \
         backend): give one of them"
    )]
    Place {
        /// The drive.
        id: String,
    },
    /// What a backend decides.
    #[error(
        "Invalid block config. Drive '{id}' with a socket cannot have {field}, which is the vhost-user \
         backend's affair: leave it out"
    )]
    Backend {
        /// The drive.
        id: String,
        /// As in the configuration.
        field: &'static str,
    },
    /// Memory that comes when a backend has its own view of it.
    #[error(
        "drive '{id}' with a socket does not go with hot-pluggable memory, of which its vhost-user backend \
         would not hear: leave one of them out"
    )]
    Hotplug {
        /// The drive.
        id: String,
    },
    /// Several root drives.
    #[error(
        "A root block device already exists! Drives '{first}' and '{second}' are both the root device: leave it to one"
    )]
    Roots {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
}

pub(super) fn validate(config: &Config) -> Result<(), DriveError> {
    let drives = &config.drives;
    for (index, drive) in drives.iter().enumerate() {
        let id = || drive.drive_id.clone();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if drive.drive_id.is_empty() || !drive.drive_id.chars().all(allowed) {
            return Err(DriveError::DriveId { id: id() });
        }
        place(drive)?;
        if drive.socket.is_some() && config.memory_hotplug.is_some() {
            return Err(DriveError::Hotplug { id: id() });
        }
        let earlier = drives.iter().take(index);
        for other in earlier {
            let (first, second) = (other.drive_id.clone(), id());
            if other.serial() == drive.serial() {
                return Err(DriveError::DriveIds { first, second });
            }
            if other.is_root_device && drive.is_root_device {
                return Err(DriveError::Roots { first, second });
            }
        }
        if let Some(partuuid) = &drive.partuuid {
            let allowed = |c: char| c.is_ascii_hexdigit() || c == '-';
            if partuuid.is_empty() || !partuuid.chars().all(allowed) || !drive.is_root_device {
                let (id, partuuid) = (id(), partuuid.clone());
                return Err(DriveError::Partition { id, partuuid });
            }
        }
        if let Some(queues) = drive.num_queues
            && !(1..=256).contains(&queues)
        {
            return Err(DriveError::Queues { id: id(), queues });
        }
    }
    Ok(())
}

/// Where the disk is, and what does not go with a socket.
fn place(drive: &Drive) -> Result<(), DriveError> {
    let id = drive.drive_id.clone();
    let has_path = drive.path_on_host != Path::new("");
    if drive.socket.is_none() {
        return has_path.then_some(()).ok_or(DriveError::Place { id });
    }
    let wrong = [
        ("is_read_only", drive.is_read_only),
        ("cache_type None", drive.cache_type == CacheType::None),
        ("io_engine", drive.io_engine != IoEngine::Auto),
        ("rate_limiter", drive.rate_limiter.is_some()),
        ("logical_block_size", drive.logical_block_size.is_some()),
        ("physical_block_size", drive.physical_block_size.is_some()),
    ];
    let wrong = wrong.into_iter().find(|(_, wrong)| *wrong);
    match (has_path, wrong) {
        (true, _) => Err(DriveError::Place { id }),
        (false, Some((field, _))) => Err(DriveError::Backend { id, field }),
        (false, None) => Ok(()),
    }
}
