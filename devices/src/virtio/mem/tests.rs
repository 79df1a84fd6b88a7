use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::virtio::core::{NEEDS_RESET, Reg, VirtioState};
use crate::virtio::driver::{Rig, TRANSPORTS, Transport, Vq, ram};

const DATA: u64 = 0x8000;
const BLOCK: u64 = 2 << 20;
const BASE: u64 = 1 << 32;
const COUNT: u64 = 8;

pub fn options() -> MemOptions {
    MemOptions {
        region: Arc::new(Region::new(COUNT * BLOCK, PAGE).unwrap()),
        address: BASE,
        block: BLOCK,
        requested: 4 * BLOCK,
        memory: None,
    }
}

const PAGE: u64 = 4096;

struct Bench {
    rig: Rig,
    vq: Vq,
    handle: MemHandle,
    region: Arc<Region>,
    memory: Memory,
}

impl Bench {
    fn new() -> Self {
        let ram = ram();
        let memory = Memory::new(ram.clone());
        let options = MemOptions {
            memory: Some(memory.clone()),
            ..options()
        };
        let region = Arc::clone(&options.region);
        let (mem, handle) = Mem::new(options, &MemState::default()).unwrap();
        let rig = Rig::with(Transport::Mmio, Box::new(mem), ram, VirtioState::default());
        let vq = rig.start(None).remove(0);
        Self {
            rig,
            vq,
            handle,
            region,
            memory,
        }
    }

    /// The answer and the state.
    fn request(&mut self, kind: u16, addr: u64, blocks: u16) -> (u16, u16) {
        let mut bytes = [0; REQUEST];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&addr.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        let ram = &self.rig.ram;
        ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let answer = DATA + 0x100;
        ram.write_slice(&[9; ANSWER], GuestAddress(answer)).unwrap();
        let (request, room) = (REQUEST as u32, ANSWER as u32);
        let head = self.vq.add(&[(DATA, request, false), (answer, room, true)]);
        self.rig.kick(&self.vq);
        self.rig.run(0);
        assert_eq!(self.vq.used().get(&head.into()), Some(&room));
        let word = |at| self.rig.ram.read_obj(GuestAddress(answer + at)).unwrap();
        (word(0), word(8))
    }

    fn plug(&mut self, first: u64, blocks: u16) -> u16 {
        self.request(PLUG, BASE + first * BLOCK, blocks).0
    }

    fn unplug(&mut self, first: u64, blocks: u16) -> u16 {
        self.request(UNPLUG, BASE + first * BLOCK, blocks).0
    }

    /// Whether devices reach the first byte of a block.
    fn seen(&self, block: u64) -> bool {
        let at = GuestAddress(BASE + block * BLOCK);
        self.memory.memory().write_obj(1_u8, at).is_ok()
    }

    /// The first byte of a block as the guest reads it.
    fn guest(&self, block: u64) -> u8 {
        let at = (self.region.address() + block * BLOCK) as *const u8;
        // SAFETY: within the region, all of which can be read.
        unsafe { at.read_volatile() }
    }
}

#[test]
fn plugged_blocks_are_memory_and_others_are_not() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(1, 2), ACK);
    assert_eq!(bench.handle.status().plugged, 2 * BLOCK);
    let seen: Vec<bool> = (0..COUNT).map(|block| bench.seen(block)).collect();
    assert_eq!(seen, [false, true, true, false, false, false, false, false]);
    // What devices write, the guest reads, across blocks that were plugged one by one.
    assert_eq!(bench.plug(3, 1), ACK);
    let over = GuestAddress(BASE + 3 * BLOCK - 4);
    let ram = bench.memory.memory();
    ram.write_slice(&[7; 8], over).unwrap();
    assert_eq!(bench.guest(3), 7);
    let stale = ram.into_inner();
    // Unplugged in the middle: the rest stays, content and all.
    assert_eq!(bench.unplug(2, 1), ACK);
    let seen: Vec<bool> = (0..COUNT).map(|block| bench.seen(block)).collect();
    assert_eq!(seen, [false, true, false, true, false, false, false, false]);
    assert_eq!((bench.guest(2), bench.guest(3)), (0, 1));
    // A device that still has the view of before does no harm, and the guest sees nothing of it.
    stale
        .write_obj(5_u8, GuestAddress(BASE + 2 * BLOCK))
        .unwrap();
    assert_eq!(bench.guest(2), 0);
    assert_eq!(bench.request(UNPLUG_ALL, 0, 0).0, ACK);
    assert!((0..COUNT).all(|block| !bench.seen(block) && bench.guest(block) == 0));
    assert_eq!(bench.memory.memory().num_regions(), 2);
    assert_eq!(bench.handle.status().plugged, 0);
    assert_ne!(bench.plug(COUNT, 1), ACK);
    let counted = bench.handle.counters();
    for figure in [
        ("plug_count", 3),
        ("plug_bytes", 3 * BLOCK),
        ("plug_fails", 1),
        ("unplug_count", 1),
        ("unplug_bytes", BLOCK),
        ("unplug_all_count", 1),
        ("unplug_all_fails", 0),
    ] {
        assert!(counted.contains(&figure), "{figure:?} in {counted:?}");
    }
}

#[test]
fn unplugged_memory_is_the_hosts_again() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(0, 4), ACK);
    let at = GuestAddress(BASE);
    let bytes = vec![1; 4 * BLOCK as usize];
    bench.memory.memory().write_slice(&bytes, at).unwrap();
    let view = bench.memory.memory();
    let file = view
        .find_region(at)
        .unwrap()
        .file_offset()
        .unwrap()
        .arc()
        .clone();
    drop(view);
    assert_eq!(file.metadata().unwrap().blocks() * 512, 4 * BLOCK);
    assert_eq!(bench.unplug(1, 2), ACK);
    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * BLOCK);
    // Plugged again, it is empty.
    assert_eq!(bench.plug(1, 1), ACK);
    assert_eq!((bench.guest(0), bench.guest(1)), (1, 0));
}

#[test]
fn requests_that_cannot_be() {
    let mut bench = Bench::new();
    // No blocks, not aligned, outside, wrapping.
    for (addr, blocks) in [
        (BASE, 0),
        (BASE + 4096, 1),
        (BASE - BLOCK, 1),
        (BASE + COUNT * BLOCK, 1),
        (BASE + (COUNT - 1) * BLOCK, 2),
        (0, u16::MAX),
        (u64::MAX - BLOCK + 1, u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(
                bench.request(kind, addr, blocks).0,
                ERROR,
                "{kind} {addr:#x}"
            );
        }
    }
    assert_eq!(bench.request(4, BASE, 1).0, ERROR);
    assert_eq!(bench.unplug(0, 1), ERROR);
    assert_eq!(bench.plug(0, 2), ACK);
    assert_eq!(bench.plug(1, 2), ERROR);
    assert_eq!(bench.unplug(1, 2), ERROR);
    // More than was asked for.
    assert_eq!(bench.plug(2, 3), NACK);
    assert_eq!(bench.plug(2, 2), ACK);
    let states: Vec<_> = [(0, 4), (3, 2), (4, 4)]
        .map(|(first, blocks)| bench.request(STATE, BASE + first * BLOCK, blocks))
        .into();
    assert_eq!(states, [(ACK, PLUGGED), (ACK, MIXED), (ACK, UNPLUGGED)]);
}

#[test]
fn requests_without_room_stop_the_device() {
    for buffers in [
        vec![
            (DATA, REQUEST as u32 - 1, false),
            (DATA, ANSWER as u32, true),
        ],
        vec![
            (DATA, REQUEST as u32, false),
            (DATA, ANSWER as u32 - 1, true),
        ],
    ] {
        let mut bench = Bench::new();
        bench.vq.add(&buffers);
        bench.rig.kick(&bench.vq);
        bench.rig.run(0);
        let status = bench.rig.port.get(Reg::Status);
        assert_ne!(status & u32::from(NEEDS_RESET), 0);
    }
}

#[test]
fn the_driver_is_told_of_another_size() {
    for transport in TRANSPORTS {
        let (mem, handle) = Mem::new(options(), &MemState::default()).unwrap();
        let rig = Rig::new(transport, Box::new(mem));
        rig.start(None);
        let words = || {
            let mut data = [0; 56];
            rig.port.read_config(0, &mut data);
            let (words, _) = data.as_chunks();
            words
                .iter()
                .map(|w| u64::from_le_bytes(*w))
                .collect::<Vec<_>>()
        };
        let len = COUNT * BLOCK;
        assert_eq!(words(), [BLOCK, 0, BASE, len, len, 0, 4 * BLOCK]);
        let generation = rig.port.get(Reg::ConfigGeneration);
        handle.set_requested(6 * BLOCK).unwrap();
        rig.run(0);
        assert_eq!(words()[6], 6 * BLOCK);
        assert_ne!(rig.port.get(Reg::ConfigGeneration), generation);
        assert_eq!(rig.port.get(Reg::InterruptStatus) & 2, 2);
        for bytes in [len + BLOCK, BLOCK + 4096] {
            assert!(handle.set_requested(bytes).is_err());
        }
    }
}

#[test]
fn a_reset_leaves_what_is_plugged_and_so_does_a_restore() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(0, 1), ACK);
    assert_eq!(bench.plug(3, 2), ACK);
    bench.handle.set_requested(5 * BLOCK).unwrap();
    // Section 5.15.5: a reset of the device changes no block.
    bench.rig.port.set(Reg::Status, 0);
    assert_eq!(bench.handle.status().plugged, 3 * BLOCK);
    let DeviceState::Mem(state) = bench.rig.core.save().device else {
        panic!("another state");
    };
    assert_eq!(state.plugged, [(0, 1), (3, 2)]);
    let (mem, handle) = Mem::new(options(), &state).unwrap();
    let status = handle.status();
    assert_eq!((status.plugged, status.requested), (3 * BLOCK, 5 * BLOCK));
    assert_eq!(mem.save(), DeviceState::Mem(state));
    for plugged in [
        vec![(0, 0)],
        vec![(7, 2)],
        vec![(u64::MAX, 2)],
        vec![(0, 2), (1, 1)],
    ] {
        let state = MemState {
            requested: None,
            layout: None,
            plugged,
        };
        assert!(matches!(Mem::new(options(), &state), Err(MemError::State)));
    }
}

#[test]
fn layouts_that_cannot_be() {
    let good = options();
    for (address, block) in [
        (BASE + PAGE, BLOCK),
        (BASE, 1 << 20),
        (BASE, 3 << 20),
        (BASE, 64 << 20),
    ] {
        let options = MemOptions {
            address,
            block,
            ..good.clone()
        };
        let made = Mem::new(options, &MemState::default());
        assert!(
            matches!(made, Err(MemError::Layout { .. })),
            "{address:#x} {block:#x}"
        );
    }
    assert!(Region::new(0, PAGE).is_err() && Region::new(PAGE, PAGE).is_err());
}

#[test]
fn a_guest_cannot_use_up_the_mappings_of_the_process() {
    let pieces = 2 * MAX_RUNS as u64 + 4;
    let options = MemOptions {
        region: Arc::new(Region::new(pieces * BLOCK, PAGE).unwrap()),
        requested: pieces * BLOCK,
        memory: Some(Memory::new(ram())),
        ..options()
    };
    let state = MemState {
        requested: None,
        layout: None,
        plugged: (0..MAX_RUNS as u64).map(|piece| (2 * piece, 1)).collect(),
    };
    let (mut mem, handle) = Mem::new(options, &state).unwrap();
    let next = 2 * MAX_RUNS as u64;
    assert_eq!(mem.plug(next..next + 1), BUSY);
    let plugged = handle.status().plugged;
    assert_eq!(plugged, MAX_RUNS as u64 * BLOCK);
    // What joins two of them is welcome, and then there is room for one more.
    assert_eq!(mem.plug(1..2), ACK);
    assert_eq!(mem.plug(next..next + 1), ACK);
    // Neither can a piece be split, and all of it stays plugged.
    assert_eq!(mem.unplug(1..2), BUSY);
    assert_eq!(mem.state(0..3), PLUGGED);
    assert_eq!(mem.unplug(next..next + 1), ACK);
    assert_eq!(mem.unplug(1..2), ACK);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn whatever_is_asked_blocks_are_memory_or_not(
        requests in prop::collection::vec((0..3_u16, 0..COUNT, 0..4_u16), 1..24)
    ) {
        let mut bench = Bench::new();
        let mut model = [false; COUNT as usize];
        for (kind, first, blocks) in requests {
            let range = first as usize..(first + u64::from(blocks)) as usize;
            let (answer, _) = bench.request(kind, BASE + first * BLOCK, blocks);
            if answer == ACK && kind == UNPLUG_ALL {
                model.fill(false);
            } else if answer == ACK {
                model[range].fill(kind == PLUG);
            }
            for (block, plugged) in (0..).zip(model) {
                prop_assert_eq!(bench.seen(block), plugged);
                prop_assert_eq!(bench.guest(block), u8::from(plugged));
            }
            let plugged = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(bench.handle.status().plugged, plugged * BLOCK);
        }
    }
}
