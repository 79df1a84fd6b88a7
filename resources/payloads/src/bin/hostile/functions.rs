//! What only PCI has: configuration space, BARs, MSI-X. Nothing to do for other devices.
//!
//! Messages may have any address, but never a delivery mode other than fixed: this processor would
//! have to take an NMI.

use payloads::io;
use payloads::virtio::pci::{ECAM, Function};
use payloads::virtio::queue::{Desc, WRITE};
use payloads::virtio::{Transport, disk};

use super::{Attack, DATA, REQUESTS};

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
/// Delivery modes of a message.
const DELIVERY: u32 = 0x700;

fn function(attack: &Attack<'_>) -> Option<Function> {
    match attack.device.transport {
        Transport::Mmio(_) => None,
        Transport::Pci(function) => Some(function),
    }
}

/// Garbage in every byte of configuration space, of functions that are not there too, in every
/// width, by ECAM and by ports.
pub fn configuration_space(attack: &mut Attack<'_>) -> bool {
    let Some(f) = function(attack) else {
        return true;
    };
    let identity: u32 = io::read(f.space);
    // What is there, and some of what is not.
    for at in (0..0x110).step_by(4).chain((0x110..0x1000).step_by(100)) {
        for value in [u32::MAX, 0, 0x5555_5555] {
            io::write(f.space + at, value);
            let _ = io::read::<u32>(f.space + at);
        }
    }
    for at in 0..0x110 {
        let value = attack.random.u64();
        io::write(f.space + at, value as u8);
        io::write(f.space + at, value as u16);
        io::write(f.space + at, value);
        let _ = io::read::<u64>(f.space + at);
    }
    for _ in 0..attack.steps / 4 {
        let at = ECAM + attack.random.below(0x10_0000 - 8);
        let _ = io::read::<u32>(at);
        // Other functions keep their BARs and messages.
        let at = f.space + attack.random.below(0x1000 - 8);
        io::write(at, attack.random.u64() as u32);
        io::out32(ADDRESS_PORT, attack.random.u64() as u32);
        let _ = io::in32(DATA_PORT + attack.random.below(4) as u16);
        let slot = ((f.space - ECAM) >> 4) as u32;
        let register = attack.random.u64() as u32 & 0x7fc;
        io::out32(ADDRESS_PORT, 1 << 31 | slot | register);
        io::out32(DATA_PORT, attack.random.u64() as u32);
        io::out8(DATA_PORT + 3, attack.random.u64() as u8);
    }
    mend(&f);
    io::read::<u32>(f.space) == identity
}

/// As it was found: without MSI-X, and the BAR in place.
fn mend(f: &Function) {
    io::write(f.space + f.msix + 2, 0u16);
    f.restore_bar();
    f.enable();
}

/// Vectors that do not exist, messages to anywhere, BARs on top of RAM and of other devices.
pub fn vectors_and_bars(attack: &mut Attack<'_>) -> bool {
    let Some(f) = function(attack) else {
        return true;
    };
    let device = attack.device;
    vectors(attack, &f);
    // Nothing is to be written to RAM any more.
    device.reset();
    let command = f.space + 4;
    for _ in 0..2 {
        for bar in [
            0,
            0x10_0000,
            DATA,
            0xc000_0000,
            0xd000_0000,
            ECAM,
            0xe800_0000,
            0xe801_0000,
            0xefff_0000,
            0xfec0_0000,
            0xfee0_0000,
            0xffff_0000,
            1 << 32,
            1 << 52,
            u64::MAX,
        ] {
            io::write(DATA, 0x1234_5678_u32);
            io::write(f.space + 0x10, bar as u32);
            io::write(f.space + 0x14, (bar >> 32) as u32);
            io::write(command, attack.random.u64() as u16);
            let _ = io::read::<u32>(f.common);
            device.notify(0);
            // RAM stays RAM.
            if io::read::<u32>(DATA) != 0x1234_5678 {
                return false;
            }
            let low = bar as u32 as u64;
            if bar == low && (0xc000_0000..0xf000_0000).contains(&low) {
                let _ = io::read::<u32>(low + 0x14);
            }
            f.enable();
        }
        mend(&f);
    }
    // Moved within the window it works there.
    let elsewhere = 0xeff0_0000u64;
    io::write(f.space + 0x10, elsewhere as u32);
    let moved = io::read::<u16>(elsewhere + (f.common - f.bar) + 0x12);
    mend(&f);
    moved == io::read(f.common + 0x12) && moved != 0xffff
}

fn vectors(attack: &mut Attack<'_>, f: &Function) {
    let device = attack.device;
    let (table, entries) = f.msix_table();
    io::write(f.space + f.msix + 2, 0x8000u16);
    for round in 0..100u64 {
        let mut queue = attack.start(0);
        for entry in 0..entries + 2 {
            let at = table + 16 * entry;
            // Masked while it changes.
            io::write(at + 12, 1u32);
            let address = attack
                .random
                .pick(&[0xfee0_0000, 0, u64::MAX, 0xffff_f000, DATA]);
            io::write(at, address);
            io::write(at + 8, attack.random.u64() as u32 & !DELIVERY);
            io::write(at + 12, attack.random.below(2) as u32);
        }
        for vector in [
            0,
            1,
            entries as u16,
            entries as u16 + 1,
            0x7ff,
            0xfffe,
            0xffff,
        ] {
            io::write(f.common + 0x10, vector);
            for n in 0..device.queues() + 1 {
                device.select(n);
                io::write(f.common + 0x1a, vector);
                let _ = io::read::<u16>(f.common + 0x1a);
            }
        }
        device.select(0);
        io::write(f.common + 0x1a, (round % 3) as u16);
        // Something to interrupt for.
        let read = device.id == disk::ID;
        io::write(REQUESTS, 0u64);
        io::write(REQUESTS + 8, 0u64);
        queue.desc(
            0,
            Desc {
                addr: REQUESTS,
                len: 16,
                flags: 1,
                next: 1,
            },
        );
        queue.desc(
            1,
            Desc {
                addr: DATA,
                len: 513,
                flags: WRITE,
                next: 0,
            },
        );
        queue.offer(u16::from(!read));
        queue.publish();
        device.notify(0);
        io::write(
            f.space + f.msix + 2,
            attack.random.pick(&[0x8000u16, 0xc000, 0, 0xffff]),
        );
    }
    mend(f);
}
