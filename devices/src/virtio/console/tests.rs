use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::core::Reg;
use super::super::driver::{Rig, Transport, Vq};
use super::super::uds::{Listener, SocketType};
use super::*;

const DATA: u64 = 0x2_0000;
const INPUT: u64 = 0x8_0000;
const CONTROL: u64 = 0xc_0000;

/// A console that reads endless zeros, and a named port that only writes.
pub fn options() -> ConsoleOptions {
    let null = || {
        Some(
            File::options()
                .write(true)
                .open("/dev/null")
                .unwrap()
                .into(),
        )
    };
    let zero = File::open("/dev/zero").unwrap().into();
    ConsoleOptions {
        ports: vec![
            PortOptions::console(PortEnd::fds(Some(zero), null()).unwrap()),
            PortOptions::named("agent", PortEnd::fds(None, null()).unwrap()),
        ],
        size: (80, 25),
        order: SizeOrder::default(),
    }
}

struct Bench {
    rig: Rig,
    vqs: Vec<Vq>,
    handle: ConsoleHandle,
    /// The driver has a buffer for control messages out.
    offered: bool,
}

impl Bench {
    fn new(ports: Vec<PortOptions>, features: Option<u64>) -> Self {
        let options = ConsoleOptions {
            ports,
            size: (132, 43),
            ..ConsoleOptions::default()
        };
        let (console, handle) = Console::new(options, ConsoleState::default()).unwrap();
        let rig = Rig::new(Transport::Mmio, Box::new(console));
        let vqs = rig.start(features);
        rig.run(0);
        Self {
            rig,
            vqs,
            handle,
            offered: false,
        }
    }

    /// All ports there, ready and open.
    fn opened(ports: Vec<PortOptions>) -> Self {
        let count = ports.len() as u32;
        let mut bench = Self::new(ports, None);
        bench.say(u32::MAX, DEVICE_READY, 1);
        for id in 0..count {
            bench.say(id, PORT_READY, 1);
            bench.say(id, PORT_OPEN, 1);
        }
        bench.messages();
        bench
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let words = [id, u32::from(event) | u32::from(value) << 16];
        let at = GuestAddress(CONTROL + 0x1000);
        self.rig.ram.write_obj(words, at).unwrap();
        self.vqs[CONTROL_TX].add(&[(at.0, 8, false)]);
        self.rig.kick(&self.vqs[CONTROL_TX]);
        self.rig.run(1);
        self.vqs[CONTROL_TX].used();
    }

    /// All control messages that wait.
    fn messages(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.message()).collect()
    }

    /// One buffer for control messages; what comes in it.
    fn message(&mut self) -> Option<Vec<u8>> {
        if !self.offered {
            self.vqs[CONTROL_RX].add(&[(CONTROL, 64, true)]);
        }
        self.offered = true;
        self.rig.kick(&self.vqs[CONTROL_RX]);
        self.rig.run(1);
        let used = self.vqs[CONTROL_RX].used();
        let len = *used.values().next()?;
        self.offered = false;
        let mut bytes = vec![0; len as usize];
        self.rig
            .ram
            .read_slice(&mut bytes, GuestAddress(CONTROL))
            .unwrap();
        Some(bytes)
    }

    /// Writes to a port from one place in RAM.
    fn write(&mut self, port: usize, bytes: &[u8]) {
        self.rig.ram.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let (half, vq) = (bytes.len() as u32 / 2, &mut self.vqs[queues(port).1]);
        let rest = bytes.len() as u32 - half;
        vq.add(&[(DATA, half, false), (DATA + u64::from(half), rest, false)]);
        self.rig.kick(vq);
        self.rig.turn();
    }

    /// Gives a port one buffer.
    fn offer(&mut self, port: usize, len: u32) {
        let vq = &mut self.vqs[queues(port).0];
        vq.add(&[(INPUT, len, true)]);
        self.rig.kick(vq);
        self.rig.run(1);
    }

    fn input(&mut self, port: usize) -> Option<Vec<u8>> {
        self.rig.run(1);
        let used = self.vqs[queues(port).0].used();
        let mut bytes = vec![0; *used.values().next()? as usize];
        self.rig
            .ram
            .read_slice(&mut bytes, GuestAddress(INPUT))
            .unwrap();
        Some(bytes)
    }
}

fn socket() -> (UnixStream, PortEnd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, PortEnd::stream(theirs.into()).unwrap())
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) % 251) as u8).collect()
}

#[test]
fn a_driver_is_told_of_ports_in_order() {
    let (_console, console) = socket();
    let ports = vec![
        PortOptions::console(console),
        PortOptions::named("x", PortEnd::closed()),
    ];
    let mut bench = Bench::new(ports, None);
    bench.say(u32::MAX, DEVICE_READY, 1);
    assert_eq!(bench.message().unwrap(), [0, 0, 0, 0, 1, 0, 1, 0]);
    assert_eq!(bench.message().unwrap(), [1, 0, 0, 0, 1, 0, 1, 0]);
    bench.say(0, PORT_READY, 1);
    assert_eq!(bench.message().unwrap(), [0, 0, 0, 0, 4, 0, 1, 0]);
    // 43 rows first.
    assert_eq!(
        bench.message().unwrap(),
        [0, 0, 0, 0, 5, 0, 1, 0, 43, 0, 132, 0]
    );
    assert_eq!(bench.message().unwrap(), [0, 0, 0, 0, 6, 0, 1, 0]);
    bench.say(1, PORT_READY, 1);
    assert_eq!(bench.message().unwrap(), [1, 0, 0, 0, 7, 0, 1, 0, b'x']);
    // Ports that are not there, and messages that are none.
    bench.say(7, PORT_READY, 1);
    bench.say(u32::MAX, PORT_OPEN, 1);
    bench.say(0, 77, 1);
    assert_eq!(bench.message(), None);
    bench.handle.resize(80, 24).unwrap();
    assert_eq!(bench.messages(), [[0, 0, 0, 0, 5, 0, 1, 0, 24, 0, 80, 0]]);
    // However often the driver asks, without taking the answers.
    for _ in 0..1000 {
        bench.say(u32::MAX, DEVICE_READY, 1);
        bench.say(1, PORT_READY, 1);
    }
    // One went into the buffer that was there; then both ports, and a name.
    assert_eq!(bench.messages().len(), 4);
}

#[test]
fn bytes_go_both_ways() {
    let (mut peer, end) = socket();
    let (host, pipe) = PortEnd::pipe(64).unwrap();
    let ports = vec![PortOptions::console(end), PortOptions::named("agent", pipe)];
    let mut bench = Bench::opened(ports);
    bench.write(0, b"hello, host");
    bench.write(1, b"hello, VMM");
    let mut bytes = [0; 11];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello, host");
    assert_eq!(host.readable().read().unwrap(), 1);
    assert_eq!(host.take().unwrap(), b"hello, VMM");

    peer.write_all(b"hello, guest").unwrap();
    bench.rig.run(1);
    bench.offer(0, 5);
    assert_eq!(bench.input(0).unwrap(), b"hello");
    bench.offer(0, 50);
    assert_eq!(bench.input(0).unwrap(), b", guest");
    assert_eq!(host.write(b"ping").unwrap(), 4);
    bench.offer(1, 50);
    assert_eq!(bench.input(1).unwrap(), b"ping");
    assert_eq!(host.write(&[7; 100]).unwrap(), 64);
    assert_eq!(host.write(&[7; 100]).unwrap(), 0);
    bench.offer(1, 50);
    assert_eq!(host.writable().read().unwrap(), 1);
    assert_eq!(host.write(&[7; 100]).unwrap(), 50);
}

#[test]
fn a_driver_without_multiport_has_one_port() {
    let (mut peer, end) = socket();
    let ports = vec![
        PortOptions::console(end),
        PortOptions::named("x", PortEnd::closed()),
    ];
    let mut bench = Bench::new(ports, Some(1 << 32 | 1 << F_SIZE));
    peer.write_all(b"in").unwrap();
    bench.offer(0, 8);
    assert_eq!(bench.input(0).unwrap(), b"in");
    bench.write(0, b"out");
    let mut bytes = [0; 3];
    peer.read_exact(&mut bytes).unwrap();
    let mut config = [0; 16];
    bench.rig.port.read_config(0, &mut config);
    assert_eq!(config, [132, 0, 43, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let generation = bench.rig.port.get(Reg::ConfigGeneration);
    bench.handle.resize(80, 24).unwrap();
    bench.rig.run(1);
    bench.rig.port.read_config(0, &mut config);
    assert_eq!(config[..4], [80, 0, 24, 0]);
    assert_ne!(bench.rig.port.get(Reg::ConfigGeneration), generation);
}

#[test]
fn a_flood_loses_nothing_and_a_slow_port_holds_up_no_other() {
    let (mut slow, end) = socket();
    let (mut fast, other) = socket();
    let mut port = PortOptions::named("slow", end);
    port.buffer = 4096;
    let mut bench = Bench::opened(vec![port, PortOptions::named("fast", other)]);
    // Until the slow port takes no more.
    let mut sent = Vec::new();
    for i in 0.. {
        let bytes = pattern(32 * 1024, i);
        bench.write(0, &bytes);
        sent.extend(bytes);
        if bench.vqs[1].used().is_empty() {
            break;
        }
        assert!(i < 100, "bytes are taken without end");
    }
    // More is not taken, and the other port goes on.
    bench.rig.run(1);
    assert!(bench.vqs[1].used().is_empty());
    for i in 0..20 {
        bench.write(1, &[i; 100]);
        assert_eq!(bench.vqs[5].used().len(), 1);
        fast.read_exact(&mut [0; 100]).unwrap();
    }
    // A restart of the device, with the chain half done, repeats and loses nothing.
    bench
        .rig
        .ram
        .write_slice(&sent[sent.len() - 32 * 1024..], GuestAddress(DATA))
        .unwrap();
    bench.rig.core.pause();
    bench.rig.core.resume();
    let mut got = vec![0; sent.len()];
    let mut at = 0;
    while at < got.len() {
        let end = got.len().min(at + 8192);
        slow.read_exact(&mut got[at..end]).unwrap();
        at = end;
        bench.rig.run(0);
    }
    assert!(got == sent);
    assert_eq!(bench.vqs[1].used().len(), 1);
    assert_eq!(bench.handle.lost(0), 0);
}

#[test]
fn a_console_gives_up_on_a_reader_that_stands_still() {
    let (peer, end) = socket();
    let mut port = PortOptions::console(end);
    port.patience = Some(Duration::from_millis(20));
    port.buffer = 1000;
    let mut bench = Bench::opened(vec![port]);
    let mut written = 0;
    for _ in 0..100 {
        bench.write(0, &[b'x'; 30_000]);
        written += 30_000;
        for _ in 0..100 {
            if !bench.vqs[1].used().is_empty() {
                break;
            }
            bench.rig.run(5);
        }
    }
    let lost = bench.handle.lost(0);
    assert!(lost > 1_000_000 && lost < written, "{lost} of {written}");
    // And goes on when it reads again: all that was not lost is there.
    peer.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let mut got = 0;
    let mut buffer = [0; 65536];
    let mut peer = peer;
    while let Ok(count) = peer.read(&mut buffer) {
        got += count as u64;
        bench.rig.run(0);
    }
    assert_eq!(got + lost, written);
    bench.write(0, b"again");
    assert_eq!(peer.read(&mut buffer).unwrap(), 5);
    assert_eq!(bench.handle.lost(0), lost);
}

#[test]
fn closed_ends_are_told_and_ports_come_and_go() {
    let (host, pipe) = PortEnd::pipe(64).unwrap();
    let mut bench = Bench::new(vec![PortOptions::named("agent", pipe)], None);
    bench.say(u32::MAX, DEVICE_READY, 1);
    bench.say(0, PORT_READY, 1);
    bench.say(0, PORT_OPEN, 1);
    let open = |value| vec![0, 0, 0, 0, 6, 0, value, 0];
    assert_eq!(bench.messages().last().unwrap(), &open(1));
    drop(host);
    assert_eq!(bench.messages(), [open(0)]);
    // The guest is not held up.
    bench.write(0, &[0; 1000]);
    assert_eq!(bench.vqs[1].used().len(), 1);
    let (mut peer, end) = socket();
    bench.handle.connect(0, end).unwrap();
    assert_eq!(bench.messages(), [open(1)]);
    bench.write(0, b"again");
    peer.read_exact(&mut [0; 5]).unwrap();
    // A socket's other side goes: once all is read, the port is closed.
    peer.write_all(b"last").unwrap();
    drop(peer);
    bench.offer(0, 10);
    assert_eq!(bench.input(0).unwrap(), b"last");
    bench.offer(0, 10);
    assert_eq!(bench.messages(), [open(0)]);
    let (mut peer, end) = socket();
    bench.handle.connect(0, end).unwrap();
    assert_eq!(bench.messages(), [open(1)]);
    bench.handle.remove(0).unwrap();
    assert_eq!(bench.messages(), [vec![0, 0, 0, 0, 2, 0, 1, 0]]);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    bench.say(0, PORT_READY, 1);
    assert!(bench.message().is_none());
    let (_peer, end) = socket();
    bench.handle.connect(0, end).unwrap();
    assert_eq!(bench.messages(), [vec![0, 0, 0, 0, 1, 0, 1, 0]]);
    assert!(bench.handle.remove(1).is_err());
}

#[test]
fn clients_of_a_socket_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Listener::bind(&path, SocketType::Stream).unwrap();
    let mut bench = Bench::opened(vec![PortOptions::named("p", PortEnd::clients(listener))]);
    let open = |value: u8| [0, 0, 0, 0, PORT_OPEN as u8, 0, value, 0].to_vec();
    let mut first = UnixStream::connect(&path).unwrap();
    first.write_all(b"first").unwrap();
    let second = UnixStream::connect(&path).unwrap();
    assert_eq!(bench.messages(), [open(1)]);
    bench.offer(0, 64);
    assert_eq!(bench.input(0).unwrap(), b"first");
    bench.write(0, b"to the first");
    let mut bytes = [0; 12];
    first.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the first");
    // Its half-close is none for the guest; when it is gone, the guest hears of that, and then of
    // the next.
    first.shutdown(std::net::Shutdown::Write).unwrap();
    bench.offer(0, 64);
    assert_eq!(bench.input(0), None);
    bench.write(0, b"still there?");
    first.read_exact(&mut bytes).unwrap();
    assert!(bench.messages().is_empty());
    drop(first);
    assert_eq!(bench.messages(), [open(0), open(1)]);
    bench.write(0, b"to the other");
    let mut second = second;
    second.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the other");
    drop(second);
    assert_eq!(bench.messages(), [open(0)]);
    drop(bench);
    assert!(!path.exists());
}

#[test]
fn input_waits_until_the_port_is_open() {
    let (mut peer, end) = socket();
    let mut bench = Bench::new(vec![PortOptions::named("agent", end)], None);
    peer.write_all(b"early").unwrap();
    bench.offer(0, 10);
    assert_eq!(bench.input(0), None);
    bench.say(0, PORT_OPEN, 1);
    assert_eq!(bench.input(0).unwrap(), b"early");
}

#[test]
fn files_and_the_rest_of_the_output_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    std::fs::write(&input, "typed").unwrap();
    let end = PortEnd::fds(
        Some(File::open(&input).unwrap().into()),
        Some(File::create(&output).unwrap().into()),
    );
    let mut bench = Bench::opened(vec![PortOptions::console(end.unwrap())]);
    bench.offer(0, 3);
    assert_eq!(bench.input(0).unwrap(), b"typ");
    bench.offer(0, 10);
    assert_eq!(bench.input(0).unwrap(), b"ed");
    bench.offer(0, 10);
    assert_eq!(bench.input(0), None);
    bench.write(0, b"printed");
    assert_eq!(std::fs::read(&output).unwrap(), b"printed");

    // Buffered output reaches a reader that is only slow.
    let (mut peer, end) = socket();
    let mut bench = Bench::opened(vec![PortOptions::console(end)]);
    let mut written = 0;
    while bench.vqs[1].used().len() == usize::from(written > 0) && written < 300_000 {
        bench.write(0, &[1; 50_000]);
        written += 50_000;
    }
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        let mut all = Vec::new();
        peer.read_to_end(&mut all).map(|_| all.len())
    });
    drop(bench);
    assert_eq!(reader.join().unwrap().unwrap(), written);
}

#[test]
fn shared_pipes_stay_blocking_for_others() {
    let (reader, writer) = std::io::pipe().unwrap();
    let end = PortEnd::fds(None, Some(writer.try_clone().unwrap().into())).unwrap();
    // SAFETY: no memory is involved.
    let flags = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&writer), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
    let mut bench = Bench::opened(vec![PortOptions::console(end)]);
    bench.write(0, b"piped");
    let mut bytes = [0; 5];
    { reader }.read_exact(&mut bytes).unwrap();
}

#[test]
fn options_are_checked() {
    let named = |name: &str| PortOptions::named(name, PortEnd::closed());
    let new = |ports| {
        let options = ConsoleOptions {
            ports,
            ..ConsoleOptions::default()
        };
        Console::new(options, ConsoleState::default()).map(drop)
    };
    assert!(matches!(new(vec![]), Err(ConsoleError::Ports { ports: 0 })));
    assert!(new((0..33).map(|_| named("")).collect()).is_err());
    for names in [["a", "a"], ["a/b", ""], ["..", ""], ["a b", ""], ["é", ""]] {
        assert!(new(names.map(named).into()).is_err(), "{names:?}");
    }
    new(vec![named("org.bulle.agent.0"), named(""), named("")]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is written and read in whatever pieces: the streams are the same.
    #[test]
    fn streams_are_kept(
        steps in prop::collection::vec((any::<bool>(), 1..5000_usize), 1..60),
        capacity in 1..9000_usize,
    ) {
        let (host, pipe) = PortEnd::pipe(capacity).unwrap();
        let mut bench = Bench::opened(vec![PortOptions::named("agent", pipe)]);
        let (mut sent, mut got): (Vec<u8>, Vec<u8>) = Default::default();
        let (mut typed, mut seen): (Vec<u8>, Vec<u8>) = Default::default();
        let mut busy = false;
        for (i, (out, len)) in steps.into_iter().enumerate() {
            if out {
                while busy {
                    got.extend(host.take().unwrap());
                    bench.rig.run(0);
                    busy = bench.vqs[1].used().is_empty();
                }
                let bytes = pattern(len, i);
                bench.write(0, &bytes);
                sent.extend(bytes);
                busy = bench.vqs[1].used().is_empty();
            } else {
                let bytes = pattern(len, i);
                let count = host.write(&bytes).unwrap();
                typed.extend(&bytes[..count]);
                bench.offer(0, len as u32);
                while let Some(bytes) = bench.input(0) {
                    seen.extend(bytes);
                    if seen.len() < typed.len() {
                        bench.offer(0, len as u32);
                    }
                }
            }
        }
        for _ in 0..10_000 {
            got.extend(host.take().unwrap());
            bench.rig.run(0);
            if got.len() == sent.len() {
                break;
            }
        }
        prop_assert!(got == sent);
        prop_assert!(seen == typed);
    }
}
