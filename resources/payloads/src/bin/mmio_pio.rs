//! Port and MMIO accesses of every width: what devices keep, and what nobody answers.
#![no_std]
#![no_main]

use payloads::{console::COM1, io, println, start::StartInfo};

payloads::start!(main);

/// A port and an address that no device claims.
const FREE_PORT: u16 = 0x1230;
const FREE_ADDR: u64 = 0xfd00_0000;
const SCRATCH: u16 = COM1 + 7;
const IOAPIC: u64 = 0xfec0_0000;

struct Checks(u8);

impl Checks {
    fn check(&mut self, what: &str, good: bool) {
        println!("{what}: {}", if good { "ok" } else { "WRONG" });
        self.0 += u8::from(!good);
    }
}

fn ports(checks: &mut Checks) {
    for (index, value) in [(0x50u8, 0xa5u8), (0x51, 0x5a), (0x50, 0x3c)] {
        io::out8(0x70, index);
        io::out8(0x71, value);
        io::out8(0x70, index);
        checks.check("CMOS RAM keeps a byte", io::in8(0x71) == value);
    }
    io::out8(SCRATCH, 0x42);
    let mut bytes = [0u8; 16];
    io::ins8(SCRATCH, &mut bytes);
    checks.check("rep insb reads a register repeatedly", bytes == [0x42; 16]);
    io::outs8(COM1, b"rep outsb: ok\n");
    let all = io::in8(FREE_PORT) == 0xff
        && io::in16(FREE_PORT) == 0xffff
        && io::in32(FREE_PORT) == 0xffff_ffff;
    checks.check("a free port reads as ones", all);
    let (mut b, mut w, mut d) = ([0u8; 7], [0u16; 7], [0u32; 7]);
    io::ins8(FREE_PORT, &mut b);
    io::ins16(FREE_PORT, &mut w);
    io::ins32(FREE_PORT, &mut d);
    let ones = b == [0xff; 7] && w == [0xffff; 7] && d == [0xffff_ffff; 7];
    checks.check("rep ins from a free port reads ones", ones);
    io::out8(FREE_PORT, 1);
    io::out16(FREE_PORT, 2);
    io::out32(FREE_PORT, 3);
    io::outs8(FREE_PORT, &b);
    io::outs16(FREE_PORT, &w);
    io::outs32(FREE_PORT, &d);
    checks.check(
        "writes to a free port do nothing",
        io::in32(FREE_PORT) == u32::MAX,
    );
}

fn mmio(checks: &mut Checks) {
    let ones = || {
        io::read::<u8>(FREE_ADDR) == u8::MAX
            && io::read::<u16>(FREE_ADDR + 2) == u16::MAX
            && io::read::<u32>(FREE_ADDR + 4) == u32::MAX
            && io::read::<u64>(FREE_ADDR + 8) == u64::MAX
    };
    checks.check("free MMIO reads as ones", ones());
    io::write(FREE_ADDR, 0u8);
    io::write(FREE_ADDR + 2, 0u16);
    io::write(FREE_ADDR + 4, 0u32);
    io::write(FREE_ADDR + 8, 0u64);
    checks.check("writes to free MMIO do nothing", ones());
    let across = io::read::<[u8; 8]>(FREE_ADDR + 0xffc);
    checks.check("an access across two pages reads ones", across == [0xff; 8]);
    io::write(IOAPIC, 1u32); // version
    let version: u32 = io::read(IOAPIC + 0x10);
    checks.check("the I/O APIC has 24 pins", version >> 16 & 0xff == 23);
    io::write(IOAPIC, 0x12u32); // pin 1, low half: mask it, vector 0x55
    io::write(IOAPIC + 0x10, 0x1_0055u32);
    io::write(IOAPIC, 0x12u32);
    let entry: u32 = io::read(IOAPIC + 0x10);
    checks.check(
        "an I/O APIC entry keeps its bits",
        entry & 0x1_00ff == 0x1_0055,
    );
}

fn main(_: &StartInfo) -> u8 {
    let mut checks = Checks(0);
    ports(&mut checks);
    mmio(&mut checks);
    checks.0
}
