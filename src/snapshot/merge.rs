//! A chain of memory files as one: for a snapshot that is to need nothing else.

use std::fs::File;
use std::io;
use std::path::Path;

use super::create::{Parts, write};
use super::image::{ImageWriter, MAX_RUN, Region};
use super::plugged::copy;
use super::{Snapshot, SnapshotError};

/// Writes `snapshot` to two files of its own, with all of its memory.
///
/// # Errors
/// [`SnapshotError`]; files that were there before are untouched.
pub fn merge(snapshot: &Snapshot, state: &Path, memory: &Path) -> Result<(), SnapshotError> {
    let parts = Parts {
        config: &snapshot.config,
        machine: &snapshot.machine,
        guest: &snapshot.guest,
    };
    write((state, memory), &parts, |file, id| {
        let mut writer = ImageWriter::new(file, id);
        let regions = copy_all(snapshot, &mut writer)?;
        writer.finish(regions, None)
    })?;
    Ok(())
}

/// Copies all of the memory of `snapshot`, and says where it is.
pub(super) fn copy_all(
    snapshot: &Snapshot,
    writer: &mut ImageWriter<'_>,
) -> io::Result<Vec<Region>> {
    for piece in pieces(snapshot) {
        piece.copy(snapshot, writer)?;
    }
    let regions = snapshot.layers.first().map(|top| top.map.regions.clone());
    Ok(regions.unwrap_or_default())
}

/// Bytes that come from one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) end: u64,
    pub(super) layer: usize,
}

impl Piece {
    fn copy(&self, snapshot: &Snapshot, writer: &mut ImageWriter<'_>) -> io::Result<()> {
        let file: &File = match snapshot.layers.get(self.layer) {
            Some(layer) => &layer.image.file,
            None => return Ok(()),
        };
        let len = self.end - self.offset;
        let mut buffer = vec![0; MAX_RUN.min(len) as usize];
        copy(file, (self.offset, len), &mut buffer, |at, data| {
            writer.write(at, data, true)
        })
    }
}

/// Which bytes come from which layer, in order: from the first, which is the newest, that has them.
pub(super) fn pieces(snapshot: &Snapshot) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::new();
    let ram = snapshot.config.machine_config.mem_size_mib << 20;
    for (layer, content) in snapshot.layers.iter().enumerate() {
        let mut more = Vec::new();
        for run in &content.map.runs {
            // Memory of devices, behind RAM, is whole in the newest.
            let most = if layer == 0 { u64::MAX } else { ram };
            let (mut at, end) = (run.offset, (run.offset + run.len).min(most));
            // What newer layers have of it is theirs; `all` is in order.
            let first = all.partition_point(|piece| piece.end <= at);
            let newer = all.iter().skip(first);
            for newer in newer.take_while(|piece| piece.offset < end) {
                if at < newer.offset {
                    more.push(Piece {
                        offset: at,
                        end: newer.offset,
                        layer,
                    });
                }
                at = newer.end;
            }
            if at < end {
                more.push(Piece {
                    offset: at,
                    end,
                    layer,
                });
            }
        }
        all.append(&mut more);
        all.sort_unstable_by_key(|piece| piece.offset);
    }
    all
}
