mod control;
mod exchange;
mod large;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::core::Reg;
use super::super::driver::{RAM, Rig, Transport, Vq};
use super::*;

/// Guest addresses of headers and of data.
const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const ENGINES: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Sync];

/// A disk that goes away by itself.
pub fn temporary_disk(len: u64, read_only: bool) -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    let options = DiskOptions {
        path: "temporary".into(),
        read_only,
        ..DiskOptions::default()
    };
    if !read_only {
        return Disk::from_file(file, &options).unwrap();
    }
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    Disk::from_file(fs::File::open(path).unwrap(), &options).unwrap()
}

struct Bench {
    rig: Rig,
    vqs: Vec<Vq>,
    handle: BlockHandle,
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
}

impl Bench {
    fn new(disk: DiskOptions, options: BlockOptions, features: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut content = vec![0_u8; 1 << 20];
        for (i, sector) in content.chunks_mut(512).enumerate() {
            sector.fill(i as u8);
        }
        fs::write(&path, content).unwrap();
        let disk = DiskOptions {
            path: path.clone(),
            ..disk
        };
        let disk = Disk::open(&disk).unwrap();
        let (block, handle) = Block::new(disk, options, BlockState::default()).unwrap();
        let rig = Rig::new(Transport::Mmio, Box::new(block));
        let vqs = rig.start(features);
        Self {
            rig,
            vqs,
            handle,
            _dir: dir,
            path,
        }
    }

    fn simple(engine: EngineKind) -> Self {
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        Self::new(DiskOptions::default(), options, None)
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let words = [u64::from(kind), sector];
        self.rig.ram.write_obj(words, GuestAddress(at)).unwrap();
    }

    fn byte(&self, at: u64) -> u8 {
        self.rig.ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// Adds a request on queue 0 with its header and status in slot `slot`; returns its head.
    fn add(&mut self, slot: u64, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
        let header = HEADER + 32 * slot;
        self.header(header, kind, sector);
        self.rig
            .ram
            .write_obj(0xee_u8, GuestAddress(header + 16))
            .unwrap();
        let mut bufs = vec![(header, 16, false)];
        bufs.extend_from_slice(data);
        bufs.push((header + 16, 1, true));
        self.vqs[0].add(&bufs)
    }

    fn status(&self, slot: u64) -> u8 {
        self.byte(HEADER + 32 * slot + 16)
    }

    /// Waits until `n` chains are used.
    fn wait(&mut self, n: usize) -> std::collections::BTreeMap<u32, u32> {
        self.rig.kick(&self.vqs[0]);
        let mut used = std::collections::BTreeMap::new();
        for _ in 0..500 {
            self.rig.run(10);
            used.extend(self.vqs[0].used());
            if used.len() >= n {
                return used;
            }
        }
        panic!("{} of {n} requests done", used.len());
    }

    /// One request; its status and the bytes written by the device.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u32, u32) {
        let head = self.add(0, kind, sector, data);
        let used = self.wait(1);
        (self.status(0).into(), used[&head.into()])
    }

    fn disk_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let file = fs::File::open(&self.path).unwrap();
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn fill(&self, addr: u64, len: usize, byte: u8) {
        let bytes = vec![byte; len];
        self.rig
            .ram
            .write_slice(&bytes, GuestAddress(addr))
            .unwrap();
    }
}

#[test]
fn reads_and_writes() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        // Over two buffers, neither of a sector's size.
        let data = [(DATA, 700, true), (DATA + 0x1000, 324, true)];
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, 5, &data),
            (VIRTIO_BLK_S_OK, 1025)
        );
        assert_eq!([bench.byte(DATA), bench.byte(DATA + 699)], [5, 6]);
        assert_eq!(bench.byte(DATA + 0x1000 + 323), 6);
        bench.fill(DATA, 1024, 0xab);
        let data = [(DATA, 100, false), (DATA + 100, 924, false)];
        assert_eq!(
            bench.request(VIRTIO_BLK_T_OUT, 7, &data),
            (VIRTIO_BLK_S_OK, 1)
        );
        let bytes = bench.disk_bytes(6 * 512, 2048);
        assert!(bytes[..512].iter().all(|b| *b == 6));
        assert!(bytes[512..1536].iter().all(|b| *b == 0xab));
        assert!(bytes[1536..].iter().all(|b| *b == 9));
        assert_eq!(
            bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]),
            (VIRTIO_BLK_S_OK, 1)
        );
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[]), (VIRTIO_BLK_S_OK, 1));
    }
}

#[test]
fn many_requests_are_one_batch() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        for slot in 0..5 {
            bench.add(
                slot,
                VIRTIO_BLK_T_IN,
                slot * 3,
                &[(DATA + slot * 512, 512, true)],
            );
        }
        bench.wait(5);
        for slot in 0..5 {
            assert_eq!(u32::from(bench.status(slot)), VIRTIO_BLK_S_OK);
            assert_eq!(u64::from(bench.byte(DATA + slot * 512)), slot * 3);
        }
        let values = bench.handle.counters();
        let count = values
            .iter()
            .find(|(name, _)| *name == "remaining_reqs_count");
        assert_eq!(count.unwrap().1, 4 + 3 + 2 + 1, "behind each of them");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        let io_error = VIRTIO_BLK_S_IOERR;
        let sectors = 2048;
        let one = [(DATA, 512, true)];
        let out = [(DATA, 512, false)];
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, sectors, &one).0, io_error);
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, sectors, &out).0, io_error);
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, u64::MAX, &out).0, io_error);
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, u64::MAX / 512, &one).0,
            io_error
        );
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 511, true)]).0,
            io_error
        );
        assert_eq!(
            bench.request(VIRTIO_BLK_T_IN, sectors - 1, &one).0,
            VIRTIO_BLK_S_OK
        );
        assert_eq!(bench.request(3, 0, &one).0, VIRTIO_BLK_S_UNSUPP);
        assert_eq!(fs::metadata(&bench.path).unwrap().len(), 1 << 20);
        // No room for a status: the driver is broken.
        bench.vqs[0].add(&[(HEADER, 16, false)]);
        bench.rig.kick(&bench.vqs[0]);
        bench.rig.run(10);
        assert_ne!(bench.rig.port.get(Reg::Status) & 0x40, 0);
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    for engine in ENGINES {
        let disk = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        let mut bench = Bench::new(disk, options, None);
        assert_ne!(bench.rig.core.traits().features & 1 << VIRTIO_BLK_F_RO, 0);
        bench.fill(DATA, 512, 0xab);
        let out = [(DATA, 512, false)];
        for kind in [
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
        ] {
            assert_eq!(bench.request(kind, 0, &out).0, VIRTIO_BLK_S_IOERR);
        }
        assert_eq!(bench.disk_bytes(0, 512), [0; 512]);
    }
}

#[test]
fn a_read_only_disk_is_not_written_by_a_writable_file_either() {
    for engine in ENGINES {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let disk = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        let kept = file.try_clone().unwrap();
        let disk = Disk::from_file(file, &disk).unwrap();
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        let mut bench = Bench::simple(EngineKind::Sync);
        let (block, _) = Block::new(disk, options, BlockState::default()).unwrap();
        bench.rig = Rig::new(Transport::Pci, Box::new(block));
        bench.vqs = bench.rig.start(None);
        bench.fill(DATA, 512, 0xab);
        let out = [(DATA, 512, false)];
        assert_eq!(
            bench.request(VIRTIO_BLK_T_OUT, 0, &out).0,
            VIRTIO_BLK_S_IOERR
        );
        let mut sector = [0xff; 512];
        kept.read_exact_at(&mut sector, 0).unwrap();
        assert_eq!(sector, [0; 512]);
    }
}

#[test]
fn the_serial_is_told() {
    let options = BlockOptions {
        serial: "a-serial-longer-than-it-may-be".into(),
        ..BlockOptions::default()
    };
    let mut bench = Bench::new(DiskOptions::default(), options, None);
    let id = [(DATA, 20, true)];
    assert_eq!(
        bench.request(VIRTIO_BLK_T_GET_ID, 0, &id),
        (VIRTIO_BLK_S_OK, 21)
    );
    let mut bytes = [0; 21];
    bench
        .rig
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&bytes, b"a-serial-longer-than\0");
    // A shorter buffer gets what fits, and the status its own byte.
    bench.fill(DATA, 21, 0);
    assert_eq!(
        bench.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 3, true)]),
        (VIRTIO_BLK_S_OK, 4)
    );
    bench
        .rig
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&bytes[..5], b"a-s\0\0");
}

/// Writes ranges of (sector, sectors, flags) to `DATA`.
fn put_ranges(bench: &Bench, ranges: &[(u64, u32, u32)]) -> (u64, u32, bool) {
    for (i, (sector, sectors, flags)) in ranges.iter().enumerate() {
        let words = [*sector, u64::from(*sectors) | u64::from(*flags) << 32];
        let at = GuestAddress(DATA + 16 * i as u64);
        bench.rig.ram.write_obj(words, at).unwrap();
    }
    (DATA, 16 * ranges.len() as u32, false)
}

#[test]
fn discard_and_write_zeroes_free_blocks() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        let blocks = |bench: &Bench| fs::metadata(&bench.path).unwrap().blocks();
        let before = blocks(&bench);
        let two = put_ranges(&bench, &[(8, 512, 0), (1024, 512, 0)]);
        assert_eq!(
            bench.request(VIRTIO_BLK_T_DISCARD, 0, &[two]).0,
            VIRTIO_BLK_S_OK
        );
        let freed = before - blocks(&bench);
        assert!(freed >= 2 * 504, "{freed} sectors freed");
        assert_eq!(bench.disk_bytes(7 * 512, 1024)[..512], [7; 512]);
        assert_eq!(bench.disk_bytes(1024 * 512, 512), [0; 512]);
        // Unaligned to the host's blocks, and kept or freed.
        for (sector, unmap) in [(601, 0), (701, 1)] {
            let range = put_ranges(&bench, &[(sector, 3, unmap)]);
            let result = bench.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[range]);
            assert_eq!(result, (VIRTIO_BLK_S_OK, 1));
            let bytes = bench.disk_bytes((sector - 1) * 512, 5 * 512);
            assert!(bytes[512..4 * 512].iter().all(|b| *b == 0));
            assert_eq!(
                [bytes[511], bytes[4 * 512]],
                [(sector - 1) as u8, (sector + 3) as u8]
            );
        }
        let empty = put_ranges(&bench, &[(5, 0, 0)]);
        assert_eq!(
            bench.request(VIRTIO_BLK_T_DISCARD, 0, &[empty]).0,
            VIRTIO_BLK_S_OK
        );
        type Ranges = &'static [(u64, u32, u32)];
        let bad: [(u32, Ranges, u32); 6] = [
            (VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)], VIRTIO_BLK_S_UNSUPP),
            (VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)], VIRTIO_BLK_S_UNSUPP),
            (
                VIRTIO_BLK_T_WRITE_ZEROES,
                &[(0, 8, 0); 2],
                VIRTIO_BLK_S_IOERR,
            ),
            (VIRTIO_BLK_T_DISCARD, &[(2047, 2, 0)], VIRTIO_BLK_S_IOERR),
            (
                VIRTIO_BLK_T_DISCARD,
                &[(u64::MAX, 1, 0)],
                VIRTIO_BLK_S_IOERR,
            ),
            (VIRTIO_BLK_T_DISCARD, &[(0, 1, 0); 33], VIRTIO_BLK_S_IOERR),
        ];
        for (kind, ranges, expected) in bad {
            let buffer = put_ranges(&bench, ranges);
            assert_eq!(bench.request(kind, 0, &[buffer]).0, expected, "{ranges:?}");
        }
        assert_eq!(fs::metadata(&bench.path).unwrap().len(), 1 << 20);
    }
}

#[test]
fn direct_io_takes_any_buffer() {
    for engine in ENGINES {
        let disk = DiskOptions {
            cache: Cache::None,
            ..DiskOptions::default()
        };
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let probe = dir.path().join("probe");
        fs::write(&probe, [0; 4096]).unwrap();
        let probe = DiskOptions {
            path: probe,
            ..disk.clone()
        };
        if let Err(DiskError::Direct { .. }) = Disk::open(&probe) {
            eprintln!("no O_DIRECT on the filesystem of the temporary directory: not tested");
            return;
        }
        let mut bench = Bench::new(disk, options, None);
        let block = bench.rig.core.traits().clone();
        assert_ne!(block.features & 1 << VIRTIO_BLK_F_BLK_SIZE, 0);
        for shift in [0, 1] {
            let data = [(DATA + shift, 4096, true)];
            assert_eq!(bench.request(VIRTIO_BLK_T_IN, 8, &data).0, VIRTIO_BLK_S_OK);
            assert_eq!(
                [bench.byte(DATA + shift), bench.byte(DATA + shift + 4095)],
                [8, 15]
            );
            bench.fill(DATA + shift, 8192, 0x77 + shift as u8);
            let data = [
                (DATA + shift, 4000, false),
                (DATA + shift + 4000, 4192, false),
            ];
            assert_eq!(
                bench.request(VIRTIO_BLK_T_OUT, 16, &data).0,
                VIRTIO_BLK_S_OK
            );
            let bytes = bench.disk_bytes(16 * 512, 8192);
            assert!(bytes.iter().all(|b| *b == 0x77 + shift as u8));
        }
        assert_eq!(bench.disk_bytes(32 * 512, 1), [32]);
        // More than is copied at once, and each byte in its place.
        let pattern: Vec<u8> = (0..0x3_0000_u32).map(|i| (i / 512 + i) as u8).collect();
        let at = GuestAddress(DATA + 3);
        bench.rig.ram.write_slice(&pattern, at).unwrap();
        let data = [(DATA + 3, 0x3_0000, false)];
        assert_eq!(
            bench.request(VIRTIO_BLK_T_OUT, 64, &data).0,
            VIRTIO_BLK_S_OK
        );
        assert_eq!(bench.disk_bytes(64 * 512, 0x3_0000), pattern);
        bench.fill(DATA, 0x3_0100, 0);
        let data = [(DATA + 5, 0x3_0000, true)];
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 64, &data).0, VIRTIO_BLK_S_OK);
        let mut read = vec![0; 0x3_0000];
        let at = GuestAddress(DATA + 5);
        bench.rig.ram.read_slice(&mut read, at).unwrap();
        assert_eq!(read, pattern);
    }
}

#[test]
fn requests_in_flight_finish_before_the_queues_leave() {
    for engine in ENGINES {
        let mut bench = Bench::simple(engine);
        for slot in 0..8 {
            // Flushes are never complete when io_uring takes them.
            bench.add(slot, VIRTIO_BLK_T_FLUSH, 0, &[]);
        }
        bench.rig.kick(&bench.vqs[0]);
        bench.rig.turn();
        bench.rig.core.pause();
        let queue = bench.rig.core.save().queues[0];
        assert_eq!((queue.next_avail, queue.next_used), (8, 8));
        assert_eq!(bench.vqs[0].used().len(), 8);
        for slot in 0..8 {
            assert_eq!(u32::from(bench.status(slot)), VIRTIO_BLK_S_OK);
        }
        bench.rig.core.resume();
        assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, VIRTIO_BLK_S_OK);
    }
}
