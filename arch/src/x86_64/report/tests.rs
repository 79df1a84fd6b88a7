use vm_memory::GuestMemoryMmap;

use super::*;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const CR0_ON: u64 = 1 << 31 | 1;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const LMA: u64 = 1 << 10;

struct Guest {
    memory: GuestMemoryMmap<()>,
    report: VcpuReport,
}

impl Guest {
    /// 4 MiB of memory, page tables from 0x1000 on.
    fn new(cr4: u64, efer: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let mut report = VcpuReport::default();
        let sregs = &mut report.sregs;
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_ON, 0x1000, cr4, efer);
        sregs.cs.l = u8::from(efer & LMA != 0);
        Self { memory, report }
    }

    fn entry(self, table: u64, index: u64, value: u64) -> Self {
        self.memory
            .write_obj(value, GuestAddress(table + index * 8))
            .unwrap();
        self
    }

    fn entry32(self, table: u64, index: u64, value: u32) -> Self {
        self.memory
            .write_obj(value, GuestAddress(table + index * 4))
            .unwrap();
        self
    }

    fn walk(&self, linear: u64) -> Result<u64, WalkError> {
        translate(&self.memory, &self.report.sregs, linear).map(|address| address.0)
    }
}

#[test]
fn without_paging_addresses_are_physical() {
    let mut guest = Guest::new(0, 0);
    guest.report.sregs.cr0 = 1;
    assert_eq!(guest.walk(0x12_3456), Ok(0x12_3456));
}

#[test]
fn four_levels_of_small_and_large_pages() {
    // The kernel's half of the address space: 0xffff_8000_0000_0000 on.
    let guest = Guest::new(PAE, LMA)
        .entry(0x1000, 256, 0x2000 | PRESENT)
        .entry(0x2000, 0, 0x3000 | PRESENT)
        .entry(0x3000, 1, 0x4000 | PRESENT)
        .entry(0x4000, 2, 1 << 63 | 0x5000 | PRESENT)
        .entry(0x3000, 2, 0x8060_0000 | LARGE | PRESENT)
        .entry(0x2000, 3, 0x1_4000_0000 | LARGE | PRESENT);
    let base = 0xffff_8000_0000_0000;
    assert_eq!(guest.walk(base + 0x20_2abc), Ok(0x5abc));
    assert_eq!(guest.walk(base + 0x5a_bcde), Ok(0x8060_0000 + 0x1a_bcde));
    assert_eq!(guest.walk(base + 0xc123_4567), Ok(0x1_4123_4567));
    assert_eq!(
        guest.walk(base + 0x20_3000),
        Err(WalkError::NotMapped {
            linear: base + 0x20_3000,
            entry: 0x4018
        })
    );
    let linear = 0x8000_0000_0000;
    assert_eq!(guest.walk(linear), Err(WalkError::NotCanonical { linear }));
}

#[test]
fn five_levels() {
    let guest = Guest::new(PAE | LA57, LMA)
        .entry(0x1000, 1, 0x2000 | PRESENT)
        .entry(0x2000, 0, 0x3000 | PRESENT)
        .entry(0x3000, 0, 0x4000 | PRESENT)
        .entry(0x4000, 0, 0x5000 | PRESENT)
        .entry(0x5000, 7, 0x6000 | PRESENT);
    assert_eq!(guest.walk((1 << 48) + 0x7123), Ok(0x6123));
}

#[test]
fn pae_has_a_short_first_level() {
    let mut guest = Guest::new(PAE, 0)
        .entry(0x1020, 3, 0x3000 | PRESENT)
        .entry(0x3000, 511, 0x4000 | PRESENT)
        .entry(0x4000, 511, 0x7000 | PRESENT)
        .entry(0x3000, 0, 0x20_0000 | LARGE | PRESENT);
    guest.report.sregs.cr3 = 0x1020;
    assert_eq!(guest.walk(0xffff_fff0), Ok(0x7ff0));
    assert_eq!(guest.walk(0xc000_0001), Ok(0x20_0001));
    assert!(matches!(
        guest.walk(0),
        Err(WalkError::NotMapped { entry: 0x1020, .. })
    ));
}

#[test]
fn two_levels_with_and_without_large_pages() {
    let entries = |guest: Guest| {
        guest
            .entry32(0x1000, 1, 0x2000 | 1)
            .entry32(0x2000, 3, 0x8000 | 1)
            .entry32(0x1000, 2, 0x00c0_0000 | 1 << 13 | 0x81)
    };
    let guest = entries(Guest::new(1 << 4, 0));
    assert_eq!(guest.walk(0x40_3123), Ok(0x8123));
    assert_eq!(guest.walk(0x80_0123), Ok(0x1_00c0_0123));
    // Without PSE the same bit means nothing and the entry is a table outside of memory.
    let guest = entries(Guest::new(0, 0));
    assert!(matches!(
        guest.walk(0x80_0123),
        Err(WalkError::OutsideMemory { .. })
    ));
}

#[test]
fn tables_that_point_to_themselves_or_nowhere_end() {
    let guest = Guest::new(PAE, LMA).entry(0x1000, 0, 0x1000 | PRESENT);
    assert_eq!(guest.walk(0x123), Ok(0x1123));
    let mut guest = Guest::new(PAE, LMA);
    guest.report.sregs.cr3 = u64::MAX;
    assert!(matches!(
        guest.walk(u64::MAX),
        Err(WalkError::OutsideMemory { .. })
    ));
    assert!(guest.report.instruction_bytes(&guest.memory).is_empty());
}

#[test]
fn instruction_bytes_cross_pages_and_stop_at_a_hole() {
    let mut guest = Guest::new(PAE, LMA)
        .entry(0x1000, 0, 0x2000 | PRESENT)
        .entry(0x2000, 0, 0x3000 | PRESENT)
        .entry(0x3000, 0, 0x4000 | PRESENT)
        .entry(0x4000, 1, 0x9000 | PRESENT)
        .entry(0x4000, 2, 0x7000 | PRESENT);
    let bytes: Vec<u8> = (1..=15).collect();
    guest
        .memory
        .write_slice(&bytes[..5], GuestAddress(0x9ffb))
        .unwrap();
    guest
        .memory
        .write_slice(&bytes[5..], GuestAddress(0x7000))
        .unwrap();
    guest.report.regs.rip = 0x1ffb;
    assert_eq!(guest.report.instruction_bytes(&guest.memory), bytes);
    let guest = guest.entry(0x4000, 2, 0);
    assert_eq!(guest.report.instruction_bytes(&guest.memory), bytes[..5]);
}

#[test]
fn real_mode_adds_the_segment() {
    let mut report = VcpuReport::default();
    report.sregs.cs.base = 0xffff_0000;
    report.regs.rip = 0xfff0;
    assert_eq!(report.linear_rip(), 0xffff_fff0);
    report.sregs.cs.l = 1;
    assert_eq!(report.linear_rip(), 0xffff_fff0, "not in long mode");
    report.sregs.efer = LMA;
    assert_eq!(report.linear_rip(), 0xfff0);
}

#[test]
fn the_text_has_eight_lines() {
    let mut report = VcpuReport::default();
    report.regs.rip = 0xffff_ffff_8100_0000;
    report.regs.r15 = 0x1234;
    report.sregs.cr2 = 0xdead_beef;
    report.sregs.cs.selector = 0x10;
    (report.sregs.cs.l, report.sregs.efer, report.sregs.cr0) = (1, 0xd01, CR0_ON);
    let text = report.to_string();
    assert_eq!(text.lines().count(), 8);
    for part in [
        "RIP ffffffff81000000",
        "R15 0000000000001234",
        "CR2 00000000deadbeef",
        "CS 0010@0 ",
        "64-bit cpl 0",
        "EFER 0000000000000d01 GDT 0+0",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(text.lines().all(|line| line.len() < 100), "{text}");
    assert!(VcpuReport::default().to_string().contains("real mode"));
}
