//! Frames over a socket.

use super::*;

#[test]
fn frames_go_both_ways_on_both_transports() {
    for transport in TRANSPORTS {
        let (options, mut socket) = on_socket();
        let mut guest = Guest::on(transport, options, None);
        guest.offer(4, 2048);
        for len in [14, 60, 1514] {
            guest.send(BLANK, &frame(len));
            expect(&mut socket, &frame(len));
            assert_eq!(guest.vqs[1].used().len(), 1);
        }
        let sent = [60, 1514, 14];
        for len in sent {
            socket.write_all(&prefixed(&frame(len))).unwrap();
        }
        let got = guest.used();
        assert_eq!(got.len(), 3);
        for (len, mut bytes) in sent.into_iter().zip(got) {
            let body = bytes.split_off(12);
            assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            assert!(body == frame(len), "{len} bytes");
        }
        let [rx, tx] = guest.handle.traffic();
        assert_eq!((rx.frames, rx.bytes, rx.dropped), (3, 1588, 0));
        assert_eq!((tx.frames, tx.bytes, tx.dropped), (3, 1588, 0));
        assert!(guest.rig.irq.take() > 0);
    }
}

#[test]
fn a_long_frame_is_spread_over_buffers_that_come_together() {
    let (mut options, mut socket) = on_socket();
    options.mtu = Some(9000);
    let mut guest = Guest::new(options, None);
    guest.offer(15, 2000);
    let long = frame(9000);
    socket.write_all(&prefixed(&long)).unwrap();
    let got = guest.used();
    assert_eq!(got.len(), 5);
    assert_eq!(got[0][10..12], [5, 0]);
    let mut all: Vec<u8> = got.concat();
    assert!(all.split_off(12) == long);
    // Stopping gives back the buffers that were taken ahead, in their order.
    let queue = guest.rig.core.save().queues[0];
    assert_eq!((queue.next_avail, queue.next_used), (5, 5));
    socket.write_all(&prefixed(&frame(100))).unwrap();
    assert!(guest.used()[0][12..] == frame(100));
}

#[test]
fn a_frame_too_long_for_its_buffer_is_dropped_whole() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, Some(0));
    guest.offer(2, 1000);
    for len in [5000, 989, 60] {
        socket.write_all(&prefixed(&frame(len))).unwrap();
    }
    let got = guest.used();
    assert!(got.len() == 1 && got[0][12..] == frame(60));
    assert_eq!(guest.handle.traffic()[0].dropped, 2);
}

#[test]
fn without_buffers_the_host_is_not_waited_for() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, None);
    socket.write_all(&prefixed(&frame(60))).unwrap();
    // It is busy no longer than it takes to see that there are none; `run` fails otherwise.
    guest.rig.run(5);
    guest.offer(2, 2048);
    assert!(guest.used()[0][12..] == frame(60));
}

#[test]
fn a_peer_that_does_not_read_gets_everything_later() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, None);
    let mut sent = 0;
    // Until the socket is full: the frame stays with the driver.
    loop {
        guest.send(BLANK, &frame(60_000));
        if guest.vqs[1].used().is_empty() {
            break;
        }
        sent += 1;
        assert!(sent < 1000);
    }
    guest.rig.run(0);
    for _ in 0..=sent {
        // The device sends as there is room, so the test reads in pieces.
        let mut got = Vec::new();
        while got.len() < 60_004 {
            let mut piece = vec![0; 60_004 - got.len()];
            let count = socket.read(&mut piece).unwrap();
            got.extend_from_slice(&piece[..count]);
            guest.rig.run(0);
        }
        assert!(got == prefixed(&frame(60_000)));
    }
    assert_eq!(guest.vqs[1].used().len(), 1);
}

#[test]
fn a_frame_cut_by_a_pause_is_lost_and_the_next_is_not() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, None);
    guest.offer(4, 2048);
    let (cut, whole) = (prefixed(&frame(1000)), prefixed(&frame(500)));
    socket.write_all(&cut[..300]).unwrap();
    guest.rig.run(5);
    guest.rig.core.pause();
    socket.write_all(&cut[300..]).unwrap();
    socket.write_all(&whole).unwrap();
    guest.rig.core.resume();
    let got = guest.used();
    assert!(got.len() == 1 && got[0][12..] == frame(500));
}

#[test]
fn hostile_frames_are_dropped() {
    let (options, mut socket) = on_socket();
    let mut guest = Guest::new(options, None);
    // Too short, too long, with work that was not negotiated.
    guest.send(BLANK, &frame(13));
    let tso = [1, 1, 54, 0, 100, 5, 34, 0, 16, 0, 0, 0];
    guest.send(tso, &frame(100));
    let long = (TX_AT, 0x1_0013 + 12, false);
    guest.vqs[1].add(&[long]);
    guest.vqs[1].add(&[(TX_AT, 3, false)]);
    // One frame from thousands of tiny buffers.
    guest.rig.kick(&guest.vqs[1]);
    guest.rig.run(0);
    assert_eq!(guest.vqs[1].used().len(), 4);
    assert_eq!(guest.handle.traffic()[1].dropped, 4);
    guest.send(BLANK, &frame(60));
    expect(&mut socket, &frame(60));
    // Buffers without room for a header break the device, not the VMM.
    guest.offer(1, 11);
    assert!(guest.needs_reset());
}

#[test]
fn a_peer_that_speaks_another_protocol_takes_the_link_down() {
    for bytes in [[0xff; 4], [0; 4], 65554_u32.to_be_bytes()] {
        let (options, mut socket) = on_socket();
        let mut guest = Guest::new(options, None);
        guest.offer(2, 2048);
        socket.write_all(&bytes).unwrap();
        assert!(guest.used().is_empty());
        let mut status = [0xff; 2];
        guest.rig.port.read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
    }
}

#[test]
fn complaints_of_the_other_end_are_told_once_and_in_one_line() {
    use std::os::fd::OwnedFd;
    let with = |text: &str| {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(text.as_bytes()).unwrap();
        let read = OwnedFd::from(read);
        Stream::new(ours.into()).unwrap().with_complaints(read)
    };
    let mut stream = with("no route\n to\u{1b}[2J host\n");
    assert_eq!(stream.complaints().unwrap(), "no route; to?[2J host");
    assert_eq!(stream.complaints(), None);
    assert_eq!(with("").complaints(), None);
    let long = with(&"x".repeat(5000)).complaints().unwrap();
    assert_eq!(long.len(), 1024);
}

/// Says that an end was lost, and hands on who takes another.
#[derive(Debug)]
struct Told(std::sync::mpsc::Sender<Renewal>);

impl Keeper for Told {
    fn lost(&self, renewal: Renewal) {
        self.0.send(renewal).unwrap();
    }
}

#[test]
fn another_end_comes_in_place_of_one_that_is_gone() {
    let (told, lost) = std::sync::mpsc::channel();
    let (mut options, socket) = on_socket();
    options.keeper = Some(Box::new(Told(told)));
    let mut guest = Guest::new(options, None);
    // Amid a frame, or with no buffer for one: both are noticed.
    (&socket).write_all(&60_u32.to_be_bytes()).unwrap();
    let mut before = Some(socket);
    for round in 0..3_u32 {
        if round > 0 {
            guest.offer(4, 2048);
        }
        drop(before.take());
        guest.rig.run(50);
        assert_eq!(guest.handle.link_changes(), 2 * round + 1);
        let renewal = lost.try_recv().unwrap();
        assert!(lost.try_recv().is_err() && renewal.is_wanted());
        // What is sent meanwhile is lost, and its buffers come back.
        guest.send(BLANK, &frame(60));
        assert_eq!(guest.vqs[1].used().len(), 1);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        renewal.renew(Stream::new(ours.into()).unwrap()).unwrap();
        guest.rig.run(50);
        assert_eq!(guest.handle.link_changes(), 2 * round + 2);
        guest.send(BLANK, &frame(1514));
        expect(&mut theirs, &frame(1514));
        assert_eq!(guest.vqs[1].used().len(), 1);
        if round > 0 {
            theirs.write_all(&prefixed(&frame(100))).unwrap();
            assert!(guest.used()[0][12..] == frame(100));
        }
        assert!(!guest.needs_reset());
        before = Some(theirs);
    }
    drop(guest);
    drop(before);
    assert!(lost.try_recv().is_err());
}
