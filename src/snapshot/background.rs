//! Snapshots that are written while the guest goes on.
//!
//! A child process has guest RAM as it is when the machine stands still, and writes all of it; the
//! machine stands still for as long as making the child takes. Pages that the guest writes to meanwhile
//! exist twice. (Write protection by userfaultfd was measured to take longer, and private mappings of
//! files, which RAM is that was loaded, cannot have it.) The vmm thread owns it.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use super::SnapshotError;
use super::create::{Files, Request};
use crate::control::chain;
use crate::sandbox::child::{self, Child};

/// A snapshot that is being written.
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
        let child = child::start(&kept, || match files.take() {
            Some(files) => files.save(request).map(drop).map_err(|error| chain(&error)),
            None => Ok(()),
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
