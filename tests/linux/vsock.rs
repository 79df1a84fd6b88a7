//! Sockets between guest and host with Debian's own driver, on both transports.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, connect, listen,
    recv, send, socket,
};

use crate::common::{Bulle, Input};
use crate::{linux, tool_root};

/// Ports that the guest tool serves.
pub const ECHO: u32 = 1001;
const SUM: u32 = 1002;
const MESSAGES: u32 = 1003;
const END: u32 = 1004;
pub const TIME: u32 = 1005;
/// Ports that the host listens on.
const HOST_SUM: u32 = 2000;
const HOST_MESSAGES: u32 = 2001;
const HOST_NOBODY: u32 = 2002;

/// Two hundred streams take a while in the lab.
const PATIENCE: Duration = Duration::from_secs(300);
/// Streams at once, each way.
const STREAMS: u32 = 200;
const BYTES: usize = 24 * 1024;

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn host_port(path: &Path, port: u32) -> PathBuf {
    with_suffix(path, &format!("_{port}"))
}

/// Says CONNECT and reads the answer, byte by byte since data may follow.
pub fn dial(path: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(250)))
        .unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let (mut line, mut byte) = (String::new(), [0]);
    while !line.ends_with('\n') {
        match stream.read(&mut byte) {
            Ok(1) => line.push(char::from(byte[0])),
            // A refused connection ends, or is reset.
            _ => return None,
        }
    }
    let number = line
        .strip_prefix("OK ")
        .expect("an answer of the host's side")
        .trim_end();
    assert!(number.parse::<u32>().unwrap() >= 1 << 30);
    Some(stream)
}

fn pattern(seed: u32, length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|n| ((n ^ seed).wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// Length and CRC-32 as the guest tool says them.
fn sum(bytes: &[u8]) -> String {
    format!("{} {:08x}\n", bytes.len(), crc32fast::hash(bytes))
}

/// Each of many streams at once gets its own bytes back, or what they add up to after its half-close.
fn streams_to_the_guest(path: &Path) {
    let threads: Vec<_> = (0..STREAMS)
        .map(|seed| {
            let port = if seed % 2 == 0 { ECHO } else { SUM };
            let mut stream = dial(path, port).expect("the guest listens");
            thread::spawn(move || {
                let data = pattern(seed, BYTES);
                let mut writer = stream.try_clone().unwrap();
                let sent = data.clone();
                let writing = thread::spawn(move || {
                    writer.write_all(&sent).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).unwrap();
                writing.join().unwrap();
                match port {
                    ECHO => assert!(answer == data, "stream {seed} came back damaged"),
                    _ => assert_eq!(String::from_utf8(answer).unwrap(), sum(&data)),
                }
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

/// Answers each of the guest's streams with what it sent.
fn serve_sums(listener: UnixListener) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let streams: Vec<_> = (0..STREAMS).map(|_| listener.accept().unwrap().0).collect();
        for mut stream in streams {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len(), BYTES);
            stream.write_all(sum(&bytes).as_bytes()).unwrap();
        }
    })
}

fn seqpacket() -> OwnedFd {
    socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap()
}

/// Sends back each message of one of the guest's connections.
fn serve_messages(path: &Path) -> thread::JoinHandle<usize> {
    let listener = seqpacket();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    thread::spawn(move || {
        let client = accept(listener.as_raw_fd()).unwrap();
        let mut buffer = vec![0; 256 * 1024];
        let mut messages = 0;
        while let Ok(count @ 1..) = recv(client, &mut buffer, MsgFlags::empty()) {
            assert_eq!(
                send(client, &buffer[..count], MsgFlags::empty()).unwrap(),
                count
            );
            messages += 1;
        }
        messages
    })
}

/// Messages to the guest come back as they are, however many wait.
fn messages_to_the_guest(path: &Path) {
    let client = seqpacket();
    let address = UnixAddr::new(&with_suffix(path, ".seqpacket")).unwrap();
    connect(client.as_raw_fd(), &address).unwrap();
    let fd = client.as_raw_fd();
    send(
        fd,
        format!("CONNECT {MESSAGES}\n").as_bytes(),
        MsgFlags::empty(),
    )
    .unwrap();
    let mut buffer = vec![0; 256 * 1024];
    let count = recv(fd, &mut buffer, MsgFlags::empty()).unwrap();
    assert!(buffer[..count].starts_with(b"OK "));
    let sizes = [1, 17, 4096, 30_000, 65_536, 100_000, 2];
    for (seed, size) in (0..).zip(sizes) {
        assert_eq!(
            send(fd, &pattern(seed, size), MsgFlags::empty()).unwrap(),
            size
        );
    }
    for (seed, size) in (0..).zip(sizes) {
        let count = recv(fd, &mut buffer, MsgFlags::empty()).unwrap();
        assert!(
            buffer[..count] == pattern(seed, size),
            "{count} bytes instead of {size}"
        );
    }
}

fn sockets(flavour: &str, options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let sums = serve_sums(UnixListener::bind(host_port(&path, HOST_SUM)).unwrap());
    let messages = serve_messages(&host_port(&path, HOST_MESSAGES));
    let script = format!(
        "guest-tool serve && guest-tool dial {HOST_SUM} {STREAMS} {BYTES} &&
         guest-tool messages {HOST_MESSAGES} && guest-tool refused {HOST_NOBODY}"
    );
    let bulle: Bulle = linux(flavour)
        .arg("--root")
        .arg(tool_root(dir.path()))
        .arg("--vsock")
        .arg(format!("path={},cid=77", path.display()))
        .args(options)
        .patience(PATIENCE)
        .timeout("280s")
        .input(Input::Null)
        .command(["/bin/sh", "-c", &script]);
    let running = bulle.start().wait_for("serving\n");
    streams_to_the_guest(&path);
    messages_to_the_guest(&path);
    assert!(
        dial(&path, 9).is_none(),
        "nobody listens on port 9 of the guest"
    );
    assert!(dial(&path, END).is_some());
    let outcome = running.finish().exits(0);
    let expected =
        format!("serving\nserved\ndialed {STREAMS} of {STREAMS}\nmessages 10\nrefused\n");
    assert_eq!(outcome.stdout, expected, "{outcome:#?}");
    sums.join().unwrap();
    assert_eq!(messages.join().unwrap(), 10);
    // Its sockets are gone, the host's listeners are not its own.
    assert!(!path.exists() && !with_suffix(&path, ".seqpacket").exists());
    assert!(host_port(&path, HOST_SUM).exists());
}

#[test]
fn sockets_on_mmio() {
    sockets("amd64", &[]);
}

#[test]
fn sockets_on_pci() {
    sockets("cloud-amd64", &["--pci", "--cpus", "2"]);
}
