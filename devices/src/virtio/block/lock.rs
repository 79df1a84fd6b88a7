//! Open file description locks, so that a disk is opened for writing once.
//!
//! They are advisory, cover the whole file, go with the open file, and are seen by QEMU, which
//! locks images in the same way.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for a lock that no process holds; on a busy host the kernel takes its time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(2);

/// Who holds a lock, as far as this user may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder(Option<(u32, String)>);

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some((pid, name)) => write!(f, "process {pid} ({name})"),
            None => f.write_str("a process of another user or on another host"),
        }
    }
}

/// Why a file could not be locked.
#[derive(Debug)]
pub(in crate::virtio) enum LockError {
    Held(Holder),
    Io(io::Error),
}

/// Locks `file` for one writer, or for readers only, until it is closed or [`unlock`]ed.
///
/// A lock that no process holds is waited for: the kernel closes the files of an io_uring some
/// time after the process that had it has ended.
pub(in crate::virtio) fn lock(file: &File, write: bool) -> Result<(), LockError> {
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    let mut deadline = None;
    loop {
        let error = match set(file, kind) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return Err(LockError::Io(error));
        }
        let now = Instant::now();
        let first = deadline.is_none();
        let end = *deadline.get_or_insert(now + PATIENCE);
        if first || now >= end {
            let holder = holder(file);
            if holder.is_some() || now >= end {
                return Err(LockError::Held(Holder(holder)));
            }
        }
        thread::sleep(RETRY);
    }
}

/// Gives the lock up at once, whoever still has the open file.
pub(super) fn unlock(file: &File) {
    if let Err(error) = set(file, libc::F_UNLCK) {
        log::warn!("a disk stays locked until its file is closed: {error}");
    }
}

fn set(file: &File, kind: libc::c_int) -> io::Result<()> {
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `range` is a valid flock to read.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Looks through the open files of all processes that may be looked at: the kernel names no
/// process for these locks, but says with each open file which locks it holds.
fn holder(file: &File) -> Option<(u32, String)> {
    let inode = format!(":{} ", file.metadata().ok()?.ino());
    let holds = |info: &str| {
        let mut locks = info.lines().filter(|line| line.starts_with("lock:"));
        locks.any(|line| line.contains(&inode))
    };
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Ok(infos) = fs::read_dir(process.path().join("fdinfo")) else {
            continue;
        };
        for info in infos.flatten() {
            if fs::read_to_string(info.path()).is_ok_and(|info| holds(&info)) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some((pid, name.trim_end().to_owned()));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [0; 512]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let writer = open();
        lock(&writer, true).unwrap();
        let other = open();
        for write in [true, false] {
            let Err(LockError::Held(holder)) = lock(&other, write) else {
                panic!("locked twice");
            };
            let (pid, name) = holder.0.clone().unwrap();
            assert_eq!(pid, std::process::id());
            assert!(!name.is_empty());
            assert!(holder.to_string().contains(&pid.to_string()));
        }
        drop(writer);
        let reader = open();
        lock(&reader, false).unwrap();
        lock(&other, false).unwrap();
        assert!(matches!(lock(&other, true), Err(LockError::Held(_))));
        drop(reader);
        lock(&other, true).unwrap();
        let again = open();
        assert!(matches!(lock(&again, true), Err(LockError::Held(_))));
        unlock(&other);
        lock(&again, true).unwrap();
    }
}
