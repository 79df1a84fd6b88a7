//! The memory file: guest RAM region after region, with holes where there is nothing, and a trailer
//! that says which snapshot it belongs to.
//!
//! What is laid out where is in the state file ([`MemoryMap`]), with a checksum for each run of
//! data. A file of changes has data only where they are; the rest is in its base. Loading maps the
//! file copy-on-write, so the time it takes does not depend on its size.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::publish;

/// Bytes behind the last region.
pub const TRAILER_LEN: u64 = 64;
/// First bytes of the trailer.
const TRAILER: [u8; 8] = *b"BULLEMEM";
/// Most bytes of one run, which has one checksum.
pub const MAX_RUN: u64 = 2 << 20;
/// Most regions of a map: two of RAM, and those of devices.
const MAX_REGIONS: usize = 64;
/// Longest chain of files of changes.
pub const MAX_CHAIN: usize = 64;

/// A memory file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("Cannot open the memory file {}", path.display())]
    Open {
        /// As named.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error("Cannot read the memory file {}", path.display())]
    Read {
        /// As named.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// Shorter or longer than it should be.
    #[error("The memory file {} has {found} bytes, its snapshot was written with {expected}: it was cut short or is another one", path.display())]
    Length {
        /// As named.
        path: PathBuf,
        /// As it was written.
        expected: u64,
        /// As it is.
        found: u64,
    },
    /// Of another snapshot.
    #[error("The memory file {} belongs to another snapshot: name the one that was written with this state file", path.display())]
    Other {
        /// As named.
        path: PathBuf,
    },
    /// Written to since.
    #[error("The memory file {} was changed since the snapshot was taken: its time of change is another", path.display())]
    Changed {
        /// As named.
        path: PathBuf,
    },
    /// A checksum does not match.
    #[error("The memory file {} is damaged at byte {offset}", path.display())]
    Damaged {
        /// As named.
        path: PathBuf,
        /// Where.
        offset: u64,
    },
    /// What the state file says of memory cannot be.
    #[error("The snapshot's map of its memory is damaged: {why}")]
    Map {
        /// What is wrong.
        why: &'static str,
    },
    /// A file of changes whose base is not there.
    #[error("The snapshot has changes only, and its base {} cannot be loaded", path.display())]
    Base {
        /// State file of the base.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Guest memory in the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// A run of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Offset in the file, a multiple of a page.
    pub offset: u64,
    /// Bytes, a multiple of a page, at most [`MAX_RUN`].
    pub len: u64,
    /// CRC-32/ISO-HDLC of the data.
    pub crc: u32,
}

/// What identifies the very file that was written, as long as it is not copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    device: u64,
    inode: u64,
    seconds: i64,
    nanoseconds: i64,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            seconds: metadata.mtime(),
            nanoseconds: metadata.mtime_nsec(),
        })
    }
}

/// The snapshot that a file of changes builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Which snapshot.
    #[serde(with = "serde_bytes")]
    pub id: [u8; 16],
    /// Its state file, absolute.
    pub state: PathBuf,
    /// Its memory file, absolute.
    pub memory: PathBuf,
}

impl Base {
    /// Whether it is still where it was.
    pub fn is_there(&self) -> bool {
        ids(&self.state, &self.memory) == [Some(self.id); 2]
    }
}

/// What is where in a memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// Guest memory, in the order of offsets.
    pub regions: Vec<Region>,
    /// Where there is data, in the order of offsets.
    pub runs: Vec<Run>,
    /// The file as it was written.
    pub stamp: Stamp,
    /// Where the rest is; `None`: it is zeros.
    pub base: Option<Base>,
}

impl MemoryMap {
    /// Of a file in memory, in which no data are known yet.
    pub fn of(regions: Vec<Region>) -> Self {
        Self {
            regions,
            runs: Vec::new(),
            stamp: Stamp::default(),
            base: None,
        }
    }

    /// Bytes of guest memory.
    pub fn len(&self) -> u64 {
        self.regions
            .last()
            .map_or(0, |last| last.offset.saturating_add(last.len))
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks a map that comes from a file.
    ///
    /// # Errors
    /// [`ImageError::Map`].
    pub fn check(&self) -> Result<(), ImageError> {
        let wrong = |why| Err(ImageError::Map { why });
        let page = |value: u64| value.is_multiple_of(super::pages::PAGE);
        if self.regions.len() > MAX_REGIONS {
            return wrong("it has too many regions");
        }
        let mut end = 0;
        for region in &self.regions {
            if region.offset != end || region.len == 0 || !page(region.len) || !page(region.address)
            {
                return wrong("its regions do not follow each other");
            }
            let ends = end
                .checked_add(region.len)
                .zip(region.address.checked_add(region.len));
            let Some((next, _)) = ends else {
                return wrong("a region is too long");
            };
            end = next;
        }
        let mut behind = 0;
        for run in &self.runs {
            let next = run.offset.checked_add(run.len);
            if run.offset < behind || run.len == 0 || run.len > MAX_RUN {
                return wrong("its runs of data are not in order");
            }
            match next {
                Some(next) if next <= end && page(run.offset) && page(run.len) => behind = next,
                _ => return wrong("a run of data is outside of memory"),
            }
        }
        Ok(())
    }
}

/// Who is told how far writing is: bytes that are done, and all; `false` ends it.
pub type Watch<'a> = &'a dyn Fn(u64, u64) -> bool;

/// Nobody wants the snapshot any more.
#[derive(Debug, thiserror::Error)]
#[error("it was cancelled")]
pub struct Cancelled;

/// Writes a memory file: where there is data, and the trailer at the end.
pub struct ImageWriter<'a> {
    file: &'a File,
    id: [u8; 16],
    runs: Vec<Run>,
    /// Whether runs have their checksums.
    summed: bool,
    watch: Option<Watch<'a>>,
    /// Bytes that were looked at, and those that will have been.
    done: u64,
    total: u64,
}

impl<'a> ImageWriter<'a> {
    /// For the memory of the snapshot `id`, into an empty file.
    pub fn new(file: &'a File, id: [u8; 16]) -> Self {
        Self {
            file,
            id,
            runs: Vec::new(),
            summed: true,
            watch: None,
            done: 0,
            total: 0,
        }
    }

    /// Tells `watch` how far it is.
    pub fn watched(self, watch: Option<Watch<'a>>) -> Self {
        Self { watch, ..self }
    }

    /// So many bytes more are going to be written.
    pub fn expect(&mut self, bytes: u64) {
        self.total += bytes;
    }

    /// For a file in memory, which has neither checksums nor trailer.
    pub fn in_memory(file: &'a File) -> Self {
        Self {
            summed: false,
            ..Self::new(file, [0; 16])
        }
    }

    /// What was written so far, of memory in `regions`.
    pub fn into_map(self, regions: Vec<Region>) -> MemoryMap {
        MemoryMap {
            runs: self.runs,
            ..MemoryMap::of(regions)
        }
    }

    /// Writes `data`, a multiple of a page, to `offset`, leaving out pages of zeros where `sparse`.
    ///
    /// # Errors
    /// Of the file, and [`Cancelled`].
    pub fn write(&mut self, offset: u64, data: &[u8], sparse: bool) -> io::Result<()> {
        self.put_pages(offset, data, sparse)?;
        self.done += data.len() as u64;
        match self.watch {
            Some(watch) if !watch(self.done, self.total) => Err(io::Error::other(Cancelled)),
            _ => Ok(()),
        }
    }

    fn put_pages(&mut self, offset: u64, data: &[u8], sparse: bool) -> io::Result<()> {
        if !sparse {
            return self.put(offset, data);
        }
        let page = super::pages::PAGE as usize;
        let bytes = |from: usize, to: usize| data.get(from * page..to * page).unwrap_or_default();
        let mut first = None;
        for (index, content) in data.chunks(page).enumerate() {
            match (is_zero(content), first) {
                (false, None) => first = Some(index),
                (true, Some(from)) => {
                    self.put(offset + (from * page) as u64, bytes(from, index))?;
                    first = None;
                }
                _ => {}
            }
        }
        match first {
            Some(from) => self.put(
                offset + (from * page) as u64,
                bytes(from, data.len() / page),
            ),
            None => Ok(()),
        }
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        let mut at = offset;
        for data in data.chunks(MAX_RUN as usize) {
            self.runs.push(Run {
                offset: at,
                len: data.len() as u64,
                crc: if self.summed {
                    crc32fast::hash(data)
                } else {
                    0
                },
            });
            at += data.len() as u64;
        }
        Ok(())
    }

    /// Writes the trailer behind `regions` and has all of it on the disk.
    pub fn finish(mut self, regions: Vec<Region>, base: Option<Base>) -> io::Result<MemoryMap> {
        // They may come in any order.
        self.runs.sort_unstable_by_key(|run| run.offset);
        let mut map = MemoryMap {
            regions,
            runs: self.runs,
            stamp: Stamp::of(self.file)?,
            base,
        };
        let mut trailer = [0; TRAILER_LEN as usize];
        for (to, from) in trailer.iter_mut().zip(TRAILER.iter().chain(&self.id)) {
            *to = *from;
        }
        self.file.write_all_at(&trailer, map.len())?;
        self.file.sync_all()?;
        map.stamp = Stamp::of(self.file)?;
        // That may have taken long.
        match self.watch {
            Some(watch) if !watch(self.done, self.total) => Err(io::Error::other(Cancelled)),
            _ => Ok(map),
        }
    }
}

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: any bytes are valid integers.
    let (head, words, tail) = unsafe { page.align_to::<u128>() };
    head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

/// A memory file that fits its state file.
#[derive(Debug)]
pub struct Image {
    /// The file.
    pub file: File,
    /// Its name.
    pub path: PathBuf,
}

impl Image {
    /// Opens the memory file of the snapshot `id`: the one at `path`, or the one that had this name
    /// before a crash while the next was published.
    ///
    /// # Errors
    /// [`ImageError`] where it is none, or not the one that was written.
    pub fn open(path: &Path, id: [u8; 16], map: &MemoryMap) -> Result<Self, ImageError> {
        match Self::open_one(path, id, map) {
            Ok(image) => Ok(image),
            Err(error) => Self::open_one(&previous(path), id, map).map_err(|_| error),
        }
    }

    fn open_one(path: &Path, id: [u8; 16], map: &MemoryMap) -> Result<Self, ImageError> {
        let path = path.to_owned();
        let file = match publish::open(&path) {
            Ok(file) => file,
            Err(source) => return Err(ImageError::Open { path, source }),
        };
        match check_file(&file, &path, id, map) {
            Ok(()) => Ok(Self { file, path }),
            Err(error) => Err(error),
        }
    }

    /// Compares every run with its checksum.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] says where.
    pub fn verify(&self, map: &MemoryMap) -> Result<(), ImageError> {
        let mut buffer = vec![0; MAX_RUN as usize];
        for run in &map.runs {
            let data = buffer.get_mut(..run.len as usize).unwrap_or_default();
            let read = self.file.read_exact_at(data, run.offset);
            read.map_err(|source| ImageError::Read {
                path: self.path.clone(),
                source,
            })?;
            if crc32fast::hash(data) != run.crc {
                return Err(ImageError::Damaged {
                    path: self.path.clone(),
                    offset: run.offset,
                });
            }
        }
        Ok(())
    }
}

fn check_file(file: &File, path: &Path, id: [u8; 16], map: &MemoryMap) -> Result<(), ImageError> {
    let read = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let found = file.metadata().map_err(read)?.len();
    let expected = map.len().saturating_add(TRAILER_LEN);
    if found != expected {
        let path = path.to_owned();
        return Err(ImageError::Length {
            path,
            expected,
            found,
        });
    }
    let mut trailer = [0; TRAILER_LEN as usize];
    file.read_exact_at(&mut trailer, map.len()).map_err(read)?;
    let path = path.to_owned();
    if !trailer.starts_with(&TRAILER) || trailer.get(8..24) != Some(id.as_slice()) {
        return Err(ImageError::Other { path });
    }
    let stamp = Stamp::of(file).map_err(read)?;
    let same = (stamp.device, stamp.inode) == (map.stamp.device, map.stamp.inode);
    match same && stamp != map.stamp {
        true => Err(ImageError::Changed { path }),
        false => Ok(()),
    }
}

/// Whether the memory file at `memory` is the one of the state file at `state`, as far as can be read.
pub fn belongs(state: &Path, memory: &Path) -> bool {
    let [saved, memory] = ids(state, memory);
    saved.is_some() && saved == memory
}

/// Of which snapshot a state file and a memory file are, where they are any.
fn ids(state: &Path, memory: &Path) -> [Option<[u8; 16]>; 2] {
    let id = |path: &Path, at: fn(u64) -> u64, magic: [u8; 8], from: usize| -> Option<[u8; 16]> {
        let file = File::open(path).ok()?;
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, at(file.metadata().ok()?.len()))
            .ok()?;
        let id = bytes.get(from..from + 16)?.try_into().ok()?;
        bytes.starts_with(&magic).then_some(id)
    };
    let saved = id(state, |_| 0, super::format::MAGIC, super::format::ID_AT);
    let memory = id(memory, |len| len.saturating_sub(TRAILER_LEN), TRAILER, 8);
    [saved, memory]
}

/// The name that a memory file keeps until the state file of its successor is there.
pub fn previous(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".previous");
    path.with_file_name(name)
}
