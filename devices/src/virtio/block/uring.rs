//! Requests carried out by io_uring: a ring per queue, the disk as a registered file, one system
//! call per batch.
//!
//! A ring never has more requests under way than it has entries, so it cannot overflow. Guest RAM
//! that the kernel works on is kept by the tasks, and those are kept until they are complete: a
//! ring that is dropped waits for them.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use super::disk::{Cache, Disk, PUNCH, unsupported, zero_mode};
use super::request::Status;
use super::sync;
use super::task::{Op, Step, Task, failure};

#[cfg(test)]
mod tests;

/// The disk's index among the registered files.
const DISK: types::Fixed = types::Fixed(0);
/// Requests given to the kernel at once where it carries them out on the spot, as it does with what
/// is in the page cache: the driver handles these while the next are carried out.
const BATCH: usize = 16;
/// The same in bytes.
const BATCH_BYTES: u64 = 256 << 10;
/// Longest write into the page cache, in bytes, that this thread carries out itself: many file systems
/// have io_uring leave such to a thread of the kernel, and waking that takes longer than the write.
const SHORT: u64 = 256 << 10;
/// How long one may take. Where the disk does not keep up, the kernel makes writers wait.
const QUICK: Duration = Duration::from_millis(1);
/// For so many times as long as one took that was not quick, writes are the kernel's threads': this
/// thread, which others need, waits for one hundredth of its time at most.
const REST: u32 = 100;

/// A task that came to its end.
pub(super) type Finished = (Task, Status, Option<io::Error>);

/// A ring and its tasks.
pub(super) struct Ring {
    ring: IoUring,
    disk: Arc<Disk>,
    /// By the number that the kernel gives back.
    tasks: Vec<Option<Task>>,
    free: Vec<usize>,
    finished: Vec<Finished>,
    /// Bytes of the tasks that the kernel has.
    bytes: u64,
    /// Of those, reads and writes that need not reach the disk.
    transfers: usize,
    /// Nothing was left under way by the last turn.
    at_once: bool,
    /// Writes are the kernel's threads' until then.
    resting: Option<Instant>,
    /// [`waits`] before the first write of this turn.
    waits: Option<libc::c_long>,
}

/// Whether this process may use io_uring.
pub(super) fn available() -> io::Result<()> {
    // That it may is asked once: what a process may do becomes less only by its own doing.
    static MAY: AtomicBool = AtomicBool::new(false);
    if MAY.load(Ordering::Relaxed) {
        return Ok(());
    }
    // SAFETY: a null pointer, which the kernel finds to be outside of the process.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<u8>()) };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EFAULT) if result < 0 => {
            MAY.store(true, Ordering::Relaxed);
            Ok(())
        }
        _ => Err(error),
    }
}

/// The rings of a device by queue, each made when its queue first needs it.
pub(super) struct Rings {
    rings: Vec<Option<Ring>>,
    entries: u16,
    /// The host refused one, and that is no error.
    refused: bool,
    or_sync: bool,
}

impl Rings {
    /// For `queues` queues of `entries`. Where the host refuses a ring, system calls that wait do
    /// if `or_sync` says so.
    pub fn new(queues: u16, entries: u16, or_sync: bool) -> Self {
        Self {
            rings: (0..queues).map(|_| None).collect(),
            entries,
            refused: false,
            or_sync,
        }
    }

    /// The ring of `queue`, if there is one.
    pub fn get(&self, queue: usize) -> Option<&Ring> {
        self.rings.get(queue).and_then(Option::as_ref)
    }

    /// The ring of `queue`, if there is one.
    pub fn get_mut(&mut self, queue: usize) -> Option<&mut Ring> {
        self.rings.get_mut(queue).and_then(Option::as_mut)
    }

    /// Makes the ring of `queue` where there is none; the file descriptor of a new one.
    pub fn make(&mut self, queue: usize, disk: &Arc<Disk>) -> io::Result<Option<RawFd>> {
        let Some(slot @ None) = self.rings.get_mut(queue) else {
            return Ok(None);
        };
        if self.refused {
            return Ok(None);
        }
        match Ring::new(Arc::clone(disk), self.entries) {
            Ok(ring) => Ok(Some(slot.insert(ring).fd())),
            Err(error) if self.or_sync => {
                log::info!("disk {:?} does without io_uring: {error}", disk.path());
                self.refused = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the ring of `queue` away, with nothing under way.
    pub fn remove(&mut self, queue: usize) {
        if let Some(slot) = self.rings.get_mut(queue) {
            *slot = None;
        }
    }
}

impl Ring {
    /// A ring for up to `entries` requests on `disk`.
    pub fn new(disk: Arc<Disk>, entries: u16) -> io::Result<Self> {
        let entries = u32::from(entries);
        let mut builder = IoUring::builder();
        builder.dontfork();
        // Linux 5.19: completions do not interrupt a thread that is in user space. They are not
        // deferred further (IORING_SETUP_DEFER_TASKRUN), since epoll is not told of such.
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
            transfers: 0,
            at_once: false,
            resting: None,
            waits: None,
        })
    }

    /// Works on another disk from now on, with nothing under way.
    pub fn exchange(&mut self, disk: Arc<Disk>) -> io::Result<()> {
        let file = [disk.file().as_raw_fd()];
        self.ring.submitter().register_files_update(0, &file)?;
        self.disk = disk;
        Ok(())
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

    /// Tasks that the kernel has and that take no longer than a transfer.
    pub fn transfers(&self) -> usize {
        self.transfers
    }

    /// How many tasks, and tasks of how many bytes, to [`push`](Self::push) before a [`turn`](Self::turn).
    pub fn batch(&self) -> (usize, u64) {
        match self.at_once {
            true => (BATCH, BATCH_BYTES),
            false => (usize::MAX, u64::MAX),
        }
    }

    /// Queues a task for the next [`turn`](Self::turn). One that the kernel does not take is at
    /// its end.
    pub fn push(&mut self, mut task: Task) -> io::Result<()> {
        let unaligned = matches!(task.op, Op::Read | Op::Write { .. })
            && !task.is_aligned(self.disk.memory_align());
        let cached = self.is_short_cached_write(&task);
        if unaligned || cached {
            if cached {
                self.waits.get_or_insert_with(waits);
            }
            let begun = Instant::now();
            let (status, error) = sync::run(&self.disk, &mut task);
            if cached {
                self.took(begun.elapsed());
            }
            self.finished.push((task, status, error));
            return Ok(());
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            self.tasks.len() - 1
        });
        self.bytes += task.weight;
        self.transfers += usize::from(is_transfer(&task));
        self.queue(index, task)
    }

    /// Whether this thread is to carry a task out, as a write into the page cache that will be quick.
    fn is_short_cached_write(&self, task: &Task) -> bool {
        matches!(task.op, Op::Write { sync: false })
            && task.left <= SHORT
            && self.disk.cache() != Cache::None
            && self.resting.is_none_or(|until| Instant::now() >= until)
    }

    /// Takes note of how long such a write took.
    fn took(&mut self, time: Duration) {
        // Not because others wanted this processor.
        if time > QUICK && self.waits != Some(waits()) {
            self.resting = Some(Instant::now() + time * REST);
        }
    }

    fn queue(&mut self, index: usize, task: Task) -> io::Result<()> {
        let entry = entry(&task).user_data(index as u64);
        loop {
            // SAFETY: the entry points to guest RAM or to a vector on the heap, which belong to the
            // task. That is put into `tasks`, where it stays unchanged until the kernel says that the
            // entry is complete.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                if let Some(slot) = self.tasks.get_mut(index) {
                    *slot = Some(task);
                }
                return Ok(());
            }
            if let Err(error) = self.enter(0) {
                self.end(index, task, Status::IoError, error.raw_os_error());
                return Err(error);
            }
        }
    }

    fn end(&mut self, index: usize, task: Task, status: Status, code: Option<i32>) {
        self.free.push(index);
        self.bytes -= task.weight;
        self.transfers -= usize::from(is_transfer(&task));
        self.finished.push((task, status, failure(status, code)));
    }

    /// Gives the kernel what was pushed and takes what is complete; requests that are not at their
    /// end go on. One system call, or none where there is nothing to do.
    pub fn turn(&mut self) -> io::Result<()> {
        self.waits = None;
        loop {
            if !self.ring.submission().is_empty() {
                self.enter(0)?;
            }
            self.reap()?;
            if self.ring.submission().is_empty() {
                self.at_once = self.in_flight() == 0;
                return Ok(());
            }
        }
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

    /// Takes completions; requests that are not at their end are queued again.
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
                Step::More => self.queue(index, task)?,
                Step::Done(status) => self.end(index, task, status, code),
            }
        }
    }

    /// Tasks that came to their end, to be taken from there.
    pub fn finished(&mut self) -> &mut Vec<Finished> {
        &mut self.finished
    }

    /// Waits until all tasks are at their end.
    pub fn drain(&mut self) -> io::Result<()> {
        loop {
            self.reap()?;
            if self.in_flight() == 0 {
                return Ok(());
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

/// How often this thread has waited for something.
fn waits() -> libc::c_long {
    // SAFETY: all of `rusage` may be zero, and the call writes nothing else.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage.ru_nvcsw
    }
}

fn is_transfer(task: &Task) -> bool {
    matches!(task.op, Op::Read | Op::Write { sync: false })
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
    let flags = match task.op {
        Op::Write { sync: true } => libc::RWF_DSYNC,
        _ => 0,
    };
    match (&task.op, iovecs) {
        // One buffer, as most have: there is no vector for the kernel to read.
        (Op::Read, [one]) => opcode::Read::new(DISK, one.iov_base.cast(), one.iov_len as u32)
            .offset(task.offset)
            .build(),
        (Op::Write { .. }, [one]) => {
            opcode::Write::new(DISK, one.iov_base.cast(), one.iov_len as u32)
                .offset(task.offset)
                .rw_flags(flags)
                .build()
        }
        (Op::Read, _) => opcode::Readv::new(DISK, pointer, count)
            .offset(task.offset)
            .build(),
        (Op::Write { .. }, _) => opcode::Writev::new(DISK, pointer, count)
            .offset(task.offset)
            .rw_flags(flags)
            .build(),
        (Op::Flush, _) => opcode::Fsync::new(DISK)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        (Op::Discard(ranges), _) => fallocate(ranges, |_| PUNCH),
        (Op::Zero { ranges, .. }, _) => fallocate(ranges, |range| zero_mode(range.unmap)),
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
