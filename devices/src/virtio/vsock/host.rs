//! What is done with connected Unix sockets of the host. No call waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::virtio::iovecs::send;

/// Longest line of a client: `CONNECT 4294967295\n` with room for spaces.
const MAX_LINE: usize = 64;

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
