//! Throughput and latency of the first share, its queue polled, without interrupts.
//!
//! On the command line: `op=read` of pieces of the file `data` one behind the other, `op=lookup` of the
//! files `f0` and on, or `op=getattr` of the file `data`; `depth=N` requests under way (1),
//! `size=BYTES` of a piece (131072), `bytes=N` of `data`, `files=N`, `count=N` requests,
//! `windows=ADDRESS` of MMIO devices 512 bytes apart, where QEMU has them. Prints one line
//! as [`Polled::print`] says, and waits to be ended.
#![no_std]
#![no_main]

use payloads::polled::{MAX_COUNT, Polled};
use payloads::virtio::queue::{NEXT, Queue, WRITE};
use payloads::virtio::{Device, EVENT_IDX, find};
use payloads::{io, println, start::StartInfo, tsc};

payloads::start!(main);

/// Device ID of shares.
const ID: u32 = 26;
const RINGS: u64 = 0x100_0000;
const REQUESTS: u64 = 0x110_0000;
/// Bytes of a slot: the request, and at [`REPLY`] the start of its answer.
const SLOT: u64 = 0x400;
const REPLY: u64 = 0x200;
const DATA: u64 = 0x300_0000;
const MAX_DATA: u64 = 0x400_0000;
const QUEUE: u16 = 256;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const HEADER: u64 = 40;
/// Header of an answer.
const ANSWER: u64 = 16;
const ROOT: u64 = 1;

fn request(slot: u64) -> u64 {
    REQUESTS + SLOT * slot
}

/// Writes the header of a request with `len` bytes behind it.
fn header(slot: u64, opcode: u32, node: u64, len: u64) {
    let at = request(slot);
    io::write(at, (HEADER + len) as u32);
    io::write(at + 4, opcode);
    io::write(at + 8, slot + 1);
    io::write(at + 16, node);
    (24..HEADER)
        .step_by(8)
        .for_each(|n| io::write(at + n, 0u64));
    io::write(at + REPLY, 0u64);
}

/// Whether the answer is one without error, of as many bytes.
fn answered(slot: u64, len: u64) -> bool {
    let at = request(slot) + REPLY;
    io::read::<u32>(at) == (ANSWER + len) as u32 && io::read::<u32>(at + 4) == 0
}

/// Writes the name of a file and a zero; the bytes of both.
fn name(at: u64, number: u64) -> u64 {
    let digits = number.checked_ilog10().unwrap_or(0);
    io::write(at, b'f');
    for n in 0..=digits {
        let digit = number / 10u64.pow(digits - n) % 10;
        io::write(at + 1 + u64::from(n), b'0' + digit as u8);
    }
    io::write(at + 2 + u64::from(digits), 0u8);
    u64::from(digits) + 3
}

/// One request without data, to find out what the others need: a word of the answer.
fn ask(polled: &mut Polled, opcode: u32, node: u64, body: &[u8], answer: u32) -> Option<u64> {
    header(0, opcode, node, body.len() as u64);
    for (at, byte) in (request(0) + HEADER..).zip(body) {
        io::write(at, *byte);
    }
    let len = HEADER as u32 + body.len() as u32;
    let reply = request(0) + REPLY;
    let parts = [(request(0), len, NEXT), (reply, answer + 16, WRITE)];
    polled.queue.chain(0, &parts);
    polled.run(1, |_| {}, |_, _| true)?;
    (io::read::<u32>(reply + 4) == 0).then(|| io::read(reply + ANSWER))
}

/// Starts the session and opens `data`: its node and its handle.
fn open(polled: &mut Polled) -> Option<(u64, u64)> {
    let mut init = [0; 16];
    init[0] = 7;
    init[4] = 31;
    // FUSE_BIG_WRITES and FUSE_MAX_PAGES, for reads of more than 128 KiB.
    init[12..].copy_from_slice(&(1u32 << 5 | 1 << 22).to_le_bytes());
    ask(polled, INIT, 0, &init, 64)?;
    let node = ask(polled, LOOKUP, ROOT, b"data\0", 128)?;
    let handle = ask(polled, OPEN, node, &[0; 8], 16)?;
    Some((node, handle))
}

fn start(device: &Device) -> Queue {
    device.negotiate(EVENT_IDX);
    for index in 0..2 {
        device.select(index);
        let size = device.queue_max().min(QUEUE);
        Queue::new(RINGS + 0x1_0000 * u64::from(index), index, size).announce(device);
    }
    device.select(1);
    let queue = Queue::new(RINGS + 0x1_0000, 1, device.queue_max().min(QUEUE));
    device.driver_ok();
    queue
}

/// What is asked for, over and over.
struct Work {
    queue: Queue,
    node: u64,
    handle: u64,
    size: u64,
    /// After so many requests they repeat.
    period: u64,
    begun: u64,
}

impl Work {
    /// Which request of the period is next.
    fn next(&mut self) -> u64 {
        self.begun += 1;
        (self.begun - 1) % self.period
    }

    /// Descriptors without data: a request of `len` bytes and an answer of `answer`.
    fn plain(&self, slot: u64, len: u64, answer: u64) {
        let at = request(slot);
        let (ask, room) = ((HEADER + len) as u32, (ANSWER + answer) as u32);
        let parts = [(at, ask, NEXT), (at + REPLY, room, WRITE)];
        self.queue.chain(3 * slot as u16, &parts);
    }

    fn look_up(&mut self, slot: u64) {
        let len = name(request(slot) + HEADER, self.next());
        header(slot, LOOKUP, ROOT, len);
        self.plain(slot, len, 128);
    }

    fn get_attr(&mut self, slot: u64) {
        header(slot, GETATTR, self.node, 16);
        io::write(request(slot) + HEADER, 0u64);
        io::write(request(slot) + HEADER + 8, 0u64);
        self.plain(slot, 16, 104);
    }

    fn read(&mut self, slot: u64) {
        let (at, offset) = (request(slot), self.size * self.next());
        header(slot, READ, self.node, 40);
        let body = [self.handle, offset, self.size, 0, 0];
        for (at, word) in (at + HEADER..).step_by(8).zip(body) {
            io::write(at, word);
        }
        let parts = [
            (at, (HEADER + 40) as u32, NEXT),
            (at + REPLY, ANSWER as u32, NEXT | WRITE),
            (DATA + self.size * slot, self.size as u32, WRITE),
        ];
        self.queue.chain(3 * slot as u16, &parts);
    }
}

fn main(info: &StartInfo) -> u8 {
    let number = |key| info.option(key).and_then(|n| n.parse::<u64>().ok());
    let Some(device) = find(ID, number("windows")) else {
        println!("no share");
        return 2;
    };
    let mut polled = Polled::new(device, start(&device), 1, 3);
    let Some((node, handle)) = open(&mut polled) else {
        println!("no session, or no file");
        return 3;
    };
    let queue = polled.queue;
    let mut polled = Polled::new(device, queue, number("depth").unwrap_or(1), 3);
    let size = number("size").unwrap_or(1 << 17).max(1);
    let count = number("count").unwrap_or(1000).clamp(1, MAX_COUNT);
    if size * polled.depth > MAX_DATA {
        println!("too much");
        return 2;
    }
    let mut work = Work {
        queue,
        node,
        handle,
        size,
        period: 1,
        begun: 0,
    };
    let cycles = match info.option("op") {
        Some("lookup") => {
            work.period = number("files").unwrap_or(1).max(1);
            polled.run(
                count,
                |slot| work.look_up(slot),
                |slot, _| answered(slot, 128),
            )
        }
        Some("getattr") => polled.run(
            count,
            |slot| work.get_attr(slot),
            |slot, _| answered(slot, 104),
        ),
        _ => {
            work.period = (number("bytes").unwrap_or(size) / size).max(1);
            polled.run(
                count,
                |slot| work.read(slot),
                |slot, _| answered(slot, size),
            )
        }
    };
    let Some(cycles) = cycles else {
        println!("a request failed, status {:#x}", device.status());
        return 3;
    };
    polled.print(count, cycles);
    // The benchmark looks at this machine, then ends it.
    tsc::wait(tsc::LONG, || false);
    0
}
