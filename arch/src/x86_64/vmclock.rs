//! The vmclock page, by which a guest's kernel and programs see that time or the machine's identity
//! made a jump (linux/include/uapi/linux/vmclock-abi.h, version 1).
//!
//! bulle says that much and tells no time: counter and status are "unknown". The page is guest
//! memory in the reserved range below 1 MiB, and the generic event device tells of changes. Written
//! while the guest does not run, and in the order in which a guest on another processor may read.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{VMCLOCK_SIZE, VMCLOCK_START};

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// No counter of the processor goes with this clock.
const COUNTER_INVALID: u8 = 0xff;
/// `vm_generation_counter` is there.
const GENERATION_PRESENT: u64 = 1 << 8;
/// The guest is notified of each change.
const NOTIFICATION_PRESENT: u64 = 1 << 9;

/// Offsets of `struct vmclock_abi`.
mod offset {
    pub const SIZE: u64 = 4;
    pub const VERSION: u64 = 8;
    pub const COUNTER_ID: u64 = 10;
    pub const SEQ_COUNT: u64 = 12;
    pub const DISRUPTION_MARKER: u64 = 16;
    pub const FLAGS: u64 = 24;
    pub const GENERATION_COUNTER: u64 = 104;
}

fn at(offset: u64) -> GuestAddress {
    GuestAddress(VMCLOCK_START + offset)
}

/// Write the page of a machine that starts; memory is zero there.
///
/// # Errors
/// When guest memory has no such address.
pub fn write<M>(memory: &M) -> Result<(), GuestMemoryError>
where
    M: Bytes<GuestAddress, E = GuestMemoryError>,
{
    memory.write_obj(MAGIC, at(0))?;
    memory.write_obj(VMCLOCK_SIZE as u32, at(offset::SIZE))?;
    memory.write_obj(VERSION, at(offset::VERSION))?;
    memory.write_obj(COUNTER_INVALID, at(offset::COUNTER_ID))?;
    let flags = GENERATION_PRESENT | NOTIFICATION_PRESENT;
    memory.write_obj(flags, at(offset::FLAGS))
}

/// Say that the counters of time made a jump, and that the machine goes on from an old state.
///
/// # Errors
/// When guest memory has no such address.
pub fn disrupt<M>(memory: &M) -> Result<(), GuestMemoryError>
where
    M: Bytes<GuestAddress, E = GuestMemoryError>,
{
    let sequence: u32 = memory.read_obj(at(offset::SEQ_COUNT))?;
    // Odd while the fields change, then even and another one than before.
    let sequence = sequence | 1;
    memory.write_obj(sequence, at(offset::SEQ_COUNT))?;
    fence(Ordering::Release);
    for field in [offset::DISRUPTION_MARKER, offset::GENERATION_COUNTER] {
        let before: u64 = memory.read_obj(at(field))?;
        memory.write_obj(before.wrapping_add(1), at(field))?;
    }
    fence(Ordering::Release);
    memory.write_obj(sequence.wrapping_add(1), at(offset::SEQ_COUNT))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn a_jump_is_seen_by_what_changes() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write(&memory).unwrap();
        let mut before = [0_u8; 112];
        memory.read_slice(&mut before, at(0)).unwrap();
        assert_eq!(before[..12], *b"VCLK\x00\x10\x00\x00\x01\x00\xff\x00");
        assert_eq!(before[12..24], [0; 12]);
        assert_eq!(before[24..32], [0, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(before[32..], [0; 80], "the status is unknown");
        for times in 1..4 {
            disrupt(&memory).unwrap();
            let mut wanted = before;
            (wanted[12], wanted[16], wanted[104]) = (2 * times, times, times);
            let mut now = [0; 112];
            memory.read_slice(&mut now, at(0)).unwrap();
            assert_eq!(now, wanted);
        }
        // Whatever the guest wrote there.
        memory.write_slice(&[0xff; 112], at(0)).unwrap();
        disrupt(&memory).unwrap();
        assert_eq!(memory.read_obj::<u32>(at(12)).unwrap(), 0);
    }
}
