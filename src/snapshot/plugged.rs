//! The memory that devices bring, such as hot-plugged memory: each has a file in memory of its own, and a place
//! in the memory file of a snapshot behind guest RAM.
//!
//! The vmm thread calls this while no vCPU runs and devices are at rest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use arch::memory::GuestMemory;
use devices::virtio::mem;

use super::Snapshot;
use super::image::{ImageError, ImageWriter, MAX_RUN, Region};
use super::ram::{self, MapError, data_runs};

/// Memory of a device, in a file in memory.
#[derive(Clone, Copy, Debug)]
pub struct Plugged<'a> {
    /// Guest physical address.
    pub address: u64,
    /// Its content; nothing is where nothing is plugged.
    pub region: &'a mem::Region,
}

/// Writes the memory of a device, which has its place in the file at `offset`.
fn write(plugged: &Plugged<'_>, offset: u64, writer: &mut ImageWriter<'_>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_RUN as usize];
    plugged.region.bring();
    let file = plugged.region.file();
    let runs = data_runs(file, 0, plugged.region.len())?;
    writer.expect(runs.iter().map(|(_, len)| len).sum());
    for (start, len) in runs {
        copy(file, (start, len), &mut buffer, |at, data| {
            writer.write(offset + at, data, true)
        })?;
    }
    Ok(())
}

/// Writes the memory of devices behind `memory`, and says where all is in the file.
///
/// # Errors
/// Of either file.
pub fn write_all(
    memory: &GuestMemory,
    all: &[Plugged<'_>],
    writer: &mut ImageWriter<'_>,
) -> io::Result<Vec<Region>> {
    let mut regions = ram::regions(memory);
    for plugged in all {
        let offset = regions.last().map_or(0, |last| last.offset + last.len);
        write(plugged, offset, writer)?;
        regions.push(Region {
            address: plugged.address,
            len: plugged.region.len(),
            offset,
        });
    }
    Ok(regions)
}

/// Fills the memory of a device, which is empty, from `snapshot`.
///
/// # Errors
/// Where the snapshot has no such memory, or of either file.
pub fn fill(snapshot: &Snapshot, plugged: &Plugged<'_>) -> Result<(), MapError> {
    // Whole in every file of a chain.
    let layer = snapshot.layers.first().ok_or(MapError::Layout)?;
    let mut regions = layer.map.regions.iter();
    let fits = |r: &&Region| (r.address, r.len) == (plugged.address, plugged.region.len());
    let here = regions.find(fits).ok_or(MapError::Layout)?;
    let mut buffer = vec![0; MAX_RUN as usize];
    for run in &layer.map.runs {
        let Some(start) = run
            .offset
            .checked_sub(here.offset)
            .filter(|at| *at < here.len)
        else {
            continue;
        };
        let range = (run.offset, run.len.min(here.len - start));
        let copied = copy(&layer.image.file, range, &mut buffer, |at, data| {
            plugged.region.write(at - here.offset, data)
        });
        copied.map_err(|source| {
            let path = layer.image.path.clone();
            MapError::Image(ImageError::Read { path, source })
        })?;
        snapshot.read(range.1)?;
    }
    Ok(())
}

/// Reads `len` bytes of `file` from `start` on, in pieces, each given to `f` with its offset.
pub(super) fn copy(
    file: &File,
    (start, len): (u64, u64),
    buffer: &mut [u8],
    mut f: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = start;
    while at < start + len {
        let piece = (start + len - at).min(buffer.len() as u64);
        let data = buffer.get_mut(..piece as usize).unwrap_or_default();
        file.read_exact_at(data, at)?;
        f(at, data)?;
        at += piece;
    }
    Ok(())
}
