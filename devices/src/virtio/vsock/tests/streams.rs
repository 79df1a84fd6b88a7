//! Connections with data, of which nothing may be lost.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::*;
use crate::virtio::core::{NEEDS_RESET, Reg};
use crate::virtio::iovecs::send as send_message;
use crate::virtio::uds::{Listener, dial};
use crate::virtio::vsock::host::recv;

/// A guest's socket as a kernel has it: credit in both directions.
#[derive(Default)]
struct Socket {
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,
    received: u32,
    /// What came, and what is still to go.
    input: Vec<u8>,
    output: Vec<u8>,
    messages: Vec<Vec<u8>>,
    seed: usize,
}

impl Socket {
    fn header(&self, op: u16, ports: (u32, u32)) -> Header {
        Header {
            fwd_cnt: self.received,
            ..Guest::header(op, ports)
        }
    }

    fn take(&mut self, header: &Header, data: &[u8]) {
        self.peer_alloc = header.buf_alloc;
        self.peer_fwd = header.fwd_cnt;
        self.input.extend(data);
        self.received += data.len() as u32;
        if header.flags & END_OF_MESSAGE != 0 && header.op == op::RW {
            self.messages.push(std::mem::take(&mut self.input));
        }
    }

    fn credit(&self) -> usize {
        (self.peer_alloc - self.sent.wrapping_sub(self.peer_fwd)) as usize
    }

    /// The next piece of output that fits.
    fn next(&mut self, most: usize) -> Vec<u8> {
        let len = self.credit().min(most).min(self.output.len());
        self.sent += len as u32;
        self.output.drain(..len).collect()
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + seed) % 253) as u8).collect()
}

const LEN: usize = 40_000;

/// The host's side; every seventh reads little at a time.
fn echo(i: usize, mut stream: UnixStream) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; if i.is_multiple_of(7) { 333 } else { 20_000 }];
        let mut total = 0;
        while total < LEN {
            let count = stream.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "connection {i} ended after {total} bytes");
            stream.write_all(&buffer[..count]).unwrap();
            total += count;
        }
        assert_eq!(stream.read(&mut buffer).unwrap(), 0);
    })
}

/// Hundreds of echoing connections at once, half made by each side, some of them slow.
#[test]
fn hundreds_of_streams_keep_their_bytes() {
    const COUNT: u32 = 300;
    let mut guest = Guest::new(options());
    let listener = guest.listen(80);
    let mut sockets: BTreeMap<(u32, u32), Socket> = BTreeMap::new();
    let mut clients = Vec::new();
    for i in 0..COUNT / 2 {
        let (stream, ports) = guest.accept(5000 + i);
        clients.push((stream, ports));
        let ports = (80, 10_000 + i);
        guest.op(op::REQUEST, ports);
        let (response, _) = guest.packet();
        clients.push((listener.accept().unwrap().0, ports));
        sockets.entry(ports).or_default().take(&response, &[]);
    }
    for (i, (_, ports)) in clients.iter().enumerate() {
        let socket = sockets.entry(*ports).or_default();
        socket.peer_alloc = 16 << 10;
        socket.seed = i;
        socket.output = pattern(LEN, i);
    }
    let mut order: Vec<_> = clients.iter().map(|(_, ports)| *ports).collect();
    let threads = clients.into_iter().enumerate();
    let threads: Vec<_> = threads.map(|(i, (stream, _))| echo(i, stream)).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut resets = 0;
    while !order.is_empty() {
        assert!(
            Instant::now() < deadline,
            "{} connections are not done",
            order.len()
        );
        for ports in &order {
            let socket = sockets.get_mut(ports).unwrap();
            let piece = socket.next(9000);
            if !piece.is_empty() {
                let len = piece.len() as u32;
                let header = Header {
                    len,
                    ..socket.header(op::RW, *ports)
                };
                guest.send(header, &piece);
            }
        }
        for (header, data) in guest.packets() {
            let ports = (header.src_port, header.dst_port);
            let socket = sockets.get_mut(&ports).unwrap();
            if header.op == op::RST {
                assert_eq!(socket.input.len(), LEN, "{ports:?} was reset");
                resets += 1;
                continue;
            }
            socket.take(&header, &data);
            if header.op != op::CREDIT_UPDATE {
                guest.send(sockets[&ports].header(op::CREDIT_UPDATE, ports), &[]);
            }
        }
        order.retain(|ports| {
            let done = sockets[ports].input.len() == LEN;
            if done {
                let header = Header {
                    flags: 3,
                    ..Guest::header(op::SHUTDOWN, *ports)
                };
                guest.send(header, &[]);
            }
            !done
        });
    }
    for thread in threads {
        thread.join().unwrap();
    }
    resets += guest.packets().len();
    assert_eq!(resets, COUNT as usize, "each is ended once");
    for socket in sockets.values() {
        assert!(socket.input == pattern(LEN, socket.seed));
    }
    assert_eq!(sockets.len(), COUNT as usize);
}

fn seqpacket(guest: &mut Guest, ports: (u32, u32)) -> OwnedFd {
    let path = PathBuf::from(format!("{}_{}", guest.path.display(), ports.0));
    let listener = Listener::bind(&path, SocketType::Seqpacket).unwrap();
    let header = Header {
        kind: 2,
        ..Guest::header(op::REQUEST, ports)
    };
    guest.send(header, &[]);
    let (response, _) = guest.packet();
    assert_eq!((response.op, response.kind), (op::RESPONSE, 2));
    listener.accept().unwrap()
}

fn packet(ports: (u32, u32), len: usize, flags: u32) -> Header {
    Header {
        kind: 2,
        len: len as u32,
        flags,
        ..Guest::header(op::RW, ports)
    }
}

#[test]
fn messages_keep_their_boundaries() {
    let mut guest = Guest::new(options());
    let ports = (10, 20);
    let host = seqpacket(&mut guest, ports);
    let mut buffer = vec![0; 300 << 10];
    // One message of several packets, and several of one; nothing comes of an empty one.
    guest.send(packet(ports, 3, 0), b"one");
    assert!(recv(&host, &mut buffer, 0).is_err());
    guest.send(packet(ports, 4, END_OF_MESSAGE | 2), b" two");
    guest.send(packet(ports, 5, END_OF_MESSAGE), b"three");
    guest.send(packet(ports, 0, END_OF_MESSAGE), b"");
    guest.send(packet(ports, 4, END_OF_MESSAGE), b"four");
    for message in ["one two", "three", "four"] {
        let count = recv(&host, &mut buffer, 0).unwrap();
        assert_eq!(&buffer[..count], message.as_bytes());
    }
    assert!(recv(&host, &mut buffer, 0).is_err());
    guest.packets();
    // As long as was granted, and credit for it all comes back.
    let long = pattern(200 << 10, 1);
    for (i, piece) in long.chunks(50 << 10).enumerate() {
        guest.send(packet(ports, piece.len(), u32::from(i == 3)), piece);
    }
    let count = recv(&host, &mut buffer, 0).unwrap();
    assert!(buffer[..count] == long);
    let (update, _) = guest.packets().pop().unwrap();
    assert_eq!(
        (update.op, update.fwd_cnt),
        (op::CREDIT_UPDATE, 16 + (200 << 10))
    );

    // The other way: a message that needs several packets, and short ones, in order.
    let messages = [pattern(60_000, 2), vec![1], pattern(5_000, 3)];
    let mut socket = Socket::default();
    use std::os::fd::AsFd;
    for message in &messages {
        send_message(host.as_fd(), message).unwrap();
    }
    for _ in 0..10 {
        for (header, data) in guest.packets() {
            socket.take(&header, &data);
            let update = Header {
                kind: 2,
                ..socket.header(op::CREDIT_UPDATE, ports)
            };
            guest.send(update, &[]);
        }
    }
    assert!(socket.messages == messages);
    // One that the guest never has room for.
    send_message(host.as_fd(), &pattern(GUEST_ALLOC as usize + 1, 0)).unwrap();
    assert_eq!(guest.packets().pop().unwrap().0.op, op::RST);
}

#[test]
fn the_host_connects_with_messages() {
    let mut guest = Guest::new(options());
    let path = PathBuf::from(format!("{}.seqpacket", guest.path.display()));
    let host = dial(&path, SocketType::Seqpacket).unwrap();
    use std::os::fd::AsFd;
    send_message(host.as_fd(), b"CONNECT 77\n").unwrap();
    let (request, _) = guest.packet();
    assert_eq!(
        (request.op, request.kind, request.dst_port),
        (op::REQUEST, 2, 77)
    );
    let ports = (request.src_port, 77);
    guest.send(
        Header {
            kind: 2,
            ..Guest::header(op::RESPONSE, ports)
        },
        &[],
    );
    let mut buffer = [0; 64];
    let count = recv(&host, &mut buffer, 0).unwrap();
    assert_eq!(&buffer[..count], format!("OK {}\n", ports.0).as_bytes());
    guest.send(packet(ports, 2, END_OF_MESSAGE), b"hi");
    assert_eq!(recv(&host, &mut buffer, 0).unwrap(), 2);
}

#[test]
fn a_flood_of_tiny_messages_is_cut_off() {
    let mut guest = Guest::new(options());
    let ports = (10, 20);
    let _host = seqpacket(&mut guest, ports);
    let mut sent = 0;
    while !guest.packets().iter().any(|(h, _)| h.op == op::RST) {
        for _ in 0..500 {
            guest.send(packet(ports, 1, END_OF_MESSAGE), b"x");
        }
        sent += 500;
        assert!(sent < 100_000, "messages are kept without end");
    }
    assert!(sent > 10_000);
}

fn any_header() -> impl Strategy<Value = Header> {
    let port = || prop_oneof![4 => 10..13_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)];
    let cid = prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()];
    let word = || prop_oneof![4 => 0..4_u32, 2 => Just(GUEST_ALLOC), 1 => any::<u32>()];
    let len = prop_oneof![2 => Just(0), 4 => 0..2000_u32, 1 => any::<u32>()];
    let op = prop_oneof![8 => 0..9_u16, 1 => any::<u16>()];
    let kind = prop_oneof![8 => 1..3_u16, 1 => any::<u16>()];
    let numbers = (cid, port(), port(), len, kind, op, word(), word(), word());
    numbers.prop_map(
        |(dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt)| Header {
            src_cid: CID.into(),
            dst_cid,
            src_port,
            dst_port,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever a guest sends while hosts talk: it stays alive, within limits, and still works.
    #[test]
    fn any_packets_are_survived(headers in prop::collection::vec(any_header(), 1..200)) {
        let mut options = options();
        options.max_connections = 8;
        let mut guest = Guest::new(options);
        let stream = guest.listen(10);
        stream.set_nonblocking(true).unwrap();
        let path = PathBuf::from(format!("{}_11", guest.path.display()));
        let messages = Listener::bind(&path, SocketType::Seqpacket).unwrap();
        let mut hosts: Vec<OwnedFd> = Vec::new();
        use std::os::fd::AsFd;
        for header in headers {
            let payload = vec![1; header.len.min(2000) as usize];
            guest.send(header, &payload);
            hosts.extend(stream.accept().map(|(s, _)| OwnedFd::from(s)));
            hosts.extend(messages.accept());
            for host in &hosts {
                let _ = send_message(host.as_fd(), &[3; 100]);
                let _ = recv(host, &mut [0; 500], 0);
            }
            guest.packets();
        }
        drop(hosts);
        guest.packets();
        let status = guest.rig.port.get(Reg::Status) as u8;
        prop_assert_eq!(status & NEEDS_RESET, 0);
        guest.vqs = guest.rig.start(None);
        for slot in 0..15 {
            guest.offer(RX_BASE + SLOT * slot, SLOT as u32);
        }
        let _ = std::fs::remove_file(format!("{}_10", guest.path.display()));
        guest.connect((10, 1));
    }

    #[test]
    fn headers_are_read_as_written(header in any_header()) {
        let bytes = header.bytes().try_into().unwrap();
        prop_assert_eq!(Header::parse(bytes), header);
    }
}
