mod limits;
mod restored;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::driver::{Rig, Transport, Vq};
use super::packet::*;
use super::*;

pub const CID: u32 = 52;
const GUEST_ALLOC: u32 = 64 << 10;
const EVENTS: u64 = 0x7000;
const TX_BASE: u64 = 0x8000;
const RX_BASE: u64 = super::super::driver::RAM[1];
const SLOT: u64 = 0x1_0000;

fn temporary_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("bulle-vsock-{}-{next}", std::process::id());
    std::env::temp_dir().join(name)
}

/// A device on a path of its own.
pub fn options() -> VsockOptions {
    VsockOptions::new(CID, temporary_path())
}

/// A device, listening.
fn made(options: VsockOptions, state: VsockState) -> Result<Vsock, VsockError> {
    Vsock::new(VsockEnd::bind(options)?, state)
}

/// A guest: a driver that keeps buffers out, and makes what packets the test wants.
struct Guest {
    rig: Rig,
    vqs: Vec<Vq>,
    path: PathBuf,
    /// Buffer of each chain that is out.
    slots: std::collections::BTreeMap<u32, u64>,
    tx: u64,
}

impl Guest {
    fn new(options: VsockOptions) -> Self {
        Self::restored(options, VsockState::default())
    }

    fn restored(options: VsockOptions, state: VsockState) -> Self {
        Self::with(options.path.clone(), made(options, state).unwrap())
    }

    fn with(path: PathBuf, vsock: Vsock) -> Self {
        let rig = Rig::new(Transport::Mmio, Box::new(vsock));
        let vqs = rig.start(None);
        let mut guest = Self {
            rig,
            vqs,
            path,
            slots: Default::default(),
            tx: 0,
        };
        guest.rig.run(0);
        for slot in 0..15 {
            guest.offer(RX_BASE + SLOT * slot, SLOT as u32);
        }
        guest
    }

    fn offer(&mut self, at: u64, len: u32) {
        let head = self.vqs[RX].add(&[(at, len, true)]);
        self.slots.insert(head.into(), at);
    }

    fn header(op: u16, ports: (u32, u32)) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.1,
            dst_port: ports.0,
            kind: 1,
            op,
            buf_alloc: GUEST_ALLOC,
            ..Header::default()
        }
    }

    /// Sends a packet, the header and the payload in a descriptor each.
    fn send(&mut self, header: Header, payload: &[u8]) {
        let at = TX_BASE + (self.tx % 8) * 0x1_1000;
        self.tx += 1;
        let ram = &self.rig.ram;
        ram.write_slice(&header.bytes(), GuestAddress(at)).unwrap();
        ram.write_slice(payload, GuestAddress(at + 64)).unwrap();
        let data = (at + 64, payload.len() as u32, false);
        self.vqs[TX]
            .add(&[(at, HEADER as u32, false), data][..1 + usize::from(!payload.is_empty())]);
        self.rig.kick(&self.vqs[TX]);
        self.rig.turn();
        assert_eq!(
            self.vqs[TX].used().len(),
            1,
            "the device holds a packet back"
        );
    }

    fn op(&mut self, op: u16, ports: (u32, u32)) {
        self.send(Self::header(op, ports), &[]);
    }

    fn data(&mut self, ports: (u32, u32), payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..Self::header(op::RW, ports)
        };
        self.send(header, payload);
    }

    /// Packets that came, oldest first.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.rig.run(1);
        let mut packets = Vec::new();
        loop {
            let used = self.vqs[RX].used();
            if used.is_empty() {
                return packets;
            }
            // Chains are used in the order they were offered, which starts anywhere in the ring.
            let first = self.next_head(&used);
            let order = (first..16).chain(0..first);
            for (head, len) in order.filter_map(|h| used.get_key_value(&h)) {
                let at = self.slots[head];
                let mut bytes = vec![0; *len as usize];
                self.rig
                    .ram
                    .read_slice(&mut bytes, GuestAddress(at))
                    .unwrap();
                let payload = bytes.split_off(HEADER as usize);
                packets.push((Header::parse(bytes.try_into().unwrap()), payload));
                self.offer(at, SLOT as u32);
            }
            self.rig.kick(&self.vqs[RX]);
            self.rig.run(0);
        }
    }

    /// The oldest of the used heads: with 15 of 16 out, behind the one that is not used.
    fn next_head(&self, used: &std::collections::BTreeMap<u32, u32>) -> u32 {
        let gap = (0..16).find(|h| !used.contains_key(h) && used.contains_key(&((h + 1) % 16)));
        gap.map_or(0, |h| (h + 1) % 16)
    }

    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn nothing(&mut self) {
        assert_eq!(self.packets(), []);
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }

    /// A connection that the guest makes.
    fn connect(&mut self, ports: (u32, u32)) -> UnixStream {
        let listener = self.listen(ports.0);
        self.op(op::REQUEST, ports);
        assert_eq!(self.packet().0.op, op::RESPONSE);
        std::fs::remove_file(format!("{}_{}", self.path.display(), ports.0)).unwrap();
        let stream = listener.accept().unwrap().0;
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }

    /// A connection that the host makes, to the guest's port.
    fn accept(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let (request, _) = self.packet();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
        assert_eq!((request.src_cid, request.dst_cid), (2, CID.into()));
        let ports = (request.src_port, port);
        self.op(op::RESPONSE, ports);
        let ok = format!("OK {}\n", ports.0);
        let mut line = vec![0; ok.len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, ok.as_bytes());
        (stream, ports)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        assert!(self.path.exists());
    }
}

#[test]
fn the_host_connects() {
    let mut guest = Guest::new(options());
    let (mut stream, ports) = guest.accept(1234);
    stream.write_all(b"hello, guest").unwrap();
    let (header, data) = guest.packet();
    assert_eq!((header.op, header.len), (op::RW, 12));
    assert_eq!(data, b"hello, guest");
    guest.data(ports, b"hello, host");
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello, host");
    // Half a line, and data right behind it.
    let mut other = UnixStream::connect(&guest.path).unwrap();
    other.write_all(b"conn").unwrap();
    guest.nothing();
    other.write_all(b"ect 7\nearly").unwrap();
    let (request, _) = guest.packet();
    assert_ne!(request.src_port, ports.0);
    guest.op(op::RESPONSE, (request.src_port, 7));
    assert_eq!(guest.packet().1, b"early");
}

#[test]
fn clients_that_do_not_know_the_protocol_are_sent_away() {
    let mut guest = Guest::new(options());
    for line in [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 1 2\n",
        "GET / HTTP/1.1\n",
        "\n",
    ] {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        guest.nothing();
        assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "{line:?}");
    }
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(&[b'x'; 64]).unwrap();
    guest.nothing();
    assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)));
    // A port where the guest does not listen.
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    let (request, _) = guest.packet();
    guest.op(op::RST, (request.src_port, 5));
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    guest.nothing();
}

#[test]
fn the_guest_connects() {
    let mut guest = Guest::new(options());
    let mut stream = guest.connect((1024, 99));
    guest.data((1024, 99), b"abc");
    let mut bytes = [0; 3];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abc");
    // Nobody listens there.
    guest.op(op::REQUEST, (1025, 99));
    let (reset, _) = guest.packet();
    assert_eq!(
        (reset.op, reset.src_port, reset.dst_port),
        (op::RST, 1025, 99)
    );
    // A listener of the other kind.
    let _listener = guest.listen(1026);
    let header = Header {
        kind: 2,
        ..Guest::header(op::REQUEST, (1026, 99))
    };
    guest.send(header, &[]);
    assert_eq!(guest.packet().0.op, op::RST);
}

#[test]
fn broken_packets_are_refused_or_dropped() {
    let mut guest = Guest::new(options());
    let ports = (1, 2);
    let header = |op| Guest::header(op, ports);
    let wrong = [
        Header {
            dst_cid: 9,
            ..header(op::REQUEST)
        },
        Header {
            kind: 3,
            ..header(op::REQUEST)
        },
        Header {
            dst_port: u32::MAX,
            ..header(op::REQUEST)
        },
        header(op::RW),
        header(op::RESPONSE),
        header(op::SHUTDOWN),
        header(op::CREDIT_REQUEST),
        header(0),
        header(77),
    ];
    for header in wrong {
        guest.send(header, &[]);
        let (answer, _) = guest.packet();
        assert_eq!(answer, header.reset());
    }
    let dropped = [
        header(op::RST),
        Header {
            src_cid: 9,
            ..header(op::REQUEST)
        },
        // Longer than the buffers, and than any packet.
        Header {
            len: 100,
            ..header(op::RW)
        },
        Header {
            len: u32::MAX,
            ..header(op::RW)
        },
    ];
    for header in dropped {
        guest.send(header, b"short");
        guest.nothing();
    }
    // On a connection: unknown operations, a second request, data after its end.
    for op in [op::REQUEST, op::RESPONSE, 0, 99] {
        let mut stream = guest.connect(ports);
        guest.op(op, ports);
        assert_eq!(guest.packet().0.op, op::RST);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let _stream = guest.connect(ports);
    guest.send(
        Header {
            flags: 2,
            ..header(op::SHUTDOWN)
        },
        &[],
    );
    guest.data(ports, b"late");
    assert_eq!(guest.packet().0.op, op::RST);
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut guest = Guest::new(options());
    let ports = (10, 20);
    let shutdown = |flags| Header {
        flags,
        ..Guest::header(op::SHUTDOWN, ports)
    };
    // The guest first, then the host.
    let mut stream = guest.connect(ports);
    guest.data(ports, b"last");
    guest.send(shutdown(SHUTDOWN_SEND), &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.packet().1, b"answer");
    drop(stream);
    let (header, _) = guest.packet();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
    guest.send(shutdown(SHUTDOWN_BOTH), &[]);
    assert_eq!(guest.packet().0.op, op::RST);
    // The host first.
    let mut stream = guest.connect(ports);
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.packets();
    assert_eq!(packets[0].1, b"question");
    assert_eq!(
        (packets[1].0.op, packets[1].0.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND)
    );
    guest.data(ports, b"answer");
    guest.send(shutdown(SHUTDOWN_BOTH), &[]);
    assert_eq!(guest.packet().0.op, op::RST);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"answer");
    // The guest reads no more.
    let mut stream = guest.connect(ports);
    guest.send(shutdown(SHUTDOWN_RECEIVE), &[]);
    assert!(stream.write_all(b"x").is_err());
    guest.data(ports, b"still");
    stream.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_guest_that_closes_has_its_data_read() {
    let mut guest = Guest::new(options());
    let ports = (10, 20);
    let mut stream = guest.connect(ports);
    // More than the host's socket holds.
    let sent = 300_000;
    for _ in 0..30 {
        guest.data(ports, &[7; 10_000]);
        assert!(guest.packets().iter().all(|(h, _)| h.op != op::RST));
    }
    let header = Header {
        flags: 3,
        ..Guest::header(op::SHUTDOWN, ports)
    };
    guest.send(header, &[]);
    assert_eq!(guest.packet().0.op, op::RST);
    // The port pair is not free yet.
    guest.op(op::REQUEST, ports);
    assert_eq!(guest.packet().0.op, op::RST);
    stream.set_nonblocking(true).unwrap();
    let mut got = 0;
    let mut buffer = [0; 20_000];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(_) => guest.rig.run(1),
        }
    }
    assert_eq!(got, sent);
    let _again = guest.connect(ports);
}

#[test]
fn credit_is_kept_in_both_directions() {
    let mut guest = Guest::new(options());
    let ports = (10, 20);
    let mut stream = guest.connect(ports);
    // The host floods: no more than the guest granted comes.
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[1; 10_000]).is_ok() {
        guest.rig.run(0);
    }
    let packets = guest.packets();
    let total: u32 = packets.iter().map(|(h, _)| h.len).sum();
    assert_eq!(total, GUEST_ALLOC);
    assert_eq!(packets.last().unwrap().0.op, op::CREDIT_REQUEST);
    guest.nothing();
    // A lie about what it read gets it nothing more; an update with nothing new as well.
    for fwd_cnt in [GUEST_ALLOC + 1, u32::MAX, 0] {
        guest.send(
            Header {
                fwd_cnt,
                ..Guest::header(op::CREDIT_UPDATE, ports)
            },
            &[],
        );
        guest.nothing();
    }
    guest.send(
        Header {
            fwd_cnt: 100,
            ..Guest::header(op::CREDIT_UPDATE, ports)
        },
        &[],
    );
    assert_eq!(guest.packets()[0].0.len, 100);

    // The guest floods: the host's socket fills, then what was granted, then it is thrown out.
    let _stream = guest.connect((11, 20));
    let mut sent = 0_u32;
    let reset = loop {
        guest.data((11, 20), &[2; 32 << 10]);
        sent += 32 << 10;
        let packets = guest.packets();
        if let Some((header, _)) = packets.iter().find(|(h, _)| h.op == op::RST) {
            break *header;
        }
        for (header, _) in packets.iter().filter(|(h, _)| h.src_port == 11) {
            assert!(sent.wrapping_sub(header.fwd_cnt) <= header.buf_alloc);
        }
        assert!(sent < 4 << 20);
    };
    assert_eq!((reset.src_port, reset.dst_port), (11, 20));
    assert!(sent > 256 << 10);
    // CREDIT_REQUEST is answered.
    let _stream = guest.connect((12, 20));
    guest.op(op::CREDIT_REQUEST, (12, 20));
    let (header, _) = guest.packet();
    assert_eq!(
        (header.op, header.buf_alloc, header.fwd_cnt),
        (op::CREDIT_UPDATE, 256 << 10, 0)
    );
}
