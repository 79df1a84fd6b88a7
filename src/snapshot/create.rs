//! Writing the two files of a snapshot.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use arch::memory::GuestMemory;
use nix::sys::utsname::uname;

use super::format::{MAX_FILE, Writer};
use super::image::{Base, Image, ImageWriter, MemoryMap, Watch, belongs, previous};
use super::plugged::{self, Plugged};
use super::protect::Protected;
use super::publish::Unpublished;
use super::ram::{self, Part};
use super::{
    CONFIG, FormatError, GUEST, GuestFacts, Layer, MACHINE, MEMORY, MachineState, ORIGIN, Origin,
    SnapshotError,
};
use crate::config::Config;
use crate::vm::build::random;

/// What is saved, and where.
#[derive(Clone)]
pub struct Request<'a> {
    /// The state file.
    pub state_path: &'a Path,
    /// The memory file.
    pub memory_path: &'a Path,
    /// The machine's configuration.
    pub config: &'a Config,
    /// Its state.
    pub machine: &'a MachineState,
    /// What is known of the guest.
    pub guest: &'a GuestFacts,
    /// Its RAM.
    pub memory: &'a GuestMemory,
    /// Where what nobody wrote of it comes from.
    pub origin: &'a ram::Origin,
    /// The snapshot that only changes are written since, where they are wanted.
    pub base: Option<Base>,
    /// Memory that devices bring and that is the guest's alone.
    pub plugged: &'a [Plugged<'a>],
    /// Who is told how far it is.
    pub watch: Option<Watch<'a>>,
}

/// A snapshot that was written.
#[derive(Debug)]
pub struct Created {
    /// Which one.
    pub id: [u8; 16],
    /// The memory file.
    pub memory: fs::File,
    /// What is where in it.
    pub map: MemoryMap,
    /// What a snapshot of the changes since would build on.
    pub base: Base,
}

impl From<Created> for Layer {
    fn from(created: Created) -> Self {
        let (file, path) = (created.memory, created.base.memory);
        Self {
            id: created.id,
            image: Image { file, path },
            map: created.map,
        }
    }
}

/// Writes a snapshot. Both files appear with all they have to have, or neither does.
///
/// # Errors
/// [`SnapshotError`]; files that were there before are untouched.
pub fn create(request: &Request<'_>) -> Result<Created, SnapshotError> {
    Files::new((request.state_path, request.memory_path))?.save(request)
}

/// What goes into the state file, beside the map of the memory file.
pub struct Parts<'a> {
    /// The machine's configuration.
    pub config: &'a Config,
    /// Its state.
    pub machine: &'a MachineState,
    /// What is known of the guest.
    pub guest: &'a GuestFacts,
}

/// Writes the state file of `parts` and the memory file that `fill` fills, to these two paths.
pub fn write(
    (state_path, memory_path): (&Path, &Path),
    parts: &Parts<'_>,
    fill: impl FnOnce(&fs::File, [u8; 16]) -> io::Result<MemoryMap>,
) -> Result<Created, SnapshotError> {
    Files::new((state_path, memory_path))?.write(parts, fill)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Write { path, source }
}

/// The two files of a snapshot, on their way to their names.
#[derive(Debug)]
pub struct Files {
    state: Unpublished,
    memory: Unpublished,
}

impl Files {
    /// Files that are to be at these two paths, for state and memory.
    ///
    /// # Errors
    /// [`SnapshotError`] where they cannot be written.
    pub fn new((state, memory): (&Path, &Path)) -> Result<Self, SnapshotError> {
        if same_file(state, memory) {
            let path = state.to_owned();
            return Err(SnapshotError::SamePath { path });
        }
        Ok(Self {
            state: Unpublished::new(state).map_err(failed(state))?,
            memory: Unpublished::new(memory).map_err(failed(memory))?,
        })
    }

    /// Their descriptors.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.state.as_raw_fd(), self.memory.as_raw_fd()]
    }

    /// Writes what `request` says, but to these files.
    ///
    /// # Errors
    /// [`SnapshotError`]; files that were there before are untouched.
    pub fn save(self, request: &Request<'_>) -> Result<Created, SnapshotError> {
        let parts = Parts {
            config: request.config,
            machine: request.machine,
            guest: request.guest,
        };
        self.write(&parts, |file, id| write_memory(request, id, file))
    }

    /// Writes `parts` and all of `protected` memory, which is no longer protected when that is in the file,
    /// unless `watch` ends it.
    ///
    /// # Errors
    /// [`SnapshotError`]; files that were there before are untouched.
    pub(super) fn save_protected(
        self,
        parts: &Parts<'_>,
        mut protected: Protected,
        watch: Watch<'_>,
    ) -> Result<Created, SnapshotError> {
        self.write(parts, |file, id| {
            let mut writer = ImageWriter::new(file, id).watched(Some(watch));
            protected.write(&mut writer)?;
            let regions = ram::regions(protected.memory());
            drop(protected);
            writer.finish(regions, None)
        })
    }

    fn write(
        mut self,
        parts: &Parts<'_>,
        fill: impl FnOnce(&fs::File, [u8; 16]) -> io::Result<MemoryMap>,
    ) -> Result<Created, SnapshotError> {
        let state_path = self.state.path().to_owned();
        let memory_path = self.memory.path().to_owned();
        let id = random().map_err(SnapshotError::Random)?;
        let map = fill(self.memory.file(), id).map_err(failed(&memory_path))?;
        let bytes = encode(parts, id, &map).map_err(SnapshotError::Encode)?;
        let len = bytes.len() as u64;
        if len > MAX_FILE {
            return Err(SnapshotError::Scattered { len });
        }
        io::Write::write_all(self.state.file(), &bytes).map_err(failed(&state_path))?;
        self.state.sync().map_err(failed(&state_path))?;
        let absolute = |path: &Path| std::path::absolute(path).map_err(failed(path));
        let base = Base {
            id,
            state: absolute(&state_path)?,
            memory: absolute(&memory_path)?,
        };
        let memory = publish(self.state, self.memory, (&state_path, &memory_path));
        Ok(Created {
            id,
            memory: memory.map_err(failed(&memory_path))?,
            map,
            base,
        })
    }
}

/// Gives both files their names. The memory file that had the name before stays until the new state
/// is there, so that the old state has its memory whenever this is cut short.
fn publish(
    state: Unpublished,
    memory: Unpublished,
    (state_path, path): (&Path, &Path),
) -> io::Result<fs::File> {
    let before = previous(path);
    let kept = match fs::hard_link(path, &before) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        // An interrupted snapshot left it. Of both, the one that the present state has is kept.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if belongs(state_path, path) {
                fs::remove_file(&before)?;
                fs::hard_link(path, &before)?;
            }
            true
        }
        Err(error) => return Err(error),
    };
    let memory = memory.publish()?;
    state.publish()?;
    if kept && let Err(error) = fs::remove_file(&before) {
        // Somebody else did, or does: nothing needs it any more.
        log::debug!("{} is not removed: {error}", before.display());
    }
    // Closing it would do, but it may stay open.
    let _ = memory.unlock();
    Ok(memory)
}

fn write_memory(request: &Request<'_>, id: [u8; 16], file: &fs::File) -> io::Result<MemoryMap> {
    let mut writer = ImageWriter::new(file, id).watched(request.watch);
    let part = match request.base {
        Some(_) => Part::Changes,
        None => Part::All,
    };
    ram::write(request.memory, request.origin, part, &mut writer)?;
    let regions = plugged::write_all(request.memory, request.plugged, &mut writer)?;
    writer.finish(regions, request.base.clone())
}

/// Writes the sections of `parts`, and between them what `memory` says of memory.
pub fn describe(
    writer: &mut Writer,
    parts: &Parts<'_>,
    memory: impl FnOnce(&mut Writer) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let config = serde_json::to_vec(parts.config).map_err(|error| {
        let (name, why) = (CONFIG.name, error.to_string());
        FormatError::Content { name, why }
    })?;
    writer.section(CONFIG, &config);
    writer.value(MACHINE, parts.machine)?;
    memory(writer)?;
    writer.value(GUEST, parts.guest)
}

fn encode(parts: &Parts<'_>, id: [u8; 16], map: &MemoryMap) -> Result<Vec<u8>, FormatError> {
    let mut writer = Writer::new(id);
    describe(&mut writer, parts, |writer| writer.value(MEMORY, map))?;
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let kernel = uname().map(|name| name.release().to_string_lossy().into_owned());
    let origin = Origin {
        bulle: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: kernel.unwrap_or_default(),
        time: since.unwrap_or(Duration::ZERO).as_secs(),
    };
    writer.value(ORIGIN, &origin)?;
    Ok(writer.finish())
}

/// Whether both are one file, which need not be there yet.
pub fn same_file(a: &Path, b: &Path) -> bool {
    let at = |path: &Path| -> Option<(u64, u64)> {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let name = |path: &Path| -> Option<PathBuf> {
        let parent = std::path::absolute(path).ok()?;
        let parent = parent.parent()?.canonicalize().ok()?;
        Some(parent.join(path.file_name()?))
    };
    a == b || name(a).is_some_and(|a| name(b) == Some(a)) || at(a).is_some_and(|a| at(b) == Some(a))
}
