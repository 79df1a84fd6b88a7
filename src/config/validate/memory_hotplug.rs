//! The memory device: sizes that go into each other.

use crate::config::{MAX_MEMORY_MIB, MachineConfig, MemoryHotplug};

/// A memory device that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryHotplugError {
    /// Blocks.
    #[error(
        "Block size must not be lower than {least} MiB: blocks of {block} MiB cannot be plugged, give a power of two from \
         {least} MiB on (the size of the host's pages, and 2 MiB at least)"
    )]
    Block {
        /// As asked, in MiB.
        block: u64,
        /// Fewest MiB.
        least: u64,
    },
    /// Slots.
    #[error(
        "a slot size of {slot} MiB cannot be had: give a multiple of the block size from 128 MiB on"
    )]
    Slot {
        /// As asked, in MiB.
        slot: u64,
    },
    /// The whole.
    #[error(
        "Total size must be a multiple of slot size: {total} MiB of hot-pluggable memory cannot be had, give a multiple of \
         {slot} MiB (the slot size) up to 1T"
    )]
    Total {
        /// As asked, in MiB.
        total: u64,
        /// Slot size in MiB.
        slot: u64,
    },
    /// What is plugged at first.
    #[error(
        "{requested} MiB cannot be plugged at first: give a multiple of {block} MiB (the block size) \
         up to {total} MiB"
    )]
    Requested {
        /// As asked, in MiB.
        requested: u64,
        /// Block size in MiB.
        block: u64,
        /// The whole in MiB.
        total: u64,
    },
}

pub(super) fn validate(
    memory: &MemoryHotplug,
    machine: &MachineConfig,
) -> Result<(), MemoryHotplugError> {
    let MemoryHotplug {
        total_size_mib: total,
        block_size_mib: block,
        slot_size_mib: slot,
        requested_size_mib: requested,
    } = *memory;
    let least = machine.huge_pages.reserved_mib().unwrap_or(2).max(2);
    if block < least || !block.is_power_of_two() {
        return Err(MemoryHotplugError::Block { block, least });
    }
    if slot < 128 || !slot.is_multiple_of(block) {
        return Err(MemoryHotplugError::Slot { slot });
    }
    if total == 0 || total > MAX_MEMORY_MIB || !total.is_multiple_of(slot) {
        return Err(MemoryHotplugError::Total { total, slot });
    }
    if requested > total || !requested.is_multiple_of(block) {
        return Err(MemoryHotplugError::Requested {
            requested,
            block,
            total,
        });
    }
    Ok(())
}
