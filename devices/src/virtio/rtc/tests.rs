use std::time::{SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::core::Reg;
use super::super::driver::{Rig, TRANSPORTS, Transport, Vq};
use super::*;

const REQUEST: u64 = 0x1_0000;
const RESPONSE: u64 = 0x2_0000;
const OFFSET: u64 = 1 << 40;

/// A counter that only goes on.
fn ticks() -> u64 {
    static TICKS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1000);
    TICKS.fetch_add(10, std::sync::atomic::Ordering::SeqCst)
}

/// With the counter of x86.
pub fn options() -> RtcOptions {
    RtcOptions {
        leap_seconds: LeapSeconds::Unknown,
        counter: Some(Counter { id: 1, read: ticks }),
    }
}

struct Bench {
    rig: Rig,
    vq: Vq,
    handle: RtcHandle,
}

impl Bench {
    fn new(transport: Transport, options: RtcOptions) -> Self {
        let (rtc, handle) = Rtc::new(options, RtcState::default());
        let rig = Rig::new(transport, Box::new(rtc));
        let vq = rig.start(None).remove(0);
        Self { rig, vq, handle }
    }

    /// What `request` is answered in a buffer of `room` bytes, as far as it was written.
    fn ask(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        let ram = self.rig.ram.clone();
        ram.write_slice(request, GuestAddress(REQUEST)).unwrap();
        ram.write_slice(&[0xee; 64], GuestAddress(RESPONSE))
            .unwrap();
        let len = request.len() as u32;
        let mut bufs = vec![(REQUEST, len, false), (RESPONSE, room, true)];
        bufs.retain(|(_, len, _)| *len > 0);
        let head = self.vq.add(&bufs);
        self.rig.kick(&self.vq);
        self.rig.run(10);
        let written = self.vq.used()[&head.into()];
        let mut bytes = [0; 64];
        ram.read_slice(&mut bytes, GuestAddress(RESPONSE)).unwrap();
        let (answer, rest) = bytes.split_at(written as usize);
        assert!(rest.iter().all(|byte| *byte == 0xee));
        answer.to_vec()
    }
}

fn request(kind: u16, clock: u16, counter: u8) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..10].copy_from_slice(&clock.to_le_bytes());
    bytes[10] = counter;
    bytes
}

fn word(answer: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(answer[at..at + 8].try_into().unwrap())
}

fn failed(status: u8) -> Vec<u8> {
    vec![status, 0, 0, 0, 0, 0, 0, 0]
}

#[test]
fn clocks_say_what_they_are() {
    for (leap_seconds, kind, smearing) in [
        (LeapSeconds::Step, 0, 0),
        (LeapSeconds::Smeared, 3, 0),
        (LeapSeconds::NoonLinear, 3, 1),
        (LeapSeconds::UtcSls, 3, 2),
        (LeapSeconds::Unknown, 4, 0),
    ] {
        let options = RtcOptions {
            leap_seconds,
            ..options()
        };
        let mut bench = Bench::new(Transport::Mmio, options);
        let traits = bench.rig.core.traits();
        assert_eq!((traits.id, traits.features & 0xff_ffff), (17, 0));
        let cfg = bench.ask(&request(0x1000, 0, 0)[..8], 16);
        assert_eq!((word(&cfg, 0), word(&cfg, 8)), (0, 2));
        let utc = bench.ask(&request(0x1001, 0, 0), 16);
        assert_eq!(utc[8..], [kind, smearing, 0, 0, 0, 0, 0, 0]);
        let monotonic = bench.ask(&request(0x1001, 1, 0), 64);
        assert_eq!(monotonic[8..], [2, 0, 0, 0, 0, 0, 0, 0]);
        for kind in [0x1001, 0x1002, 1, 2] {
            assert_eq!(bench.ask(&request(kind, 2, 0), 24), failed(3));
            assert_eq!(bench.ask(&request(kind, u16::MAX, 0), 24), failed(3));
        }
    }
}

#[test]
fn clocks_are_read() {
    for transport in TRANSPORTS {
        let mut bench = Bench::new(transport, options());
        let now = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .as_nanos() as u64
        };
        let before = now();
        let utc = bench.ask(&request(1, 0, 0), 16);
        assert_eq!((utc.len(), word(&utc, 0)), (16, 0));
        assert!((before..=now()).contains(&word(&utc, 8)));
        let mut last = 0;
        for _ in 0..10 {
            let monotonic = word(&bench.ask(&request(1, 1, 0), 16), 8);
            assert!(monotonic > last);
            last = monotonic;
        }
        assert!(host(libc::CLOCK_MONOTONIC).unwrap() >= last);
    }
}

#[test]
fn clocks_are_read_with_the_guests_counter() {
    let mut bench = Bench::new(Transport::Pci, options());
    // Not before it is known how far the guest's is from the host's.
    let cap = request(0x1002, 0, 1);
    assert_eq!(word(&bench.ask(&cap, 16), 8), 0);
    assert_eq!(bench.ask(&request(2, 0, 1), 24), failed(2));
    bench.handle.set_counter_offset(0);
    bench.handle.set_counter_offset(OFFSET);
    for clock in [0, 1] {
        assert_eq!(word(&bench.ask(&request(0x1002, clock, 1), 16), 8), 1);
        let before = ticks() + OFFSET;
        let first = bench.ask(&request(2, clock, 1), 24);
        let second = bench.ask(&request(2, clock, 1), 24);
        let after = ticks() + OFFSET;
        let cycles = [word(&first, 16), word(&second, 16)];
        assert!(before < cycles[0] && cycles[0] < cycles[1] && cycles[1] < after);
        assert!(word(&first, 8) <= word(&second, 8));
        // Arm's is known, but not here; others are not known, and one is nobody's.
        assert_eq!(word(&bench.ask(&request(0x1002, clock, 0), 16), 8), 0);
        assert_eq!(bench.ask(&request(2, clock, 0), 24), failed(2));
        for kind in [0x1002, 2] {
            assert_eq!(bench.ask(&request(kind, clock, 2), 24), failed(2));
            assert_eq!(bench.ask(&request(kind, clock, 0xf0), 24), failed(2));
            assert_eq!(bench.ask(&request(kind, clock, 0xff), 24), failed(4));
        }
    }
}

#[test]
fn requests_that_are_none_are_told_so() {
    let mut bench = Bench::new(Transport::Mmio, options());
    for kind in [0, 3, 0x0fff, 0x1003, 0x1004, 0x1005, 0x2000, 0xffff] {
        assert_eq!(bench.ask(&request(kind, 0, 0), 64), failed(2));
    }
    // Requests and responses that are cut short.
    assert_eq!(bench.ask(&[], 64), failed(4));
    assert_eq!(bench.ask(&request(1, 0, 0)[..7], 64), failed(4));
    assert_eq!(bench.ask(&request(1, 0, 0)[..15], 64), failed(4));
    assert_eq!(bench.ask(&request(0x1000, 0, 0)[..8], 15), failed(4));
    assert_eq!(bench.ask(&request(2, 0, 1), 23), failed(4));
    assert_eq!(bench.ask(&request(1, 0, 0), 3), [4, 0, 0]);
    assert_eq!(bench.ask(&request(1, 0, 0), 1), [4]);
    assert!(bench.ask(&request(1, 0, 0), 0).is_empty());
    // What is reserved is zero; what is behind a request is nothing.
    for at in [2, 7, 10, 11, 15] {
        let mut bytes = request(1, 0, 0);
        bytes[at] = 1;
        assert_eq!(bench.ask(&bytes, 16), failed(4));
    }
    let mut long = request(1, 0, 0);
    long.extend([0xff; 40]);
    assert_eq!(bench.ask(&long, 64).len(), 16);
    assert_eq!(bench.rig.port.get(Reg::Status) & 0x40, 0);
}

#[test]
fn monotonic_time_does_not_go_back_on_another_host() {
    let far = host(libc::CLOCK_MONOTONIC).unwrap() + (1 << 50);
    for (saved, least) in [(far, far), (5, 5)] {
        let state = RtcState { monotonic: saved };
        let (mut rtc, _) = Rtc::new(options(), state);
        assert_eq!(rtc.save(), DeviceState::Rtc(state));
        let first = rtc.read(MONOTONIC).unwrap();
        assert!(first >= least && rtc.read(MONOTONIC).unwrap() >= first);
        rtc.reset();
        assert_eq!(rtc.save(), DeviceState::Rtc(RtcState::default()));
        assert!(rtc.read(MONOTONIC).unwrap() >= first);
    }
    let (mut rtc, _) = Rtc::new(
        options(),
        RtcState {
            monotonic: u64::MAX,
        },
    );
    assert_eq!(rtc.read(MONOTONIC), Ok(u64::MAX));
}

proptest! {
    /// Any bytes are answered as the specification says: with a status, and never with more than
    /// there is room for.
    #[test]
    fn any_request_has_one_answer(
        bytes in prop::collection::vec(any::<u8>(), 0..=16),
        kind in prop::sample::select(vec![1u16, 2, 0x1000, 0x1001, 0x1002]),
        room in 0u64..40,
    ) {
        let mut bytes = bytes;
        for (to, from) in bytes.iter_mut().zip(kind.to_le_bytes()) {
            *to = from;
        }
        let (mut rtc, handle) = Rtc::new(options(), RtcState::default());
        handle.set_counter_offset(7);
        match Request::parse(&bytes, room).and_then(|request| rtc.answer(request)) {
            Ok(response) => prop_assert!(response.bytes().len() as u64 <= room),
            Err(failure) => prop_assert!((2..=5).contains(&failure.bytes()[0])),
        }
    }
}
