//! Reads the time of day from the CMOS clock.
#![no_std]
#![no_main]

use payloads::{io, println, start::StartInfo};

payloads::start!(main);

fn cmos(index: u8) -> u8 {
    io::out8(0x70, index);
    io::in8(0x71)
}

/// Century, year, month, day, hours, minutes, seconds; `None` while they change.
fn time() -> Option<[u8; 7]> {
    let read = || [0x32, 9, 8, 7, 4, 2, 0].map(cmos);
    let updating = || cmos(0xa) & 0x80 != 0;
    let first = (!updating()).then(read)?;
    (!updating() && read() == first).then_some(first)
}

fn main(_: &StartInfo) -> u8 {
    let raw = loop {
        if let Some(raw) = time() {
            break raw;
        }
    };
    let binary = cmos(0xb) & 4 != 0;
    let number = |v: u8| if binary { v } else { (v >> 4) * 10 + (v & 15) };
    let [century, year, month, day, hours, minutes, seconds] = raw.map(number);
    println!("{century:02}{year:02}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}Z");
    0
}
