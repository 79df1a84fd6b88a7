//! What goes through the queues of devices that speak a protocol: requests, messages and packets
//! that no driver would send.

pub mod frames;
pub mod fuse;
pub mod ports;
pub mod sockets;

use payloads::virtio::Device;
use payloads::virtio::queue::{Desc, NEXT, Queue, WRITE};
use payloads::{io, tsc};

use super::QUEUES;

/// Cycles that a device gets for a chain that it need not answer.
pub const SHORT: u64 = 300_000;
/// Byte that the device has no business to overwrite.
const CANARY: u8 = 0xa5;
/// Bytes looked at behind what the device may write.
const FENCE: u64 = 64;

/// A buffer: address and length.
pub type Buffer = (u64, u32);

/// A device that runs with all its queues, and RAM for what goes through them.
pub struct Line {
    pub device: Device,
    queues: [Queue; QUEUES as usize],
    /// Where requests are made, 1 MiB.
    pub out: u64,
    /// Where answers come, 1 MiB.
    pub answers: u64,
}

impl Line {
    /// Starts `device` in RAM from `base` on, 3 MiB; `None` if it does not run.
    pub fn start(device: Device, features: u64, base: u64) -> Option<Self> {
        if !device.negotiate(features) {
            return None;
        }
        let mut queues = [Queue::new(base, 0, 16); QUEUES as usize];
        for (n, queue) in (0..device.queues().min(QUEUES)).zip(&mut queues) {
            *queue = Queue::new(base + u64::from(n) * 0x1000, n, 16);
            queue.announce(&device);
        }
        device.driver_ok();
        let (out, answers) = (base + 0x10_0000, base + 0x20_0000);
        device.runs().then_some(Self {
            device,
            queues,
            out,
            answers,
        })
    }

    /// Makes a chain from descriptor `head` on available.
    pub fn post(&mut self, queue: u16, head: u16, readable: &[Buffer], writable: &[Buffer]) {
        let count = (readable.len() + writable.len()) as u16;
        let readable = readable.iter().map(|buffer| (buffer, 0));
        let all = readable.chain(writable.iter().map(|buffer| (buffer, WRITE)));
        let queue = &mut self.queues[usize::from(queue)];
        for (at, (&(addr, len), flags)) in (head..).zip(all) {
            let next = if at + 1 < head + count { NEXT } else { 0 };
            let flags = flags | next;
            let next = at + 1;
            queue.desc(
                at,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        queue.offer(head);
        queue.publish();
        self.device.notify(queue.index);
    }

    /// The next chain that the device is done with: its head and the bytes written.
    pub fn used(&mut self, queue: u16) -> Option<(u32, u32)> {
        self.queues[usize::from(queue)].used()
    }

    /// Waits for that.
    pub fn wait(&mut self, queue: u16, cycles: u64) -> Option<(u32, u32)> {
        let mut used = None;
        tsc::wait(cycles, || {
            used = self.used(queue);
            used.is_some() || !self.device.runs()
        });
        used
    }

    /// Sends a chain and waits until the device is done with it; the bytes that it wrote.
    pub fn send(&mut self, queue: u16, readable: &[Buffer], writable: &[Buffer]) -> Option<u32> {
        self.post(queue, 0, readable, writable);
        self.wait(queue, tsc::LONG).map(|(_, len)| len)
    }
}

/// Writes bytes to RAM; where they end.
pub fn put(at: u64, bytes: &[u8]) -> u64 {
    let end = at + bytes.len() as u64;
    (at..end)
        .zip(bytes)
        .for_each(|(at, byte)| io::write(at, *byte));
    end
}

/// Marks what lies behind a buffer.
pub fn fence(at: u64) {
    (at..at + FENCE).for_each(|at| io::write(at, CANARY));
}

/// Whether nobody wrote there.
pub fn is_whole(at: u64) -> bool {
    (at..at + FENCE).all(|at| io::read::<u8>(at) == CANARY)
}
