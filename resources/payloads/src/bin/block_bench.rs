//! Throughput and latency of the first disk, its queue polled. No interrupt is taken.
//!
//! On the command line: `depth=N` requests under way (32), `size=BYTES` each (4096), `count=N` of
//! them (100000), `write=1`, `sequential=1`, `span=BYTES` of the disk that are used (all),
//! `seed=N`, `interrupts=1` to ask for interrupts as a driver does that sleeps until one (none by
//! default), `windows=ADDRESS` of MMIO devices where another monitor has them. Prints one line: `count cycles median p99 kicks`, the last three per request in
//! cycles, and waits to be ended.
#![no_std]
#![no_main]

use payloads::random::Random;
use payloads::virtio::disk::{ID, IN, OUT};
use payloads::virtio::queue::{Desc, NEXT, Queue, WRITE};
use payloads::virtio::{Device, EVENT_IDX, find};
use payloads::{io, println, start::StartInfo, tsc};

payloads::start!(main);

/// `VIRTIO_BLK_F_FLUSH`: without it, every write would go to the disk before it is answered.
const FLUSH: u64 = 1 << 9;
const RINGS: u64 = 0x100_0000;
/// Request headers, and the status behind each.
const HEADERS: u64 = 0x110_0000;
/// Latencies in cycles, four bytes each.
const TIMES: u64 = 0x120_0000;
const MAX_COUNT: u64 = 0x20_0000;
const DATA: u64 = 0x300_0000;
const MAX_DATA: u64 = 0x400_0000;
const MAX_DEPTH: u64 = 64;
const QUEUE: u16 = 256;

struct Bench {
    device: Device,
    queue: Queue,
    depth: u64,
    size: u64,
    count: u64,
    kind: u32,
    sequential: bool,
    places: u64,
    interrupts: bool,
    random: Random,
    begun: u64,
    kicks: u64,
    started: [u64; MAX_DEPTH as usize],
}

impl Bench {
    /// Descriptors that stay as they are: three for each request.
    fn prepare(&self) {
        let write = if self.kind == IN { WRITE } else { 0 };
        for slot in 0..self.depth {
            let header = HEADERS + 64 * slot;
            io::write(header, u64::from(self.kind));
            let at = 3 * slot as u16;
            let chain = [
                (header, 16, NEXT, at + 1),
                (
                    DATA + slot * self.size,
                    self.size as u32,
                    NEXT | write,
                    at + 2,
                ),
                (header + 32, 1, WRITE, 0),
            ];
            for (at, (addr, len, flags, next)) in (at..).zip(chain) {
                self.queue.desc(
                    at,
                    Desc {
                        addr,
                        len,
                        flags,
                        next,
                    },
                );
            }
        }
    }

    fn begin(&mut self, slot: u64) {
        let place = match self.sequential {
            true => self.begun % self.places,
            false => self.random.below(self.places),
        };
        io::write(HEADERS + 64 * slot + 8, place * self.size / 512);
        io::write(HEADERS + 64 * slot + 32, 0xffu8);
        self.queue.offer(3 * slot as u16);
        self.started[slot as usize] = tsc::now();
        self.begun += 1;
    }

    fn publish(&mut self, before: u16) {
        if self.queue.avail == before {
            return;
        }
        self.queue.publish();
        if self.queue.wants_kick(true, before) {
            self.device.notify(0);
            self.kicks += 1;
        }
    }

    /// Carries all requests out; `None` if one fails or is never answered. The cycles it took.
    fn run(&mut self) -> Option<u64> {
        let begin = tsc::now();
        let before = self.queue.avail;
        (0..self.depth).for_each(|slot| self.begin(slot));
        self.publish(before);
        let mut done = 0;
        let mut last = begin;
        while done < self.count {
            let before = self.queue.avail;
            if !self.interrupts || self.queue.used_index() != self.queue.seen {
                // An index that the device is far beyond, so that it never interrupts.
                self.queue
                    .set_used_event(self.queue.seen.wrapping_sub(0x4000));
            }
            while let Some((head, _)) = self.queue.used() {
                last = tsc::now();
                let slot = u64::from(head) / 3;
                if io::read::<u8>(HEADERS + 64 * slot + 32) != 0 {
                    return None;
                }
                let time = last.wrapping_sub(self.started[slot as usize]);
                io::write(TIMES + 4 * done, time.min(u32::MAX.into()) as u32);
                done += 1;
                if self.begun < self.count {
                    self.begin(slot);
                }
            }
            self.publish(before);
            if self.interrupts {
                // Of the next; what came before is found by the next round.
                self.queue.set_used_event(self.queue.seen);
            }
            if tsc::now().wrapping_sub(last) > tsc::LONG {
                return None;
            }
            core::hint::spin_loop();
        }
        Some(last - begin)
    }
}

fn main(info: &StartInfo) -> u8 {
    let option = |key| info.option(key).and_then(|n| n.parse::<u64>().ok());
    let Some(device) = find(ID, option("windows")) else {
        println!("no disk");
        return 2;
    };
    device.negotiate(EVENT_IDX | FLUSH);
    device.select(0);
    let queue = Queue::new(RINGS, 0, device.queue_max().min(QUEUE));
    queue.announce(&device);
    device.driver_ok();
    let sectors: u64 = io::read(device.config());
    let size = option("size").unwrap_or(4096);
    let depth = option("depth").unwrap_or(32).min(MAX_DEPTH);
    let count = option("count").unwrap_or(100_000).min(MAX_COUNT);
    if depth * size > MAX_DATA || 3 * depth > queue.size.into() || count < depth {
        println!("too much, or too little");
        return 2;
    }
    let mut bench = Bench {
        device,
        queue,
        depth,
        size,
        count,
        kind: if option("write").is_some() { OUT } else { IN },
        sequential: option("sequential").is_some(),
        interrupts: option("interrupts").is_some(),
        places: option("span").unwrap_or(sectors * 512).min(sectors * 512) / size,
        random: Random::new(option("seed").unwrap_or(1)),
        begun: 0,
        kicks: 0,
        started: [0; MAX_DEPTH as usize],
    };
    bench.prepare();
    let Some(cycles) = bench.run() else {
        println!("a request failed, status {:#x}", device.status());
        return 3;
    };
    // SAFETY: as many times were written there, and nothing else uses that RAM.
    let times = unsafe { core::slice::from_raw_parts_mut(TIMES as *mut u32, count as usize) };
    times.sort_unstable();
    let percentile = |n: usize| times[(times.len() - 1) * n / 100];
    println!(
        "{count} {cycles} {} {} {}",
        percentile(50),
        percentile(99),
        bench.kicks
    );
    // The benchmark looks at this machine, then ends it.
    tsc::wait(tsc::LONG, || false);
    0
}
