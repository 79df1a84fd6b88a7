//! Copies a directory tree of the host into an archive.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::InitramfsError;
use super::archive::{Archive, Meta};

/// Directories still to be read: on the host, and their names in the archive.
type Pending = Vec<(PathBuf, Vec<u8>)>;

/// Adds everything in `root`, parents before children, in the order of names.
pub(super) fn pack(archive: &mut Archive<'_>, root: &Path) -> Result<(), InitramfsError> {
    let metadata = fs::metadata(root).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => InitramfsError::NoRoot {
            path: root.to_owned(),
        },
        _ => unreadable(root)(source),
    })?;
    if !metadata.is_dir() {
        return Err(InitramfsError::NotADirectory {
            path: root.to_owned(),
        });
    }
    archive.bytes(&meta_of(&metadata), b".", b"")?;
    let mut walk = Walk {
        device: metadata.dev(),
        links: HashMap::new(),
        pending: Vec::new(),
    };
    walk.pending.push((root.to_owned(), Vec::new()));
    while let Some((directory, name)) = walk.pending.pop() {
        walk.directory(archive, &directory, &name)?;
    }
    Ok(())
}

struct Walk {
    /// The file system of the root.
    device: u64,
    /// Inodes in the archive of files with several links, by inode on the host.
    links: HashMap<u64, u32>,
    pending: Pending,
}

impl Walk {
    fn directory(
        &mut self,
        archive: &mut Archive<'_>,
        directory: &Path,
        name: &[u8],
    ) -> Result<(), InitramfsError> {
        let unreadable = unreadable(directory);
        let entries: io::Result<Vec<fs::DirEntry>> =
            fs::read_dir(directory).and_then(Iterator::collect);
        let mut entries = entries.map_err(unreadable)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let file_name = entry.file_name();
            let mut child = Vec::with_capacity(name.len() + file_name.len() + 1);
            child.extend_from_slice(name);
            if !name.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(file_name.as_bytes());
            // The agent's own place.
            if child != b".bulle" {
                self.entry(archive, &entry, child)?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        archive: &mut Archive<'_>,
        entry: &fs::DirEntry,
        name: Vec<u8>,
    ) -> Result<(), InitramfsError> {
        let path = entry.path();
        let metadata = entry.metadata().map_err(unreadable(&path))?;
        let kind = metadata.file_type();
        let mut meta = meta_of(&metadata);
        if kind.is_dir() {
            archive.bytes(&meta, &name, b"")?;
            if metadata.dev() == self.device {
                self.pending.push((path, name));
            }
            return Ok(());
        }
        if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(unreadable(&path))?;
            return archive.bytes(&meta, &name, target.as_os_str().as_bytes());
        }
        if kind.is_socket() {
            return Ok(());
        }
        if !kind.is_file() {
            return archive.bytes(&meta, &name, b"");
        }
        if metadata.nlink() > 1 && metadata.dev() == self.device {
            let links = u32::try_from(metadata.nlink()).unwrap_or(u32::MAX);
            if let Some(inode) = self.links.get(&metadata.ino()) {
                meta.link = Some((*inode, links));
                return archive.bytes(&meta, &name, b"");
            }
            let inode = archive.new_inode();
            self.links.insert(metadata.ino(), inode);
            meta.link = Some((inode, links));
        }
        // Not through a link that took the file's place: it may lead out of the directory.
        archive.host_file(&meta, &name, &path, libc::O_NOFOLLOW)
    }
}

fn meta_of(metadata: &Metadata) -> Meta {
    let rdev = metadata.rdev();
    Meta {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: u32::try_from(metadata.mtime().max(0)).unwrap_or(u32::MAX),
        rdev: (libc::major(rdev), libc::minor(rdev)),
        link: None,
    }
}

fn unreadable(path: &Path) -> impl Fn(io::Error) -> InitramfsError {
    move |source| InitramfsError::Read {
        path: path.to_owned(),
        source,
    }
}
