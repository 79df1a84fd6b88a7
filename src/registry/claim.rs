//! The microVM's side: an entry of its own while it lives.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{About, RegistryError, SOCKET, STATE, failed};

/// Times that a name is tried whose stale entry somebody else may be removing.
const ATTEMPTS: u32 = 5;
/// Time between them.
const PAUSE: Duration = Duration::from_millis(1);

/// How names of entries begin that are being removed, and no other.
pub const ASIDE: char = '.';

/// Where an entry is to be, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The base directory.
    pub base: PathBuf,
    /// The name; `None`: any that is free.
    pub name: Option<String>,
}

/// An entry that is held. Dropping it removes it.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    name: String,
    _lock: Flock<File>,
}

impl Claim {
    /// Makes an entry at `place` for this process.
    ///
    /// # Errors
    /// [`RegistryError::Taken`] where a living microVM has the name.
    pub fn new(place: &Place, about: &About) -> Result<Self, RegistryError> {
        make_dir(&place.base, true).map_err(|error| failed(&place.base, error))?;
        if let Some(name) = &place.name {
            return Self::named(&place.base, name, about);
        }
        loop {
            let name = random_name().map_err(|error| failed(&place.base, error))?;
            match Self::named(&place.base, &name, about) {
                Err(RegistryError::Taken { .. }) => {}
                other => return other,
            }
        }
    }

    fn named(base: &Path, name: &str, about: &About) -> Result<Self, RegistryError> {
        let dir = base.join(name);
        let text = serde_json::to_vec(about).map_err(|error| failed(&dir, error.into()))?;
        for _ in 0..ATTEMPTS {
            match write_state(&dir, &text) {
                Ok(lock) => {
                    let (name, _lock) = (name.to_owned(), lock);
                    return Ok(Self { dir, name, _lock });
                }
                // Whoever removes a stale entry was between our two steps.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&dir, error)),
            }
            if !remove_stale(&dir) {
                std::thread::sleep(PAUSE);
            }
        }
        let name = name.to_owned();
        Err(RegistryError::Taken { name })
    }

    /// The name that it has.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its control socket belongs.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// Listens at its control socket.
    pub fn listen(&self) -> io::Result<UnixListener> {
        let listener = UnixListener::bind(self.socket())?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Has its control socket lead to one that is elsewhere.
    pub fn link(&self, socket: &Path) -> io::Result<()> {
        symlink(std::path::absolute(socket)?, self.socket())
    }
}

impl Drop for Claim {
    /// The lock goes last.
    fn drop(&mut self) {
        discard(&self.dir);
    }
}

/// Makes a directory that only its owner may enter, unless it is there.
fn make_dir(path: &Path, parents: bool) -> io::Result<()> {
    let made = DirBuilder::new()
        .mode(0o700)
        .recursive(parents)
        .create(path);
    match made {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The state file, which is locked before it has its name.
fn write_state(dir: &Path, text: &[u8]) -> io::Result<Flock<File>> {
    make_dir(dir, false)?;
    let (mut file, path) = tempfile::NamedTempFile::new_in(dir)?.into_parts();
    file.write_all(text)?;
    let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    path.persist_noclobber(dir.join(STATE))?;
    Ok(locked)
}

/// Removes an entry whose process is gone; says whether it did.
pub fn remove_stale(dir: &Path) -> bool {
    let path = dir.join(STATE);
    let Ok(file) = File::open(&path) else {
        return false;
    };
    let Ok(locked) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return false;
    };
    // Whoever had the lock before may have put another microVM's entry there.
    let same = |a: Metadata, b: Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    let (ours, there) = (locked.metadata(), fs::metadata(&path));
    ours.and_then(|ours| Ok(same(ours, there?)))
        .unwrap_or(false)
        && discard(dir)
}

/// Removes an entry whose lock is held here; says whether it did. Its name is free at once, so that nothing of
/// a next entry is removed with it.
fn discard(dir: &Path) -> bool {
    let aside = dir.with_file_name(format!("{ASIDE}{}", random_name().unwrap_or_default()));
    let removed = fs::rename(dir, &aside).and_then(|()| fs::remove_dir_all(&aside));
    if let Err(error) = &removed {
        log::debug!("{} stays: {error}", dir.display());
    }
    removed.is_ok()
}

/// Eight digits that nobody has.
pub fn random_name() -> io::Result<String> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
    Ok(format!("{:08x}", u32::from_ne_bytes(bytes)))
}
