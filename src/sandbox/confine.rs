//! What a process gives up before it takes anything from others: the one place for that of processes that wait to become
//! clones. A filter of system calls and rules for paths would be set here, too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::child::close_others;

/// Confines this process, which has one thread: nothing that it starts has more rights than it has, and of
/// descriptors it keeps `socket` and the first three. It stays dumpable, since only then a process without rights may
/// look at its own pages (/proc/self/pagemap), which snapshots of changes need.
///
/// # Errors
/// Of the kernel.
pub fn waiting(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: it takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    close_others(vec![0, 1, 2, socket.as_raw_fd()])
}
