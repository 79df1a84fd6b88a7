//! Persistent memory: names, at most one root of the guest.

use crate::config::Config;

/// Persistent memory that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PmemError {
    /// A name that cannot be one.
    #[error("pmem id '{}' cannot be used: give letters, digits, '.', '-' and '_'", id.escape_debug())]
    Id {
        /// As given.
        id: String,
    },
    /// Two of one name.
    #[error("two pmem devices have the id '{id}': give each its own")]
    Ids {
        /// As given.
        id: String,
    },
    /// Several roots.
    #[error(
        "A root device already exists! '{first}' and '{second}' are both the root device: leave it to one"
    )]
    Roots {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// bulle's agent finds its root elsewhere.
    #[error(
        "the pmem device '{id}' is to be the root device, which the agent cannot use: run without a \
         command (--root none), or use a drive"
    )]
    Agent {
        /// The device.
        id: String,
    },
}

pub(super) fn validate(config: &Config) -> Result<(), PmemError> {
    let mut root = config.root_drive().map(|drive| drive.drive_id.clone());
    for (index, pmem) in config.pmem.iter().enumerate() {
        let id = || pmem.id.clone();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if pmem.id.is_empty() || !pmem.id.chars().all(allowed) {
            return Err(PmemError::Id { id: id() });
        }
        if config
            .pmem
            .iter()
            .take(index)
            .any(|other| other.id == pmem.id)
        {
            return Err(PmemError::Ids { id: id() });
        }
        if !pmem.root_device {
            continue;
        }
        if config.guest.is_some() {
            return Err(PmemError::Agent { id: id() });
        }
        if let Some(first) = root.replace(id()) {
            return Err(PmemError::Roots {
                first,
                second: id(),
            });
        }
    }
    Ok(())
}
