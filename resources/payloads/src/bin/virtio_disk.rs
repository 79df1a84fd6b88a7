//! A polling driver for the first virtio-mmio device, a disk: writes and reads a sector. On the
//! command line, `reads=N` reads more, `log=N` writes and flushes N sectors one by one and says which
//! are on the disk, and `attack=1` does what no driver should, and then works on.
#![no_std]
#![no_main]

use core::sync::atomic::{Ordering, fence};

use payloads::{io, println, start::StartInfo};

payloads::start!(main);

const DEVICE: u64 = 0xd000_0000;
/// Rings and buffers, in RAM that nothing else uses.
const DESC: u64 = 0x100_0000;
const AVAIL: u64 = 0x100_1000;
const USED: u64 = 0x100_2000;
const HEADER: u64 = 0x100_3000;
const DATA: u64 = 0x100_4000;
const STATUS: u64 = 0x100_5000;
const SIZE: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

fn reg(offset: u64, value: u32) {
    io::write(DEVICE + offset, value);
}

fn status() -> u32 {
    io::read(DEVICE + 0x70)
}

struct Disk {
    avail: u16,
}

impl Disk {
    /// Resets and starts the device (section 3.1.1).
    fn start() -> Self {
        reg(0x70, 0);
        for bits in [1, 3] {
            reg(0x70, bits);
        }
        for (select, features) in [(0, 0), (1, 1)] {
            reg(0x24, select);
            reg(0x20, features);
        }
        reg(0x70, 11);
        for ring in [DESC, AVAIL, USED] {
            for at in (0..0x1000).step_by(8) {
                io::write(ring + at, 0u64);
            }
        }
        reg(0x30, 0);
        reg(0x38, SIZE.into());
        for (offset, ring) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            reg(offset, ring as u32);
            reg(offset + 4, (ring >> 32) as u32);
        }
        reg(0x44, 1);
        reg(0x70, 15);
        Self { avail: 0 }
    }

    fn describe(index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        io::write(DESC + 16 * index, addr);
        io::write(DESC + 16 * index + 8, len);
        io::write(DESC + 16 * index + 12, flags);
        io::write(DESC + 16 * index + 14, next);
    }

    /// Makes chain 0 available, and kicks.
    fn submit(&mut self) {
        io::write(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), 0u16);
        self.avail = self.avail.wrapping_add(1);
        fence(Ordering::SeqCst);
        io::write(AVAIL + 2, self.avail);
        fence(Ordering::SeqCst);
        reg(0x50, 0);
    }

    /// One sector, and the request's status.
    fn request(&mut self, kind: u32, sector: u64) -> u8 {
        io::write(HEADER, kind);
        io::write(HEADER + 8, sector);
        io::write(STATUS, 0xffu8);
        Self::describe(0, HEADER, 16, NEXT, 1);
        let data = if kind == IN { WRITE } else { 0 };
        Self::describe(1, DATA, 512, NEXT | data, 2);
        Self::describe(2, STATUS, 1, WRITE, 0);
        self.submit();
        while io::read::<u16>(USED + 2) != self.avail {
            core::hint::spin_loop();
        }
        io::read(STATUS)
    }
}

/// Writes and reads back; ends with what the sector holds.
fn work(disk: &mut Disk, fill: u8) -> bool {
    for at in 0..512 {
        io::write(DATA + at, fill);
    }
    let written = disk.request(OUT, 1);
    io::write(DATA, 0u8);
    let read = disk.request(IN, 1);
    let all = (0..512).all(|at| io::read::<u8>(DATA + at) == fill);
    (written, read) == (0, 0) && all
}

/// Writes its number into each of the sectors 1 to `count` and flushes it, whatever becomes of it.
fn log(disk: &mut Disk, count: u64) {
    let fill = |number: u64| (0..64).for_each(|word| io::write(DATA + 8 * word, number));
    for number in 1..=count {
        fill(number);
        match (disk.request(OUT, number), disk.request(FLUSH, 0)) {
            (0, 0) => println!("flushed {number}"),
            (written, flushed) => println!("failed {number} {written} {flushed}"),
        }
    }
    fill(0);
    println!(
        "reads back {}",
        disk.request(IN, 1) == 0 && io::read::<u64>(DATA) == 1
    );
}

/// Everything that a hostile driver might do to a running device.
fn attack() {
    let mut disk = Disk::start();
    for value in [u32::MAX, 0xffff, 0x8000, 0] {
        // Not the status register: the device is to go on.
        for offset in (0..0x200).step_by(4).filter(|offset| *offset != 0x70) {
            reg(offset, value);
            let _ = io::read::<u32>(DEVICE + offset);
        }
    }
    // A loop of descriptors, addresses outside RAM, lengths that wrap, an index from nowhere.
    let chains = [
        (DESC, 16, NEXT, 0),
        (u64::MAX - 8, 16, NEXT, 1),
        (DEVICE, 512, WRITE, 0),
        (HEADER, u32::MAX, 0, 0),
        (HEADER, 16, NEXT, 0xffff),
        (DESC, 4096, 4, 0),
    ];
    for (addr, len, flags, next) in chains {
        Disk::describe(0, addr, len, flags, next);
        disk.submit();
        disk = Disk::start();
    }
    io::write(AVAIL + 2, 0xffffu16);
    for _ in 0..10_000 {
        reg(0x50, 0);
    }
    // Resets while requests are under way.
    for _ in 0..100 {
        disk = Disk::start();
        io::write(HEADER, IN);
        Disk::describe(0, HEADER, 16, NEXT, 1);
        Disk::describe(1, DATA, 512, NEXT | WRITE, 2);
        Disk::describe(2, STATUS, 1, WRITE, 0);
        disk.submit();
        reg(0x70, 0);
    }
}

fn main(info: &StartInfo) -> u8 {
    let magic: u32 = io::read(DEVICE);
    let (version, id) = (io::read::<u32>(DEVICE + 4), io::read::<u32>(DEVICE + 8));
    if (magic, version, id) != (0x7472_6976, 2, 2) {
        println!("no disk: {magic:#x} {version} {id}");
        return 2;
    }
    let mut disk = Disk::start();
    println!("status {}", status());
    println!("sectors {}", io::read::<u64>(DEVICE + 0x100));
    println!("sane {}", work(&mut disk, 0x5a));
    println!("beyond the end {}", disk.request(IN, u64::MAX));
    let reads: u32 = info
        .option("reads")
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    let good = (0..reads).all(|n| disk.request(IN, u64::from(n % 8)) == 0);
    println!("reads {good}");
    if let Some(count) = info.option("log").and_then(|n| n.parse().ok()) {
        log(&mut disk, count);
    }
    if info.option("attack").is_none() {
        return 0;
    }
    attack();
    let mut disk = Disk::start();
    println!("after the attack {}", work(&mut disk, 0xa5));
    0
}
