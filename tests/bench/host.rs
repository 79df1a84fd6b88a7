//! The yardstick: a process of the host that does the same requests on the same file by io_uring.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};

use super::{Case, Run};

/// Page-aligned buffers, one per request under way.
struct Buffers {
    start: *mut u8,
    layout: Layout,
}

impl Buffers {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, 4096).unwrap();
        // SAFETY: the layout has a size.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(!start.is_null());
        Self { start, layout }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: made with this layout, and no request is under way any more.
        unsafe { dealloc(self.start, self.layout) }
    }
}

/// The generator of the payloads, so that both have the same places in the same order.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

/// Carries out `count` requests of `case` on `file`.
pub fn run(case: &Case, file: &File, count: usize, seed: u64) -> Run {
    let depth = case.depth.min(count);
    let buffers = Buffers::new(depth * case.size);
    let mut ring = IoUring::builder()
        .setup_coop_taskrun()
        .build(256)
        .expect("io_uring is there");
    ring.submitter()
        .register_files(&[file.as_raw_fd()])
        .unwrap();
    let places = file.metadata().unwrap().len() / case.size as u64;
    let mut random = Random::new(seed);
    let mut begun = 0;
    let mut started = vec![Instant::now(); depth];
    let mut times = Vec::with_capacity(count);
    let mut push = |ring: &mut IoUring, slot: usize, started: &mut Vec<Instant>| {
        let place = match case.sequential {
            true => begun % places,
            false => random.below(places),
        };
        begun += 1;
        let (buffer, len) = (
            buffers.start.wrapping_add(slot * case.size),
            case.size as u32,
        );
        let offset = place * case.size as u64;
        let entry = match case.write {
            false => opcode::Read::new(types::Fixed(0), buffer, len)
                .offset(offset)
                .build(),
            true => opcode::Write::new(types::Fixed(0), buffer, len)
                .offset(offset)
                .build(),
        };
        started[slot] = Instant::now();
        // SAFETY: the buffer outlives the request, which is waited for below.
        unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.unwrap();
        begun as usize
    };
    let begin = Instant::now();
    for slot in 0..depth {
        push(&mut ring, slot, &mut started);
    }
    let mut pushed = depth;
    while times.len() < count {
        ring.submit_and_wait(1).unwrap();
        while let Some(entry) = { ring.completion().next() } {
            assert_eq!(
                entry.result(),
                case.size as i32,
                "a request of the host failed"
            );
            let slot = entry.user_data() as usize;
            times.push(started[slot].elapsed());
            if pushed < count {
                pushed = push(&mut ring, slot, &mut started);
            }
        }
    }
    let elapsed = begin.elapsed();
    times.sort_unstable();
    Run {
        rate: count as f64 / elapsed.as_secs_f64(),
        median: times[(count - 1) / 2],
        p99: times[(count - 1) * 99 / 100],
        kicks: 0.0,
        interrupts: 0.0,
    }
}
