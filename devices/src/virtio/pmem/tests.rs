use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use super::*;
use crate::virtio::core::{NEEDS_RESET, Reg};
use crate::virtio::driver::{Rig, TRANSPORTS, Transport, Vq};
use crate::virtio::limiter::{BucketConfig, LimiterConfig};
use vm_memory::{Bytes, GuestAddress};

const DATA: u64 = 0x8000;
const ADDRESS: u64 = 0x1_4000_0000;

/// A mapped file of `len` bytes that is gone from its directory.
pub fn options(len: u64, read_only: bool) -> PmemOptions {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem");
    File::create(&path).unwrap().set_len(len).unwrap();
    let options = PmemOptions::open(&path, read_only).unwrap();
    PmemOptions {
        address: ADDRESS,
        ..options
    }
}

/// The mapping as the guest has it.
fn bytes(mapping: &Mapping) -> *mut u8 {
    mapping.address() as *mut u8
}

fn read(mapping: &Mapping, at: u64) -> u8 {
    assert!(at < mapping.len());
    // SAFETY: within the mapping, whose pages the test keeps behind it.
    unsafe { bytes(mapping).add(at as usize).read_volatile() }
}

fn write(mapping: &Mapping, at: u64, byte: u8) {
    assert!(at < mapping.len() && !mapping.read_only());
    // SAFETY: as above, and writable.
    unsafe { bytes(mapping).add(at as usize).write_volatile(byte) }
}

fn request(rig: &Rig, vq: &mut Vq, kind: u32) -> u32 {
    rig.ram.write_obj(kind, GuestAddress(DATA)).unwrap();
    rig.ram.write_obj(9_u32, GuestAddress(DATA + 8)).unwrap();
    let head = vq.add(&[(DATA, 4, false), (DATA + 8, 4, true)]);
    rig.kick(vq);
    rig.run(0);
    assert_eq!(vq.used().get(&head.into()), Some(&4));
    rig.ram.read_obj(GuestAddress(DATA + 8)).unwrap()
}

#[test]
fn the_file_is_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem");
    fs::write(&path, vec![7; 3 << 20]).unwrap();
    let options = PmemOptions::open(&path, false).unwrap();
    let mapping = Arc::clone(&options.mapping);
    assert_eq!((mapping.len(), mapping.address() % ALIGN), (4 << 20, 0));
    assert_eq!((read(&mapping, 0), read(&mapping, (3 << 20) - 1)), (7, 7));
    // Behind the end there is memory, which the file does not get.
    assert_eq!(read(&mapping, 3 << 20), 0);
    write(&mapping, (4 << 20) - 1, 1);
    write(&mapping, 5, 9);
    let rig = Rig::new(
        Transport::Mmio,
        Box::new(Pmem::new(options, PmemState::default()).unwrap().0),
    );
    let mut vqs = rig.start(None);
    assert_eq!(request(&rig, &mut vqs[0], FLUSH), OK);
    assert_eq!(request(&rig, &mut vqs[0], 1), FAILED);
    let content = fs::read(&path).unwrap();
    assert_eq!((content.len(), content[5]), (3 << 20, 9));
}

#[test]
fn the_guest_finds_it() {
    for transport in TRANSPORTS {
        let pmem = Pmem::new(options(1, true), PmemState::default()).unwrap().0;
        let rig = Rig::new(transport, Box::new(pmem));
        let mut data = [0; 16];
        rig.port.read_config(0, &mut data);
        let expected = [ADDRESS.to_le_bytes(), ALIGN.to_le_bytes()].concat();
        assert_eq!(data.as_slice(), expected);
    }
}

#[test]
fn requests_without_room_for_an_answer_stop_the_device() {
    for buffers in [
        vec![(DATA, 3, false), (DATA + 8, 4, true)],
        vec![(DATA, 4, false), (DATA + 8, 3, true)],
        vec![(DATA, 4, false)],
    ] {
        let pmem = Pmem::new(options(1, false), PmemState::default())
            .unwrap()
            .0;
        let rig = Rig::new(Transport::Mmio, Box::new(pmem));
        let mut vqs = rig.start(None);
        vqs[0].add(&buffers);
        rig.kick(&vqs[0]);
        rig.run(0);
        assert_ne!(rig.port.get(Reg::Status) & u32::from(NEEDS_RESET), 0);
    }
}

#[test]
fn a_file_that_becomes_shorter_reads_zeros_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem");
    fs::write(&path, vec![7; 2 << 20]).unwrap();
    let options = PmemOptions::open(&path, false).unwrap();
    let mapping = Arc::clone(&options.mapping);
    let (mut one, mut other) = (0, 0);
    assert!(!mapping.repair(&mut one).unwrap());
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(5000).unwrap();
    // Two who met it: both go on, and then there is nothing more.
    assert!(mapping.repair(&mut one).unwrap() && mapping.repair(&mut other).unwrap());
    assert!(!mapping.repair(&mut one).unwrap() && !mapping.repair(&mut other).unwrap());
    assert_eq!(read(&mapping, 4999), 7);
    assert_eq!((read(&mapping, 5000), read(&mapping, 1 << 20)), (0, 0));
    write(&mapping, 1 << 20, 3);
    // What was written is not all kept, and the guest is told so.
    let rig = Rig::new(
        Transport::Mmio,
        Box::new(Pmem::new(options, PmemState::default()).unwrap().0),
    );
    let mut vqs = rig.start(None);
    assert_eq!(request(&rig, &mut vqs[0], FLUSH), FAILED);
    assert_eq!(fs::metadata(&path).unwrap().len(), 5000);
}

#[test]
fn a_flush_of_a_shorter_file_fails_before_anyone_meets_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem");
    fs::write(&path, vec![7; 2 << 20]).unwrap();
    let options = PmemOptions::open(&path, false).unwrap();
    let rig = Rig::new(
        Transport::Mmio,
        Box::new(Pmem::new(options, PmemState::default()).unwrap().0),
    );
    let mut vqs = rig.start(None);
    assert_eq!(request(&rig, &mut vqs[0], FLUSH), OK);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    assert_eq!(request(&rig, &mut vqs[0], FLUSH), FAILED);
}

#[test]
fn files_that_cannot_be_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem");
    let open = |read_only| PmemOptions::open(&path, read_only);
    assert!(matches!(open(true), Err(PmemError::Host { .. })));
    File::create(&path).unwrap();
    assert!(matches!(open(true), Err(PmemError::Size { size: 0, .. })));
    assert!(matches!(
        PmemOptions::open(dir.path(), true),
        Err(PmemError::Kind { .. })
    ));
    fs::write(&path, "x").unwrap();
    // One writer, or readers.
    let reader = open(true).unwrap();
    assert!(matches!(open(false), Err(PmemError::Held { .. })));
    drop(open(true).unwrap());
    drop(reader);
    let writer = open(false).unwrap();
    assert!(matches!(open(true), Err(PmemError::Held { .. })));
    drop(writer);
    let file = File::open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [b'x']);
}

#[test]
fn flushes_wait_for_their_limits_and_for_new_ones() {
    let limits = LimiterConfig {
        ops: Some(BucketConfig {
            size: 1,
            refill_time: 3_600_000,
            one_time_burst: 0,
        }),
        bandwidth: None,
    };
    let options = PmemOptions {
        limiter: Some(Arc::new(Limiter::new(limits))),
        ..options(1, false)
    };
    let (pmem, handle) = Pmem::new(options, PmemState::default()).unwrap();
    let rig = Rig::new(Transport::Mmio, Box::new(pmem));
    let mut vqs = rig.start(None);
    assert_eq!(request(&rig, &mut vqs[0], FLUSH), OK);
    assert_eq!(
        request(&rig, &mut vqs[0], FLUSH),
        OK,
        "the debt comes after it"
    );
    rig.ram.write_obj(FLUSH, GuestAddress(DATA)).unwrap();
    vqs[0].add(&[(DATA, 4, false), (DATA + 8, 4, true)]);
    rig.kick(&vqs[0]);
    rig.run(20);
    assert!(vqs[0].used().is_empty());
    let throttled = ("rate_limiter_throttled_events", 1);
    assert_eq!(handle.counters()[1], throttled);
    let pace = handle.pace().unwrap();
    pace.limiter().set(LimiterConfig::default());
    pace.limits_changed().unwrap();
    rig.run(20);
    assert_eq!(vqs[0].used().len(), 1);
}
