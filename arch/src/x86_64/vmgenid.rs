//! The virtual machine generation id: 16 bytes of guest memory that change when the guest goes on
//! from an old state, so that it makes new secrets (Microsoft, "Virtual Machine Generation ID", 2012).
//!
//! They lie in reserved memory below 1 MiB, which no guest uses as RAM; ACPI's device says where, and
//! the generic event device that they changed. Written while the guest does not run.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::VMGENID_START;

/// Bytes of the id.
pub const VMGENID_SIZE: usize = 16;

const ADDRESS: GuestAddress = GuestAddress(VMGENID_START);

/// Give the guest this id.
///
/// # Errors
/// When guest memory has no such address.
pub fn write<M>(memory: &M, id: [u8; VMGENID_SIZE]) -> Result<(), GuestMemoryError>
where
    M: Bytes<GuestAddress, E = GuestMemoryError>,
{
    memory.write_slice(&id, ADDRESS)
}

/// The id that the guest sees.
///
/// # Errors
/// When guest memory has no such address.
pub fn read<M>(memory: &M) -> Result<[u8; VMGENID_SIZE], GuestMemoryError>
where
    M: Bytes<GuestAddress, E = GuestMemoryError>,
{
    memory.read_obj(ADDRESS)
}
