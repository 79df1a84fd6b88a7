//! Unix sockets over which memory goes to other processes as descriptors.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect as connect_fd,
    sendmsg, socket,
};

/// Connects to a socket that somebody listens at; the connection does not block.
///
/// # Errors
/// Of the host; at once where the listener takes nobody at the moment.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect_fd(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// Sends one message with descriptors.
///
/// # Errors
/// Of the host, and where the message does not go as a whole.
pub fn send(to: &UnixStream, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let sent = sendmsg::<()>(
        to.as_raw_fd(),
        &[IoSlice::new(message)],
        &[ControlMessage::ScmRights(fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    match sent == message.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}
