//! What of a snapshot is read before its machine is there, rather than mapped: all of RAM where it is to be in reserved
//! huge pages, small changes of a chain, and memory that was plugged. Somebody may watch that and end it.
//!
//! On the thread that makes the machine.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use arch::memory::{GuestMemory, ram_regions};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::image::{ImageError, MAX_RUN, Region, Run};
use super::merge::{Piece, pieces};
use super::ram::{COPIED, MapError, within};
use super::{Layer, Paging, Snapshot};
use crate::config::MachineConfig;

/// Told how many bytes are read, and of how many; says whether to go on.
pub type OnRead = Box<dyn Fn(u64, u64) -> bool + Send + Sync>;

/// How far reading is.
pub struct Reading {
    done: AtomicU64,
    total: u64,
    on_read: OnRead,
}

impl Reading {
    /// Of `snapshot`, whose configuration and paging are what they will be.
    pub fn new(snapshot: &Snapshot, on_read: OnRead) -> Self {
        Self {
            done: AtomicU64::new(0),
            total: to_read(snapshot),
            on_read,
        }
    }

    /// So many more bytes are read.
    ///
    /// # Errors
    /// [`MapError::Cancelled`].
    pub fn add(&self, bytes: u64) -> Result<(), MapError> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        match (self.on_read)(done, self.total) {
            true => Ok(()),
            false => Err(MapError::Cancelled),
        }
    }
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} bytes", self.done, self.total)
    }
}

/// Bytes that are read of `snapshot` before its machine is there.
fn to_read(snapshot: &Snapshot) -> u64 {
    let Some((_, changes)) = snapshot.layers.split_last() else {
        return 0;
    };
    let config = &snapshot.config;
    let regions = ram_regions(config.machine_config.mem_size_mib << 20).len();
    let reserved = config.machine_config.huge_pages.reserved_mib().is_some();
    let ram: u64 = match snapshot.paging {
        Paging::Mapped if reserved => {
            let pieces = pieces(snapshot);
            let end = snapshot
                .layers
                .first()
                .map_or(0, |layer| end_of_ram(layer, regions));
            let ram = pieces
                .iter()
                .filter_map(|piece| within(&run(piece), 0, end));
            ram.map(|(_, len)| len).sum()
        }
        Paging::Mapped => changes.iter().map(|layer| small(layer, regions)).sum(),
        Paging::Lazy(_) | Paging::Handler { .. } => 0,
    };
    let newest = snapshot.layers.first();
    ram + newest.map_or(0, |layer| sum(layer, regions, |_, in_ram| !in_ram))
}

/// Bytes of changes that are copied to mapped RAM, which has so many regions.
pub fn small(layer: &Layer, regions: usize) -> u64 {
    sum(layer, regions, |run, in_ram| in_ram && run.len <= COPIED)
}

/// Bytes of the runs that `is_one` says of, told whether they are of RAM.
fn sum(layer: &Layer, regions: usize, is_one: impl Fn(&Run, bool) -> bool) -> u64 {
    let end = end_of_ram(layer, regions);
    let runs = layer.map.runs.iter();
    let runs = runs.filter(|run| is_one(run, run.offset < end));
    runs.map(|run| run.len).sum()
}

fn end_of_ram(layer: &Layer, regions: usize) -> u64 {
    let ram = layer.map.regions.iter().take(regions).next_back();
    ram.map_or(0, |region| region.offset + region.len)
}

/// RAM with the data of all files of `snapshot`, each page read once.
pub fn copied(snapshot: &Snapshot, config: &MachineConfig) -> Result<GuestMemory, MapError> {
    let memory = crate::vm::memory::map(config)?;
    let base = snapshot.layers.last().ok_or(MapError::Layout)?;
    let pieces = pieces(snapshot);
    for (index, region) in memory.iter().enumerate() {
        let fits = |r: &&Region| r.address == region.start_addr().0 && r.len == region.len();
        let regions = &base.map.regions;
        let here = regions.get(index).filter(fits).ok_or(MapError::Layout)?;
        for piece in &pieces {
            let layer = snapshot.layers.get(piece.layer).ok_or(MapError::Layout)?;
            let Some((start, len)) = within(&run(piece), here.offset, here.len) else {
                continue;
            };
            for at in (start..start + len).step_by(MAX_RUN as usize) {
                let count = MAX_RUN.min(start + len - at);
                // SAFETY: within the region's mapping, as just checked, which nobody uses yet.
                let bytes = unsafe {
                    std::slice::from_raw_parts_mut(region.as_ptr().add(at as usize), count as usize)
                };
                let read = layer.image.file.read_exact_at(bytes, here.offset + at);
                read.map_err(|source| {
                    let path = layer.image.path.clone();
                    MapError::Image(ImageError::Read { path, source })
                })?;
                snapshot.read(count)?;
            }
        }
    }
    Ok(memory)
}

fn run(piece: &Piece) -> Run {
    Run {
        offset: piece.offset,
        len: piece.end - piece.offset,
        crc: 0,
    }
}
