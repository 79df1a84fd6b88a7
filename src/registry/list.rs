//! The commands' side: the entries of living microVMs, and the one that a name means.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::claim::{ASIDE, remove_stale};
use super::{About, RegistryError, SOCKET, STATE, failed};

/// Most bytes of a state file: a command line, written as JSON.
const MAX_STATE: u64 = 16 << 20;
/// Characters of a name for each that may be wrong in it, beside a first, for it to be offered.
const PER_SLIP: usize = 4;

/// A microVM that lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its directory.
    dir: PathBuf,
    /// What it was started with.
    pub about: About,
}

impl Entry {
    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// Whether its process still lives.
    pub fn is_alive(&self) -> bool {
        File::open(self.dir.join(STATE)).is_ok_and(is_held)
    }

    /// Removes it, if its process is gone.
    pub fn clean_up(&self) {
        remove_stale(&self.dir);
    }

    /// The entry in `dir`. `None`: nobody lives there.
    fn read(dir: PathBuf) -> Result<Option<Self>, RegistryError> {
        let path = dir.join(STATE);
        let error = |source| failed(&path, source);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(source) if is_gone(source.kind()) => return Ok(None),
            Err(source) => return Err(error(source)),
        };
        let mut text = Vec::new();
        let read = (&mut file).take(MAX_STATE).read_to_end(&mut text);
        read.map_err(error)?;
        if !is_held(file) {
            remove_stale(&dir);
            return Ok(None);
        }
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(ASIDE) {
            // Its microVM has ended and is about to remove it.
            return Ok(None);
        }
        let about = serde_json::from_slice(&text).map_err(|source| error(source.into()))?;
        Ok(Some(Self {
            name: name.into_owned(),
            about,
            dir,
        }))
    }
}

fn is_gone(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Whether a living process holds the lock of this file.
fn is_held(file: File) -> bool {
    matches!(
        Flock::lock(file, FlockArg::LockSharedNonblock),
        Err((_, Errno::EWOULDBLOCK))
    )
}

/// All that live below `base`, the oldest first. Stale entries are removed; those that cannot be read are
/// logged and left.
pub fn list(base: &Path) -> Result<Vec<Entry>, RegistryError> {
    let dirs = match fs::read_dir(base) {
        Ok(dirs) => dirs,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(base, error)),
    };
    let mut entries = Vec::new();
    for dir in dirs {
        let dir = dir.map_err(|error| failed(base, error))?.path();
        match Entry::read(dir) {
            Ok(entry) => entries.extend(entry),
            Err(error) => log::warn!("{}", crate::control::chain(&error)),
        }
    }
    entries.sort_by(|a, b| (a.about.created_ms, &a.name).cmp(&(b.about.created_ms, &b.name)));
    Ok(entries)
}

/// The one that is called `name`, or the only one whose name begins so.
pub fn find(base: &Path, name: &str) -> Result<Entry, RegistryError> {
    let mut entries = list(base)?;
    if let Some(at) = entries.iter().position(|entry| entry.name == name) {
        return Ok(entries.swap_remove(at));
    }
    let (mut matching, others): (Vec<_>, Vec<_>) = entries
        .into_iter()
        .partition(|entry| !name.is_empty() && entry.name.starts_with(name));
    let name = name.to_owned();
    match (matching.pop(), matching.is_empty()) {
        (Some(entry), true) => Ok(entry),
        (Some(entry), false) => {
            matching.push(entry);
            let names = matching.into_iter().map(|entry| entry.name).collect();
            Err(RegistryError::Ambiguous { name, names })
        }
        (None, _) => {
            let names = others.into_iter().map(|entry| entry.name);
            let slips = 1 + name.len() / PER_SLIP;
            let near = names.filter(|other| strsim::osa_distance(&name, other) <= slips);
            let near = near.collect();
            Err(RegistryError::Unknown { name, near })
        }
    }
}
