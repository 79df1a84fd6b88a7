//! A balloon: touches 48 MiB, gives them to the balloon, looks at what is left, takes one page back.
//! Then waits for a byte on COM1. With `wait=1` it waits for one before it gives, too.
#![no_std]
#![no_main]

use payloads::console::COM1;
use payloads::start::StartInfo;
use payloads::virtio::queue::{Desc, Queue};
use payloads::virtio::{Device, devices};
use payloads::{io, println};

payloads::start!(main);

const ID: u32 = 5;
/// Rings and page numbers, in RAM that nothing else uses.
const RINGS: u64 = 0x100_0000;
const NUMBERS: u64 = 0x110_0000;
/// What is given, with a page before and behind that is not.
const GIVEN: core::ops::Range<u64> = 0x200_0000..0x500_0000;
const PAGE: u64 = 4096;
/// Pages of one request, as Linux has it.
const BATCH: u64 = 256;

/// Gives or takes the pages from `start` to `end`; false if there is no answer.
fn give(device: &Device, queue: &mut Queue, start: u64, end: u64) -> bool {
    let (first, count) = (start / PAGE, (end - start) / PAGE);
    // Downwards, as a guest that allocates page by page may have them.
    for at in 0..count {
        io::write(NUMBERS + 4 * at, (first + count - 1 - at) as u32);
    }
    let desc = Desc {
        addr: NUMBERS,
        len: 4 * count as u32,
        flags: 0,
        next: 0,
    };
    queue.desc(0, desc);
    queue.one(device).is_some()
}

fn wait() {
    while io::in8(COM1 + 5) & 1 == 0 {
        core::hint::spin_loop();
    }
    io::in8(COM1);
}

fn main(info: &StartInfo) -> u8 {
    let Some(device) = devices().find(|device| device.id == ID) else {
        println!("no balloon");
        return 2;
    };
    println!("target {}", io::read::<u32>(device.config()));
    device.negotiate(0);
    let mut queues = [0, 1].map(|index| Queue::new(RINGS + 0x1_0000 * index, index as u16, 16));
    queues.iter().for_each(|queue| queue.announce(&device));
    device.driver_ok();
    let [inflate, deflate] = &mut queues;
    let pages = (GIVEN.start - PAGE..GIVEN.end + PAGE).step_by(PAGE as usize);
    pages.clone().for_each(|page| io::write(page, page));
    println!("touched");
    if info.option("wait").is_some() {
        wait();
    }
    let batches = GIVEN.step_by((BATCH * PAGE) as usize);
    let given = batches.map(|at| give(&device, inflate, at, at + BATCH * PAGE));
    println!("given {}", given.filter(|good| !good).count() == 0);
    let count = |value: fn(u64) -> u64| {
        let held = |page: &u64| io::read::<u64>(*page) == value(*page);
        pages.clone().filter(held).count()
    };
    // Reading takes no memory, since the host has one page of zeros for all.
    println!("kept {}", count(|page| page));
    let taken = give(&device, deflate, GIVEN.start, GIVEN.start + PAGE);
    io::write(GIVEN.start, GIVEN.start);
    println!("taken {taken}");
    println!("kept then {}", count(|page| page));
    println!("waiting");
    wait();
    0
}
