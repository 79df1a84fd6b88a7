//! Requests carried out at once, by system calls that wait. The fallback where there is no
//! io_uring, and the way of the few requests that it cannot take.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::disk::{Aligned, Disk};
use super::request::{HEADER, Status};
use super::task::{Op, Step, Task, failure};
use crate::virtio::io::{read_at, write_at};

/// Bytes copied at once where the guest's buffers are not aligned for O_DIRECT.
const BOUNCE: u64 = 1 << 16;

/// Carries out `task` to its end.
pub(super) fn run(disk: &Disk, task: &mut Task) -> (Status, Option<io::Error>) {
    loop {
        let result = step(disk, task);
        let code = result.as_ref().err().and_then(io::Error::raw_os_error);
        if let Step::Done(status) = task.step(result) {
            return (status, failure(status, code));
        }
    }
}

fn step(disk: &Disk, task: &Task) -> io::Result<u64> {
    match &task.op {
        Op::Read | Op::Write { .. } if !task.is_aligned(disk.memory_align()) => bounce(disk, task),
        Op::Read | Op::Write { .. } => transfer(disk, task),
        Op::Flush => disk.file().sync_data().map(|()| 0),
        Op::Discard(ranges) => match ranges.last() {
            Some(range) => disk.discard(range.offset, range.len).map(|()| 0),
            None => Ok(0),
        },
        Op::Zero { ranges, .. } => match ranges.last() {
            Some(range) => disk.zero(range.offset, range.len, range.unmap).map(|()| 0),
            None => Ok(0),
        },
    }
}

fn transfer(disk: &Disk, task: &Task) -> io::Result<u64> {
    let fd = disk.file().as_raw_fd();
    let iovecs = task.iovecs();
    let (pointer, count) = (iovecs.as_ptr(), iovecs.len() as libc::c_int);
    let offset = task.offset as libc::off64_t;
    // SAFETY: the iovecs are `count` valid ones, over guest RAM that the task keeps mapped, and
    // guest RAM may change at any time whoever writes it.
    let result = unsafe {
        match task.op {
            Op::Write { sync } => {
                let flags = if sync { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, pointer, count, offset, flags)
            }
            _ => libc::preadv2(fd, pointer, count, offset, 0),
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Moves a piece through a buffer of our own.
fn bounce(disk: &Disk, task: &Task) -> io::Result<u64> {
    let outside = |_| io::Error::from_raw_os_error(libc::EFAULT);
    let len = task.left.min(BOUNCE) as usize;
    let mut buffer = Aligned::new(len, disk.memory_align());
    let bytes = buffer.get(len);
    match task.op {
        Op::Write { sync } => {
            let segments = task.chain.readable();
            let total = crate::virtio::io::total(segments) - HEADER;
            let at = HEADER + (total - task.left);
            read_at(task.ram(), segments, at, bytes).map_err(outside)?;
            disk.file().write_all_at(bytes, task.offset)?;
            if sync {
                disk.file().sync_data()?;
            }
            Ok(len as u64)
        }
        _ => {
            let done = disk.file().read_at(bytes, task.offset)?;
            let at = task.produced - task.left;
            let bytes = bytes.get(..done).unwrap_or_default();
            write_at(task.ram(), task.chain.writable(), at, bytes).map_err(outside)?;
            Ok(done as u64)
        }
    }
}
