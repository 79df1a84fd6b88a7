//! Sockets between guest and host: a guest that speaks virtio-vsock without an operating system,
//! against a process of the host on the same Unix socket.
//!
//! The listening end is the same for both. It takes the time: of streams from the connection to the
//! last byte, of connections from the first to the end of the last.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use super::Guest;
use super::turns::{self, Turn};

/// What a packet carries, and what is written at once.
const PIECE: usize = 64 << 10;
/// Bytes of one turn.
const BYTES: usize = 128 << 20;
/// Connections of one turn.
const CONNECTIONS: usize = 1000;
/// Connections of the guest at a time.
const DEPTH: usize = 8;
const PORT: usize = 7;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// To the listening end.
    Send,
    /// From there.
    Receive,
    /// Connections without data.
    Connect,
}

impl Way {
    fn operations(self) -> usize {
        match self {
            Self::Send | Self::Receive => BYTES / PIECE,
            Self::Connect => CONNECTIONS,
        }
    }
}

fn drain(stream: &mut UnixStream) -> usize {
    let mut buffer = vec![0; 4 * PIECE];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return total,
            count => total += count,
        }
    }
}

/// The listening end; operations a second.
fn serve(listener: &UnixListener, way: Way) -> f64 {
    let (mut stream, _) = listener.accept().unwrap();
    let begin = Instant::now();
    match way {
        Way::Send => assert_eq!(drain(&mut stream), BYTES),
        Way::Receive => {
            let piece = [1; PIECE];
            (0..BYTES / PIECE).for_each(|_| stream.write_all(&piece).unwrap());
            assert_eq!(drain(&mut stream), 0);
        }
        Way::Connect => {
            drain(&mut stream);
            for _ in 1..CONNECTIONS {
                drain(&mut listener.accept().unwrap().0);
            }
        }
    }
    way.operations() as f64 / begin.elapsed().as_secs_f64()
}

/// The other end, in a thread of the host; its processor time.
fn client(path: &Path, way: Way) -> f64 {
    let cpu = turns::thread_time();
    let connect = || UnixStream::connect(path).unwrap();
    match way {
        Way::Send => {
            let (piece, mut stream) = ([1; PIECE], connect());
            (0..BYTES / PIECE).for_each(|_| stream.write_all(&piece).unwrap());
        }
        Way::Receive => {
            let (mut piece, mut stream) = ([0; PIECE], connect());
            (0..BYTES / PIECE).for_each(|_| stream.read_exact(&mut piece).unwrap());
        }
        Way::Connect => (0..CONNECTIONS).for_each(|_| drop(connect())),
    }
    turns::thread_time() - cpu
}

fn turn(rate: f64, kicks: f64, cpu: f64, way: Way) -> Turn {
    let count = way.operations() as f64;
    Turn {
        rate,
        times: None,
        kicks: kicks / count,
        cpu: cpu / count,
    }
}

fn host(listener: &UnixListener, path: &Path, way: Way) -> Turn {
    let (rate, cpu) = thread::scope(|scope| {
        let client = scope.spawn(|| client(path, way));
        (serve(listener, way), client.join().unwrap())
    });
    turn(rate, 0.0, cpu, way)
}

fn guest(listener: &UnixListener, path: &Path, way: Way) -> Turn {
    let append = match way {
        Way::Send => format!("op=send bytes={BYTES}"),
        Way::Receive => format!("op=receive bytes={BYTES}"),
        Way::Connect => format!("op=connect count={CONNECTIONS} depth={DEPTH}"),
    };
    let vsock = ["--vsock".to_owned(), format!("path={}", path.display())];
    let mut guest = Guest::start("vsock_bench", &format!("{append} port={PORT}"), &vsock);
    let rate = serve(listener, way);
    let line = guest.line();
    let numbers: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
    let [_, kicks] = numbers[..] else {
        panic!("the guest said {line:?}")
    };
    turn(rate, kicks, turns::vmm_time(guest.child.id()), way)
}

/// Measures and prints the table.
pub fn print(rounds: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let port = dir.path().join(format!("vsock_{PORT}"));
    let listener = UnixListener::bind(&port).unwrap();
    turns::head("sockets", rounds);
    for (name, bytes, way) in [
        ("64 KiB, guest to host", PIECE, Way::Send),
        ("64 KiB, host to guest", PIECE, Way::Receive),
        ("connections, 8 at a time", 0, Way::Connect),
    ] {
        let host = || host(&listener, &port, way);
        let guest = || guest(&listener, &path, way);
        // QEMU has no socket device of its own, and the host's kernel may have none.
        turns::compare(name, bytes, rounds, host, guest, || None);
    }
}
