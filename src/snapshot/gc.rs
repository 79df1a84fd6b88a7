//! What may go of a directory of snapshots: files that were not finished, and snapshots that nothing
//! builds on which is to be kept.
//!
//! Only files that look like a snapshot's are ever named. One that is being written is locked.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::format::{HEADER_LEN, ID_AT, MAGIC};
use super::image::{belongs, previous};
use super::{Snapshot, SnapshotError, publish, working_set};

/// Name of the state file in a snapshot's directory.
pub const STATE: &str = "state";
/// Name of the memory file.
pub const MEMORY: &str = "memory";
/// Files younger than this may be about to be locked.
const YOUNG: Duration = Duration::from_secs(1);

/// A file that may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Garbage {
    /// Which.
    pub path: PathBuf,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Why it may go.
    pub why: Why,
    /// Device and number of the file, which another may take the place of.
    inode: (u64, u64),
}

impl Garbage {
    /// Removes the file, unless another has its name by now, and says whether.
    ///
    /// # Errors
    /// Where it cannot be removed.
    pub fn remove(&self) -> io::Result<bool> {
        let is_it = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.inode);
        if is_it {
            fs::remove_file(&self.path)?;
        }
        Ok(is_it)
    }
}

/// Why a file may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A snapshot that was not finished.
    Unfinished,
    /// Part of one that was replaced.
    Replaced,
    /// Of a snapshot that nothing kept builds on.
    Unneeded,
}

/// Nothing can be said of a directory.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// It cannot be read.
    #[error("Cannot look through {}", path.display())]
    Read {
        /// The directory or file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// One that is to be kept cannot be loaded, so what it needs is not known.
    #[error("The snapshot {} is to be kept, and what it builds on is not known", path.display())]
    Kept {
        /// Its directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<SnapshotError>,
    },
}

/// What may go of `directory`, a snapshot's or one with directories of snapshots. With `keep`, the names of
/// some of these, also all snapshots that none of them builds on.
///
/// # Errors
/// [`GcError`]: a directory that cannot be read, or one that is to be kept and cannot be loaded.
pub fn garbage(directory: &Path, keep: Option<&[PathBuf]>) -> Result<Vec<Garbage>, GcError> {
    let mut places = vec![directory.to_owned()];
    // What a link leads to is not below it.
    let is_dir = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    places.extend(entries(directory)?.into_iter().filter(is_dir));
    let needed = keep.map(|names| needed(directory, names)).transpose()?;
    let mut all = Vec::new();
    for place in &places {
        let id = id_of(&place.join(STATE));
        match (&needed, id) {
            (Some(needed), Some(id)) if !needed.contains(&id) => {
                let [state, memory] = [place.join(STATE), place.join(MEMORY)];
                // The state goes first, so that a half is never taken for a whole.
                let beside = [previous(&memory), working_set::path(&memory)];
                let all_of_it = [state].into_iter().chain(beside).chain([memory]);
                all.extend(files(all_of_it, Why::Unneeded));
            }
            (_, Some(_)) => all.extend(replaced(place)),
            (_, None) => all.extend(first(place)?),
        }
        all.extend(unfinished(place)?);
    }
    Ok(all)
}

/// Ids of the snapshots at `names` below `directory` and of all that they build on.
fn needed(directory: &Path, names: &[PathBuf]) -> Result<BTreeSet<[u8; 16]>, GcError> {
    let mut ids = BTreeSet::new();
    for name in names {
        let path = directory.join(name);
        let snapshot = Snapshot::open(&path.join(STATE), &path.join(MEMORY));
        let snapshot = snapshot.map_err(|source| GcError::Kept {
            path,
            source: Box::new(source),
        })?;
        ids.extend(snapshot.layers.iter().map(|layer| layer.id));
    }
    Ok(ids)
}

/// The id in the header of a state file; `None` for anything else.
fn id_of(state: &Path) -> Option<[u8; 16]> {
    let mut head = [0; HEADER_LEN];
    publish::open(state)
        .ok()?
        .read_exact_at(&mut head, 0)
        .ok()?;
    let id = head.get(ID_AT..ID_AT + 16)?.try_into().ok()?;
    head.starts_with(&MAGIC).then_some(id)
}

/// The memory file that lost its state, where an interrupted snapshot left two.
fn replaced(place: &Path) -> Vec<Garbage> {
    let (state, memory) = (place.join(STATE), place.join(MEMORY));
    let before = previous(&memory);
    if belongs(&state, &memory) {
        files([before], Why::Replaced)
    } else if belongs(&state, &before) {
        files([memory], Why::Unfinished)
    } else {
        Vec::new()
    }
}

/// The memory file of a first snapshot that was interrupted before its state file, which is there under its temporary
/// name, had its own.
fn first(place: &Path) -> Result<Vec<Garbage>, GcError> {
    let (state, memory) = (place.join(STATE), place.join(MEMORY));
    let none = fs::symlink_metadata(state).is_err();
    let alone = none && temporary(place)?.iter().any(|left| belongs(left, &memory));
    let memory = alone.then_some(memory);
    Ok(files(memory, Why::Unfinished))
}

/// Temporary files that nobody writes any more.
fn unfinished(place: &Path) -> Result<Vec<Garbage>, GcError> {
    Ok(files(temporary(place)?, Why::Unfinished))
}

fn temporary(place: &Path) -> Result<Vec<PathBuf>, GcError> {
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(publish::is_temporary) && abandoned(path)
    };
    Ok(entries(place)?.into_iter().filter(is_ours).collect())
}

fn abandoned(path: &Path) -> bool {
    let Ok(file) = publish::open(path) else {
        return false;
    };
    let age = file.metadata().and_then(|metadata| metadata.modified());
    let old = age.is_ok_and(|time| time.elapsed().is_ok_and(|age| age >= YOUNG));
    old && file.try_lock().is_ok()
}

/// Those of `paths` that are there, and that nobody writes.
fn files(paths: impl IntoIterator<Item = PathBuf>, why: Why) -> Vec<Garbage> {
    let found = paths.into_iter().filter_map(|path| {
        let metadata = fs::symlink_metadata(&path).ok()?;
        let idle = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
        (metadata.is_file() && idle).then(|| Garbage {
            bytes: metadata.blocks() * 512,
            inode: (metadata.dev(), metadata.ino()),
            path,
            why,
        })
    });
    found.collect()
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, GcError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(directory)?;
        entries.map(|entry| Ok(entry?.path())).collect()
    };
    let mut entries = read().map_err(|source| GcError::Read {
        path: directory.to_owned(),
        source,
    })?;
    entries.sort();
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_took_the_place_of_one_that_may_go_stays() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(".bulle-left.tmp");
        let file = File::create(&left).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        drop(file);
        let found = garbage(dir.path(), None).unwrap();
        let [one] = found.as_slice() else {
            panic!("{found:?}");
        };
        let other = dir.path().join("other");
        fs::write(&other, "new").unwrap();
        fs::rename(&other, &left).unwrap();
        assert!(!one.remove().unwrap());
        assert_eq!(fs::read(&left).unwrap(), b"new");
        let again = garbage(dir.path(), None).unwrap();
        assert!(again.is_empty(), "it is young: {again:?}");
        let file = File::options().append(true).open(&left).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        drop(file);
        let again = garbage(dir.path(), None).unwrap();
        assert!(again.iter().all(|one| one.remove().unwrap()) && !left.exists());
    }
}
