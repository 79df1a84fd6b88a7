//! Resizing, limits, the write cache and restoring.

use std::fs;
use std::io::Write;
use std::time::Duration;

use virtio_bindings::virtio_blk::*;

use super::super::*;
use super::{Bench, DATA, ENGINES, temporary_disk};
use crate::virtio::core::{CORE_FEATURES, Reg, VirtioState};
use crate::virtio::driver::{RAM, RAM_LEN, Rig, Transport, ram};
use crate::virtio::limiter::{BucketConfig, LimiterConfig};

#[test]
fn a_disk_grows_under_its_guest() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        let capacity = |bench: &Bench| {
            let mut data = [0; 8];
            bench.rig.port.read_config(0, &mut data);
            u64::from_le_bytes(data)
        };
        assert_eq!(capacity(&bench), 2048);
        let generation = bench.rig.port.get(Reg::ConfigGeneration);
        let file = fs::File::options().append(true).open(&bench.path).unwrap();
        (&file).write_all(&[0x42; 4096]).unwrap();
        assert_eq!(bench.handle.resize().unwrap(), 2056);
        bench.rig.run(10);
        assert_eq!(capacity(&bench), 2056);
        assert_ne!(bench.rig.port.get(Reg::ConfigGeneration), generation);
        assert_eq!(bench.rig.port.get(Reg::InterruptStatus) & 2, 2);
        let data = [(DATA, 512, true)];
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, 2055, &data).0,
            VIRTIO_BLK_S_OK
        );
        assert_eq!(bench.byte(DATA + 511), 0x42);
        // Shrunk behind our back: an I/O error, and the device lives.
        file.set_len(512).unwrap();
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, 100, &data).0,
            VIRTIO_BLK_S_IOERR
        );
        let two = [(DATA, 1024, true)];
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, 0, &two).0,
            VIRTIO_BLK_S_IOERR
        );
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &data).0, VIRTIO_BLK_S_OK);
    }
}

#[test]
fn limits_are_kept_and_can_be_lifted() {
    for engine in ENGINES {
        let limiter = Arc::new(Limiter::new(LimiterConfig {
            bandwidth: None,
            ops: Some(BucketConfig {
                size: 2,
                refill_time: 100,
                one_time_burst: 0,
            }),
        }));
        let options = BlockOptions {
            engine,
            limiter: Some(Arc::clone(&limiter)),
            ..BlockOptions::default()
        };
        let mut bench = Bench::new(DiskOptions::default(), options, None);
        let start = Instant::now();
        for slot in 0..5 {
            bench.add(
                slot,
                VIRTIO_BLK_T_IN,
                slot,
                &[(DATA + 512 * slot, 512, true)],
            );
        }
        bench.rig.kick(&bench.vqs[0]);
        bench.rig.run(0);
        let queue = bench.rig.core.save().queues[0];
        assert_eq!(
            queue.next_avail, queue.next_used,
            "held requests stay with the driver"
        );
        while bench.vqs[0].used_index() < 5 {
            bench.rig.run(5);
        }
        // Two at once and one each 50 ms.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(140), "{took:?}");
        // A limit that would take an hour, lifted.
        limiter.set(LimiterConfig {
            bandwidth: Some(BucketConfig {
                size: 512,
                refill_time: 3_600_000,
                one_time_burst: 0,
            }),
            ops: None,
        });
        bench.vqs[0].used();
        for slot in 0..2 {
            bench.add(
                slot,
                VIRTIO_BLK_T_IN,
                slot,
                &[(DATA + 512 * slot, 512, true)],
            );
        }
        bench.rig.kick(&bench.vqs[0]);
        let begin = Instant::now();
        while bench.vqs[0].used_index() < 6 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            bench.rig.run(20);
        }
        assert_eq!(bench.vqs[0].used_index(), 6);
        limiter.set(LimiterConfig::default());
        bench.handle.limits_changed().unwrap();
        bench.wait(2);
    }
}

#[test]
fn a_pause_costs_no_tokens() {
    for engine in ENGINES {
        let limiter = Limiter::new(LimiterConfig {
            bandwidth: None,
            ops: Some(BucketConfig {
                size: 1,
                refill_time: 300,
                one_time_burst: 0,
            }),
        });
        let options = BlockOptions {
            engine,
            limiter: Some(Arc::new(limiter)),
            ..BlockOptions::default()
        };
        let mut bench = Bench::new(DiskOptions::default(), options, None);
        let start = Instant::now();
        for slot in 0..2 {
            bench.add(slot, VIRTIO_BLK_T_IN, slot, &[(DATA, 512, true)]);
        }
        bench.rig.kick(&bench.vqs[0]);
        bench.rig.run(0);
        // The second request is held, given back, and comes again; two hundred tokens are a minute.
        for _ in 0..200 {
            bench.rig.core.pause();
            bench.rig.core.resume();
            bench.rig.run(0);
        }
        while bench.vqs[0].used_index() < 2 {
            bench.rig.run(5);
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(290), "{took:?}");
        assert!(took < Duration::from_secs(30), "{took:?}");
    }
}

#[test]
fn a_limit_that_came_later_holds_requests_until_their_time() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        let ops = BucketConfig {
            size: 1,
            refill_time: 50,
            one_time_burst: 0,
        };
        bench.handle.limiter().set(LimiterConfig {
            bandwidth: None,
            ops: Some(ops),
        });
        let start = Instant::now();
        for slot in 0..3 {
            bench.add(slot, VIRTIO_BLK_T_IN, slot, &[(DATA, 512, true)]);
        }
        bench.wait(3);
        // One at once, then one each 50 ms.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(95), "{took:?}");
    }
}

#[test]
fn a_larger_disk_is_told_after_a_restore() {
    let make = |state: &DeviceState, len| {
        let state = match state {
            DeviceState::Block(state) => *state,
            _ => BlockState::default(),
        };
        let disk = temporary_disk(len, false);
        Block::new(disk, BlockOptions::default(), state).unwrap().0
    };
    let block = make(&DeviceState::Reset, 1 << 20);
    let rig = Rig::with(
        Transport::Mmio,
        Box::new(block),
        ram(),
        VirtioState::default(),
    );
    rig.start(None);
    let state = rig.core.save();
    let again = make(&state.device, 1 << 21);
    let again = Rig::with(Transport::Mmio, Box::new(again), ram(), state);
    again.core.resume();
    again.run(10);
    assert_eq!(again.port.get(Reg::InterruptStatus) & 2, 2);
    let mut data = [0; 8];
    again.port.read_config(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), 4096);
    // RAM has a second piece behind a hole: buffers there work as well.
    assert!(RAM[1] > RAM_LEN);
}

#[test]
fn writes_are_synchronous_unless_the_driver_flushes() {
    let flush = 1_u64 << VIRTIO_BLK_F_FLUSH;
    let choice = 1 << VIRTIO_BLK_F_CONFIG_WCE;
    let cases = [
        (Cache::Writeback, 0, true, true),
        (Cache::None, choice, true, true),
        (Cache::Writeback, flush, false, false),
        (Cache::None, flush | choice, true, false),
        (Cache::Writeback, flush | choice, false, true),
        (Cache::Unsafe, 0, false, false),
    ];
    for (cache, features, writeback, expected) in cases {
        let sync = writes_through(cache, |bit| features >> bit & 1 != 0, writeback);
        assert_eq!(sync, expected, "{cache:?} {features:#x} {writeback}");
    }
    // And synchronous writes work: the driver does not know flushes.
    for engine in ENGINES {
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        let features = Some(CORE_FEATURES);
        let mut bench = Bench::new(DiskOptions::default(), options, features);
        bench.fill(DATA, 512, 0x99);
        let out = [(DATA, 512, false)];
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 3, &out).0, VIRTIO_BLK_S_OK);
        assert_eq!(bench.disk_bytes(3 * 512, 512), [0x99; 512]);
    }
}

#[test]
fn the_cache_is_the_drivers_choice() {
    let bench = Bench::simple(EngineKind::Auto);
    let writeback = || match bench.rig.core.save().device {
        DeviceState::Block(state) => state.writeback,
        other => panic!("{other:?}"),
    };
    let register = || {
        let mut value = [0xff];
        bench.rig.port.read_config(32, &mut value);
        value
    };
    assert_eq!((register(), writeback()), ([1], true));
    bench.rig.port.write_config(32, &[0]);
    assert_eq!((register(), writeback()), ([0], false));
    // Nothing else can be written, and the choice goes with its driver.
    bench.rig.port.write_config(0, &[0xff]);
    let mut capacity = [0; 8];
    bench.rig.port.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    bench.rig.port.set(Reg::Status, 0);
    assert!(writeback());
}

#[test]
fn queues_that_cannot_be_are_refused() {
    for (queues, queue_size) in [(0, 256), (257, 256), (1, 0), (1, 1), (1, 100)] {
        let options = BlockOptions {
            queues,
            queue_size,
            ..BlockOptions::default()
        };
        let disk = temporary_disk(1 << 20, false);
        let made = Block::new(disk, options, BlockState::default());
        assert!(matches!(made, Err(BlockError::Queues { .. })));
    }
}
