//! Linear to guest-physical addresses by the guest's own page tables (Intel SDM volume 3, chapter
//! "Paging"). A walk reads at most one entry at each of five levels, whatever the tables hold.

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

pub(super) const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
pub(super) const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Address bits of an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A linear address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// A 64-bit address whose upper bits are not copies of its highest translated bit.
    #[error("linear address {linear:#x} is not canonical")]
    NotCanonical {
        /// The address.
        linear: u64,
    },
    /// An entry says that nothing is mapped.
    #[error("linear address {linear:#x} is not mapped (page table entry at {entry:#x})")]
    NotMapped {
        /// The address.
        linear: u64,
        /// Guest-physical address of the entry.
        entry: u64,
    },
    /// A page table is not in guest memory.
    #[error("the page tables for linear address {linear:#x} leave guest memory at {entry:#x}")]
    OutsideMemory {
        /// The address.
        linear: u64,
        /// Guest-physical address of the entry that cannot be read.
        entry: u64,
    },
}

/// One paging mode.
struct Mode {
    /// Lowest address bit that each level translates, the highest level first.
    levels: &'static [u32],
    /// Bytes of an entry.
    entry_size: u64,
    /// Address bits of CR3.
    root: u64,
    /// Levels (by their lowest bit) whose entries may map a large page.
    large: &'static [u32],
    /// Bits of a linear address.
    bits: u32,
}

const TWO_LEVELS: Mode = Mode {
    levels: &[22, 12],
    entry_size: 4,
    root: 0xffff_f000,
    large: &[22],
    bits: 32,
};
const TWO_LEVELS_SMALL_PAGES: Mode = Mode {
    large: &[],
    ..TWO_LEVELS
};
const PAE: Mode = Mode {
    levels: &[30, 21, 12],
    entry_size: 8,
    root: 0xffff_ffe0,
    large: &[21],
    bits: 32,
};
const FOUR_LEVELS: Mode = Mode {
    levels: &[39, 30, 21, 12],
    entry_size: 8,
    root: ADDRESS,
    large: &[30, 21],
    bits: 48,
};
const FIVE_LEVELS: Mode = Mode {
    levels: &[48, 39, 30, 21, 12],
    bits: 57,
    ..FOUR_LEVELS
};

/// The mode the control registers select; none when paging is off.
fn mode(sregs: &kvm_sregs) -> Option<Mode> {
    if sregs.cr0 & CR0_PG == 0 {
        return None;
    }
    let has = |bit| sregs.cr4 & bit != 0;
    Some(match (sregs.efer & EFER_LMA != 0, has(CR4_PAE)) {
        (true, _) if has(CR4_LA57) => FIVE_LEVELS,
        (true, _) => FOUR_LEVELS,
        (false, true) => PAE,
        (false, false) if has(CR4_PSE) => TWO_LEVELS,
        (false, false) => TWO_LEVELS_SMALL_PAGES,
    })
}

/// Guest-physical address behind a linear address, without regard to permissions.
///
/// # Errors
/// [`WalkError`] says where the walk ended. The address that is returned may lie outside of memory.
pub fn translate<M: Bytes<GuestAddress>>(
    mem: &M,
    sregs: &kvm_sregs,
    linear: u64,
) -> Result<GuestAddress, WalkError> {
    let Some(mode) = mode(sregs) else {
        return Ok(GuestAddress(linear));
    };
    let upper = linear >> (mode.bits - 1);
    let all_ones = u64::MAX >> (mode.bits - 1);
    let linear = match mode.bits {
        32 => linear & u64::from(u32::MAX),
        _ if upper == 0 || upper == all_ones => linear,
        _ => return Err(WalkError::NotCanonical { linear }),
    };
    let mut table = sregs.cr3 & mode.root;
    let mut level_end = mode.bits;
    for &shift in mode.levels {
        let index = linear >> shift & ((1 << (level_end - shift)) - 1);
        level_end = shift;
        let address = table + index * mode.entry_size;
        let entry = read_entry(mem, address, mode.entry_size).ok_or(WalkError::OutsideMemory {
            linear,
            entry: address,
        })?;
        if entry & PRESENT == 0 {
            return Err(WalkError::NotMapped {
                linear,
                entry: address,
            });
        }
        table = entry & ADDRESS;
        if entry & LARGE != 0 && mode.large.contains(&shift) {
            let offset = (1 << shift) - 1;
            // A 4 MiB page has bits 32 to 39 of its address in bits 13 to 20 (PSE-36).
            let high = if mode.entry_size == 4 {
                (entry >> 13 & 0xff) << 32
            } else {
                0
            };
            return Ok(GuestAddress(table & !offset | high | linear & offset));
        }
    }
    Ok(GuestAddress(table | linear & 0xfff))
}

fn read_entry<M: Bytes<GuestAddress>>(mem: &M, address: u64, size: u64) -> Option<u64> {
    let address = GuestAddress(address);
    if size == 4 {
        mem.read_obj::<u32>(address).ok().map(u64::from)
    } else {
        mem.read_obj(address).ok()
    }
}
