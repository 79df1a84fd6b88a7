//! A memory device: plugs a block, uses it, unplugs it. With `write=1` it then writes to it, which
//! no driver may; with `dma=1` it lets the device read a request from it; with `wait=1` it waits for a byte on COM1
//! while it uses it.
#![no_std]
#![no_main]

use payloads::console::COM1;
use payloads::start::StartInfo;
use payloads::virtio::queue::{Desc, NEXT, Queue, WRITE};
use payloads::virtio::{Device, devices};
use payloads::{io, memory, println};

payloads::start!(main);

const ID: u32 = 24;
/// Rings and buffers, in RAM that nothing else uses.
const RINGS: u64 = 0x100_0000;
const REQUEST: u64 = 0x110_0000;
const ANSWER: u64 = REQUEST + 64;
const PLUG: u64 = 0;
const UNPLUG: u64 = 1;
const STATE: u64 = 3;

/// Answer and state, or `None` if there is no answer.
fn ask(device: &Device, queue: &mut Queue, at: u64, kind: u64, addr: u64) -> Option<(u16, u16)> {
    io::write(at, kind);
    io::write(at + 8, addr);
    io::write(at + 16, 1u64);
    send(device, queue, at)
}

fn send(device: &Device, queue: &mut Queue, at: u64) -> Option<(u16, u16)> {
    let desc = |addr, len, flags, next| Desc {
        addr,
        len,
        flags,
        next,
    };
    queue.desc(0, desc(at, 24, NEXT, 1));
    queue.desc(1, desc(ANSWER, 10, WRITE, 0));
    queue.one(device)?;
    Some((io::read(ANSWER), io::read(ANSWER + 8)))
}

/// Bytes that nobody touches but whoever is to find them.
const FAR: u64 = 0x10_0000;

/// Waits, then has the device read a request from a page that nothing else has touched since, and looks at all of it.
fn wait(device: &Device, queue: &mut Queue, start: u64) {
    let pages = || (0..FAR).step_by(4096);
    for page in pages() {
        io::write(start + page + 8, page ^ 0x5a5a);
    }
    let at = start + FAR;
    io::write(at, STATE);
    io::write(at + 8, start);
    io::write(at + 16, 1u64);
    println!("waits");
    while io::in8(COM1 + 5) & 1 == 0 {
        core::hint::spin_loop();
    }
    println!("state then {:?}", send(device, queue, at));
    println!("used then {:#x}", io::read::<u64>(start));
    let kept = pages().filter(|page| io::read::<u64>(start + page + 8) == page ^ 0x5a5a);
    println!("kept {}", kept.count());
}

fn main(info: &StartInfo) -> u8 {
    let Some(device) = devices().find(|device| device.id == ID) else {
        println!("no memory device");
        return 2;
    };
    let config = |at| io::read::<u64>(device.config() + at);
    let (block, start) = (config(0), config(16));
    println!("block {block}");
    println!("start {start:#x}");
    println!("requested {}", config(48));
    memory::map(start);
    device.negotiate(2);
    let mut queue = Queue::new(RINGS, 0, 16);
    queue.announce(&device);
    device.driver_ok();
    println!("before {:#x}", io::read::<u64>(start));
    println!("plug {:?}", ask(&device, &mut queue, REQUEST, PLUG, start));
    println!("plugged {}", config(40));
    io::write(start, 0x1234_5678u64);
    println!("used {:#x}", io::read::<u64>(start));
    // The device reads its request from what was plugged.
    println!(
        "state {:?}",
        ask(&device, &mut queue, start + 64, STATE, start)
    );
    if info.option("wait").is_some() {
        wait(&device, &mut queue, start);
    }
    println!(
        "unplug {:?}",
        ask(&device, &mut queue, REQUEST, UNPLUG, start)
    );
    println!("plugged then {}", config(40));
    println!("after {:#x}", io::read::<u64>(start));
    if info.option("dma").is_some() {
        println!("from nowhere {:?}", send(&device, &mut queue, start + 64));
        println!("runs {}", device.runs());
    }
    if info.option("write").is_some() {
        io::write(start, 1u8);
        println!("written");
    }
    0
}
