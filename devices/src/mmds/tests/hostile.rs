//! Guests that mean no good.

use std::thread::sleep;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;

use super::guest::{MAC, head, lines};
use super::*;
use crate::mmds::link::MAX_OUTGOING;

const GET: &str = "GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n";

/// A TCP segment of the guest in its frame.
pub fn segment(port: u16, control: TcpControl, ack: bool, payload: &[u8]) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: port,
        dst_port: 80,
        control,
        seq_number: TcpSeqNumber(7),
        ack_number: ack.then_some(TcpSeqNumber(9)),
        window_len: 1000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let (from, to) = (Ipv4Addr::new(169, 254, 3, 4), DEFAULT_ADDRESS);
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let checksums = ChecksumCapabilities::default();
    let mut frame = vec![0; 14 + ip.buffer_len() + tcp.buffer_len()];
    let mut ethernet = EthernetFrame::new_unchecked(frame.as_mut_slice());
    ethernet.set_src_addr(EthernetAddress(MAC));
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let mut packet = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    ip.emit(&mut packet, &checksums);
    let mut segment = TcpPacket::new_unchecked(packet.payload_mut());
    tcp.emit(&mut segment, &from.into(), &to.into(), &checksums);
    frame
}

#[test]
fn a_flood_of_beginnings_keeps_nobody_out() {
    let mut guest = served(Service::default());
    for port in 1..2000 {
        guest
            .stack
            .send(&segment(port, TcpControl::Syn, false, b""));
    }
    let waiting = std::iter::from_fn(|| guest.stack.receive()).count();
    assert!(waiting <= MAX_OUTGOING + MAX_CONNECTIONS, "{waiting}");
    assert_eq!(lines(&guest.ask(GET)).1, "ami-1");
}

#[test]
fn idle_connections_make_room_and_busy_ones_stay() {
    let begun = || {
        let begin = Instant::now();
        let mut guest = served(Service::default());
        let all: Vec<_> = (0..MAX_CONNECTIONS).map(|_| guest.connect()).collect();
        let open = all.iter().filter(|one| guest.is_open(**one)).count();
        let one_more = guest.connect();
        let kept = (open, guest.is_open(one_more));
        // Unless it took so long that some were idle.
        (begin.elapsed() < Duration::from_secs(1)).then_some((guest, all, kept))
    };
    let (mut guest, all, kept) = (0..20).find_map(|_| begun()).unwrap();
    assert_eq!(
        kept,
        (MAX_CONNECTIONS, false),
        "nobody has been idle for long"
    );
    sleep(Duration::from_millis(1100));
    for handle in &all[1..] {
        guest.say(*handle, GET.as_bytes());
    }
    assert_eq!(lines(&guest.ask(GET)).1, "ami-1");
    assert!(!guest.is_open(all[0]));
    assert!(all[1..].iter().all(|one| guest.is_open(*one)));
}

#[test]
fn a_request_without_end_ends_its_connection() {
    let mut guest = served(Service::default());
    let handle = guest.connect();
    guest.say(handle, &[b'G'; MAX_REQUEST - 1]);
    assert!(guest.is_open(handle));
    guest.say(handle, b"GG");
    assert!(!guest.is_open(handle));
    assert_eq!(lines(&guest.ask(GET)).1, "ami-1");
}

#[test]
fn answers_nobody_takes_wait_in_bounds_and_go_on_after_that() {
    let mut guest = served(Service::default());
    guest.mmds.put(json!({ "a": "x".repeat(50_000) })).unwrap();
    let request = b"GET /a HTTP/1.1\r\n\r\n";
    for port in 1..60 {
        guest
            .stack
            .send(&segment(port, TcpControl::Syn, false, b""));
        guest
            .stack
            .send(&segment(port, TcpControl::None, true, request));
    }
    assert!(guest.stack.is_waiting());
    let now = Instant::now();
    assert!(
        guest.stack.due().unwrap() >= now,
        "nothing is to be done at once"
    );
    guest.stack.reset();
    assert!(!guest.stack.is_waiting() && guest.stack.due().is_none());
    let answer = guest.ask("GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(lines(&answer).1.len(), 50_000);
}

#[test]
fn only_tcp_of_whole_packets_gets_through() {
    let good = segment(9, TcpControl::Syn, false, b"");
    let sent = |change: &dyn Fn(&mut Vec<u8>)| {
        // What is sent is sent again after a while.
        let mut guest = served(Service::default());
        let mut frame = good.clone();
        change(&mut frame);
        guest.stack.send(&frame);
        std::iter::from_fn(|| guest.stack.receive()).count()
    };
    assert_eq!(sent(&|_| {}), 1);
    // A fragment, UDP, another version, sources that are none, an Ethernet address of many.
    for (at, value) in [(20, 0x20), (23, 17), (14, 0x65), (26, 0), (26, 224), (6, 1)] {
        let change = |frame: &mut Vec<u8>| frame[at] = value;
        let zero = |frame: &mut Vec<u8>| frame[26..30].fill(value);
        assert_eq!(sent(if value == 0 { &zero } else { &change }), 0, "{at}");
    }
    for len in 0..good.len() {
        assert_eq!(sent(&|frame| frame.truncate(len)), 0, "{len}");
    }
    let padded = |frame: &mut Vec<u8>| {
        frame[35] += 1;
        frame.extend([0; 10]);
    };
    assert_eq!(sent(&padded), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever segments come in whatever order: no panic, answers in bounds, and the service goes on.
    #[test]
    fn any_segments_are_survived(
        parts in prop::collection::vec((any::<u8>(), any::<[u8; 20]>(), 0..200_usize), 1..60),
    ) {
        let mut guest = served(Service::default());
        for (how, bytes, len) in parts {
            let payload = [GET.as_bytes(), &vec![how; len]].concat();
            let mut frame = segment(how.into(), TcpControl::None, true, &payload);
            // All of the TCP header but the ports is the input's; the length of it now and then.
            let places = [38..46, 47..54].into_iter().flatten();
            for (at, byte) in places.zip(bytes) {
                frame[at] = byte;
            }
            frame[46] = if how & 3 == 0 { bytes[19] } else { 0x50 };
            if how & 4 == 0 {
                frame[38..42].copy_from_slice(&[0, 0, 0, 7 + (how >> 4)]);
            }
            prop_assert!(guest.stack.takes(&head(&frame)));
            guest.stack.send(&frame);
            if how & 8 == 0 {
                let mut count = 0;
                while let Some(frame) = guest.stack.receive() {
                    prop_assert!(frame.len() <= 1514);
                    count += 1;
                    prop_assert!(count < 1000, "it never ends");
                }
            }
            guest.stack.due();
        }
        guest.stack.reset();
        prop_assert_eq!(lines(&guest.ask(GET)).1, "ami-1");
    }
}
