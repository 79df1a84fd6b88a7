//! Saving a paused machine to two files, and reading them again.
//!
//! [`create`] writes a state file ([`format`]) and a memory file ([`image`]); [`Snapshot::open`]
//! reads the one and opens the other, with all that a file of changes builds on. Everything read is
//! untrusted. The vmm thread owns both. Files appear as a whole or not at all ([`publish`]).

pub mod background;
mod create;
pub mod exclusive;
pub mod fork;
pub mod format;
pub mod gc;
pub mod image;
mod merge;
pub mod own;
pub mod pages;
pub mod plugged;
pub mod protect;
mod publish;
pub mod ram;
mod reading;
mod rebind;
mod retired;
pub mod socket;
pub mod template;
#[cfg(test)]
mod tests;
pub mod uffd;
pub mod working_set;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arch::state::{VcpuState, VmState};
use serde::{Deserialize, Serialize};

pub use self::create::{Created, Files, Request, create, same_file};
use self::format::{FormatError, Kind, MAX_FILE, Reader};
use self::image::{Base, Image, ImageError, MAX_CHAIN, MemoryMap, Region};
pub use self::merge::merge;
pub use self::plugged::Plugged;
pub use self::reading::{OnRead, Reading};
pub use self::rebind::{NetworkRebind, Overrides, RebindError};
pub use self::template::Template;
use self::working_set::WorkingSet;
use crate::board::BoardState;
use crate::config::{Config, MAX_VCPUS};
use crate::guest::client::Talk;

/// Configuration of the machine, as JSON.
const CONFIG: Kind = Kind::mandatory("config", 1);
/// [`MachineState`].
const MACHINE: Kind = Kind::mandatory("machine", 1);
/// [`MemoryMap`].
const MEMORY: Kind = Kind::mandatory("memory", 1);
/// [`GuestFacts`].
const GUEST: Kind = Kind::mandatory("guest", 1);
/// [`Origin`]: for people.
const ORIGIN: Kind = Kind::optional("origin", 1);
/// All that this bulle knows.
const KNOWN: [Kind; 5] = [CONFIG, MACHINE, MEMORY, GUEST, ORIGIN];

/// A machine without its configuration and its memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// What the vCPUs share.
    pub vm: VmState,
    /// Each vCPU, by index.
    pub vcpus: Vec<VcpuState>,
    /// Devices.
    pub board: BoardState,
}

/// What the host's side of the session knows of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFacts {
    /// Release of its kernel, where the kernel's file says.
    pub release: String,
    /// bulle's agent in it, where it waits for a command.
    #[serde(default)]
    pub agent: Option<AgentReady>,
    /// The conversation with an agent that does not wait for a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub talk: Option<Box<AgentTalk>>,
}

/// An agent that runs its command, or is not there yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentTalk {
    /// Whether it chose the port of the virtio console, not COM2; `None`: it is not known yet.
    pub port: Option<bool>,
    /// Whether its command has a terminal.
    pub tty: bool,
    /// What was said.
    pub client: Talk,
}

/// An agent that has said Hello and waits for Start (docs/agent-protocol.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentReady {
    /// Bytes of input that it takes before it grants more.
    pub window: u32,
    /// Its features.
    pub features: u32,
    /// Whether it chose the port of the virtio console, not COM2.
    pub port: bool,
}

/// Where a snapshot was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Version of bulle.
    pub bulle: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// Seconds since 1970.
    pub time: u64,
}

/// A snapshot cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state file cannot be opened or read.
    #[error("Cannot read the state file {}", path.display())]
    Read {
        /// As named.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// Far too long for one.
    #[error("{} has {len} bytes, a state file has at most {MAX_FILE}: name the state file, not the memory file", path.display())]
    TooLong {
        /// As named.
        path: PathBuf,
        /// Bytes.
        len: u64,
    },
    /// Far too much to say of memory.
    #[error(
        "a state file of {len} bytes would be needed, since what is written of guest memory is scattered, and it has \
         at most {MAX_FILE}: save all of it (Full)"
    )]
    Scattered {
        /// Bytes.
        len: u64,
    },
    /// What is in it.
    #[error("Cannot load the state file {}", path.display())]
    Format {
        /// As named.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
    /// It cannot be put together.
    #[error("Cannot save the machine's state")]
    Encode(#[source] FormatError),
    /// It contradicts itself.
    #[error("The state file {} is damaged: {why}", path.display())]
    State {
        /// As named.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The memory file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file cannot be written; what was there before still is.
    #[error("Cannot write {}: nothing was changed", path.display())]
    Write {
        /// As named.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// One file for both.
    #[error("State and memory cannot both go to {}: name two files", path.display())]
    SamePath {
        /// As named.
        path: PathBuf,
    },
    /// No process that writes.
    #[error(
        "Cannot make a process that writes the snapshot: check the limits on processes and memory (ulimit -u, \
         pids cgroup, vm.overcommit_memory), or save without background"
    )]
    Process(#[source] io::Error),
    /// Random numbers.
    #[error("Cannot get random numbers for the snapshot's id")]
    Random(#[source] io::Error),
}

/// One memory file of a chain.
#[derive(Debug)]
pub struct Layer {
    /// Which snapshot it belongs to.
    pub id: [u8; 16],
    /// The file.
    pub image: Image,
    /// What is where in it.
    pub map: MemoryMap,
}

impl Layer {
    /// In a file that has no name.
    fn in_memory(file: File, map: MemoryMap) -> Self {
        let path = PathBuf::from("in memory");
        Self {
            id: [0; 16],
            image: Image { file, path },
            map,
        }
    }
}

/// How a machine's memory comes to be there.
#[derive(Clone, Debug, Default)]
pub enum Paging {
    /// Memory files are mapped, or copied to reserved huge pages.
    #[default]
    Mapped,
    /// bulle brings each page from the memory files when it is touched, and this working set early.
    Lazy(Option<WorkingSet>),
    /// Another process does.
    Handler {
        /// The socket that it listens at.
        path: PathBuf,
        /// What is where in the memory file that it has.
        regions: Vec<Region>,
    },
}

/// A snapshot, read and checked.
#[derive(Debug)]
pub struct Snapshot {
    /// Which one.
    pub id: [u8; 16],
    /// The state file; empty where there is none, since it is in memory.
    pub path: PathBuf,
    /// The machine's configuration.
    pub config: Config,
    /// Its state.
    pub machine: Arc<MachineState>,
    /// What is known of the guest.
    pub guest: GuestFacts,
    /// Its memory: the newest changes first, the file that has all last. None where a handler has it.
    pub layers: Vec<Arc<Layer>>,
    /// How its memory comes to be there.
    pub paging: Paging,
    /// Where it was taken.
    pub origin: Option<Origin>,
    /// Who watches what is read of it.
    pub reading: Option<Reading>,
}

/// What is read of a state file before its memory is opened.
struct Parts {
    id: [u8; 16],
    config: Config,
    machine: MachineState,
    memory: MemoryMap,
    guest: GuestFacts,
    origin: Option<Origin>,
}

impl Snapshot {
    /// Reads the state file at `state` and opens its memory at `memory`, with what that builds on.
    ///
    /// # Errors
    /// [`SnapshotError`] says which file is wrong, and how.
    pub fn open(state: &Path, memory: &Path) -> Result<Self, SnapshotError> {
        let parts = read_parts(state)?;
        let layers = open_layers(&parts, memory)?;
        Ok(Self::new(state, parts, layers, Paging::Mapped))
    }

    /// Reads the state file at `state`, whose memory a process brings that listens at `handler`.
    ///
    /// # Errors
    /// [`SnapshotError`] of the state file; the handler is asked when the machine is made.
    pub fn open_state(state: &Path, handler: &Path) -> Result<Self, SnapshotError> {
        let parts = read_parts(state)?;
        let paging = Paging::Handler {
            path: handler.to_owned(),
            regions: parts.memory.regions.clone(),
        };
        Ok(Self::new(state, parts, Vec::new(), paging))
    }

    fn new(state: &Path, parts: Parts, layers: Vec<Arc<Layer>>, paging: Paging) -> Self {
        Self {
            id: parts.id,
            path: state.to_owned(),
            config: parts.config,
            machine: Arc::new(parts.machine),
            guest: parts.guest,
            layers,
            paging,
            origin: parts.origin,
            reading: None,
        }
    }

    /// Has `on_read` told what is read before a machine of this is there, which it can end. Configuration and paging are
    /// what they will be.
    pub fn watch(&mut self, on_read: OnRead) {
        self.reading = Some(Reading::new(self, on_read));
    }

    /// So many bytes more are read.
    fn read(&self, bytes: u64) -> Result<(), ram::MapError> {
        self.reading.as_ref().map_or(Ok(()), |r| r.add(bytes))
    }

    /// What a snapshot of the changes since this one would build on.
    pub fn as_base(&self) -> io::Result<Option<Base>> {
        let (Some(top), false) = (self.layers.first(), self.path.as_os_str().is_empty()) else {
            return Ok(None);
        };
        Ok(Some(Base {
            id: self.id,
            state: std::path::absolute(&self.path)?,
            memory: std::path::absolute(&top.image.path)?,
        }))
    }

    /// Compares all data of all memory files with their checksums.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] says where.
    pub fn verify(&self) -> Result<(), ImageError> {
        let mut layers = self.layers.iter();
        layers.try_for_each(|layer| layer.image.verify(&layer.map))
    }
}

/// The version of the state file at `path`, also of one that another bulle wrote.
///
/// # Errors
/// [`SnapshotError::Read`], and [`SnapshotError::Format`] for something else than a state file.
pub fn format_version(path: &Path) -> Result<u16, SnapshotError> {
    let bytes = read_begin(path, format::HEADER_LEN as u64)?;
    let path = path.to_owned();
    match format::header(&bytes) {
        Ok((_, version)) => Ok(version),
        Err(source) => Err(SnapshotError::Format { path, source }),
    }
}

/// Reads a state file's bytes, no more than one can have.
fn read_file(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_begin(path, MAX_FILE + 1)?;
    match bytes.len() as u64 {
        len if len > MAX_FILE => {
            let path = path.to_owned();
            Err(SnapshotError::TooLong { path, len })
        }
        _ => Ok(bytes),
    }
}

/// Reads the first bytes of a file, at most so many.
fn read_begin(path: &Path, most: u64) -> Result<Vec<u8>, SnapshotError> {
    let failed = |source| SnapshotError::Read {
        path: path.to_owned(),
        source,
    };
    let file = publish::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    let read = file.take(most).read_to_end(&mut bytes);
    read.map(|_| bytes).map_err(failed)
}

/// Reads the bytes of a state file as far as that goes without its memory.
///
/// # Errors
/// [`SnapshotError`] says what is wrong with them; `path` is the name they go by.
pub fn check(bytes: &[u8], path: &Path) -> Result<(), SnapshotError> {
    parts_of(bytes, path).map(|_| ())
}

fn read_parts(path: &Path) -> Result<Parts, SnapshotError> {
    parts_of(&read_file(path)?, path)
}

fn parts_of(bytes: &[u8], path: &Path) -> Result<Parts, SnapshotError> {
    let parts = parse(bytes).map_err(|source| SnapshotError::Format {
        path: path.to_owned(),
        source,
    })?;
    if let Some(why) = wrong_vcpus(&parts.config, &parts.machine) {
        let path = path.to_owned();
        return Err(SnapshotError::State { path, why });
    }
    parts.memory.check()?;
    Ok(parts)
}

/// What is wrong with the vCPUs of a state, if anything is.
fn wrong_vcpus(config: &Config, machine: &MachineState) -> Option<&'static str> {
    let vcpus = &machine.vcpus;
    if vcpus.len() != usize::from(config.machine_config.vcpu_count)
        || vcpus.len() > usize::from(MAX_VCPUS)
    {
        return Some("its vCPUs are not those of its configuration");
    }
    let in_order = (0..).zip(vcpus).all(|(index, vcpu)| vcpu.index == index);
    (!in_order).then_some("its vCPUs are not in order")
}

fn parse_config(reader: &Reader<'_>) -> Result<Config, FormatError> {
    serde_json::from_slice(reader.get(CONFIG)?).map_err(|error| {
        let (name, why) = (CONFIG.name, error.to_string());
        FormatError::Content { name, why }
    })
}

fn parse(bytes: &[u8]) -> Result<Parts, FormatError> {
    let reader = Reader::new(bytes)?;
    reader.only_knows(&KNOWN)?;
    Ok(Parts {
        id: reader.id(),
        config: parse_config(&reader)?,
        machine: reader.value(MACHINE)?,
        memory: reader.value(MEMORY)?,
        guest: reader.value(GUEST)?,
        origin: reader.value(ORIGIN).ok(),
    })
}

/// Opens the memory file of `top` and those it builds on.
fn open_layers(top: &Parts, memory: &Path) -> Result<Vec<Arc<Layer>>, SnapshotError> {
    let mut layers = vec![Arc::new(Layer {
        id: top.id,
        image: Image::open(memory, top.id, &top.memory)?,
        map: top.memory.clone(),
    })];
    while let Some(base) = layers.last().and_then(|layer| layer.map.base.clone()) {
        if layers.len() >= MAX_CHAIN {
            let why = "its changes build on too many others";
            return Err(ImageError::Map { why }.into());
        }
        let beside = layers.last().map(|layer| layer.image.path.clone());
        let layer = open_base(&base, beside.as_deref()).map_err(|error| ImageError::Base {
            path: base.state.clone(),
            source: error.into(),
        })?;
        let regions = &top.memory.regions;
        // Memory of devices lies behind RAM and is whole in every file.
        let ram = layer
            .map
            .regions
            .iter()
            .zip(regions)
            .take(2)
            .all(|(a, b)| a == b);
        if !ram {
            let why = "it has another layout than what it builds on";
            return Err(ImageError::Map { why }.into());
        }
        layers.push(Arc::new(layer));
    }
    Ok(layers)
}

/// Opens what a file of changes builds on: where it was, or in the directory of those changes.
fn open_base(base: &Base, beside: Option<&Path>) -> Result<Layer, SnapshotError> {
    let open = |state: &Path, memory: &Path| {
        let parts = read_parts(state)?;
        if parts.id != base.id {
            let path = memory.to_owned();
            return Err(SnapshotError::from(ImageError::Other { path }));
        }
        Ok(Layer {
            id: parts.id,
            image: Image::open(memory, parts.id, &parts.memory)?,
            map: parts.memory,
        })
    };
    let moved =
        |path: &Path| -> Option<PathBuf> { Some(beside?.with_file_name(path.file_name()?)) };
    open(&base.state, &base.memory).or_else(|error| {
        match (moved(&base.state), moved(&base.memory)) {
            (Some(state), Some(memory)) => open(&state, &memory).map_err(|_| error),
            _ => Err(error),
        }
    })
}
