//! Snapshots that are written while the guest goes on.
//!
//! A child process has guest RAM as it is when the machine stands still, and writes all of it; the
//! machine stands still for as long as making the child takes. Pages that the guest writes to meanwhile
//! exist twice. (Write protection by userfaultfd was measured to take longer, and private mappings of
//! files, which RAM is that was loaded, cannot have it.) The vmm thread owns it.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::SnapshotError;
use super::create::{Files, Request};
use super::image::Watch;
use crate::control::chain;
use crate::sandbox::child::{self, Child};

/// Time between two words of how far it is.
const SAY_EVERY: Duration = Duration::from_millis(100);

/// A snapshot that is being written. Dropping it ends that; what was at its paths before stays.
#[derive(Debug)]
pub struct Background {
    child: Child,
    path: PathBuf,
    /// Temporary names, which go where the child did not come to use them.
    _files: Option<Files>,
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
            child,
            path,
            _files: files,
        })
    }

    /// The state file that it is written to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far it is, if that was said since the last call: bytes that are written, and all.
    pub fn progress(&mut self) -> Option<[u64; 2]> {
        self.child.progress()
    }

    /// Whether it is saved, once that is known.
    pub fn ended(&mut self) -> Option<Result<(), String>> {
        self.child.ended()
    }
}

impl AsFd for Background {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}
