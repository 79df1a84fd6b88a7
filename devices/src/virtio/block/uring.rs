//! Requests carried out by io_uring: a ring per queue, the disk as a registered file, one system
//! call per batch.
//!
//! A ring never has more requests under way than it has entries, so it cannot overflow. Guest RAM
//! that the kernel works on is kept by the tasks, and those are kept until they are complete: a
//! ring that is dropped waits for them.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::disk::{Disk, PUNCH, unsupported, zero_mode};
use super::request::Status;
use super::sync;
use super::task::{Op, Step, Task, failure};

/// The disk's index among the registered files.
const DISK: types::Fixed = types::Fixed(0);

/// A task that came to its end.
pub(super) type Finished = (Box<Task>, Status, Option<io::Error>);

/// A ring and its tasks.
pub(super) struct Ring {
    ring: IoUring,
    disk: Arc<Disk>,
    /// By the number that the kernel gives back.
    tasks: Vec<Option<Box<Task>>>,
    free: Vec<usize>,
    finished: Vec<Finished>,
    /// Bytes of the tasks that the kernel has.
    bytes: u64,
}

impl Ring {
    /// A ring for up to `entries` requests on `disk`.
    pub fn new(disk: Arc<Disk>, entries: u16) -> io::Result<Self> {
        let entries = u32::from(entries);
        let mut builder = IoUring::builder();
        builder.dontfork();
        // Linux 5.19: completions do not interrupt a thread that is in user space.
        let ring = builder
            .clone()
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|_| builder.build(entries))?;
        ring.submitter()
            .register_files(&[disk.file().as_raw_fd()])?;
        Ok(Self {
            ring,
            disk,
            tasks: Vec::new(),
            free: Vec::new(),
            finished: Vec::new(),
            bytes: 0,
        })
    }

    /// Readable when requests are complete.
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Tasks that the kernel has.
    pub fn in_flight(&self) -> usize {
        self.tasks.len() - self.free.len()
    }

    /// Bytes that they move.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Queues a task for the next [`submit`](Self::submit).
    pub fn push(&mut self, mut task: Box<Task>) -> io::Result<()> {
        if matches!(task.op, Op::Read | Op::Write { .. })
            && !task.is_aligned(self.disk.memory_align())
        {
            let (status, error) = sync::run(&self.disk, &mut task);
            self.finished.push((task, status, error));
            return Ok(());
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            self.tasks.len() - 1
        });
        let entry = entry(&task).user_data(index as u64);
        self.bytes += task.weight;
        if let Some(slot) = self.tasks.get_mut(index) {
            *slot = Some(task);
        }
        self.push_entry(entry)
    }

    fn push_entry(&mut self, entry: squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to belongs to a task in `tasks`, where it stays
            // unchanged until the kernel says that the entry is complete.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    /// Gives the kernel what was pushed.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            self.enter(0)?;
        }
        Ok(())
    }

    fn enter(&mut self, wait: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(wait) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => Ok(()),
                // Completions have to be taken first.
                Some(libc::EBUSY) => self.reap(),
                _ => Err(error),
            },
        }
    }

    /// Takes completions; requests that are not at their end go on.
    fn reap(&mut self) -> io::Result<()> {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else {
                return Ok(());
            };
            let index = entry.user_data() as usize;
            let Some(mut task) = self.tasks.get_mut(index).and_then(Option::take) else {
                continue;
            };
            let result = match u64::try_from(entry.result()) {
                Ok(done) => Ok(done),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            let result = fall_back(&self.disk, &task, result);
            let code = result.as_ref().err().and_then(io::Error::raw_os_error);
            match task.step(result) {
                Step::More => {
                    let entry = self::entry(&task).user_data(index as u64);
                    if let Some(slot) = self.tasks.get_mut(index) {
                        *slot = Some(task);
                    }
                    self.push_entry(entry)?;
                }
                Step::Done(status) => {
                    self.free.push(index);
                    self.bytes -= task.weight;
                    self.finished.push((task, status, failure(status, code)));
                }
            }
        }
    }

    /// Tasks that came to their end since the last call; others go on.
    pub fn finished(&mut self) -> io::Result<Vec<Finished>> {
        self.reap()?;
        self.submit()?;
        Ok(std::mem::take(&mut self.finished))
    }

    /// Waits until all tasks are at their end, and gives those that are new.
    pub fn drain(&mut self) -> io::Result<Vec<Finished>> {
        loop {
            self.reap()?;
            if self.in_flight() == 0 {
                return Ok(std::mem::take(&mut self.finished));
            }
            self.enter(1)?;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // The kernel may still work on guest RAM: better to keep it than to have it reused.
            std::mem::forget(std::mem::take(&mut self.tasks));
        }
    }
}

/// What the host's filesystem cannot do is done otherwise.
fn fall_back(disk: &Disk, task: &Task, result: io::Result<u64>) -> io::Result<u64> {
    match (&result, &task.op) {
        (Err(error), Op::Discard(_)) if unsupported(error) => Ok(0),
        (Err(error), Op::Zero { ranges, .. }) if unsupported(error) => match ranges.last() {
            Some(range) => disk.zero(range.offset, range.len, range.unmap).map(|()| 0),
            None => Ok(0),
        },
        _ => result,
    }
}

/// The next step of a task.
fn entry(task: &Task) -> squeue::Entry {
    let iovecs = task.iovecs();
    let (pointer, count) = (iovecs.as_ptr(), iovecs.len() as u32);
    match &task.op {
        Op::Read => opcode::Readv::new(DISK, pointer, count)
            .offset(task.offset)
            .build(),
        Op::Write { sync } => opcode::Writev::new(DISK, pointer, count)
            .offset(task.offset)
            .rw_flags(if *sync { libc::RWF_DSYNC } else { 0 })
            .build(),
        Op::Flush => opcode::Fsync::new(DISK)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Op::Discard(ranges) => fallocate(ranges, |_| PUNCH),
        Op::Zero { ranges, .. } => fallocate(ranges, |range| zero_mode(range.unmap)),
    }
}

fn fallocate(
    ranges: &[super::request::Range],
    mode: impl FnOnce(&super::request::Range) -> i32,
) -> squeue::Entry {
    match ranges.last() {
        Some(range) => opcode::Fallocate::new(DISK, range.len)
            .offset(range.offset)
            .mode(mode(range))
            .build(),
        None => opcode::Nop::new().build(),
    }
}
