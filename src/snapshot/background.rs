//! Snapshots that are written while the guest goes on.
//!
//! A child process has guest RAM as it is when the machine stands still, and writes all of it; the
//! machine stands still for as long as making the child takes. Pages that the guest writes to meanwhile
//! exist twice. Of RAM that a child would share, a thread writes what is protected ([`super::protect`]).
//! (For other RAM protection was measured to take longer, and private mappings of files, which RAM is that was
//! loaded, cannot have it.) The vmm thread owns it.

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::SnapshotError;
use super::create::{Files, Parts, Request};
use super::image::Watch;
use super::protect::Protected;
use crate::control::chain;
use crate::sandbox::child::{self, Child};
use crate::sandbox::thread::{Role, spawn};

/// Time between two words of how far it is.
const SAY_EVERY: Duration = Duration::from_millis(100);

/// A snapshot that is being written. Dropping it ends that; what was at its paths before stays.
#[derive(Debug)]
pub struct Background {
    writer: Writer,
    path: PathBuf,
    /// Temporary names, which go where the child did not come to use them.
    _files: Option<Files>,
}

#[derive(Debug)]
enum Writer {
    Child(Child),
    Thread(Thread),
}

/// A thread that writes, until this is dropped or it is done.
#[derive(Debug)]
struct Thread {
    shared: Arc<Shared>,
    /// Bytes that it had written when that was last asked for.
    heard: u64,
    handle: Option<JoinHandle<Result<(), String>>>,
}

/// What a thread that writes and who has it share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    over: AtomicBool,
    /// Bytes that are written, and all.
    progress: [AtomicU64; 2],
    /// Readable when it has something to say, or is done.
    event: EventFd,
}

impl Shared {
    fn tell(&self) {
        // A counter that is full is readable as well.
        let _ = self.event.write(1);
    }
}

/// Tells of the end of a thread, also by a panic.
struct Bell(Arc<Shared>);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
        self.0.tell();
    }
}

impl Background {
    /// Begins to write what `request` says to `files`. Memory may change once this has returned.
    ///
    /// # Errors
    /// Where the host has no room for another process.
    pub fn begin(files: Files, request: &Request<'_>) -> Result<Self, SnapshotError> {
        let path = request.state_path.to_owned();
        let kept = files.descriptors();
        let mut files = Some(files);
        let child = child::start(&kept, |mouth| {
            let Some(files) = files.take() else {
                return Ok(());
            };
            let said = Cell::new(Instant::now());
            let watch = |done, total| {
                if said.get().elapsed() >= SAY_EVERY {
                    said.set(Instant::now());
                    mouth.progress(done, total);
                }
                true
            };
            let watch: Option<Watch<'_>> = Some(&watch);
            let saved = files.save(&Request {
                watch,
                ..request.clone()
            });
            saved.map(drop).map_err(|error| chain(&error))
        });
        let child = child.map_err(SnapshotError::Process)?;
        Ok(Self {
            writer: Writer::Child(child),
            path,
            _files: files,
        })
    }

    /// As [`begin`](Self::begin), of memory that is `protected`.
    ///
    /// # Errors
    /// Where the host has no room for another thread; nothing is protected then.
    pub fn begin_protected(
        files: Files,
        request: &Request<'_>,
        protected: Protected,
    ) -> Result<Self, SnapshotError> {
        let path = request.state_path.to_owned();
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            over: AtomicBool::new(false),
            progress: Default::default(),
            event: event.map_err(SnapshotError::Process)?,
        });
        let bell = Bell(shared.clone());
        let (config, machine) = (request.config.clone(), request.machine.clone());
        let guest = request.guest.clone();
        let handle = spawn(Role::Writer, move || {
            let parts = Parts {
                config: &config,
                machine: &machine,
                guest: &guest,
            };
            let said = Cell::new(Instant::now());
            let watch = |done, total| {
                let [here, all] = &bell.0.progress;
                here.store(done, Ordering::Relaxed);
                all.store(total, Ordering::Relaxed);
                if said.get().elapsed() >= SAY_EVERY {
                    said.set(Instant::now());
                    bell.0.tell();
                }
                !bell.0.stop.load(Ordering::Relaxed)
            };
            let saved = files.save_protected(&parts, protected, &watch);
            saved.map(drop).map_err(|error| chain(&error))
        });
        let handle =
            handle.map_err(|error| SnapshotError::Process(std::io::Error::other(error)))?;
        let thread = Thread {
            shared,
            heard: 0,
            handle: Some(handle),
        };
        Ok(Self {
            writer: Writer::Thread(thread),
            path,
            _files: None,
        })
    }

    /// The state file that it is written to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest's memory is protected for it: mappings must stay as they are.
    pub fn is_protecting(&self) -> bool {
        matches!(self.writer, Writer::Thread(_))
    }

    /// How far it is, if that was said since the last call: bytes that are written, and all.
    pub fn progress(&mut self) -> Option<[u64; 2]> {
        match &mut self.writer {
            Writer::Child(child) => child.progress(),
            Writer::Thread(thread) => thread.progress(),
        }
    }

    /// Ends it, unless it has just been saved, and says whether it has.
    pub fn cancel(mut self) -> Result<(), String> {
        match &mut self.writer {
            Writer::Child(child) => child.cancel(),
            Writer::Thread(thread) => {
                thread.shared.stop.store(true, Ordering::Relaxed);
                thread.join()
            }
        }
    }

    /// Whether it is saved, once that is known.
    pub fn ended(&mut self) -> Option<Result<(), String>> {
        match &mut self.writer {
            Writer::Child(child) => child.ended(),
            Writer::Thread(thread) => thread.ended(),
        }
    }
}

impl Thread {
    fn progress(&mut self) -> Option<[u64; 2]> {
        let progress = self.shared.progress.each_ref();
        let progress @ [done, _] = progress.map(|bytes| bytes.load(Ordering::Relaxed));
        (std::mem::replace(&mut self.heard, done) != done).then_some(progress)
    }

    fn ended(&mut self) -> Option<Result<(), String>> {
        // One that is over says so once, and that is not lost here.
        let _ = self.shared.event.read();
        if !self.shared.over.load(Ordering::SeqCst) {
            return None;
        }
        Some(self.join())
    }

    fn join(&mut self) -> Result<(), String> {
        let result = self.handle.take().map(JoinHandle::join);
        let panicked = || Err("the thread that writes it panicked".to_owned());
        result.and_then(Result::ok).unwrap_or_else(panicked)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(handle) = self.handle.take()
            && handle.join().is_err()
        {
            log::error!("the thread that wrote a snapshot panicked");
        }
    }
}

impl AsFd for Background {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.writer {
            Writer::Child(child) => child.as_fd(),
            // SAFETY: the descriptor is open as long as `self`.
            Writer::Thread(thread) => unsafe {
                BorrowedFd::borrow_raw(thread.shared.event.as_raw_fd())
            },
        }
    }
}
