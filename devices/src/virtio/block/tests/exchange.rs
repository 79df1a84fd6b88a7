//! Another image in the place of the present one.

use std::time::Duration;

use super::*;
use crate::virtio::limiter::{BucketConfig, LimiterConfig};

/// An image of sectors that all have `byte`.
fn image(bench: &Bench, name: &str, byte: u8, sectors: usize) -> std::path::PathBuf {
    let path = bench.path.with_file_name(name);
    fs::write(&path, vec![byte; 512 * sectors]).unwrap();
    path
}

fn open(path: &std::path::Path, read_only: bool) -> Disk {
    let options = DiskOptions {
        path: path.to_path_buf(),
        read_only,
        ..DiskOptions::default()
    };
    Disk::open(&options).unwrap()
}

fn capacity(bench: &Bench) -> u64 {
    let mut data = [0; 8];
    bench.rig.port.read_config(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn requests_go_to_the_new_image_and_no_more_to_the_old_one() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        let data = [(DATA, 512, true)];
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 7, &data).0, VIRTIO_BLK_S_OK);
        assert_eq!(bench.byte(DATA), 7);
        let old = fs::read(&bench.path).unwrap();
        for (name, byte, sectors) in [("larger", 0xaa, 4096), ("smaller", 0xbb, 16)] {
            let path = image(&bench, name, byte, sectors);
            let size = bench.handle.exchange(open(&path, false)).unwrap();
            assert_eq!(size, sectors as u64);
            bench.rig.run(10);
            assert_eq!(capacity(&bench), size);
            assert_eq!(bench.rig.port.get(Reg::InterruptStatus) & 2, 2);
            assert_eq!(
                bench.request(VIRTIO_BLK_T_IN, size - 1, &data).0,
                VIRTIO_BLK_S_OK
            );
            assert_eq!(bench.byte(DATA + 511), byte);
            assert_eq!(
                bench.request(VIRTIO_BLK_T_IN, size, &data).0,
                VIRTIO_BLK_S_IOERR
            );
            let from = [(DATA, 512, false)];
            bench
                .rig
                .ram
                .write_slice(&[9; 512], GuestAddress(DATA))
                .unwrap();
            assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 3, &from).0, VIRTIO_BLK_S_OK);
            assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, VIRTIO_BLK_S_OK);
            let content = fs::read(&path).unwrap();
            assert!(content[3 * 512..4 * 512] == [9; 512] && content[0] == byte);
            assert_eq!(content.len(), 512 * sectors);
        }
        assert!(fs::read(&bench.path).unwrap() == old);
        // Nobody holds it any more.
        drop(open(&bench.path, false));
    }
}

#[test]
fn the_new_image_is_there_from_the_start_if_it_comes_before() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    fs::write(&paths[0], [1; 4096]).unwrap();
    fs::write(&paths[1], [2; 8192]).unwrap();
    let options = BlockOptions::default();
    let (block, handle) =
        Block::new(open(&paths[0], false), options, BlockState::default()).unwrap();
    handle.exchange(open(&paths[1], false)).unwrap();
    let rig = Rig::new(Transport::Mmio, Box::new(block));
    let vqs = rig.start(None);
    let _dir = dir;
    let mut bench = Bench {
        rig,
        vqs,
        handle,
        _dir,
        path: paths[1].clone(),
    };
    assert_eq!(capacity(&bench), 16);
    let data = [(DATA, 512, true)];
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 15, &data).0, VIRTIO_BLK_S_OK);
    assert_eq!(bench.byte(DATA), 2);
}

#[test]
fn what_waits_for_its_tokens_goes_to_the_new_image() {
    for engine in ENGINES {
        let limiter = Arc::new(Limiter::new(LimiterConfig {
            bandwidth: None,
            ops: Some(BucketConfig {
                size: 1,
                refill_time: 3_600_000,
                one_time_burst: 0,
            }),
        }));
        let options = BlockOptions {
            engine,
            limiter: Some(Arc::clone(&limiter)),
            ..BlockOptions::default()
        };
        let mut bench = Bench::new(DiskOptions::default(), options, None);
        let data = [(DATA, 512, true)];
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 1, &data).0, VIRTIO_BLK_S_OK);
        // A sector that the new image has not got.
        bench.header(HEADER, VIRTIO_BLK_T_IN, 2000);
        bench.vqs[0].add(&[
            (HEADER, 16, false),
            (DATA, 512, true),
            (HEADER + 64, 1, true),
        ]);
        bench.rig.kick(&bench.vqs[0]);
        bench.rig.run(5);
        assert!(bench.vqs[0].used().is_empty());
        let path = image(&bench, "small", 5, 16);
        bench.handle.exchange(open(&path, false)).unwrap();
        bench.rig.run(5);
        assert!(bench.vqs[0].used().is_empty(), "it still waits");
        limiter.set(LimiterConfig::default());
        bench.handle.limits_changed().unwrap();
        let begin = Instant::now();
        while bench.vqs[0].used().is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(10));
            bench.rig.run(5);
        }
        assert_eq!(u32::from(bench.byte(HEADER + 64)), VIRTIO_BLK_S_IOERR);
    }
}

#[test]
fn an_image_has_to_be_as_the_driver_knows_the_disk() {
    let bench = Bench::simple(EngineKind::Auto);
    let path = image(&bench, "read-only", 1, 8);
    let error = bench.handle.exchange(open(&path, true)).unwrap_err();
    assert!(matches!(error, BlockError::Unlike { .. }), "{error}");
    let options = DiskOptions {
        path,
        logical_block_size: Some(4096),
        ..DiskOptions::default()
    };
    let error = bench.handle.exchange(Disk::open(&options).unwrap());
    assert!(matches!(error, Err(BlockError::Unlike { .. })));
    assert_eq!(capacity(&bench), 2048);
}
