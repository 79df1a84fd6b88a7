//! What is refused, and what does not grow.

use super::*;
use crate::virtio::vsock::mux::Times;

#[test]
fn everything_is_bounded() {
    let mut options = options();
    options.max_connections = 20;
    let mut guest = Guest::new(options);
    let _listener = guest.listen(5);
    let mut answers = Vec::new();
    for port in 100..130 {
        guest.op(op::REQUEST, (5, port));
        answers.extend(guest.packets().iter().map(|(h, _)| h.op));
    }
    assert_eq!(answers.iter().filter(|op| **op == op::RESPONSE).count(), 20);
    assert_eq!(answers.iter().filter(|op| **op == op::RST).count(), 10);
    // Clients of the host wait until there is room.
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 9\n").unwrap();
    guest.nothing();
    guest.op(op::RST, (5, 100));
    assert_eq!(guest.packet().0.op, op::REQUEST);

    // A guest that comes and goes without taking the answers, and one that only makes noise.
    let vqs = guest.rig.start(None);
    guest.vqs = vqs;
    for i in 0..5000 {
        guest.op(op::REQUEST, (5, 200));
        guest.op(op::RST, (5, 200));
        guest.op(op::RW, (5, 1000 + i));
    }
    for slot in 0..15 {
        guest.offer(RX_BASE + SLOT * slot, SLOT as u32);
    }
    guest.rig.kick(&guest.vqs[RX]);
    assert_eq!(guest.packets().len(), 1024);
}

#[test]
fn options_are_checked() {
    for cid in [0, 1, 2, u32::MAX] {
        let options = VsockOptions { cid, ..options() };
        let result = made(options, VsockState::default());
        assert!(matches!(result, Err(VsockError::Cid { .. })));
    }
    let long = VsockOptions::new(CID, "/tmp/".to_owned() + &"x".repeat(92));
    let result = made(long, VsockState::default());
    assert!(matches!(
        result,
        Err(VsockError::Listen(ListenError::TooLong { max: 96, .. }))
    ));
    let first = options();
    let device = made(first.clone(), VsockState::default()).unwrap();
    let error = made(first.clone(), VsockState::default()).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(first.path.exists(), "the path belongs to the first");
    drop(device);
    assert!(!first.path.exists());
    let mut config = [0; 8];
    made(first, VsockState::default())
        .unwrap()
        .config()
        .read(0, &mut config);
    assert_eq!(config, [52, 0, 0, 0, 0, 0, 0, 0]);
}

/// The time of a device that has little.
const SHORT: Duration = Duration::from_secs(1);

/// A guest with such a device.
fn hurried() -> Guest {
    let options = options();
    let mut vsock = made(options.clone(), VsockState::default()).unwrap();
    vsock.mux.times = Times {
        handshake: SHORT,
        request: SHORT,
        close: SHORT,
        drain: SHORT,
        dial: SHORT,
        ..Times::default()
    };
    Guest::with(options.path, vsock)
}

fn ops(guest: &mut Guest) -> Vec<u16> {
    guest.packets().iter().map(|(h, _)| h.op).collect()
}

/// What comes when that time is over.
fn late(guest: &mut Guest) -> Vec<u16> {
    std::thread::sleep(SHORT + Duration::from_millis(100));
    ops(guest)
}

/// The first packets that come.
fn wait(guest: &mut Guest) -> Vec<u16> {
    let begin = Instant::now();
    loop {
        let ops = ops(guest);
        if !ops.is_empty() {
            return ops;
        }
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn nobody_waits_for_ever() {
    let mut guest = hurried();
    // A client that says nothing.
    let mut silent = UnixStream::connect(&guest.path).unwrap();
    guest.nothing();
    assert!(late(&mut guest).is_empty());
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    // A guest that does not answer.
    let mut client = UnixStream::connect(&guest.path).unwrap();
    client.write_all(b"CONNECT 4\n").unwrap();
    assert_eq!(guest.packet().0.op, op::REQUEST);
    assert_eq!(wait(&mut guest), [op::RST]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // One that does not agree to the end, nor to anything else.
    drop(guest.connect((10, 20)));
    assert_eq!(guest.packet().0.op, op::SHUTDOWN);
    guest.data((10, 20), b"late");
    guest.nothing();
    assert_eq!(wait(&mut guest), [op::RST]);
    // A host that does not read what the guest left.
    let mut stream = guest.connect((10, 20));
    for _ in 0..30 {
        guest.data((10, 20), &[7; 10_000]);
    }
    guest.packets();
    let flags = SHUTDOWN_BOTH;
    guest.send(
        Header {
            flags,
            ..Guest::header(op::SHUTDOWN, (10, 20))
        },
        &[],
    );
    // The guest hears of the end at once.
    assert_eq!(wait(&mut guest), [op::RST]);
    assert!(late(&mut guest).is_empty());
    let mut all = Vec::new();
    assert!(stream.read_to_end(&mut all).unwrap() < 300_000);
    // And an idle connection is nothing that ends.
    let _idle = guest.connect((10, 20));
    assert!(late(&mut guest).is_empty());
    guest.op(op::CREDIT_REQUEST, (10, 20));
    assert_eq!(guest.packet().0.op, op::CREDIT_UPDATE);
}

#[test]
fn a_listener_with_many_waiting_is_tried_again() {
    let mut guest = hurried();
    let listener = guest.listen(5);
    // SAFETY: no memory is involved.
    unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    for port in 1..4 {
        guest.op(op::REQUEST, (5, port));
    }
    let mut answers = Vec::new();
    answers.extend(guest.packets().iter().map(|(h, _)| h.op));
    assert_eq!(answers, [op::RESPONSE]);
    let _first = listener.accept().unwrap();
    answers.extend(wait(&mut guest));
    assert_eq!(answers, [op::RESPONSE, op::RESPONSE]);
    assert_eq!(wait(&mut guest), [op::RST]);
}

#[test]
fn what_passes_is_counted() {
    let options = options();
    let path = options.path.clone();
    let vsock = made(options, VsockState::default()).unwrap();
    let handle = vsock.handle();
    let mut guest = Guest::with(path, vsock);
    let (mut stream, ports) = guest.accept(9);
    stream.write_all(b"12345").unwrap();
    assert_eq!(guest.packet().1, b"12345");
    guest.data(ports, b"123");
    guest.op(op::RST, ports);
    let counted = handle.counters();
    let of = |name: &str| counted.iter().find(|(one, _)| *one == name).unwrap().1;
    assert_eq!((of("rx_packets_count"), of("rx_bytes_count")), (2, 5));
    assert_eq!((of("tx_packets_count"), of("tx_bytes_count")), (3, 3));
    assert_eq!((of("conns_added"), of("conns_removed")), (1, 1));
    assert_eq!(of("conns_killed"), 0);
}
