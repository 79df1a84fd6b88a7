//! What clones are made of: a state that is decoded, and open files of memory; shared by all clones of a
//! process, and handed to other processes over a Unix socket.
//!
//! One message has `BULLETPL`, then as two u32 (little-endian) the version, 1, and the number of
//! descriptors, and these by SCM_RIGHTS: a file in memory with the state, and the memory files, the newest
//! changes first. The state is as in a state file, but has section `layers`, a list of the files'
//! maps, in place of `memory`. What is received is checked as a file is.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::create::{Parts, describe};
use super::fork::{memory_file, seal};
use super::format::{FormatError, Kind, MAX_FILE, Reader, Writer};
use super::image::{ImageError, ImageWriter, MAX_CHAIN, MemoryMap};
use super::{
    CONFIG, GUEST, Layer, MACHINE, Paging, Snapshot, merge, parse_config, socket, wrong_vcpus,
};

/// First bytes of the message.
const MAGIC: [u8; 8] = *b"BULLETPL";
/// Version of the message.
const VERSION: u32 = 1;
/// Bytes of the message.
const HEAD: usize = 16;
/// Maps of the memory files.
const LAYERS: Kind = Kind::mandatory("layers", 1);

/// A template cannot be made, sent or received.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The host.
    #[error("cannot {what} what clones are made of")]
    Host {
        /// Which step.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The state.
    #[error("the state of a template is damaged")]
    Format(#[from] FormatError),
    /// What it says of memory.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Something else than a template.
    #[error("what was received is no template of this version: {why}")]
    Strange {
        /// What is wrong.
        why: &'static str,
    },
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> TemplateError {
    move |source| TemplateError::Host { what, source }
}

fn strange(why: &'static str) -> TemplateError {
    TemplateError::Strange { why }
}

/// What clones are made of.
#[derive(Clone, Debug)]
pub struct Template {
    snapshot: Arc<Snapshot>,
    /// The state as it is sent.
    state: Arc<File>,
}

impl Deref for Template {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl Template {
    /// Clones are made of `snapshot`, and its files stay open.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn new(snapshot: Snapshot) -> Result<Self, TemplateError> {
        let bytes = encode(&snapshot)?;
        let file = memory_file(c"bulle-template").map_err(failed("keep"))?;
        let written = file.write_all_at(&bytes, 0).and_then(|()| seal(&file));
        written.map_err(failed("keep"))?;
        Ok(Self {
            snapshot: Arc::new(snapshot),
            state: Arc::new(file),
        })
    }

    /// As [`new`](Self::new), with the memory copied to one file in memory: no clone needs the disk, and
    /// the snapshot's files may go or change.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn in_memory(mut snapshot: Snapshot) -> Result<Self, TemplateError> {
        let file = memory_file(c"bulle-template-memory").map_err(failed("keep"))?;
        let mut writer = ImageWriter::in_memory(&file);
        let regions = merge::copy_all(&snapshot, &mut writer).map_err(failed("copy"))?;
        let map = writer.into_map(regions);
        let sealed = file.set_len(map.len()).and_then(|()| seal(&file));
        sealed.map_err(failed("keep"))?;
        snapshot.layers = vec![Arc::new(Layer::in_memory(file, map))];
        snapshot.path = PathBuf::new();
        Self::new(snapshot)
    }

    /// Sends it. The receiver may make clones of it for as long as it likes.
    ///
    /// # Errors
    /// Of the socket.
    pub fn send(&self, to: &UnixStream) -> Result<(), TemplateError> {
        let layers = self.layers.iter().map(|layer| layer.image.file.as_raw_fd());
        let fds: Vec<RawFd> = [self.state.as_raw_fd()].into_iter().chain(layers).collect();
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend((fds.len() as u32).to_le_bytes());
        socket::send(to, &head, &fds).map_err(failed("send"))
    }
}

/// Receives what [`Template::send`] sent.
///
/// # Errors
/// Of the socket, and where something else comes.
pub fn receive(from: &UnixStream) -> Result<Snapshot, TemplateError> {
    let mut head = [0; HEAD];
    let mut files = receive_files(from, &mut head).map_err(failed("receive"))?;
    let number = |at: usize| {
        let bytes = head.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    if !head.starts_with(&MAGIC) || number(8) != Some(VERSION) {
        return Err(strange("its beginning is another"));
    }
    if files.is_empty() || number(12) != u32::try_from(files.len()).ok() {
        return Err(strange("descriptors are missing"));
    }
    let state = files.remove(0);
    let len = state.metadata().map_err(failed("read"))?.len();
    if len > MAX_FILE {
        return Err(strange("its state is too long"));
    }
    let mut bytes = vec![0; len as usize];
    state.read_exact_at(&mut bytes, 0).map_err(failed("read"))?;
    decode(&bytes, files)
}

fn receive_files(from: &UnixStream, head: &mut [u8; HEAD]) -> io::Result<Vec<File>> {
    let mut space = nix::cmsg_space!([RawFd; MAX_CHAIN + 1]);
    let mut slices = [IoSliceMut::new(head)];
    let message = recvmsg::<()>(
        from.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL,
    )?;
    let mut files = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just given us these descriptors, and nobody else has them.
            files.extend(
                fds.into_iter()
                    .map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })),
            );
        }
    }
    match message.bytes {
        HEAD => Ok(files),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, FormatError> {
    let mut writer = Writer::new(snapshot.id);
    let parts = Parts {
        config: &snapshot.config,
        machine: &snapshot.machine,
        guest: &snapshot.guest,
    };
    let maps: Vec<&MemoryMap> = snapshot.layers.iter().map(|layer| &layer.map).collect();
    describe(&mut writer, &parts, |writer| writer.value(LAYERS, &maps))?;
    Ok(writer.finish())
}

fn decode(bytes: &[u8], files: Vec<File>) -> Result<Snapshot, TemplateError> {
    let reader = Reader::new(bytes)?;
    reader.only_knows(&[CONFIG, MACHINE, GUEST, LAYERS])?;
    let maps: Vec<MemoryMap> = reader.value(LAYERS)?;
    if maps.len() != files.len() {
        return Err(strange("its memory files are not those of its state"));
    }
    let mut layers = Vec::new();
    for (map, file) in maps.into_iter().zip(files) {
        map.check()?;
        if file.metadata().map_err(failed("read"))?.len() < map.len() {
            return Err(strange("a memory file is too short"));
        }
        layers.push(Arc::new(Layer::in_memory(file, map)));
    }
    let (config, machine) = (parse_config(&reader)?, reader.value(MACHINE)?);
    if let Some(why) = wrong_vcpus(&config, &machine) {
        return Err(strange(why));
    }
    Ok(Snapshot {
        id: reader.id(),
        path: PathBuf::new(),
        config,
        machine: Arc::new(machine),
        guest: reader.value(GUEST)?,
        layers,
        paging: Paging::Mapped,
        reading: None,
        origin: None,
    })
}

#[cfg(test)]
mod tests;
