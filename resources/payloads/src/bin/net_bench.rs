//! Frames through the first network device, its queue polled, without interrupts.
//!
//! On the command line: `op=send` or `op=receive`, `count=N` frames, `size=BYTES` of each (64; more
//! than 1514 is one that the host's kernel need not cut), `depth=N` buffers (64),
//! `windows=ADDRESS` of MMIO devices 512 bytes apart, where QEMU has them. Prints one line as
//! [`Polled::print`] says, and waits to be ended.
#![no_std]
#![no_main]

use payloads::polled::{MAX_COUNT, Polled};
use payloads::virtio::queue::{NEXT, Queue, WRITE};
use payloads::virtio::{Device, EVENT_IDX, find};
use payloads::{io, println, start::StartInfo, tsc};

payloads::start!(main);

/// Device ID of network devices.
const ID: u32 = 1;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const RINGS: u64 = 0x100_0000;
const RING: u64 = 0x1_0000;
/// Headers of frames to be sent, 12 bytes each.
const HEADERS: u64 = 0x110_0000;
/// Buffers with room for the largest frame and its header.
const BUFFERS: u64 = 0x200_0000;
const BUFFER: u64 = 0x1_1000;
const HEADER: u32 = 12;
const QUEUE: u16 = 256;
/// Bytes of the headers of Ethernet, IPv4 and TCP.
const STACK: u32 = 54;
/// Longest frame that the host does not have to cut.
const MAX_PLAIN: u32 = 1514;

/// A frame for another machine, so that the host's kernel takes it and drops it.
fn frame(slot: u64, size: u32) {
    let (header, at) = (HEADERS + 16 * slot, BUFFERS + BUFFER * slot);
    (0..16).step_by(8).for_each(|n| io::write(header + n, 0u64));
    (0..64).step_by(8).for_each(|n| io::write(at + n, 0u64));
    let bytes = |at: u64, bytes: &[u8]| {
        (at..)
            .zip(bytes)
            .for_each(|(at, byte)| io::write(at, *byte));
    };
    bytes(at, &[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0]);
    let [high, low] = (size as u16 - 14).to_be_bytes();
    bytes(at + 14, &[0x45, 0, high, low, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    bytes(at + 26, &[192, 0, 2, 1, 192, 0, 2, 2]);
    // Data offset.
    bytes(at + 46, &[0x50]);
    if size > MAX_PLAIN {
        // A partial checksum at 34 + 16, segments of TCP over IPv4.
        bytes(header, &[1, 1]);
        io::write(header + 2, STACK as u16);
        io::write(header + 4, 1448u16);
        io::write(header + 6, 34u16);
        io::write(header + 8, 16u16);
    }
}

fn start(device: &Device) -> [Queue; 2] {
    device.negotiate(EVENT_IDX | CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4);
    let queues = [0, 1].map(|index| {
        device.select(index);
        let size = device.queue_max().min(QUEUE);
        Queue::new(RINGS + RING * u64::from(index), index, size)
    });
    queues.iter().for_each(|queue| queue.announce(device));
    device.driver_ok();
    queues
}

fn main(info: &StartInfo) -> u8 {
    let number = |key| info.option(key).and_then(|n| n.parse::<u64>().ok());
    let Some(device) = find(ID, number("windows")) else {
        println!("no network device");
        return 2;
    };
    let [rx, tx] = start(&device);
    let count = number("count").unwrap_or(1000).clamp(1, MAX_COUNT);
    let depth = number("depth").unwrap_or(64);
    let size = number("size").unwrap_or(64).clamp(STACK.into(), 65549) as u32;
    let receive = info.option("op") == Some("receive");
    let queue = if receive { rx } else { tx };
    let mut polled = Polled::new(device, queue, depth, 2);
    for slot in 0..polled.depth {
        let (first, at) = (2 * slot as u16, BUFFERS + BUFFER * slot);
        if receive {
            queue.chain(first, &[(at, BUFFER as u32, WRITE)]);
        } else {
            frame(slot, size);
            queue.chain(first, &[(HEADERS + 16 * slot, HEADER, NEXT), (at, size, 0)]);
        }
    }
    // The host's kernel has a few frames of its own to send.
    let mut others = 0;
    let check = |_, len| {
        others += u64::from(receive && len != size + HEADER);
        others <= count / 100
    };
    let Some(cycles) = polled.run(count, |_| {}, check) else {
        println!(
            "no frames any more, or cut ones, status {:#x}",
            device.status()
        );
        return 3;
    };
    polled.print(count, cycles);
    // The benchmark looks at this machine, then ends it.
    tsc::wait(tsc::LONG, || false);
    0
}
