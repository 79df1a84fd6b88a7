//! The boot processor's registers at the first guest instruction.
//!
//! Linux64: 64-bit mode, identity-mapped, `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, interrupts off
//! (Documentation/arch/x86/boot.rst, "64-bit boot protocol"). PVH: 32-bit protected mode, flat
//! segments, paging off, all other control bits clear (Xen docs/misc/pvh.pandoc).

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::kernel::Protocol;
use crate::layout;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Entries: null, null, code, data.
const GDT_SIZE: usize = 32;

const CR0_PE: u64 = 1;
/// Hard-wired to 1 since the 486.
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 2;

/// Segment types, accessed: execute and read, read and write; and a busy 32-bit TSS.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Where and how the boot processor starts; the other general registers are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// Decides the processor mode.
    pub protocol: Protocol,
    /// First instruction.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// `boot_params` for Linux64, else 0.
    pub rsi: u64,
    /// `hvm_start_info` for PVH, else 0.
    pub rbx: u64,
}

impl EntryState {
    /// The state that `protocol` wants, with the parameters where [`layout`] has them.
    pub fn new(protocol: Protocol, entry: u64) -> Self {
        let (rsi, rbx) = match protocol {
            Protocol::Linux64 => (layout::ZERO_PAGE_START, 0),
            Protocol::Pvh => (0, layout::PVH_INFO_START),
        };
        EntryState {
            protocol,
            rip: entry,
            rsp: layout::BOOT_STACK_POINTER,
            rsi,
            rbx,
        }
    }
}

/// Puts the mode that `entry` wants into `sregs`, as read from a vCPU after reset, and returns the
/// general registers. What no protocol names (APIC base, LDT, CR8) is left alone.
pub fn apply(entry: &EntryState, sregs: &mut kvm_sregs) -> kvm_regs {
    let long_mode = entry.protocol == Protocol::Linux64;
    let data = segment(DATA_SELECTOR, TYPE_DATA, false);
    sregs.cs = segment(CODE_SELECTOR, TYPE_CODE, long_mode);
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: TYPE_TSS_BUSY,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.gdt = table(layout::GDT_START, GDT_SIZE as u16 - 1);
    sregs.idt = table(layout::IDT_START, 0);
    sregs.cr2 = 0;
    if long_mode {
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = layout::PML4_START;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
    kvm_regs {
        rip: entry.rip,
        rsp: entry.rsp,
        rsi: entry.rsi,
        rbx: entry.rbx,
        rflags: RFLAGS,
        ..kvm_regs::default()
    }
}

/// The descriptor table that [`apply`]'s selectors point into, as bytes for guest memory.
pub(super) fn gdt(protocol: Protocol) -> [u8; GDT_SIZE] {
    let code = segment(CODE_SELECTOR, TYPE_CODE, protocol == Protocol::Linux64);
    let data = segment(DATA_SELECTOR, TYPE_DATA, false);
    let mut bytes = [0; GDT_SIZE];
    let descriptors = [0, 0, descriptor(&code), descriptor(&data)];
    for (slot, descriptor) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(descriptors) {
        *slot = descriptor.to_le_bytes();
    }
    bytes
}

fn table(base: u64, limit: u16) -> kvm_dtable {
    kvm_dtable {
        base,
        limit,
        ..kvm_dtable::default()
    }
}

/// A flat segment: base 0, limit 4 GiB.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..kvm_segment::default()
    }
}

/// A flat segment as the processor has it in memory (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    const LIMIT: u64 = 0x000f_0000_0000_ffff;
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    LIMIT | access << 40 | flags << 52
}
