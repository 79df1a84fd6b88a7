//! Starting the other processors by INIT and SIPI, in xAPIC mode.
//!
//! They run `trampoline` in real mode: take a number, leave their [`Record`], halt.

use core::arch::{global_asm, x86_64::_rdtsc};

use crate::io;

const LAPIC: u64 = 0xfee0_0000;
/// Where the trampoline goes; the SIPI vector is its page number.
const TRAMPOLINE: u64 = 0x3_0000;
/// Number of processors that came, then their records at `RECORDS`.
const COUNT: u64 = TRAMPOLINE + 0x1000;
const RECORDS: u64 = COUNT + 32;
/// TSC cycles between INIT and start-up: some ten milliseconds.
const PAUSE: u64 = 30_000_000;
/// TSC cycles until processors that did not come are started again: a second or so.
const ROUND: u64 = 3_000_000_000;
const ROUNDS: usize = 20;

global_asm!(
    ".section .rodata.trampoline, \"a\"",
    ".code16",
    ".global trampoline, trampoline_end",
    "trampoline:",
    "cli",
    "mov %cs, %ax",
    "mov %ax, %ds",
    "mov $1, %eax",
    "lock xaddl %eax, 0x1000", // COUNT
    "shl $5, %ax",
    "mov %ax, %di",
    "add $0x1020, %di", // RECORDS
    "mov $1, %eax",
    "cpuid",
    "mov %ebx, (%di)",
    "mov $0xb, %eax",
    "xor %ecx, %ecx",
    "cpuid",
    "mov %eax, 4(%di)",
    "mov %ebx, 8(%di)",
    "mov %edx, 12(%di)",
    "mov $0xb, %eax",
    "mov $1, %ecx",
    "cpuid",
    "mov %eax, 16(%di)",
    "mov %ebx, 20(%di)",
    "lock incl 0x1004", // records complete
    "1: hlt",
    "jmp 1b",
    "trampoline_end:",
    ".code64",
    ".section .text",
    options(att_syntax)
);

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

/// What CPUID said on one processor.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Record {
    /// Leaf 1, EBX: the initial APIC id is in the top byte.
    pub leaf1_ebx: u32,
    /// Leaf 0xb, level 0: bits to shift to reach the core.
    pub thread_shift: u32,
    /// Leaf 0xb, level 0: threads of this core.
    pub threads: u32,
    /// Leaf 0xb: x2APIC id.
    pub x2apic_id: u32,
    /// Leaf 0xb, level 1: bits to shift to reach the package.
    pub core_shift: u32,
    /// Leaf 0xb, level 1: logical processors of this package.
    pub logical: u32,
    /// Unused.
    pub pad: [u32; 2],
}

unsafe extern "C" {
    static boot_cpuid: [[u32; 6]; 5];
    static boot_xcr0: u32;
}

/// Whether the boot processor has AVX switched on.
pub fn boot_avx() -> bool {
    // SAFETY: written before Rust started, never after.
    unsafe { boot_xcr0 & 4 != 0 }
}

/// EAX, EBX, ECX, EDX of a leaf that the boot code read in kernel mode: 0, 1, 0x4000_0000, and the
/// first two levels of 0xb.
pub fn boot_leaf(leaf: u32, level: u32) -> Option<[u32; 4]> {
    // SAFETY: written before Rust started, never after.
    let table = unsafe { boot_cpuid };
    let found = table.iter().find(|row| row[0] == leaf && row[1] == level)?;
    found.last_chunk().copied()
}

/// This processor's record, from the leaves that the boot code read.
pub fn boot_record() -> Option<Record> {
    let [thread_shift, threads, _, x2apic_id] = boot_leaf(0xb, 0)?;
    let [core_shift, logical, ..] = boot_leaf(0xb, 1)?;
    let leaf1_ebx = boot_leaf(1, 0)?[1];
    Some(Record {
        leaf1_ebx,
        thread_shift,
        threads,
        x2apic_id,
        core_shift,
        logical,
        pad: [0; 2],
    })
}

/// This processor's local APIC id.
pub fn apic_id() -> u32 {
    io::read::<u32>(LAPIC + 0x20) >> 24
}

fn send(id: u32, command: u32) {
    io::write(LAPIC + 0x310, id << 24);
    io::write(LAPIC + 0x300, command);
    while io::read::<u32>(LAPIC + 0x300) & (1 << 12) != 0 {}
}

/// Waits until `enough` or for about `cycles`.
fn wait(cycles: u64, enough: impl Fn() -> bool) {
    // SAFETY: every x86_64 processor has a time stamp counter.
    let now = || unsafe { _rdtsc() };
    let begin = now();
    while !enough() && now().wrapping_sub(begin) < cycles {
        core::hint::spin_loop();
    }
}

/// The records of the processors that came.
fn records() -> &'static [Record] {
    let complete = io::read::<u32>(COUNT + 4) as usize;
    // SAFETY: as many records are complete; the processors that wrote them have halted.
    unsafe { core::slice::from_raw_parts(RECORDS as *const Record, complete) }
}

/// Starts `ids` (except this processor's); the records of those that came in time, and how often
/// some had to be started again.
///
/// That happens on a busy machine: a KVM without hardware virtualisation was seen to lose a
/// processor whose thread finds INIT and start-up pending at once.
pub fn start(ids: impl Iterator<Item = u32> + Clone) -> (&'static [Record], usize) {
    // SAFETY: both symbols delimit the code above.
    let code = unsafe {
        let start = &raw const trampoline;
        let len = (&raw const trampoline_end).offset_from(start);
        core::slice::from_raw_parts(start, len as usize)
    };
    for (at, byte) in code.iter().enumerate() {
        io::write(TRAMPOLINE + at as u64, *byte);
    }
    io::write(COUNT, 0u64);
    let this = apic_id();
    let others = ids.filter(|id| *id != this);
    let expected = others.clone().count();
    for round in 0..ROUNDS {
        let came = records();
        let absent = |id: &u32| !came.iter().any(|r| r.leaf1_ebx >> 24 == *id);
        for id in others.clone().filter(absent) {
            send(id, 0x4500); // INIT, assert
        }
        wait(PAUSE, || false);
        for id in others.clone().filter(absent) {
            send(id, 0x4600 | (TRAMPOLINE >> 12) as u32); // start-up
        }
        wait(ROUND, || records().len() >= expected);
        if records().len() >= expected {
            return (records(), round);
        }
    }
    (records(), ROUNDS)
}
