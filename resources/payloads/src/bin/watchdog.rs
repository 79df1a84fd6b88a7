//! Drives the watchdog as its ACPI table says. On the command line: `count=N` periods, `feeds=N`
//! feedings, each when `after=N` of them are gone, then `stop=1` to stop it, `expires=N` to wait so often for the
//! end of the countdown, and the end of feeding.
#![no_std]
#![no_main]

use payloads::{acpi, acpi::Table, io, println, start::StartInfo};

payloads::start!(main);

const FEED: u8 = 1;
const LEFT: u8 = 4;
const SET: u8 = 6;
const IS_RUNNING: u8 = 8;
const RUN: u8 = 9;
const STOP: u8 = 11;
const HAS_EXPIRED: u8 = 32;
const CLEAR_EXPIRED: u8 = 33;

/// Does what the table says for an action: `value` is written where a countdown is to be.
fn act(wdat: Table, action: u8, value: u32) -> u32 {
    let (mut entry, end) = (wdat.addr + 68, wdat.addr + wdat.len());
    while entry < end && io::read::<u8>(entry) != action {
        entry += 24;
    }
    if entry >= end {
        println!("no action {action}");
        payloads::exit(3);
    }
    let instruction: u8 = io::read(entry + 1);
    let port = io::read::<u64>(entry + 8) as u16;
    let (constant, mask): (u32, u32) = (io::read(entry + 16), io::read(entry + 20));
    match instruction {
        0 => (io::in32(port) & mask == constant).into(),
        1 => io::in32(port) & mask,
        2 => {
            io::out32(port, constant & mask);
            0
        }
        _ => {
            io::out32(port, value & mask);
            0
        }
    }
}

fn main(info: &StartInfo) -> u8 {
    let rsdp = acpi::rsdp(info);
    let Some(wdat) = rsdp.and_then(|r| acpi::tables(r).find(|t| t.signature() == *b"WDAT")) else {
        println!("no WDAT");
        return 2;
    };
    let option = |name| info.option(name).and_then(|n| n.parse::<u32>().ok());
    let count = option("count").unwrap_or(5);
    println!("running {}", act(wdat, IS_RUNNING, 0));
    act(wdat, SET, count);
    act(wdat, RUN, 0);
    println!("running {}", act(wdat, IS_RUNNING, 0));
    let after = option("after").unwrap_or(count / 3);
    for fed in 0..option("feeds").unwrap_or(0) {
        while act(wdat, LEFT, 0) > count - after {
            core::hint::spin_loop();
        }
        // A period may end in between.
        let left = loop {
            act(wdat, FEED, 0);
            let left = act(wdat, LEFT, 0);
            if left == count {
                break left;
            }
        };
        println!("fed {fed}, left {left}");
    }
    if option("stop").is_some() {
        act(wdat, STOP, 0);
        println!("running {}", act(wdat, IS_RUNNING, 0));
        return 9;
    }
    if let Some(times) = option("expires") {
        for _ in 0..times {
            while act(wdat, HAS_EXPIRED, 0) == 0 {
                core::hint::spin_loop();
            }
            act(wdat, CLEAR_EXPIRED, 0);
        }
        return 9;
    }
    loop {
        core::hint::spin_loop();
    }
}
