//! Listening Unix sockets of the host, for devices that programs of the host connect to.
//!
//! No call waits. A socket that a VM left behind is replaced: its path is there, but nobody listens.
//! Two VMs that find the same one do not both take it, since a lock on its directory is held
//! meanwhile.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

/// Longest path of a Unix socket, in bytes.
pub const MAX_PATH: usize = 107;
/// Connections that the kernel keeps for us; it has a limit of its own.
const BACKLOG: i32 = 4096;
/// How often, and how far apart, the lock on a directory is tried.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// Type of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketType {
    /// A stream of bytes.
    Stream,
    /// A sequence of messages.
    Seqpacket,
}

/// A socket cannot be made to listen on a path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Too long for the system.
    #[error("the socket path {path:?} has {} bytes: a Unix socket's has at most {max}", path.as_os_str().len())]
    TooLong {
        /// As given.
        path: PathBuf,
        /// The most.
        max: usize,
    },
    /// Somebody listens there.
    #[error("the socket {path:?} is in use by another program: give another path")]
    InUse {
        /// As given.
        path: PathBuf,
    },
    /// Something else is there, which is not bulle's to remove.
    #[error("{path:?} is there already and is no socket: give another path, or remove it")]
    Occupied {
        /// As given.
        path: PathBuf,
    },
    /// No such directory.
    #[error("cannot make the socket {path:?}: its directory does not exist; make it first")]
    NoDirectory {
        /// As given.
        path: PathBuf,
    },
    /// The system refuses.
    #[error(
        "cannot make the socket {path:?}: its directory must be one where this user can make files"
    )]
    System {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening socket, whose path goes with it.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    kind: SocketType,
    path: PathBuf,
    /// Device and inode of the path, so that nobody else's is removed.
    identity: Option<(u64, u64)>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let there = std::fs::symlink_metadata(&self.path).ok();
        if there.as_ref().map(identity) == self.identity {
            // Somebody else may remove it meanwhile, which is all the same.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens on `path`, which is made, with the process's umask. A socket on which nobody listens
    /// is replaced.
    pub fn bind(path: &Path, kind: SocketType) -> Result<Self, ListenError> {
        let own = || path.to_owned();
        if path.as_os_str().len() > MAX_PATH {
            let max = MAX_PATH;
            return Err(ListenError::TooLong { path: own(), max });
        }
        let lock = lock_directory(path);
        let bound = match bind(path, kind) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                let there = std::fs::symlink_metadata(path).ok();
                if there.is_some_and(|there| !there.file_type().is_socket()) {
                    return Err(ListenError::Occupied { path: own() });
                }
                // Without the lock it could be somebody's who just does not listen yet.
                if lock.is_none() || !is_stale(path, kind) {
                    return Err(ListenError::InUse { path: own() });
                }
                std::fs::remove_file(path).and_then(|()| bind(path, kind))
            }
            bound => bound,
        };
        bound.map_err(|source| match source.kind() {
            ErrorKind::NotFound => ListenError::NoDirectory { path: own() },
            _ => ListenError::System {
                path: own(),
                source,
            },
        })
    }

    /// Accepts a client; `WouldBlock` if there is none. Its socket does not block.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let none = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let fd = unsafe { libc::accept4(self.fd.as_raw_fd(), none, std::ptr::null_mut(), flags) };
        own(fd)
    }

    /// Type of its sockets.
    pub fn kind(&self) -> SocketType {
        self.kind
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

fn identity(there: &Metadata) -> (u64, u64) {
    (there.dev(), there.ino())
}

/// Holds the directory of `path` until dropped; `None` where that is not to be had.
fn lock_directory(path: &Path) -> Option<File> {
    let parent = path.parent()?;
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let directory = File::open(parent).ok()?;
    for _ in 0..TRIES {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(rustix::io::Errno::WOULDBLOCK) => sleep(PAUSE),
            Err(_) => return None,
        }
    }
    None
}

fn is_stale(path: &Path, kind: SocketType) -> bool {
    matches!(dial(path, kind), Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

fn socket(kind: SocketType) -> io::Result<OwnedFd> {
    let kind = match kind {
        SocketType::Stream => libc::SOCK_STREAM,
        SocketType::Seqpacket => libc::SOCK_SEQPACKET,
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
    if bytes.len() > MAX_PATH || bytes.is_empty() || bytes.contains(&0) {
        return Err(ErrorKind::InvalidInput.into());
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

fn bind(path: &Path, kind: SocketType) -> io::Result<Listener> {
    let fd = socket(kind)?;
    // SAFETY: the address is valid for the length given.
    with_address(path, |at, len| unsafe {
        libc::bind(fd.as_raw_fd(), at, len)
    })?;
    let there = std::fs::symlink_metadata(path).ok();
    let listener = Listener {
        fd,
        kind,
        path: path.to_owned(),
        identity: there.as_ref().map(identity),
    };
    // SAFETY: no memory is involved.
    match unsafe { libc::listen(listener.fd.as_raw_fd(), BACKLOG) } {
        0 => Ok(listener),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects to a listener; `WouldBlock` where too many wait for it.
pub fn dial(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let fd = socket(kind)?;
    // SAFETY: the address is valid for the length given.
    with_address(path, |at, len| unsafe {
        libc::connect(fd.as_raw_fd(), at, len)
    })?;
    Ok(fd)
}

#[cfg(test)]
mod tests;
