//! What the Linux tests run inside of a guest that busybox cannot do: sockets to the host.
//!
//!     guest-tool serve                    listens on vsock ports, see [`serve`], until told to end
//!     guest-tool dial PORT COUNT BYTES    COUNT streams at once to the host, see [`dial`]
//!     guest-tool refused PORT             connects where nobody listens
//!     guest-tool messages PORT            sends messages and gets them back, see [`messages`]
//!     guest-tool datagrams PORT COUNT     sends COUNT datagrams back that come to a UDP port
//!
//! Each says on stdout how it went, and ends with 1 when something is not as it should be.

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, VsockAddr, accept, bind,
    connect, listen, recv, send, shutdown, socket,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The host's CID, and any.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;

/// Ports of [`serve`].
const ECHO: u32 = 1001;
const SUM: u32 = 1002;
const MESSAGES: u32 = 1003;
const END: u32 = 1004;
const TIME: u32 = 1005;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |at: usize| -> Result<u32> { Ok(words.get(at).ok_or("a number is missing")?.parse()?) };
    match words.first().map(String::as_str) {
        Some("serve") => serve(),
        Some("dial") => dial(number(1)?, number(2)?, number(3)? as usize),
        Some("refused") => refused(number(1)?),
        Some("messages") => messages(number(1)?),
        Some("datagrams") => datagrams(number(1)? as u16, number(2)?),
        _ => Err("give serve, dial, refused, messages or datagrams".into()),
    }
}

/// Over IPv4 and IPv6.
fn datagrams(port: u16, count: u32) -> Result<()> {
    let socket = std::net::UdpSocket::bind(("::", port))?;
    let mut bytes = [0; 65536];
    for _ in 0..count {
        let (len, from) = socket.recv_from(&mut bytes)?;
        socket.send_to(&bytes[..len], from)?;
    }
    println!("{count} datagrams");
    Ok(())
}

fn vsock(kind: SockType) -> Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Vsock,
        kind,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

fn listener(kind: SockType, port: u32) -> Result<OwnedFd> {
    let fd = vsock(kind)?;
    bind(fd.as_raw_fd(), &VsockAddr::new(ANY, port))?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}

fn connected(kind: SockType, port: u32) -> Result<OwnedFd> {
    let fd = vsock(kind)?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(fd)
}

fn accepted(listener: &OwnedFd) -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let fd = accept(listener.as_raw_fd())?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Serves every client of `port` on a thread of its own.
fn serve_port(kind: SockType, port: u32, serve: fn(OwnedFd) -> Result<()>) -> Result<()> {
    let listener = listener(kind, port)?;
    thread::spawn(move || {
        while let Ok(client) = accepted(&listener) {
            thread::spawn(move || {
                if let Err(error) = serve(client) {
                    println!("port {port}: {error}");
                }
            });
        }
    });
    Ok(())
}

/// Sends back what comes ([`ECHO`]); the length and CRC-32 of it at its end ([`SUM`]); messages as
/// they are ([`MESSAGES`]); for each byte the time in nanoseconds ([`TIME`]). Ends when somebody connects to [`END`].
fn serve() -> Result<()> {
    serve_port(SockType::Stream, ECHO, |client| {
        let mut file = std::fs::File::from(client);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(shutdown(file.as_raw_fd(), Shutdown::Write)?),
                count => file.write_all(&buffer[..count])?,
            }
        }
    })?;
    serve_port(SockType::Stream, SUM, |client| {
        let mut file = std::fs::File::from(client);
        let (length, crc) = sum(&mut file)?;
        Ok(writeln!(file, "{length} {crc:08x}")?)
    })?;
    serve_port(SockType::SeqPacket, MESSAGES, |client| {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match recv(client.as_raw_fd(), &mut buffer, MsgFlags::empty())? {
                0 => return Ok(()),
                count => drop(send(
                    client.as_raw_fd(),
                    &buffer[..count],
                    MsgFlags::empty(),
                )?),
            }
        }
    })?;
    serve_port(SockType::Stream, TIME, |client| {
        let mut file = std::fs::File::from(client);
        while file.read(&mut [0])? == 1 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            file.write_all(&(now.as_nanos() as u64).to_le_bytes())?;
        }
        Ok(())
    })?;
    let end = listener(SockType::Stream, END)?;
    println!("serving");
    accepted(&end)?;
    println!("served");
    Ok(())
}

/// Length and CRC-32 of all that comes.
fn sum(from: &mut impl Read) -> Result<(u64, u32)> {
    let (mut hasher, mut length) = (crc32fast::Hasher::new(), 0);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok((length, hasher.finalize())),
            count => {
                hasher.update(&buffer[..count]);
                length += count as u64;
            }
        }
    }
}

/// Bytes that depend on `seed`.
fn pattern(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

/// Opens all streams, then sends over all of them at once, ends its half of each, and expects
/// from the host's side the length and CRC-32 of what it got.
fn dial(port: u32, count: u32, bytes: usize) -> Result<()> {
    let streams: Vec<OwnedFd> = (0..count)
        .map(|_| connected(SockType::Stream, port))
        .collect::<Result<_>>()?;
    let threads: Vec<_> = (0..)
        .zip(streams)
        .map(|(seed, stream)| {
            thread::Builder::new()
                .stack_size(128 * 1024)
                .spawn(move || -> Result<bool> {
                    let data = pattern(seed, bytes);
                    let mut file = std::fs::File::from(stream);
                    file.write_all(&data)?;
                    shutdown(file.as_raw_fd(), Shutdown::Write)?;
                    let mut answer = String::new();
                    file.read_to_string(&mut answer)?;
                    let crc = crc32fast::hash(&data);
                    Ok(answer == format!("{bytes} {crc:08x}\n"))
                })
        })
        .collect();
    let mut good = 0;
    for thread in threads {
        good += u32::from(thread?.join().map_err(|_| "a thread panicked")??);
    }
    println!("dialed {good} of {count}");
    if good == count {
        Ok(())
    } else {
        Err("some streams were damaged".into())
    }
}

fn refused(port: u32) -> Result<()> {
    let fd = vsock(SockType::Stream)?;
    match connect(fd.as_raw_fd(), &VsockAddr::new(HOST, port)) {
        Err(Errno::ECONNRESET) => {
            println!("refused");
            Ok(())
        }
        other => Err(format!("connecting gave {other:?}").into()),
    }
}

/// Sends messages of many sizes, each of which has to come back as one.
fn messages(port: u32) -> Result<()> {
    let fd = connected(SockType::SeqPacket, port)?;
    let mut buffer = vec![0; 256 * 1024];
    let sizes = [1, 2, 100, 4095, 4096, 4097, 65_535, 65_536, 65_537, 100_000];
    for (seed, size) in (0..).zip(sizes) {
        let message = pattern(seed, size);
        if send(fd.as_raw_fd(), &message, MsgFlags::empty())? != size {
            return Err(format!("a message of {size} bytes was cut").into());
        }
        let count = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if buffer[..count] != message {
            return Err(format!("a message of {size} bytes came back with {count}").into());
        }
    }
    println!("messages {}", sizes.len());
    Ok(())
}
