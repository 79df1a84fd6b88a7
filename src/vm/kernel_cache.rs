//! Unpacked kernels on disk, so that only the first start of a compressed image unpacks it.
//!
//! Used by the thread that builds the machine. The cache can only save time: whatever is wrong
//! with it goes to the debug log, and the kernel is unpacked. An entry is named by the identity
//! and the times of its image, written under a temporary name, renamed, and never changed after
//! that. Its checksum covers the name: neither damage nor a mix-up starts a wrong kernel.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use arch::kernel::{KernelEntry, KernelError, KernelImage};
use memmap2::{Mmap, MmapOptions};
use nix::unistd::geteuid;

/// To be counted up when what is in an entry changes.
const FORMAT: u32 = 1;
/// After the payload: its length and the checksum, both little-endian.
const TRAILER: usize = 12;
const MAX_ENTRIES: usize = 8;
const MAX_BYTES: u64 = 1 << 30;
/// How long an image must not have changed to be stored. File systems count time in steps (FAT:
/// 2 s), and two changes within one step cannot be told apart later.
const REST: Duration = Duration::from_secs(2);

/// Why the cache is of no use; for the debug log.
#[derive(Debug, thiserror::Error)]
enum CacheError {
    #[error("there is neither XDG_CACHE_HOME nor HOME")]
    NoPlace,
    #[error("{} belongs to another user or can be written by one", .0.display())]
    NotOurs(PathBuf),
    #[error("{} is damaged", .0.display())]
    Damaged(PathBuf),
    #[error("the image has changed a moment ago")]
    Unrested,
    #[error("it is too large")]
    TooLarge,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A kernel as it is in a bzImage, unpacked.
pub enum Unpacked {
    /// Just now.
    Fresh(Vec<u8>),
    /// By an earlier start.
    Cached(Cached),
}

/// An entry of the cache, checked.
pub struct Cached {
    map: Mmap,
    length: usize,
}

impl Deref for Unpacked {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Fresh(bytes) => bytes,
            Self::Cached(entry) => entry.map.get(..entry.length).unwrap_or_default(),
        }
    }
}

/// Unpacks `kernel` for `entry` and a machine with `ram` bytes of RAM, or takes it from the user's
/// cache if `cache` says so. `None` if nothing is to be unpacked for this entry.
pub fn unpack(
    kernel: &KernelImage,
    entry: KernelEntry,
    ram: u64,
    cache: bool,
) -> Result<Option<Unpacked>, KernelError> {
    let wanted = cache && kernel.is_bzimage() && entry != KernelEntry::Bzimage;
    let slot = kernel.file().filter(|_| wanted).and_then(|image| {
        let slot = user_directory().and_then(|directory| Slot::new(directory, image));
        slot.map_err(|error| log::debug!("no kernel cache: {error}"))
            .ok()
    });
    unpack_with(slot.as_ref(), || kernel.unpack(entry, ram))
}

fn unpack_with(
    slot: Option<&Slot>,
    unpack: impl FnOnce() -> Result<Option<Vec<u8>>, KernelError>,
) -> Result<Option<Unpacked>, KernelError> {
    let started = Instant::now();
    match slot.map(Slot::load).transpose() {
        Ok(Some(Some(entry))) => {
            log::debug!("kernel taken from the cache in {:.1?}", started.elapsed());
            return Ok(Some(Unpacked::Cached(entry)));
        }
        Ok(_) => {}
        Err(error) => log::debug!("kernel cache: {error}"),
    }
    let Some(bytes) = unpack()? else {
        return Ok(None);
    };
    log::debug!("kernel unpacked in {:.1?}", started.elapsed());
    let started = Instant::now();
    match slot.map(|slot| slot.store(&bytes)) {
        Some(Ok(())) => log::debug!("kernel put into the cache in {:.1?}", started.elapsed()),
        Some(Err(error)) => log::debug!("kernel not put into the cache: {error}"),
        None => {}
    }
    Ok(Some(Unpacked::Fresh(bytes)))
}

/// The user's cache directory, made if it is not there.
fn user_directory() -> Result<PathBuf, CacheError> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let root = geteuid().is_root();
    let place = place(variable("XDG_CACHE_HOME"), variable("HOME"), root);
    prepare(&place.ok_or(CacheError::NoPlace)?)
}

/// Where caches are to be, by the XDG Base Directory Specification (which ignores relative paths).
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// In this directory.
    Base(PathBuf),
    /// In `.cache` of this home.
    Home(PathBuf),
}

fn place(xdg: Option<PathBuf>, home: Option<PathBuf>, root: bool) -> Option<Place> {
    let absolute = |path: &PathBuf| path.is_absolute();
    xdg.filter(absolute)
        .map(Place::Base)
        .or_else(|| home.filter(absolute).map(Place::Home))
        .or_else(|| root.then(|| Place::Base(PathBuf::from("/var/cache"))))
}

/// The directory of the kernels there, made if need be: below a directory of this user, and nothing
/// above that. So root with another user's HOME (`sudo -E`) leaves nothing there.
fn prepare(place: &Place) -> Result<PathBuf, CacheError> {
    let base = match place {
        Place::Base(base) => base.clone(),
        Place::Home(home) => {
            check_user(home)?;
            create(home.join(".cache"))?
        }
    };
    check_user(&base)?;
    let own = create(base.join("bulle"))?;
    check_user(&own)?;
    let directory = create(own.join("kernels"))?;
    check_owner(
        &directory,
        &fs::metadata(&directory).map_err(io_at(&directory))?,
    )?;
    Ok(directory)
}

/// Makes a directory, for this user alone, unless there is one.
fn create(directory: PathBuf) -> Result<PathBuf, CacheError> {
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if !directory.is_dir() => Err(io_at(&directory)(error)),
        _ => Ok(directory),
    }
}

/// It must belong to this user.
fn check_user(path: &Path) -> Result<(), CacheError> {
    if fs::metadata(path).map_err(io_at(path))?.uid() == geteuid().as_raw() {
        Ok(())
    } else {
        Err(CacheError::NotOurs(path.to_path_buf()))
    }
}

/// Nobody but this user (and root) may be able to write.
fn check_owner(path: &Path, metadata: &Metadata) -> Result<(), CacheError> {
    if metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(CacheError::NotOurs(path.to_path_buf()))
    }
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> CacheError + '_ {
    |source| CacheError::Io {
        path: path.to_path_buf(),
        source,
    }
}

/// The place for one image in the cache.
struct Slot<'a> {
    directory: PathBuf,
    image: &'a File,
    name: String,
    /// That the image's last change was long enough ago when the slot was made.
    rested: bool,
}

impl<'a> Slot<'a> {
    fn new(directory: PathBuf, image: &'a File) -> Result<Self, CacheError> {
        let metadata = image.metadata().map_err(io_at(&directory))?;
        let rested = SystemTime::now()
            .duration_since(changed(&metadata))
            .is_ok_and(|time| time >= REST);
        Ok(Self {
            directory,
            image,
            name: entry_name(&metadata),
            rested,
        })
    }

    fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The entry, its checksum compared; `None` if there is none. A damaged one is removed.
    fn load(&self) -> Result<Option<Cached>, CacheError> {
        let path = self.path();
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(io_at(&path))?,
        };
        let metadata = file.metadata().map_err(io_at(&path))?;
        check_owner(&path, &metadata)?;
        let damaged = || {
            // If it cannot be removed, the next start finds it damaged again.
            let _ = fs::remove_file(&path);
            CacheError::Damaged(path.clone())
        };
        if !metadata.is_file() || metadata.len() <= TRAILER as u64 {
            return Err(damaged());
        }
        // SAFETY: nobody changes or cuts an entry after it has got its name, and nobody but this
        // user can (owner and mode of file are checked); removing it leaves the mapping intact.
        let map = unsafe { MmapOptions::new().populate().map_copy_read_only(&file) };
        let map = map.map_err(io_at(&path))?;
        let (payload, found) = map.split_last_chunk::<TRAILER>().ok_or_else(damaged)?;
        if *found != trailer(&self.name, payload) {
            return Err(damaged());
        }
        // The time of the last use, for eviction; without it, this entry goes earlier.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Cached {
            length: payload.len(),
            map,
        }))
    }

    /// Stores `payload`, unpacked from the image after this slot was made; then removes the
    /// entries that are too many.
    fn store(&self, payload: &[u8]) -> Result<(), CacheError> {
        if payload.len() as u64 > MAX_BYTES {
            return Err(CacheError::TooLarge);
        }
        let metadata = self.image.metadata().map_err(io_at(&self.directory))?;
        if !self.rested || entry_name(&metadata) != self.name {
            return Err(CacheError::Unrested);
        }
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
            file.write_all(payload)?;
            file.write_all(&trailer(&self.name, payload))?;
            file.persist(self.path())?;
            evict(&self.directory)
        };
        write().map_err(io_at(&self.directory))
    }
}

/// Everything that changes when another image is in the file.
fn entry_name(image: &Metadata) -> String {
    format!(
        "{FORMAT}-{:x}-{:x}-{:x}-{:x}.{:08x}-{:x}.{:08x}.vmlinux",
        image.dev(),
        image.ino(),
        image.size(),
        image.mtime(),
        image.mtime_nsec(),
        image.ctime(),
        image.ctime_nsec(),
    )
}

/// The last change of content or metadata.
fn changed(image: &Metadata) -> SystemTime {
    let content = (image.mtime(), image.mtime_nsec());
    let (seconds, nanos) = content.max((image.ctime(), image.ctime_nsec()));
    let since = |(seconds, nanos)| Duration::new(seconds, nanos);
    let epoch = SystemTime::UNIX_EPOCH;
    epoch
        + since((
            seconds.try_into().unwrap_or(0),
            nanos.try_into().unwrap_or(0),
        ))
}

fn trailer(name: &str, payload: &[u8]) -> [u8; TRAILER] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(name.as_bytes());
    hasher.update(payload);
    let mut trailer = [0; TRAILER];
    let (length, checksum) = trailer.split_at_mut(8);
    length.copy_from_slice(&(payload.len() as u64).to_le_bytes());
    checksum.copy_from_slice(&hasher.finalize().to_le_bytes());
    trailer
}

/// Removes the least recently used files that are too many or too large together; leftovers of
/// killed writers age as entries do.
fn evict(directory: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for file in fs::read_dir(directory)? {
        let file = file?;
        // Another process may have removed it meanwhile.
        if let Ok(metadata) = file.metadata() {
            files.push((
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.len(),
                file.path(),
            ));
        }
    }
    files.sort_by(|a, b| b.cmp(a));
    let mut total = 0;
    for (index, (_, _, size, path)) in files.iter().enumerate() {
        total += size;
        if index >= MAX_ENTRIES || total > MAX_BYTES {
            // Gone already, or a directory that is not ours to remove.
            let _ = fs::remove_file(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
