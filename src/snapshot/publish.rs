//! Files that are there as a whole or not at all: written under a temporary name, synced, renamed.
//!
//! A crash at any moment leaves the old file or the new one, and at most a temporary one, whose name
//! begins with a dot, beside it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// Opens a file of a snapshot for reading. A pipe, of which nobody might write the other end, is refused.
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        )),
    }
}

/// Beginning of a temporary name.
const PREFIX: &str = ".bulle-";
/// End of it.
const SUFFIX: &str = ".tmp";

/// Whether this is the name of a file on its way to another.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX) && name.ends_with(SUFFIX)
}

/// A file on its way to its name, locked meanwhile.
#[derive(Debug)]
pub struct Unpublished {
    file: NamedTempFile,
    path: PathBuf,
}

impl Unpublished {
    /// A new file that is to be at `path`, in the same directory.
    pub fn new(path: &Path) -> io::Result<Self> {
        let file = tempfile::Builder::new()
            .prefix(PREFIX)
            .suffix(SUFFIX)
            .tempfile_in(directory(path))?;
        // Where files cannot be locked nothing is told apart from what was left behind.
        if let Err(error) = file.as_file().lock() {
            log::debug!("{} is not locked: {error}", file.path().display());
        }
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// The name that it is to have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to be written.
    pub fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Has the content on the disk; the name comes with [`publish`](Self::publish).
    pub fn sync(&self) -> io::Result<()> {
        self.file.as_file().sync_all()
    }

    /// Gives the file its name; what had it before is gone. [`sync`](Self::sync) came before. It is locked until
    /// the one that is returned is closed or unlocked.
    pub fn publish(self) -> io::Result<File> {
        let file = self.file.persist(&self.path).map_err(|error| error.error)?;
        File::open(directory(&self.path))?.sync_all()?;
        Ok(file)
    }
}

impl AsRawFd for Unpublished {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
