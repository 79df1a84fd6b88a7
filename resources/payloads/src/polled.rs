//! Requests on a queue that is polled: how many are under way is kept constant, and how long each
//! took is kept in RAM.

use crate::virtio::Device;
use crate::virtio::queue::Queue;
use crate::{io, println, tsc};

/// Latencies in cycles, four bytes each.
const TIMES: u64 = 0x120_0000;
/// Most requests that are carried out.
pub const MAX_COUNT: u64 = 0x20_0000;
/// Most requests under way.
pub const MAX_DEPTH: u64 = 64;

/// A queue, and the requests on it.
pub struct Polled {
    /// Whose queue it is; EVENT_IDX is agreed on.
    pub device: Device,
    /// The queue.
    pub queue: Queue,
    /// Requests under way.
    pub depth: u64,
    /// Descriptors of each request.
    pub chain: u16,
    /// Kicks so far.
    pub kicks: u64,
    started: [u64; MAX_DEPTH as usize],
}

impl Polled {
    /// Nothing is under way yet.
    pub fn new(device: Device, queue: Queue, depth: u64, chain: u16) -> Self {
        let depth = depth.clamp(1, MAX_DEPTH.min(u64::from(queue.size / chain)));
        let started = [0; MAX_DEPTH as usize];
        Self {
            device,
            queue,
            depth,
            chain,
            kicks: 0,
            started,
        }
    }

    fn begin(&mut self, slot: u64) {
        self.queue.offer(self.chain * slot as u16);
        self.started[slot as usize] = tsc::now();
    }

    fn publish(&mut self, before: u16) {
        if self.queue.avail == before {
            return;
        }
        self.queue.publish();
        if self.queue.wants_kick(true, before) {
            self.device.notify(self.queue.index);
            self.kicks += 1;
        }
    }

    /// Carries `count` requests out, of which `fill` writes one and `check` looks at the answer, each
    /// given the slot, and the bytes that the device has written. The cycles it took; `None` if an answer is wrong or never comes.
    pub fn run(
        &mut self,
        count: u64,
        mut fill: impl FnMut(u64),
        mut check: impl FnMut(u64, u32) -> bool,
    ) -> Option<u64> {
        let start = tsc::now();
        let before = self.queue.avail;
        let mut begun = self.depth.min(count);
        for slot in 0..begun {
            fill(slot);
            self.begin(slot);
        }
        self.publish(before);
        let mut done = 0;
        let mut last = start;
        while done < count {
            let before = self.queue.avail;
            // An index that the device is far beyond, so that it never interrupts.
            let far = self.queue.seen.wrapping_sub(0x4000);
            self.queue.set_used_event(far);
            while let Some((head, len)) = self.queue.used() {
                last = tsc::now();
                let slot = u64::from(head) / u64::from(self.chain);
                if !check(slot, len) {
                    return None;
                }
                let time = last.wrapping_sub(self.started[slot as usize]);
                io::write(TIMES + 4 * done, time.min(u32::MAX.into()) as u32);
                done += 1;
                if begun < count {
                    fill(slot);
                    self.begin(slot);
                    begun += 1;
                }
            }
            self.publish(before);
            if tsc::now().wrapping_sub(last) > tsc::LONG {
                return None;
            }
            core::hint::spin_loop();
        }
        Some(last - start)
    }

    /// Prints `count cycles median p99 kicks`, the last but one and the one before it in cycles.
    pub fn print(&self, count: u64, cycles: u64) {
        // SAFETY: `run` wrote as many there, and nothing else uses that RAM.
        let times = unsafe { core::slice::from_raw_parts_mut(TIMES as *mut u32, count as usize) };
        times.sort_unstable();
        let percentile = |n: usize| times[(times.len() - 1) * n / 100];
        let (median, p99, kicks) = (percentile(50), percentile(99), self.kicks);
        println!("{count} {cycles} {median} {p99} {kicks}");
    }
}
