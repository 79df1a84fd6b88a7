//! What the clients have in common: what they are told, and how they reach the guest.

use std::io::{BufRead, BufReader, Error, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a guest may take, also in an emulated host.
const PATIENCE: Duration = Duration::from_secs(200);
/// The guest's port of TCP.
const TCP_PORT: u16 = 7777;
/// Its port of vsock, where it sends back what it gets.
const VSOCK_PORT: u32 = 1001;

/// What a client is told on its command line.
pub struct Job {
    /// The binary that is to be driven.
    pub firecracker: PathBuf,
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Image of the root file system.
    pub rootfs: PathBuf,
    /// A directory of its own.
    pub dir: PathBuf,
}

impl Job {
    /// Reads it.
    ///
    /// # Errors
    /// When an argument is missing.
    pub fn read() -> Result<Self, String> {
        let mut arguments = std::env::args().skip(1);
        let mut next = |what: &str| {
            arguments
                .next()
                .map(PathBuf::from)
                .ok_or(format!("no {what}"))
        };
        Ok(Self {
            firecracker: next("firecracker")?,
            kernel: next("kernel")?,
            initrd: next("initrd")?,
            rootfs: next("rootfs")?,
            dir: next("directory")?,
        })
    }
}

/// What the guest at an address answers to a line.
///
/// # Errors
/// When it cannot be reached, or says nothing.
pub fn ask_by_network(address: &str, line: &str) -> Result<String, Error> {
    let address = format!("{address}:{TCP_PORT}")
        .parse()
        .map_err(Error::other)?;
    until_it_answers(|| {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        ask(stream, line)
    })
}

/// What the guest behind the host's socket of a vsock device answers to a line.
///
/// # Errors
/// When it cannot be reached, or says nothing.
pub fn ask_by_vsock(socket: &str, line: &str) -> Result<String, Error> {
    until_it_answers(|| {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let answer = ask(&stream, &format!("CONNECT {VSOCK_PORT}"))?;
        if !answer.starts_with("OK ") {
            return Err(Error::other("nobody listens in the guest"));
        }
        ask(stream, line)
    })
}

fn ask(mut stream: impl Read + Write, line: &str) -> Result<String, Error> {
    writeln!(stream, "{line}")?;
    let mut answer = String::new();
    BufReader::with_capacity(1, stream).read_line(&mut answer)?;
    match answer.trim_end() {
        "" => Err(Error::other("the guest says nothing")),
        answer => Ok(answer.to_owned()),
    }
}

fn until_it_answers(mut once: impl FnMut() -> Result<String, Error>) -> Result<String, Error> {
    let begin = Instant::now();
    loop {
        match once() {
            Err(_) if begin.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(200)),
            end => return end,
        }
    }
}

/// Waits until a guest has said something to its console, which is a file.
///
/// # Errors
/// When it does not.
pub fn until_said(console: &Path, text: &str) -> Result<(), Error> {
    let begin = Instant::now();
    while !std::fs::read_to_string(console).is_ok_and(|said| said.contains(text)) {
        if begin.elapsed() > PATIENCE {
            return Err(Error::other("the guest does not say it"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until a child is gone, or is nothing but its exit code.
///
/// # Errors
/// When it stays.
pub fn until_gone(pid: u32) -> Result<(), Error> {
    let (begin, path) = (Instant::now(), format!("/proc/{pid}/stat"));
    while std::fs::read_to_string(&path).is_ok_and(|stat| !stat.contains(") Z ")) {
        if begin.elapsed() > PATIENCE {
            return Err(Error::other("the microVM does not end"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
