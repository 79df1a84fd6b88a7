mod announce;
mod detour;
mod limits;
mod stream;
mod tap;
mod vhost;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::header::Header;
use super::*;
use crate::virtio::core::{CORE_FEATURES, NEEDS_RESET, Reg};
use crate::virtio::driver::{RAM, Rig, TRANSPORTS, Transport, Vq};

pub const MAC: Mac = [2, 0, 0, 0, 0, 9];
/// Where the guest's buffers are.
const TX_AT: u64 = 0x2_0000;
const RX_AT: u64 = RAM[1];

/// A device on one end of a socket, whose other end is given as well.
pub fn on_socket() -> (NetOptions, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    (
        with_backend(NetBackend::stream(ours.into()).unwrap()),
        theirs,
    )
}

pub fn with_backend(backend: NetBackend) -> NetOptions {
    NetOptions {
        backend,
        mac: Some(MAC),
        mtu: None,
        rx_limiter: None,
        tx_limiter: None,
        detour: None,
        vhost: None,
        keeper: None,
    }
}

/// A driver of one pair of queues.
struct Guest {
    rig: Rig,
    vqs: Vec<Vq>,
    handle: NetHandle,
    slots: std::collections::BTreeMap<u32, (u64, u32)>,
}

impl Guest {
    fn new(options: NetOptions, features: Option<u64>) -> Self {
        Self::on(Transport::Mmio, options, features)
    }

    fn on(transport: Transport, options: NetOptions, features: Option<u64>) -> Self {
        let (net, handle) = Net::new(options, NetState::default()).unwrap();
        let rig = Rig::new(transport, Box::new(net));
        let features = features.map(|bits| bits | CORE_FEATURES);
        let vqs = rig.start(features);
        let guest = Self {
            rig,
            vqs,
            handle,
            slots: Default::default(),
        };
        guest.rig.run(0);
        guest
    }

    /// Offers `count` receive buffers of `len` bytes.
    fn offer(&mut self, count: u64, len: u32) {
        for _ in 0..count {
            let at = RX_AT + 0x1_0000 * self.slots.len() as u64 % 0xe_0000;
            let head = self.vqs[0].add(&[(at, len, true)]);
            self.slots.insert(head.into(), (at, len));
        }
        self.rig.kick(&self.vqs[0]);
        self.rig.run(0);
    }

    /// Sends a frame behind `header`.
    fn send(&mut self, header: Header, frame: &[u8]) {
        let ram = &self.rig.ram;
        ram.write_slice(&header, GuestAddress(TX_AT)).unwrap();
        ram.write_slice(frame, GuestAddress(TX_AT + 64)).unwrap();
        // In pieces, as drivers do.
        let half = frame.len() as u32 / 2;
        self.vqs[1].add(&[
            (TX_AT, HEADER as u32, false),
            (TX_AT + 64, half, false),
            (
                TX_AT + 64 + u64::from(half),
                frame.len() as u32 - half,
                false,
            ),
        ]);
        self.rig.kick(&self.vqs[1]);
        self.rig.run(0);
    }

    /// The used receive buffers, in the order of use, each with its bytes.
    fn used(&mut self) -> Vec<Vec<u8>> {
        self.rig.run(5);
        let used = self.vqs[0].used();
        // Heads are given out in ascending order within a turn of the ring.
        let bytes = used.iter().map(|(head, len)| {
            let (at, _) = self.slots[head];
            let mut bytes = vec![0; *len as usize];
            self.rig
                .ram
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            bytes
        });
        bytes.collect()
    }

    fn needs_reset(&self) -> bool {
        self.rig.port.get(Reg::Status) as u8 & NEEDS_RESET != 0
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + len) as u8).collect()
}

fn prefixed(frame: &[u8]) -> Vec<u8> {
    let mut all = (frame.len() as u32).to_be_bytes().to_vec();
    all.extend(frame);
    all
}

fn expect(socket: &mut UnixStream, frame: &[u8]) {
    let mut got = vec![0; frame.len() + 4];
    socket.read_exact(&mut got).unwrap();
    assert!(got == prefixed(frame), "another frame");
}

const BLANK: Header = [0; HEADER as usize];

#[test]
fn the_driver_sees_address_and_link() {
    for transport in TRANSPORTS {
        let (mut options, socket) = on_socket();
        options.mtu = Some(9000);
        let guest = Guest::on(transport, options, None);
        let mut space = [0; 12];
        guest.rig.port.read_config(0, &mut space);
        assert_eq!(space[..6], MAC);
        assert_eq!(space[6..], [1, 0, 1, 0, 0x28, 0x23]);
        let generation = guest.rig.port.get(Reg::ConfigGeneration);
        drop(socket);
        let mut guest = guest;
        guest.offer(15, 2048);
        guest.rig.run(5);
        guest.rig.port.read_config(6, &mut space[..2]);
        assert_eq!(space[..2], [0, 0], "the link is down");
        assert_ne!(guest.rig.port.get(Reg::ConfigGeneration), generation);
        // It is not waited for any more, and frames go nowhere.
        guest.send(BLANK, &frame(60));
        assert_eq!(guest.vqs[1].used().len(), 1);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn features_follow_the_backend() {
    let (options, _socket) = on_socket();
    let (net, _) = Net::new(options, NetState::default()).unwrap();
    let has = |bit: u32| net.traits().features >> bit & 1 != 0;
    assert!(has(VIRTIO_NET_F_MRG_RXBUF) && has(VIRTIO_NET_F_MAC) && has(VIRTIO_NET_F_STATUS));
    assert!(!has(VIRTIO_NET_F_CSUM) && !has(VIRTIO_NET_F_GUEST_CSUM) && !has(VIRTIO_NET_F_MTU));
    assert_eq!(net.traits().queues, [256, 256]);
}

#[test]
fn a_saved_state_fits_the_queues() {
    for pairs in [0, 2, u16::MAX] {
        let (options, _socket) = on_socket();
        let error = Net::new(
            options,
            NetState {
                pairs,
                ..NetState::default()
            },
        )
        .unwrap_err();
        assert!(matches!(error, NetError::Pairs { .. }), "{error}");
    }
}

#[test]
fn frames_from_another_address_are_counted_and_pass() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, None);
    let value = |guest: &Guest, wanted: &str| {
        let values = guest.handle.counters();
        values.iter().find(|(name, _)| *name == wanted).unwrap().1
    };
    let mut own = frame(60);
    own[6..12].copy_from_slice(&MAC);
    for (frame, spoofed) in [(&own, 0), (&frame(60), 1), (&own, 1)] {
        guest.send(BLANK, frame);
        expect(&mut socket, frame);
        assert_eq!(value(&guest, "tx_spoofed_mac_count"), spoofed);
    }
    let [sum, least, most] =
        ["sum", "min", "max"].map(|of| value(&guest, &format!("tap_write_agg.{of}_us")));
    assert!(least <= most && most <= sum, "{least}, {most}, {sum}");
}

#[test]
fn frames_that_wait_behind_others_are_counted() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, None);
    let ram = &guest.rig.ram;
    ram.write_slice(&[7; 72], GuestAddress(TX_AT)).unwrap();
    ram.write_slice(&BLANK, GuestAddress(TX_AT)).unwrap();
    for _ in 0..4 {
        guest.vqs[1].add(&[(TX_AT, 72, false)]);
    }
    guest.rig.kick(&guest.vqs[1]);
    guest.rig.run(0);
    for _ in 0..4 {
        expect(&mut socket, &[7; 60]);
    }
    let values = guest.handle.counters();
    let count = values
        .iter()
        .find(|(name, _)| *name == "tx_remaining_reqs_count");
    assert_eq!(count.unwrap().1, 3 + 2 + 1);
}

fn clean_with(bits: &[u32], header: &Header) -> Option<Header> {
    clean(header, |bit| bits.contains(&bit))
}

#[test]
fn headers_are_cleaned() {
    let csum = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 7, 7];
    assert_eq!(clean_with(&[], &csum), Some(BLANK));
    let bits = [VIRTIO_NET_F_CSUM];
    let wanted = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    assert_eq!(clean_with(&bits, &csum), Some(wanted));
    let tso = |kind: u8, flags: u8, size: u8| [flags, kind, 54, 0, size, 5, 34, 0, 16, 0, 9, 9];
    let all = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_F_HOST_USO,
    ];
    for kind in [1, 3, 4, 5] {
        assert_eq!(clean_with(&bits, &tso(kind, 1, 1)), None, "not negotiated");
        let cleaned = clean_with(&all, &tso(kind, 0xff, 1)).unwrap();
        assert_eq!(cleaned, [1, kind, 54, 0, 1, 5, 34, 0, 16, 0, 0, 0]);
        assert_eq!(clean_with(&all, &tso(kind, 0, 1)), None, "no checksum");
        assert_eq!(clean_with(&all, &tso(kind | 0x80, 1, 1)), None, "no ECN");
    }
    let mut zero = tso(1, 1, 0);
    zero[5] = 0;
    assert_eq!(clean_with(&all, &zero), None, "segments of no bytes");
    for kind in [2, 6, 0x7f, 0xff, 0x80] {
        assert_eq!(clean_with(&all, &tso(kind, 1, 1)), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the peer sends in whatever pieces: no panic, and what the device gives the guest
    /// is what was framed.
    #[test]
    fn any_stream_is_survived(
        frames in prop::collection::vec(prop_oneof![8 => 14..3000_usize, 1 => 0..14_usize], 1..8),
        piece in 3..700_usize,
        mergeable: bool,
    ) {
        let (mut options, mut socket) = on_socket();
        options.mtu = Some(3000);
        let merge = if mergeable { 1 << VIRTIO_NET_F_MRG_RXBUF } else { 0 };
        let mut guest = Guest::new(options, Some(merge));
        guest.offer(15, 1600);
        let bytes: Vec<u8> = frames.iter().flat_map(|len| prefixed(&frame(*len))).collect();
        // Until the device reads no more, for want of buffers or because of what it read.
        socket.set_nonblocking(true).unwrap();
        for piece in bytes.chunks(piece) {
            if socket.write_all(piece).is_err() {
                break;
            }
            guest.rig.turn();
        }
        let good = frames.iter().take_while(|len| **len >= 14);
        let fitting: Vec<usize> = good.copied().filter(|len| mergeable || *len <= 1588).collect();
        let buffers = |len: usize| if mergeable { (len + 12).div_ceil(1600) } else { 1 };
        let mut used = guest.used().into_iter();
        let mut room = 15;
        for len in fitting {
            // A frame is received when the longest one would fit.
            if room < 1 + usize::from(mergeable) { break; }
            let count = buffers(len);
            if count > room { break; }
            room -= count;
            let mut all = Vec::new();
            for _ in 0..count {
                all.extend(used.next().expect("a used buffer"));
            }
            prop_assert_eq!(all[10], count as u8);
            prop_assert_eq!(all.split_off(12), frame(len));
        }
        prop_assert!(!guest.needs_reset());
    }
}
