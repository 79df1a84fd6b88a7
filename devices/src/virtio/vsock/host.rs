//! Unix sockets of the host. No call waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::packet::Kind;
use crate::virtio::iovecs::send;

/// Longest path of a Unix socket, in bytes.
pub const MAX_PATH: usize = 107;
/// Connections that the kernel keeps for us; it has a limit of its own.
const BACKLOG: i32 = 4096;
/// Longest line of a client: `CONNECT 4294967295\n` with room for spaces.
const MAX_LINE: usize = 64;

/// A listening socket, whose path goes with it.
#[derive(Debug)]
pub struct Listener {
    pub fd: OwnedFd,
    pub kind: Kind,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else may have removed it, which is all the same.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn socket(kind: Kind) -> io::Result<OwnedFd> {
    let kind = match kind {
        Kind::Stream => libc::SOCK_STREAM,
        Kind::Seqpacket => libc::SOCK_SEQPACKET,
    };
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved.
    own(unsafe { libc::socket(libc::AF_UNIX, kind | flags, 0) })
}

/// Takes a file descriptor that a call returned.
fn own(fd: i32) -> io::Result<OwnedFd> {
    match fd {
        // SAFETY: the caller just got it from the kernel, so nobody else owns it.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls `f` with the address of `path`.
fn with_address(
    path: &Path,
    f: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i32,
) -> io::Result<()> {
    // SAFETY: all of `sockaddr_un` may be zero.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let len = size_of_val(&address) as libc::socklen_t;
    match f((&raw const address).cast(), len) {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Listener {
    pub fn bind(path: &Path, kind: Kind) -> io::Result<Self> {
        let fd = socket(kind)?;
        // SAFETY: the address is valid for the length given.
        with_address(path, |at, len| unsafe {
            libc::bind(fd.as_raw_fd(), at, len)
        })?;
        let path = path.to_owned();
        let listener = Self { fd, kind, path };
        // SAFETY: no memory is involved.
        match unsafe { libc::listen(listener.fd.as_raw_fd(), BACKLOG) } {
            0 => Ok(listener),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub fn accept(&self) -> io::Result<OwnedFd> {
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let none = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let fd =
            own(unsafe { libc::accept4(self.fd.as_raw_fd(), none, std::ptr::null_mut(), flags) })?;
        Ok(fd)
    }
}

/// Connects to a listener; `WouldBlock` where too many wait for it.
pub fn dial(path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    let fd = socket(kind)?;
    // SAFETY: the address is valid for the length given.
    with_address(path, |at, len| unsafe {
        libc::connect(fd.as_raw_fd(), at, len)
    })?;
    Ok(fd)
}

/// Room in the kernel for a whole message of `len` bytes, as far as the host allows.
pub fn grow(fd: &OwnedFd, len: usize) {
    let len = len as libc::c_int;
    let at = (&raw const len).cast();
    let size = size_of_val(&len) as libc::socklen_t;
    // SAFETY: the option's value is valid for the size given. It only fails for bad arguments.
    unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, at, size) };
}

/// Ends one direction of a socket; one that is gone needs no end.
pub fn shutdown(fd: &OwnedFd, how: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
}

/// Receives without waiting. For a message longer than `buffer`, with `MSG_TRUNC`, its length.
pub fn recv(fd: &OwnedFd, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
    let (at, len) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the buffer is writable for the length given.
    let count = unsafe { libc::recv(fd.as_raw_fd(), at, len, flags | libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// A client's first line: the port, once the line is whole; what follows it stays in the socket.
pub fn read_connect(fd: &OwnedFd) -> io::Result<u32> {
    let mut buffer = [0; MAX_LINE];
    let count = recv(fd, &mut buffer, libc::MSG_PEEK)?;
    let line = buffer.get(..count).unwrap_or_default();
    let (port, used) = match line.iter().position(|b| *b == b'\n') {
        Some(end) => (line.get(..end).and_then(parse_connect), end + 1),
        None if count > 0 && count < MAX_LINE => return Err(io::ErrorKind::WouldBlock.into()),
        None => (None, count),
    };
    recv(fd, buffer.get_mut(..used).unwrap_or_default(), 0)?;
    port.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_connect(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some(word), Some(port), None) if word.eq_ignore_ascii_case("connect") => port.parse().ok(),
        _ => None,
    }
}

/// Tells a client that the guest took its connection.
pub fn write_ok(fd: &OwnedFd, port: u32) -> io::Result<()> {
    let line = format!("OK {port}\n");
    match send(fd.as_fd(), line.as_bytes())? {
        count if count == line.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
