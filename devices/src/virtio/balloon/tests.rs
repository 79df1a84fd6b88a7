use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::GuestRam;
use crate::virtio::core::{NEEDS_RESET, Reg, VirtioState};
use crate::virtio::driver::{RAM, RAM_LEN, Rig, TRANSPORTS, Transport, Vq, ram};

/// Where chains have their buffers.
const DATA: u64 = 0x8000;
/// A page that tests give away, with neighbours.
const GIVEN: u64 = 0x2_0000;
const VERSION_1: u64 = 1 << 32;

pub fn options() -> BalloonOptions {
    BalloonOptions {
        num_pages: 16,
        max_pages: (2 * RAM_LEN / PAGE) as u32,
        host_page: PAGE,
        deflate_on_oom: true,
        statistics: Some(Duration::from_millis(500)),
        reporting: true,
        hinting: true,
    }
}

struct Bench {
    rig: Rig,
    vqs: Vec<Vq>,
    handle: BalloonHandle,
}

impl Bench {
    fn new(options: BalloonOptions, ram: GuestRam, features: Option<u64>) -> Self {
        let (balloon, handle) = Balloon::new(options, BalloonState::default()).unwrap();
        let state = VirtioState::default();
        let rig = Rig::with(Transport::Mmio, Box::new(balloon), ram, state);
        let vqs = rig.start(features);
        Self { rig, vqs, handle }
    }

    fn simple() -> Self {
        Self::new(options(), ram(), None)
    }

    /// Gives the device one chain of page numbers.
    fn pages(&mut self, queue: usize, pages: &[u64]) {
        let at = DATA + 0x400 * u64::from(self.vqs[queue].avail % 8);
        for (index, page) in (0..).zip(pages) {
            let pfn = (page / PAGE) as u32;
            let to = GuestAddress(at + 4 * index);
            self.rig.ram.write_obj(pfn, to).unwrap();
        }
        self.vqs[queue].add(&[(at, 4 * pages.len() as u32, false)]);
    }

    fn go(&mut self, queue: usize) -> usize {
        self.rig.kick(&self.vqs[queue]);
        self.rig.run(0);
        self.vqs[queue].used().len()
    }

    /// Waits until a buffer of statistics comes back.
    fn given_back(&mut self) {
        let begin = Instant::now();
        let mut back = 0;
        while back == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            self.rig.run(20);
            back = self.vqs[STATS].used().len();
        }
        assert_eq!(back, 1);
    }

    fn fill(&self, range: Range<u64>) {
        let bytes = vec![0xee; (range.end - range.start) as usize];
        let at = GuestAddress(range.start);
        self.rig.ram.write_slice(&bytes, at).unwrap();
    }

    fn is(&self, range: Range<u64>, byte: u8) -> bool {
        let mut bytes = vec![!byte; (range.end - range.start) as usize];
        let at = GuestAddress(range.start);
        self.rig.ram.read_slice(&mut bytes, at).unwrap();
        bytes.iter().all(|b| *b == byte)
    }

    fn works(&self) -> bool {
        self.rig.port.get(Reg::Status) & u32::from(NEEDS_RESET) == 0
    }
}

/// RAM as a memory file, its second piece first in the file.
fn shared_ram() -> (GuestRam, File) {
    // SAFETY: the name is a C string, and the result is checked before it is owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(2 * RAM_LEN).unwrap();
    let piece = |base, at| {
        let file = FileOffset::new(file.try_clone().unwrap(), at);
        (GuestAddress(base), RAM_LEN as usize, Some(file))
    };
    let pieces = [piece(RAM[0], RAM_LEN), piece(RAM[1], 0)];
    (
        GuestMemoryMmap::from_ranges_with_files(pieces).unwrap(),
        file,
    )
}

#[test]
fn inflated_pages_are_dropped_and_no_others() {
    let mut bench = Bench::simple();
    bench.fill(GIVEN - PAGE..GIVEN + 4 * PAGE);
    // Any order, twice, and over several chains: one range, one call.
    bench.pages(INFLATE, &[GIVEN + PAGE, GIVEN]);
    bench.pages(INFLATE, &[GIVEN + 2 * PAGE, GIVEN]);
    assert_eq!(bench.go(INFLATE), 2);
    assert!(bench.is(GIVEN - PAGE..GIVEN, 0xee));
    assert!(bench.is(GIVEN..GIVEN + 3 * PAGE, 0));
    assert!(bench.is(GIVEN + 3 * PAGE..GIVEN + 4 * PAGE, 0xee));
    assert_eq!(bench.handle.discarded.calls(), 1);
    assert_eq!(bench.handle.status().discarded, 3 * PAGE);
    // What the guest takes back is its own again.
    bench.pages(DEFLATE, &[GIVEN]);
    assert_eq!(bench.go(DEFLATE), 1);
    bench.fill(GIVEN..GIVEN + PAGE);
    assert!(bench.is(GIVEN..GIVEN + PAGE, 0xee));
    let counted = bench.handle.counters();
    assert!(counted.contains(&("inflate_count", 2)) && counted.contains(&("deflate_count", 1)));
}

#[test]
fn pages_of_a_memory_file_are_holes() {
    let (ram, file) = shared_ram();
    let mut bench = Bench::new(options(), ram, None);
    bench.fill(RAM[1]..RAM[1] + RAM_LEN);
    bench.fill(DATA..DATA + PAGE);
    let before = file.metadata().unwrap().blocks();
    let pages: Vec<u64> = (16..128).map(|n| RAM[1] + n * PAGE).collect();
    bench.pages(INFLATE, &pages);
    assert_eq!(bench.go(INFLATE), 1);
    let freed = before - file.metadata().unwrap().blocks();
    assert_eq!(freed * 512, 112 * PAGE);
    assert!(bench.is(RAM[1]..RAM[1] + 16 * PAGE, 0xee));
    assert!(bench.is(RAM[1] + 16 * PAGE..RAM[1] + 128 * PAGE, 0));
    assert!(bench.is(RAM[1] + 128 * PAGE..RAM[1] + RAM_LEN, 0xee));
    assert_eq!(bench.handle.status().refused, 0);
}

#[test]
fn what_is_not_ram_is_left_alone() {
    let mut bench = Bench::simple();
    bench.fill(GIVEN..GIVEN + PAGE);
    bench.pages(
        INFLATE,
        &[RAM_LEN, RAM[1] - PAGE, u64::from(u32::MAX) * PAGE],
    );
    assert_eq!(bench.go(INFLATE), 1);
    // A report that begins in RAM and ends outside, and one that wraps.
    let report = [
        (RAM_LEN - PAGE, 4 * PAGE as u32, true),
        (u64::MAX - 8, PAGE as u32, true),
    ];
    bench.vqs[REPORTING].add(&report);
    assert_eq!(bench.go(REPORTING), 1);
    assert!(bench.works() && bench.is(GIVEN..GIVEN + PAGE, 0xee));
    let status = bench.handle.status();
    assert_eq!(status.discarded, PAGE);
    assert_eq!(status.outside, 3 * PAGE + 3 * PAGE + 8);
}

#[test]
fn only_whole_host_pages_are_dropped() {
    let options = BalloonOptions {
        host_page: 4 * PAGE,
        ..options()
    };
    let mut bench = Bench::new(options.clone(), ram(), None);
    bench.fill(GIVEN..GIVEN + 8 * PAGE);
    // Three of four: none. The fourth completes it, since the driver tells what it takes back.
    bench.pages(INFLATE, &[GIVEN, GIVEN + PAGE, GIVEN + 3 * PAGE]);
    bench.go(INFLATE);
    assert!(bench.is(GIVEN..GIVEN + 8 * PAGE, 0xee));
    bench.pages(DEFLATE, &[GIVEN + PAGE]);
    bench.go(DEFLATE);
    bench.pages(INFLATE, &[GIVEN + 2 * PAGE]);
    bench.go(INFLATE);
    assert!(bench.is(GIVEN..GIVEN + 8 * PAGE, 0xee));
    bench.pages(INFLATE, &[GIVEN + PAGE]);
    bench.go(INFLATE);
    assert!(bench.is(GIVEN..GIVEN + 4 * PAGE, 0));
    assert!(bench.is(GIVEN + 4 * PAGE..GIVEN + 8 * PAGE, 0xee));
    // A report is cut to what is whole.
    bench.vqs[REPORTING].add(&[(GIVEN + PAGE, 7 * PAGE as u32, true)]);
    bench.go(REPORTING);
    assert!(bench.is(GIVEN + 4 * PAGE..GIVEN + 8 * PAGE, 0));

    // A driver that does not tell: only what one batch completes.
    let mut bench = Bench::new(options, ram(), Some(VERSION_1));
    bench.fill(GIVEN..GIVEN + 4 * PAGE);
    for page in 0..4 {
        bench.pages(INFLATE, &[GIVEN + page * PAGE]);
        bench.go(INFLATE);
    }
    assert!(bench.is(GIVEN..GIVEN + 4 * PAGE, 0xee));
    let pages: Vec<u64> = (0..4).map(|n| GIVEN + n * PAGE).collect();
    bench.pages(INFLATE, &pages);
    bench.go(INFLATE);
    assert!(bench.is(GIVEN..GIVEN + 4 * PAGE, 0));
}

#[test]
fn a_chain_of_too_many_pages_is_refused() {
    let mut bench = Bench::simple();
    let len = 4 * MAX_PFNS as u32;
    bench.vqs[INFLATE].add(&[(GIVEN, len, false)]);
    assert_eq!(bench.go(INFLATE), 1);
    assert!(bench.works());
    bench.vqs[INFLATE].add(&[(GIVEN, len + 4, false)]);
    assert_eq!(bench.go(INFLATE), 0);
    assert!(!bench.works());
}

/// Adds and removes features so that both ways to number queues differ.
#[test]
fn both_ways_to_number_queues() {
    let features = VERSION_1 | 1 << F_PAGE_REPORTING;
    for queue in [STATS, REPORTING] {
        let (balloon, _) = Balloon::new(options(), BalloonState::default()).unwrap();
        let rig = Rig::new(Transport::Mmio, Box::new(balloon));
        rig.negotiate(Some(features));
        let mut vq = Vq::new(rig.ram.clone(), queue as u16, 16);
        rig.set_queue(vq.index, vq.size, vq.rings());
        rig.driver_ok();
        rig.ram.write_obj(7_u64, GuestAddress(GIVEN)).unwrap();
        vq.add(&[(GIVEN, PAGE as u32, true)]);
        rig.kick(&vq);
        rig.run(0);
        assert_eq!(vq.used().len(), 1, "queue {queue}");
        assert_eq!(rig.ram.read_obj::<u64>(GuestAddress(GIVEN)).unwrap(), 0);
    }
}

#[test]
fn the_target_and_what_the_driver_makes_of_it() {
    for transport in TRANSPORTS {
        let (balloon, handle) = Balloon::new(options(), BalloonState::default()).unwrap();
        let balloon_space = balloon.config();
        let rig = Rig::new(transport, Box::new(balloon));
        rig.start(None);
        let word = |offset| {
            let mut data = [0; 4];
            rig.port.read_config(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!([word(0), word(4), word(8), word(12)], [16, 0, 0, 0]);
        let generation = rig.port.get(Reg::ConfigGeneration);
        handle.set_target(100).unwrap();
        rig.run(0);
        assert_eq!(word(0), 100);
        assert_ne!(rig.port.get(Reg::ConfigGeneration), generation);
        assert_eq!(rig.port.get(Reg::InterruptStatus) & 2, 2);
        // Only `actual` can be written, as a whole or by bytes.
        rig.port.write_config(0, &[9; 16]);
        assert_eq!([word(0), word(4), word(8)], [100, 0x0909_0909, 0]);
        rig.port.write_config(4, &50_u32.to_le_bytes());
        rig.port.write_config(60, &[1, 1]);
        balloon_space.write(u64::MAX, &[1, 1]);
        rig.port.write_config(5, &[1]);
        assert_eq!(handle.status().actual_pages, 306);
        assert!(handle.set_target(options().max_pages + 1).is_err());
        rig.port.set(Reg::Status, 0);
        let status = handle.status();
        assert_eq!((status.target_pages, status.actual_pages), (100, 0));
    }
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let mut bench = Bench::simple();
    let entry = |tag: u16, value: u64| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(value.to_le_bytes());
        bytes
    };
    assert_eq!(bench.handle.statistics().unwrap(), None);
    for free in [1000_u64, 2000] {
        // An unknown tag and half an entry are skipped.
        let bytes = [entry(4, free), entry(5, 4096), entry(99, 1), vec![0, 0, 1]].concat();
        let at = GuestAddress(DATA);
        bench.rig.ram.write_slice(&bytes, at).unwrap();
        bench.vqs[STATS].add(&[(DATA, bytes.len() as u32, false)]);
        // Kept for now, and given back after the interval.
        assert_eq!(bench.go(STATS), 0);
        let expected = Statistics {
            free_memory: Some(free),
            total_memory: Some(4096),
            ..Statistics::default()
        };
        assert_eq!(bench.handle.statistics().unwrap(), Some(expected));
        bench.given_back();
    }
    // No polling: the buffer stays.
    bench.handle.set_interval(Duration::ZERO).unwrap();
    bench.rig.run(0);
    bench.vqs[STATS].add(&[(DATA, 10, false)]);
    bench.go(STATS);
    bench.rig.run(100);
    assert_eq!(bench.vqs[STATS].used().len(), 0);
    // Another one takes its place, and a new interval counts for it.
    bench.vqs[STATS].add(&[(DATA, 10, false)]);
    assert_eq!(bench.go(STATS), 1);
    bench
        .handle
        .set_interval(Duration::from_millis(10))
        .unwrap();
    bench.given_back();
}

#[test]
fn a_round_of_hints() {
    let mut bench = Bench::simple();
    bench.fill(GIVEN..GIVEN + 4 * PAGE);
    let tell = |bench: &mut Bench, command: u32| {
        let at = GuestAddress(DATA);
        bench.rig.ram.write_obj(command, at).unwrap();
        bench.vqs[HINT].add(&[(DATA, 4, false)]);
        assert_eq!(bench.go(HINT), 1);
    };
    let hint = |bench: &mut Bench, page: u64| {
        bench.vqs[HINT].add(&[(GIVEN + page * PAGE, PAGE as u32, true)]);
        assert_eq!(bench.go(HINT), 1);
    };
    // Not asked for: nothing is dropped.
    hint(&mut bench, 0);
    bench.handle.start_hinting(true).unwrap();
    bench.rig.run(0);
    let round = bench.handle.hinting().unwrap().host_cmd;
    assert!(round > CMD_DONE);
    // Of another round: neither.
    tell(&mut bench, round + 1);
    hint(&mut bench, 0);
    assert!(bench.is(GIVEN..GIVEN + 4 * PAGE, 0xee));
    tell(&mut bench, round);
    hint(&mut bench, 1);
    assert!(bench.is(GIVEN..GIVEN + PAGE, 0xee));
    assert!(bench.is(GIVEN + PAGE..GIVEN + 2 * PAGE, 0));
    tell(&mut bench, CMD_STOP);
    let done = Hinting {
        host_cmd: CMD_DONE,
        guest_cmd: CMD_STOP,
    };
    assert_eq!(bench.handle.hinting().unwrap(), done);
    // After the end a late hint does no harm, and the next round has another number.
    hint(&mut bench, 2);
    assert!(bench.is(GIVEN + 2 * PAGE..GIVEN + 4 * PAGE, 0xee));
    bench.handle.start_hinting(false).unwrap();
    let next = bench.handle.hinting().unwrap().host_cmd;
    assert_eq!(next, round + 1);
    tell(&mut bench, next);
    tell(&mut bench, CMD_STOP);
    assert_eq!(bench.handle.hinting().unwrap().host_cmd, next);
    bench.handle.stop_hinting().unwrap();
    assert_eq!(bench.handle.hinting().unwrap(), done);
    let counted = bench.handle.counters();
    for figure in [
        ("free_page_hint_count", 1),
        ("free_page_hint_freed", PAGE),
        ("inflate_count", 0),
    ] {
        assert!(counted.contains(&figure), "{figure:?} in {counted:?}");
    }
}

#[test]
fn what_was_not_configured_is_not_there() {
    let options = BalloonOptions {
        statistics: None,
        reporting: false,
        hinting: false,
        deflate_on_oom: false,
        ..options()
    };
    let (balloon, handle) = Balloon::new(options.clone(), BalloonState::default()).unwrap();
    let traits = balloon.traits();
    assert_eq!((traits.features, traits.queues.len()), (0, 2));
    assert!(handle.statistics().is_err() && handle.set_interval(Duration::ZERO).is_err());
    assert!(handle.start_hinting(true).is_err() && handle.hinting().is_err());
    for host_page in [0, 2048, 3 << 12] {
        let options = BalloonOptions {
            host_page,
            ..options.clone()
        };
        assert!(Balloon::new(options, BalloonState::default()).is_err());
    }
}

#[test]
fn a_restored_balloon_goes_on_where_it_was() {
    let mut bench = Bench::simple();
    bench.handle.set_target(77).unwrap();
    bench.handle.start_hinting(true).unwrap();
    bench.rig.port.write_config(4, &70_u32.to_le_bytes());
    bench.vqs[STATS].add(&[(DATA, 10, false)]);
    bench.go(STATS);
    // The kept buffer goes back into the queue, to be taken again.
    bench.rig.core.pause();
    let state = bench.rig.core.save();
    assert_eq!(state.queues[STATS].next_avail, 0);
    let DeviceState::Balloon(saved) = state.device else {
        panic!("{state:?}");
    };
    let (_, handle) = Balloon::new(options(), saved).unwrap();
    let status = handle.status();
    assert_eq!((status.target_pages, status.actual_pages), (77, 70));
    assert_eq!(handle.hinting().unwrap(), bench.handle.hinting().unwrap());
    bench.rig.core.resume();
    bench.given_back();
}
