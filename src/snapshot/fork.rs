//! The memory of a machine that goes on, frozen for others: nothing is written to disk.
//!
//! RAM that is a file in memory becomes a private mapping of it in the time that it takes to move page
//! tables; of other RAM, what no file has yet is copied to one in memory. So the first fork of a machine
//! freezes or copies all of its RAM, and each further one copies what changed. The vmm thread owns it. The
//! machine is paused and its devices are at rest during [`Frozen::new`], not after it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use arch::memory::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Layer;
use super::image::{ImageWriter, MAX_CHAIN, MemoryMap};
use super::pages::Pagemap;
use super::plugged::{self, Plugged};
use super::ram::{self, Origin, Part, Retired};

/// Longest chain that RAM is moved onto. Once it is there, each fork copies what changed since then.
const MAX_LAYERS: usize = 32;
/// What nobody may do to a frozen file any more: write to it, make holes in it, change its length.
const SEALS: i32 = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;

/// Memory cannot be frozen. The machine can go on as it is.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} the memory that clones are to share")]
pub struct ForkError {
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ForkError {
    move |source| ForkError { what, source }
}

/// What a machine's RAM is.
#[derive(Clone, Debug, Default)]
pub struct Ram {
    /// Where the content that nobody wrote comes from.
    pub origin: Origin,
    /// The files that it is a private mapping of, the newest changes first; none where it is of none
    /// that are known.
    pub layers: Vec<Arc<Layer>>,
}

impl Ram {
    /// Has `memory`, which is this, go on as a private mapping of `top` too, to which `part` of it was
    /// just written. What was mapped before goes to `retired`.
    pub fn onto(
        &self,
        memory: &GuestMemory,
        top: Arc<Layer>,
        part: Part,
        retired: &mut Vec<Retired>,
    ) -> Self {
        let file = (&top.image.file, &top.map);
        match ram::rebase(memory, file, part, &self.origin, retired) {
            Ok(origin) => {
                let mut layers = vec![top];
                if part == Part::Changes {
                    layers.extend_from_slice(&self.layers);
                }
                Self { origin, layers }
            }
            Err(error) => {
                log::warn!("what changes of guest memory is not known from here on: {error}");
                Self {
                    origin: ram::anywhere(memory),
                    layers: Vec::new(),
                }
            }
        }
    }
}

/// A machine's memory, frozen.
#[derive(Debug)]
pub struct Frozen {
    layers: Vec<Arc<Layer>>,
    own: Option<Ram>,
    retired: Vec<Retired>,
}

impl Frozen {
    /// Freezes `memory`, which is `ram`, and what is `plugged` beside it.
    ///
    /// # Errors
    /// [`ForkError`].
    pub fn new(
        memory: &GuestMemory,
        plugged: &[Plugged<'_>],
        ram: &Ram,
    ) -> Result<Self, ForkError> {
        match ram.origin {
            Origin::Memfd => Self::whole(memory, plugged),
            _ => Self::copied(memory, plugged, ram),
        }
    }

    /// Of RAM that is a file in memory already.
    fn whole(memory: &GuestMemory, plugged: &[Plugged<'_>]) -> Result<Self, ForkError> {
        let file = memory.iter().find_map(|region| region.file_offset());
        let file = file.ok_or_else(|| failed("find")(io::ErrorKind::NotFound.into()))?;
        let file = file.file().try_clone().map_err(failed("share"))?;
        let mut layers = Vec::new();
        if !plugged.is_empty() {
            layers.push(write(memory, plugged, |_| Ok(()))?);
        }
        let regions = ram::regions(memory);
        let mut retired = Vec::new();
        let mut freeze = || {
            for (region, here) in memory.iter().zip(&regions) {
                // SAFETY: no vCPU runs and devices are at rest.
                retired.extend(unsafe { Retired::replace(region, &file, here.offset) }?);
            }
            seal(&file)
        };
        if let Err(error) = freeze() {
            ram::share_again(memory, &file);
            return Err(failed("freeze")(error));
        }
        // What is where in it is looked at when the machine goes on.
        layers.push(layer(file, MemoryMap::of(regions)));
        Ok(Self {
            layers,
            own: None,
            retired,
        })
    }

    /// Of RAM of which some is in no file.
    fn copied(memory: &GuestMemory, plugged: &[Plugged<'_>], ram: &Ram) -> Result<Self, ForkError> {
        let (part, below) = match (&ram.origin, ram.layers.as_slice()) {
            // With one more it could not be loaded or sent.
            (Origin::Files(_), layers @ [_, ..])
                if layers.len() < MAX_CHAIN && Pagemap::is_there() =>
            {
                (Part::Changes, layers)
            }
            _ => (Part::All, [].as_slice()),
        };
        let top = write(memory, plugged, |writer| {
            ram::write(memory, &ram.origin, part, writer)
        })?;
        let mut layers = below.to_vec();
        let mut retired = Vec::new();
        let mut own = ram.clone();
        if part == Part::All || !plugged.is_empty() || !top.map.runs.is_empty() {
            layers.insert(0, top.clone());
            if layers.len() <= MAX_LAYERS {
                own = ram.onto(memory, top, part, &mut retired);
            }
        }
        Ok(Self {
            layers,
            own: Some(own),
            retired,
        })
    }

    /// The files, the newest first, what the machine's own RAM is now, and what was mapped before, to
    /// be dropped where it disturbs nobody. The machine may run meanwhile.
    pub fn finish(self) -> (Vec<Arc<Layer>>, Ram, Vec<Retired>) {
        let Self {
            mut layers,
            own,
            retired,
        } = self;
        let own = own.unwrap_or_else(|| {
            // Nobody else has it yet.
            if let Some(base) = layers.last_mut().and_then(Arc::get_mut) {
                look_at(base);
            }
            Ram {
                origin: ram::origin(&layers),
                layers: layers.clone(),
            }
        });
        (layers, own, retired)
    }
}

/// Notes what data there are in the file; all of it, where the kernel does not tell.
fn look_at(base: &mut Layer) {
    let len = base.map.len();
    let runs = ram::data_runs(&base.image.file, 0, len).unwrap_or_else(|_| vec![(0, len)]);
    base.map.runs = ram::pieces(&runs);
}

/// A file in memory of what `fill` writes and the memory of devices.
fn write(
    memory: &GuestMemory,
    plugged: &[Plugged<'_>],
    fill: impl FnOnce(&mut ImageWriter<'_>) -> io::Result<()>,
) -> Result<Arc<Layer>, ForkError> {
    let file = memory_file(c"bulle-forked-memory").map_err(failed("make a file for"))?;
    let mut writer = ImageWriter::in_memory(&file);
    let written = fill(&mut writer).and_then(|()| {
        let regions = plugged::write_all(memory, plugged, &mut writer)?;
        let map = writer.into_map(regions);
        file.set_len(map.len())?;
        seal(&file)?;
        Ok(map)
    });
    let map = written.map_err(failed("copy"))?;
    Ok(layer(file, map))
}

fn layer(file: File, map: MemoryMap) -> Arc<Layer> {
    Arc::new(Layer::in_memory(file, map))
}

/// An empty file in memory, that can be sealed.
pub(super) fn memory_file(name: &std::ffi::CStr) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string and the call touches no memory of ours.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create has just given us this descriptor.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Keeps everybody from changing `file`.
pub(super) fn seal(file: &File) -> io::Result<()> {
    // SAFETY: the call touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_sealed_file_stays_as_it_is() {
        let file = memory_file(c"test").unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        seal(&file).unwrap();
        assert!(file.write_all_at(&[1], 0).is_err());
        assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: touches no memory of this process.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), flags, 0, 4096) };
        let error = io::Error::last_os_error().raw_os_error();
        // What discards guest memory relies on this very error.
        assert_eq!((result, error), (-1, Some(libc::EPERM)));
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 8192]);
    }
}
