//! Bytes and connections through the socket device, its queues polled, without interrupts.
//!
//! The guest connects to port `port=N` of the host. On the command line: `op=send` of `bytes=N` in
//! packets of `size=BYTES` (65536), `op=receive` of as many, or `op=connect`: `count=N` connections, each
//! ended as soon as it is there, `depth=N` at a time. Prints `packets kicks`, or `count kicks`, once all
//! connections are at their end.
#![no_std]
#![no_main]

use payloads::virtio::queue::{NEXT, Queue, WRITE};
use payloads::virtio::{Device, EVENT_IDX, devices};
use payloads::{io, println, start::StartInfo, tsc};

payloads::start!(main);

/// Device ID of socket devices.
const ID: u32 = 19;
const F_STREAM: u64 = 1;
const RINGS: u64 = 0x100_0000;
const RING: u64 = 0x1_0000;
/// Headers of packets to the host.
const HEADERS: u64 = 0x110_0000;
/// What packets to the host carry.
const DATA: u64 = 0x120_0000;
/// Buffers for packets from the host.
const BUFFERS: u64 = 0x200_0000;
const BUFFER: u64 = 0x1_1000;
const SLOTS: u16 = 32;
const QUEUE: u16 = 64;
const MAX_SIZE: u32 = 65536;

const HEADER: u32 = 44;
const HOST: u64 = 2;
const FIRST_PORT: u32 = 1024;
/// What this guest grants each connection.
const GRANT: u32 = 1 << 20;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const BOTH: u32 = 3;

/// What is looked at of a packet from the host.
#[derive(Clone, Copy)]
struct Packet {
    port: u32,
    len: u32,
    op: u16,
    granted: u32,
    taken: u32,
}

struct Bench {
    device: Device,
    rx: Queue,
    tx: Queue,
    cid: u64,
    port: u32,
    /// Slots of the transmit queue that the device does not have: so many of `free`.
    idle: usize,
    free: [u16; SLOTS as usize],
    kicks: u64,
    /// Bytes received.
    received: u32,
}

impl Bench {
    fn new(device: Device, port: u32) -> Self {
        device.negotiate(EVENT_IDX | F_STREAM);
        let [rx, tx, event] = [0, 1, 2].map(|index| {
            device.select(index);
            let size = device.queue_max().min(QUEUE);
            Queue::new(RINGS + RING * u64::from(index), index, size)
        });
        [rx, tx, event]
            .iter()
            .for_each(|queue| queue.announce(&device));
        device.driver_ok();
        let mut bench = Self {
            device,
            rx,
            tx,
            cid: io::read(device.config()),
            port,
            idle: SLOTS.into(),
            free: core::array::from_fn(|slot| slot as u16),
            kicks: 0,
            received: 0,
        };
        for slot in 0..SLOTS {
            let at = BUFFERS + BUFFER * u64::from(slot);
            let len = HEADER + MAX_SIZE;
            bench.rx.chain(slot, &[(at, len, WRITE)]);
            bench.rx.offer(slot);
        }
        bench.kicks += kick(&device, &bench.rx, 0);
        bench
    }

    /// Takes back what the device has sent.
    fn reclaim(&mut self) {
        while let Some((head, _)) = self.tx.used() {
            self.free[self.idle] = head as u16 / 2;
            self.idle += 1;
        }
        quiet(&self.tx);
    }

    /// Sends a packet; false if the device does not take it.
    fn send(&mut self, port: u32, op: u16, flags: u32, len: u32) -> bool {
        self.reclaim();
        if self.idle == 0 {
            tsc::wait(tsc::LONG, || self.tx.used_index() != self.tx.seen);
            self.reclaim();
        }
        if self.idle == 0 {
            return false;
        }
        self.idle -= 1;
        let slot = self.free[self.idle];
        let at = HEADERS + 64 * u64::from(slot);
        io::write(at, self.cid);
        io::write(at + 8, HOST);
        io::write(at + 16, port);
        io::write(at + 20, self.port);
        io::write(at + 24, len);
        io::write(at + 28, 1u16);
        io::write(at + 30, op);
        io::write(at + 32, flags);
        io::write(at + 36, GRANT);
        io::write(at + 40, self.received);
        let head = 2 * slot;
        match len {
            0 => self.tx.chain(head, &[(at, HEADER, 0)]),
            _ => self.tx.chain(head, &[(at, HEADER, NEXT), (DATA, len, 0)]),
        }
        self.tx.offer(head);
        self.kicks += kick(&self.device, &self.tx, self.tx.avail.wrapping_sub(1));
        true
    }

    /// The next packet from the host, if there is one.
    fn poll(&mut self) -> Option<Packet> {
        let (slot, _) = self.rx.used()?;
        let at = BUFFERS + BUFFER * u64::from(slot);
        let packet = Packet {
            port: io::read(at + 20),
            len: io::read(at + 24),
            op: io::read(at + 30),
            granted: io::read(at + 36),
            taken: io::read(at + 40),
        };
        quiet(&self.rx);
        self.rx.offer(slot as u16);
        self.kicks += kick(&self.device, &self.rx, self.rx.avail.wrapping_sub(1));
        Some(packet)
    }

    /// Waits for a packet.
    fn wait(&mut self) -> Option<Packet> {
        let mut packet = None;
        tsc::wait(tsc::LONG, || {
            packet = self.poll();
            packet.is_some()
        });
        packet
    }

    /// Connects; the answer grants bytes.
    fn connect(&mut self) -> Option<Packet> {
        self.send(FIRST_PORT, REQUEST, 0, 0);
        self.wait().filter(|packet| packet.op == RESPONSE)
    }

    fn close(&mut self) -> Option<()> {
        self.send(FIRST_PORT, SHUTDOWN, BOTH, 0);
        while self.wait()?.op != RST {}
        Some(())
    }

    fn stream_out(&mut self, bytes: u64, size: u32) -> Option<u64> {
        let answer = self.connect()?;
        let (mut granted, mut taken) = (answer.granted, answer.taken);
        let (mut sent, mut packets) = (0u64, 0);
        while sent < bytes {
            let room = granted.wrapping_sub((sent as u32).wrapping_sub(taken));
            let len = size.min((bytes - sent).min(size.into()) as u32);
            let packet = match room >= len {
                true => self.poll(),
                false => Some(self.wait()?),
            };
            if let Some(packet) = packet {
                (granted, taken) = (packet.granted, packet.taken);
            } else if !self.send(FIRST_PORT, RW, 0, len) {
                return None;
            } else {
                sent += u64::from(len);
                packets += 1;
            }
        }
        self.close()?;
        Some(packets)
    }

    fn stream_in(&mut self, bytes: u64) -> Option<u64> {
        self.connect()?;
        let (mut got, mut told, mut packets) = (0, 0u64, 0);
        while got < bytes {
            let packet = self.wait()?;
            if packet.op != RW {
                continue;
            }
            got += u64::from(packet.len);
            packets += 1;
            self.received = got as u32;
            if got - told >= u64::from(GRANT / 4) {
                told = got;
                self.send(FIRST_PORT, CREDIT_UPDATE, 0, 0);
            }
        }
        self.close()?;
        Some(packets)
    }

    fn connections(&mut self, count: u32, depth: u32) -> Option<u64> {
        let (mut begun, mut done) = (0, 0);
        while done < count {
            while begun < count && begun - done < depth {
                self.send(FIRST_PORT + begun, REQUEST, 0, 0);
                begun += 1;
            }
            let packet = self.wait()?;
            match packet.op {
                RESPONSE => {
                    self.send(packet.port, SHUTDOWN, BOTH, 0);
                }
                RST => done += 1,
                _ => {}
            }
        }
        Some(count.into())
    }
}

/// Makes what was offered available; the number of kicks that this took.
fn kick(device: &Device, queue: &Queue, before: u16) -> u64 {
    queue.publish();
    let wanted = queue.wants_kick(true, before);
    if wanted {
        device.notify(queue.index);
    }
    wanted.into()
}

/// Asks for an interrupt at an index that the device is far beyond.
fn quiet(queue: &Queue) {
    queue.set_used_event(queue.seen.wrapping_sub(0x4000));
}

fn main(info: &StartInfo) -> u8 {
    let number = |key| info.option(key).and_then(|n| n.parse::<u64>().ok());
    let Some(device) = devices().find(|device| device.id == ID) else {
        println!("no socket device");
        return 2;
    };
    let mut bench = Bench::new(device, number("port").unwrap_or(1) as u32);
    let bytes = number("bytes").unwrap_or(1 << 20);
    let size = number("size")
        .unwrap_or(MAX_SIZE.into())
        .clamp(1, MAX_SIZE.into());
    let result = match info.option("op") {
        Some("connect") => {
            let count = number("count").unwrap_or(1000) as u32;
            bench.connections(count, number("depth").unwrap_or(1).clamp(1, 16) as u32)
        }
        Some("receive") => bench.stream_in(bytes),
        _ => bench.stream_out(bytes, size as u32),
    };
    let Some(packets) = result else {
        println!(
            "the host refuses or is silent, status {:#x}",
            device.status()
        );
        return 3;
    };
    println!("{packets} {}", bench.kicks);
    // The benchmark looks at this machine, then ends it.
    tsc::wait(tsc::LONG, || false);
    0
}
