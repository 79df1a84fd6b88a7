//! Frames that a service in front of the host's end takes and answers.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::*;

/// What the log says of a reset, with which a driver begins.
const RESET: usize = usize::MAX;

/// Answers frames that begin with 0xaa twice, the second time a moment later.
#[derive(Debug, Default)]
struct Echo {
    ready: VecDeque<Vec<u8>>,
    later: Option<(Instant, Vec<u8>)>,
    delay: Duration,
    log: Arc<Mutex<Vec<usize>>>,
}

impl Detour for Echo {
    fn takes(&self, start: &[u8; DETOUR_HEAD]) -> bool {
        start[0] == 0xaa
    }

    fn send(&mut self, frame: &[u8]) {
        self.log.lock().unwrap().push(frame.len());
        self.ready.push_back([&[0xbb], &frame[1..]].concat());
        let at = Instant::now() + self.delay;
        self.later = Some((at, [&[0xcc], &frame[1..]].concat()));
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let due = self.later.take_if(|(at, _)| *at <= Instant::now());
        self.ready.extend(due.map(|(_, frame)| frame));
        self.ready.pop_front()
    }

    fn is_waiting(&self) -> bool {
        !self.ready.is_empty()
    }

    fn due(&mut self) -> Option<Instant> {
        self.later.as_ref().map(|(at, _)| *at)
    }

    fn reset(&mut self) {
        self.log.lock().unwrap().push(RESET);
    }
}

fn with_echo() -> (NetOptions, UnixStream, Arc<Mutex<Vec<usize>>>) {
    with_late_echo(Duration::from_millis(300))
}

/// Of its two answers to each frame one comes after this.
fn with_late_echo(delay: Duration) -> (NetOptions, UnixStream, Arc<Mutex<Vec<usize>>>) {
    let (mut options, socket) = on_socket();
    let echo = Echo {
        delay,
        ..Echo::default()
    };
    let log = echo.log.clone();
    options.detour = Some(Box::new(echo));
    (options, socket, log)
}

fn detoured(len: usize) -> Vec<u8> {
    let mut all = frame(len);
    all[0] = 0xaa;
    all
}

fn answer(first: u8, len: usize) -> Vec<u8> {
    let mut all = frame(len);
    all[0] = first;
    all
}

/// Used buffers without their headers, which are checked.
fn frames(guest: &mut Guest) -> Vec<Vec<u8>> {
    let used = guest.used().into_iter().map(|mut bytes| {
        assert_eq!(bytes[..10], [0; 10]);
        assert_eq!(bytes[10..12], [1, 0]);
        bytes.split_off(12)
    });
    used.collect()
}

#[test]
fn a_detour_takes_and_answers_its_frames() {
    for transport in TRANSPORTS {
        let (options, mut socket, log) = with_echo();
        let mut guest = Guest::on(transport, options, None);
        guest.offer(8, 2048);
        guest.send(BLANK, &detoured(60));
        guest.send(BLANK, &frame(70));
        expect(&mut socket, &frame(70));
        let mut got = frames(&mut guest);
        assert_eq!(got[0], answer(0xbb, 60));
        socket.write_all(&prefixed(&frame(80))).unwrap();
        // What is due later comes without a kick, in its time.
        let begin = Instant::now();
        got.extend(frames(&mut guest));
        while got.len() < 3 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            guest.rig.run(1000);
            got.extend(frames(&mut guest));
        }
        got.sort();
        let mut expected = [answer(0xbb, 60), frame(80), answer(0xcc, 60)];
        expected.sort();
        assert_eq!(got, expected);
        let [rx, tx] = guest.handle.traffic();
        assert_eq!((rx.frames, rx.bytes, tx.frames, tx.bytes), (3, 200, 2, 130));
        // Nothing of it has gone to the host.
        socket.set_nonblocking(true).unwrap();
        assert!(socket.read(&mut [0]).is_err());
        assert_eq!(*log.lock().unwrap(), [RESET, 60]);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn answers_wait_for_buffers_and_for_the_frame_before_them() {
    let (options, mut socket, _) = with_echo();
    let mut guest = Guest::new(options, None);
    guest.send(BLANK, &detoured(60));
    assert!(frames(&mut guest).is_empty());
    guest.offer(8, 2048);
    assert_eq!(frames(&mut guest)[0], answer(0xbb, 60));
    guest.rig.run(1000);
    frames(&mut guest);
    let bytes = prefixed(&frame(500));
    socket.write_all(&bytes[..300]).unwrap();
    guest.rig.run(5);
    guest.send(BLANK, &detoured(61));
    assert!(
        frames(&mut guest).is_empty(),
        "half a frame is in the buffers"
    );
    socket.write_all(&bytes[300..]).unwrap();
    let got = frames(&mut guest);
    assert_eq!(got[..2], [frame(500), answer(0xbb, 61)]);
}

#[test]
fn frames_too_long_for_it_or_for_the_buffers_are_lost() {
    let (options, _socket, log) = with_late_echo(Duration::from_secs(3600));
    let mut guest = Guest::new(options, Some(0));
    guest.offer(8, 100);
    guest.send(BLANK, &detoured(89));
    guest.send(BLANK, &detoured(20_000));
    guest.send(BLANK, &detoured(88));
    assert_eq!(frames(&mut guest), [answer(0xbb, 88)]);
    let [rx, tx] = guest.handle.traffic();
    assert_eq!((rx.dropped, tx.dropped), (1, 1));
    assert_eq!(*log.lock().unwrap(), [RESET, 89, 88]);
    guest.rig.port.set(Reg::Status, 0);
    assert_eq!(
        log.lock().unwrap().last(),
        Some(&usize::MAX),
        "a reset is told"
    );
}
