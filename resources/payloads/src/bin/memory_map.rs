//! Prints the memory map and writes to the first and the last page of every RAM region.
#![no_std]
#![no_main]

use payloads::{
    io, memory, println,
    start::{MAGIC, MemmapEntry, StartInfo},
};

payloads::start!(main);

/// Whether the eight bytes at `addr` keep what is written; they are put back.
fn holds(addr: u64) -> bool {
    memory::map(addr);
    let before: u64 = io::read(addr);
    io::write(addr, !before);
    let kept = io::read::<u64>(addr) == !before;
    io::write(addr, before);
    kept
}

fn main(info: &StartInfo) -> u8 {
    if info.magic != MAGIC || info.version < 1 {
        println!(
            "no memory map: magic {:#x}, version {}",
            info.magic, info.version
        );
        return 1;
    }
    let (mut ram, mut bad) = (0, 0);
    let regions = || info.memory().iter().filter(|entry| entry.size != 0);
    for (index, entry) in regions().enumerate() {
        let last = entry.addr + entry.size;
        let meets = |e: &MemmapEntry| e.addr < last && entry.addr < e.addr + e.size;
        if regions().take(index).any(meets) {
            println!("region {:#x} overlaps another", entry.addr);
            bad += 1;
        }
        println!("{:#x}..{last:#x} type {}", entry.addr, entry.kind);
        if entry.kind == 1 {
            ram += entry.size;
            for addr in [entry.addr + 8, last - 8] {
                if !holds(addr) {
                    println!("RAM at {addr:#x} does not keep what is written");
                    bad += 1;
                }
            }
        }
    }
    println!("RAM {} KiB, {bad} bad", ram >> 10);
    u8::from(bad != 0)
}
