//! Persistent memory: says what it holds, writes to it, and flushes. `flips=N` writes a byte to each
//! of its first N pages; `wait=1` waits for a byte on COM1 before it reads the last page.
#![no_std]
#![no_main]

use payloads::console::COM1;
use payloads::start::StartInfo;
use payloads::virtio::queue::{Desc, NEXT, Queue, WRITE};
use payloads::virtio::{Device, devices};
use payloads::{io, memory, println};

payloads::start!(main);

const ID: u32 = 27;
/// Rings and buffers, in RAM that nothing else uses.
const RINGS: u64 = 0x100_0000;
const REQUEST: u64 = 0x110_0000;
const ANSWER: u64 = REQUEST + 8;
const PAGE: u64 = 4096;

/// The answer to a flush, or `None` if there is none.
fn flush(device: &Device, queue: &mut Queue) -> Option<u32> {
    io::write(REQUEST, 0u32);
    io::write(ANSWER, u32::MAX);
    let desc = |addr, flags, next| Desc {
        addr,
        len: 4,
        flags,
        next,
    };
    queue.desc(0, desc(REQUEST, NEXT, 1));
    queue.desc(1, desc(ANSWER, WRITE, 0));
    queue.one(device)?;
    Some(io::read(ANSWER))
}

fn main(info: &StartInfo) -> u8 {
    let Some(device) = devices().find(|device| device.id == ID) else {
        println!("no persistent memory");
        return 2;
    };
    let start: u64 = io::read(device.config());
    let size: u64 = io::read(device.config() + 8);
    println!("start {start:#x}");
    println!("size {size}");
    for at in (start..start + size).step_by(2 << 20) {
        memory::map(at);
    }
    device.negotiate(0);
    let mut queue = Queue::new(RINGS, 0, 16);
    queue.announce(&device);
    device.driver_ok();
    println!("first {:#x}", io::read::<u64>(start));
    let number = |key| info.option(key).and_then(|n| n.parse::<u64>().ok());
    for page in 0..number("flips").unwrap_or(1) {
        io::write(start + page * PAGE, 0x55u8);
    }
    println!("written {:#x}", io::read::<u8>(start));
    println!("flushed {:?}", flush(&device, &mut queue));
    if number("wait").is_some() {
        println!("waiting");
        while io::in8(COM1 + 5) & 1 == 0 {
            core::hint::spin_loop();
        }
        println!("last {:#x}", io::read::<u8>(start + size - PAGE));
        println!("flushed then {:?}", flush(&device, &mut queue));
    }
    0
}
