//! Guest RAM from and to memory files.
//!
//! The vmm thread calls this while no vCPU runs and devices are at rest, so nothing writes to RAM
//! meanwhile. RAM that came from a file is a private mapping of it: the pages that are the
//! process's own are what changed since ([`super::pages`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arch::memory::{GuestMemory, ram_regions};
use nix::unistd::{Whence, lseek};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::image::{ImageError, ImageWriter, MAX_RUN, MemoryMap, Region, Run};
use super::pages::{Pagemap, Which};
pub use super::retired::Retired;
use super::{Layer, Snapshot, reading, retired};
use crate::config::MachineConfig;
use crate::vm::memory::{MemoryError, advise};

/// Runs of changes up to this size are copied when they are loaded: a mapping of its own would cost
/// more, and a process has only some 65,000.
pub(super) const COPIED: u64 = 64 << 10;

/// Where the content of RAM that nobody wrote comes from.
#[derive(Clone, Debug, Default)]
pub enum Origin {
    /// Nowhere: it is zeros.
    #[default]
    Nothing,
    /// Shared memory of this process.
    Memfd,
    /// Memory files, of which RAM is a private mapping; data is at these runs.
    Files(Arc<[Run]>),
}

/// What of RAM goes into a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All that is not zeros.
    All,
    /// What changed since it was mapped. Only for [`Origin::Files`].
    Changes,
}

/// The regions of `memory` in a file, in their order.
pub fn regions(memory: &GuestMemory) -> Vec<Region> {
    let mut offset = 0;
    let regions = memory.iter().map(|region| {
        let here = Region {
            address: region.start_addr().0,
            len: region.len(),
            offset,
        };
        offset += here.len;
        here
    });
    regions.collect()
}

/// Writes `part` of `memory` to `writer`.
///
/// # Errors
/// Of the file, and where the kernel does not tell which pages there are.
pub fn write(
    memory: &GuestMemory,
    origin: &Origin,
    part: Part,
    writer: &mut ImageWriter<'_>,
) -> io::Result<()> {
    let all = memory.iter().zip(regions(memory));
    let all = all.map(|(region, here)| Ok((region, here, runs(region, here, origin, part)?)));
    let all = all.collect::<io::Result<Vec<_>>>()?;
    for (_, _, runs) in &all {
        writer.expect(runs.iter().map(|(_, len)| len).sum());
    }
    for (region, here, runs) in all {
        for (start, len) in runs {
            let mut at = start;
            while at < start + len {
                let piece = (start + len - at).min(MAX_RUN);
                // SAFETY: the range is within the region's mapping, and nothing writes to it now
                // (see the head of this module).
                let data = unsafe {
                    std::slice::from_raw_parts(region.as_ptr().add(at as usize), piece as usize)
                };
                writer.write(here.offset + at, data, part == Part::All)?;
                at += piece;
            }
        }
    }
    Ok(())
}

/// Pages of 4 KiB of `memory` that are its own: those that were used, or of files those that changed since they
/// were mapped.
///
/// # Errors
/// Where the kernel does not tell which pages there are.
pub fn dirtied(memory: &GuestMemory, origin: &Origin) -> io::Result<u64> {
    let mut bytes = 0;
    for region in memory.iter() {
        let range = (region.as_ptr() as u64, region.len());
        bytes += match origin {
            Origin::Nothing => Pagemap::open()?.bytes(Which::Populated, range)?,
            Origin::Files(_) => Pagemap::open()?.bytes(Which::Own, range)?,
            Origin::Memfd => {
                let file = region.file_offset().ok_or(io::ErrorKind::InvalidInput)?;
                let runs = data_runs(file.file(), file.start(), region.len())?;
                runs.into_iter().map(|(_, len)| len).sum()
            }
        };
    }
    Ok(bytes.div_ceil(super::pages::PAGE))
}

/// Where in a region there is something, as offsets in it and lengths, in order.
pub(super) fn runs(
    region: &GuestRegionMmap,
    here: Region,
    origin: &Origin,
    part: Part,
) -> io::Result<Vec<(u64, u64)>> {
    let (host, len) = (region.as_ptr() as u64, region.len());
    let mut runs = Vec::new();
    let push = |start, len| {
        runs.push((start, len));
        Ok::<(), io::Error>(())
    };
    match origin {
        Origin::Nothing => pages(Which::Populated, (host, len), push)?,
        Origin::Memfd => {
            let file = region.file_offset().ok_or(io::ErrorKind::InvalidInput)?;
            return data_runs(file.file(), file.start(), len);
        }
        Origin::Files(data) => {
            pages(Which::Own, (host, len), push)?;
            if part == Part::All {
                runs.extend(data.iter().filter_map(|run| within(run, here.offset, len)));
                runs = union(runs);
            }
        }
    }
    Ok(runs)
}

/// The runs of such pages in a range of addresses; where nothing tells them, all of it.
fn pages(
    which: Which,
    range: (u64, u64),
    mut f: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    match Pagemap::open() {
        Ok(pagemap) => pagemap.runs(which, range, f),
        Err(error) if error.kind() == io::ErrorKind::NotFound => f(0, range.1),
        Err(error) => Err(error),
    }
}

/// What of `run` is in the `len` bytes from `first` on, relative to that.
pub(super) fn within(run: &Run, first: u64, len: u64) -> Option<(u64, u64)> {
    let start = run.offset.max(first);
    let end = (run.offset + run.len).min(first + len);
    (start < end).then(|| (start - first, end - start))
}

/// Puts runs in order, and together where they meet.
fn union(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.sort_unstable();
    let mut all: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for (start, len) in runs {
        match all.last_mut() {
            Some((first, before)) if *first + *before >= start => {
                *before = (*before).max(start + len - *first);
            }
            _ => all.push((start, len)),
        }
    }
    all
}

/// Where `file` has data between `start` and `start + len`, relative to `start`.
pub(super) fn data_runs(file: &File, start: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let end = start + len;
    let mut runs = Vec::new();
    let mut at = start;
    while at < end {
        let from = match lseek(file, at as i64, Whence::SeekData) {
            Ok(from) => (from as u64).min(end),
            Err(nix::errno::Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let to = (lseek(file, from as i64, Whence::SeekHole)? as u64).min(end);
        if to > from {
            runs.push((from - start, to - from));
        }
        at = to.max(from + 1);
    }
    Ok(runs)
}

/// Maps the RAM of `snapshot` copy-on-write, as `config` says; of reserved huge pages, which no file can be
/// mapped in, it is a copy.
///
/// # Errors
/// [`MapError`].
pub fn map(snapshot: &Snapshot, config: &MachineConfig) -> Result<(GuestMemory, Origin), MapError> {
    if config.huge_pages.reserved_mib().is_some() {
        return Ok((reading::copied(snapshot, config)?, Origin::Nothing));
    }
    let (base, changes) = snapshot.layers.split_last().ok_or(MapError::Layout)?;
    let wanted = ram_regions(config.mem_size_mib << 20);
    let mut regions = Vec::with_capacity(wanted.len());
    for (index, (address, size)) in wanted.into_iter().enumerate() {
        let region = base.map.regions.get(index).copied();
        let fits = |r: &Region| r.address == address.0 && r.len == size as u64;
        let region = region.filter(fits).ok_or(MapError::Layout)?;
        regions.push(map_region(&base.image.file, region, config)?);
    }
    let memory = GuestMemory::from_regions(regions).map_err(MemoryError::Regions)?;
    for layer in changes.iter().rev() {
        lay_over(&memory, layer)?;
        snapshot.read(reading::small(layer, memory.num_regions()))?;
    }
    Ok((memory, origin(&snapshot.layers)))
}

/// Where RAM comes from that is a private mapping of `layers`.
pub fn origin(layers: &[Arc<Layer>]) -> Origin {
    Origin::Files(join(layers.iter().flat_map(|layer| &layer.map.runs)))
}

fn map_region(
    file: &File,
    region: Region,
    config: &MachineConfig,
) -> Result<GuestRegionMmap, MapError> {
    let mib = config.mem_size_mib;
    let file = file.try_clone().map_err(MapError::Descriptor)?;
    let mapping = MmapRegionBuilder::new(region.len as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, region.offset))
        .build()
        .map_err(|source| MemoryError::Map { mib, source })?;
    advise(&mapping, config.huge_pages);
    let region = GuestRegionMmap::new(mapping, GuestAddress(region.address));
    region.ok_or(MapError::Layout)
}

/// Lays the RAM of a snapshot, of which `layers` are the memory files, over `memory`, which nobody
/// uses yet.
///
/// # Errors
/// [`MapError`]; `memory` is of no use then.
pub fn lay(memory: &GuestMemory, layers: &[Arc<Layer>]) -> Result<(), MapError> {
    let (base, changes) = layers.split_last().ok_or(MapError::Layout)?;
    let regions = &base.map.regions;
    for (index, region) in memory.iter().enumerate() {
        let fits = |r: &&Region| r.address == region.start_addr().0 && r.len == region.len();
        let here = regions.get(index).filter(fits).ok_or(MapError::Layout)?;
        let file = &base.image.file;
        // SAFETY: all of one region's mapping, which nobody uses yet.
        let laid = unsafe { overlay(region.as_ptr(), here.len, file, here.offset) };
        laid.map_err(|source| {
            let path = base.image.path.clone();
            MapError::Image(ImageError::Read { path, source })
        })?;
    }
    changes
        .iter()
        .rev()
        .try_for_each(|layer| lay_over(memory, layer))
}

/// Puts the data of a file of changes where they belong.
fn lay_over(memory: &GuestMemory, layer: &Layer) -> Result<(), MapError> {
    let map = &layer.map;
    for run in &map.runs {
        let Some(host) = place(memory, map, *run) else {
            continue;
        };
        let done = match run.len > COPIED {
            // SAFETY: the range is part of a mapping of guest RAM, which nobody uses yet.
            true => unsafe { overlay(host, run.len, &layer.image.file, run.offset) },
            false => {
                // SAFETY: as above.
                let bytes = unsafe { std::slice::from_raw_parts_mut(host, run.len as usize) };
                layer.image.file.read_exact_at(bytes, run.offset)
            }
        };
        done.map_err(|source| {
            let path = layer.image.path.clone();
            MapError::Image(ImageError::Read { path, source })
        })?;
    }
    Ok(())
}

/// Where in this process a run of data belongs, if all of it is RAM. Memory of devices is not; it has
/// regions of its own behind that.
fn place(memory: &GuestMemory, map: &MemoryMap, run: Run) -> Option<*mut u8> {
    let mut regions = map.regions.iter().zip(memory.iter());
    regions.find_map(|(here, region)| {
        let at = run.offset.checked_sub(here.offset)?;
        let fits = at + run.len <= here.len.min(region.len());
        // SAFETY: within the mapping, as just checked.
        fits.then(|| unsafe { region.as_ptr().add(at as usize) })
    })
}

/// Maps `len` bytes of `file` from `offset` on copy-on-write over what is at `host`.
///
/// # Safety
/// The range is part of a mapping of guest RAM that nobody reads or writes meanwhile.
pub(super) unsafe fn overlay(host: *mut u8, len: u64, file: &File, offset: u64) -> io::Result<()> {
    // SAFETY: the caller's.
    unsafe { map_over(host, len, file, offset, libc::MAP_PRIVATE) }
}

/// Maps `len` bytes of `file` over what is at `host`.
///
/// # Safety
/// As [`overlay`].
unsafe fn map_over(
    host: *mut u8,
    len: u64,
    file: &File,
    offset: u64,
    sharing: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the caller's.
    let at = unsafe {
        libc::mmap(
            host.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    match at == libc::MAP_FAILED {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

/// Has `memory` be a shared mapping of `file` again, of which nothing was written since it was private.
pub(super) fn share_again(memory: &GuestMemory, file: &File) {
    for (region, here) in memory.iter().zip(regions(memory)) {
        // SAFETY: all of one region's mapping; no vCPU runs and devices are at rest.
        let shared = unsafe {
            map_over(
                region.as_ptr(),
                here.len,
                file,
                here.offset,
                libc::MAP_SHARED,
            )
        };
        if let Err(error) = shared {
            log::error!("guest memory is no longer shared: {error}");
        }
    }
}

/// Has `memory` go on as a private mapping of `file`, to which `part` of it was just written as `map`
/// says, so that what changes from now on can be told. Says where RAM comes from then; it came from
/// `origin` before. What was mapped before goes to `retired`.
///
/// # Errors
/// Of mmap: some of it may come from the new file then, with the same content.
pub fn rebase(
    memory: &GuestMemory,
    (file, map): (&File, &MemoryMap),
    part: Part,
    origin: &Origin,
    retired: &mut Vec<Retired>,
) -> io::Result<Origin> {
    match (part, origin) {
        (Part::Changes, Origin::Files(before)) => {
            for run in map.runs.iter().filter(|run| run.len > COPIED) {
                if let Some(host) = place(memory, map, *run) {
                    // SAFETY: part of a region's mapping; no vCPU runs and devices are at rest.
                    unsafe { overlay(host, run.len, file, run.offset) }?;
                }
            }
            Ok(Origin::Files(join(before.iter().chain(&map.runs))))
        }
        _ => {
            for (region, here) in memory.iter().zip(regions(memory)) {
                // SAFETY: as above.
                retired.extend(unsafe { Retired::replace(region, file, here.offset) }?);
            }
            if matches!(origin, Origin::Memfd)
                && let Err(error) = retired::give_up(memory)
            {
                log::warn!("memory that guest RAM was in is not given back: {error}");
            }
            Ok(Origin::Files(join(map.runs.iter())))
        }
    }
}

/// Where RAM comes from that may come from anywhere: all of it is looked at.
pub fn anywhere(memory: &GuestMemory) -> Origin {
    let all = regions(memory).into_iter().map(|region| Run {
        offset: region.offset,
        len: region.len,
        crc: 0,
    });
    Origin::Files(all.collect())
}

/// Runs of data, none longer than one may be.
pub(super) fn pieces(runs: &[(u64, u64)]) -> Vec<Run> {
    let pieces = runs.iter().flat_map(|&(start, len)| {
        let starts = (start..start + len).step_by(MAX_RUN as usize);
        starts.map(move |at| Run {
            offset: at,
            len: MAX_RUN.min(start + len - at),
            crc: 0,
        })
    });
    pieces.collect()
}

/// Runs of data, in order and together where they meet.
fn join<'a>(runs: impl Iterator<Item = &'a Run>) -> Arc<[Run]> {
    let runs = union(runs.map(|run| (run.offset, run.len)).collect());
    let runs = runs.into_iter();
    runs.map(|(offset, len)| Run {
        offset,
        len,
        crc: 0,
    })
    .collect()
}

/// RAM cannot be had from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The map of memory and the machine's configuration are at odds.
    #[error("The snapshot's memory is not that of its machine: it is damaged")]
    Layout,
    /// The kernel does not tell which pages were written.
    #[error("Cannot open /proc/self/pagemap")]
    Pages(#[source] io::Error),
    /// No descriptor left.
    #[error("Cannot duplicate the descriptor of a memory file")]
    Descriptor(#[source] io::Error),
    /// No room.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Nobody wants it any more.
    #[error("it was cancelled")]
    Cancelled,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_across_two_regions_is_in_both() {
        let run = Run {
            offset: 8,
            len: 8,
            crc: 0,
        };
        assert_eq!(within(&run, 0, 12), Some((8, 4)));
        assert_eq!(within(&run, 12, 12), Some((0, 4)));
        assert_eq!(within(&run, 16, 12), None);
    }

    #[test]
    fn runs_that_meet_become_one() {
        let runs = vec![(8, 4), (0, 4), (4, 4), (20, 2), (21, 5), (21, 1)];
        assert_eq!(union(runs), [(0, 12), (20, 6)]);
        assert_eq!(union(Vec::new()), []);
    }
}
