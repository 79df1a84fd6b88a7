//! RAM whose pages bulle itself brings from the memory files when they are touched.
//!
//! RAM is empty memory of this process, in pages of any size, registered with a userfaultfd. The thread
//! that watches it ([`super::watch`]) reads each page that is touched from the newest file that has it, and
//! between faults the working set. What a balloon gives back is zeros from then on. A page that cannot be
//! read is the end of the VM: whoever stands in the fault waits for that.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arch::memory::GuestMemory;
use vm_memory::GuestMemoryBackend;

use super::handler::HandlerError;
use super::watch::{HandlerLost, Provider};
use super::{Event, Filled, Mode, Uffd, feature};
use crate::config::MachineConfig;
use crate::snapshot::merge::{Piece, pieces};
use crate::snapshot::pages::PAGE;
use crate::snapshot::ram::{self, MapError};
use crate::snapshot::working_set::WorkingSet;
use crate::snapshot::{Layer, Snapshot};

/// Most bytes that are brought at once when nobody waits for them.
const CHUNK: u64 = 64 << 10;

/// A region of RAM.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Address in this process.
    host: u64,
    len: u64,
    /// Offset in the memory file's layout.
    offset: u64,
}

/// Which pages were given back, a bit for each.
#[derive(Debug)]
struct Gone {
    page: u64,
    bits: Vec<u64>,
}

impl Gone {
    /// Notes the pages that are whole in the `len` bytes at `offset`.
    fn add(&mut self, offset: u64, len: u64) {
        for page in offset.div_ceil(self.page)..(offset + len) / self.page {
            let word = (page / 64) as usize;
            if self.bits.len() <= word {
                self.bits.resize(word + 1, 0);
            }
            if let Some(word) = self.bits.get_mut(word) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// Whether the page at `offset` is one.
    fn has(&self, offset: u64) -> bool {
        let page = offset / self.page;
        let word = self.bits.get((page / 64) as usize);
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }
}

/// Who brings the pages.
pub struct Lazy {
    uffd: Uffd,
    /// Keeps the mapping.
    _memory: GuestMemory,
    places: Vec<Place>,
    layers: Vec<Arc<Layer>>,
    /// What is in which layer, in order; the rest is zeros.
    pieces: Vec<Piece>,
    /// Bytes of a page of RAM.
    page: u64,
    gone: Gone,
    /// Faults that met a removal, by offset, to be tried again.
    again: Vec<u64>,
    /// What is brought early, as offsets and lengths.
    early: VecDeque<(u64, u64)>,
    buffer: Vec<u8>,
}

/// Maps the RAM of `config` empty; its pages come from the files of `snapshot`, those of `early` before
/// they are touched.
///
/// # Errors
/// [`HandlerError`].
pub fn map(
    snapshot: &Snapshot,
    config: &MachineConfig,
    early: Option<&WorkingSet>,
) -> Result<(GuestMemory, Lazy), HandlerError> {
    let uffd = Uffd::new(feature::EVENT_REMOVE)?;
    let base = snapshot.layers.last().ok_or(MapError::Layout)?;
    let memory = crate::vm::memory::map(config).map_err(MapError::from)?;
    let mut places = Vec::new();
    for (index, (region, here)) in memory.iter().zip(ram::regions(&memory)).enumerate() {
        if base.map.regions.get(index) != Some(&here) {
            return Err(MapError::Layout.into());
        }
        let host = region.as_ptr() as u64;
        // SAFETY: all of one region of guest RAM, which nobody uses yet.
        unsafe { uffd.register((host, here.len), Mode::Missing)? };
        places.push(Place {
            host,
            len: here.len,
            offset: here.offset,
        });
    }
    let page = config.huge_pages.reserved_mib();
    let page = page.map_or(PAGE, |mib| mib << 20);
    let early = early.map_or(&[][..], WorkingSet::runs);
    let lazy = Lazy {
        uffd,
        _memory: memory.clone(),
        places,
        layers: snapshot.layers.clone(),
        pieces: pieces(snapshot),
        page,
        gone: Gone {
            page,
            bits: Vec::new(),
        },
        again: Vec::new(),
        early: early.iter().copied().collect(),
        buffer: vec![0; page.max(CHUNK) as usize],
    };
    Ok((memory, lazy))
}

impl Lazy {
    /// The region that has the byte at `host` of this process.
    fn at_host(&self, host: u64) -> Option<Place> {
        let mut places = self.places.iter().copied();
        places.find(|place| (place.host..place.host + place.len).contains(&host))
    }

    /// The region that has the byte at `offset` of the memory file.
    fn at_offset(&self, offset: u64) -> Option<Place> {
        let mut places = self.places.iter().copied();
        places.find(|place| (place.offset..place.offset + place.len).contains(&offset))
    }

    /// Reads what the files have at `offset` to the first `len` bytes of the buffer; false where that is
    /// nothing but zeros.
    fn read(&mut self, offset: u64, len: u64) -> io::Result<bool> {
        let buffer = self.buffer.get_mut(..len as usize).unwrap_or_default();
        buffer.fill(0);
        let first = self.pieces.partition_point(|piece| piece.end <= offset);
        let pieces = self.pieces.iter().skip(first);
        let mut any = false;
        for piece in pieces.take_while(|piece| piece.offset < offset + len) {
            let (from, to) = (piece.offset.max(offset), piece.end.min(offset + len));
            let range = (from - offset) as usize..(to - offset) as usize;
            let file = self.layers.get(piece.layer).map(|layer| &layer.image.file);
            if let (Some(file), Some(bytes)) = (file, buffer.get_mut(range)) {
                file.read_exact_at(bytes, from)?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Brings the `len` bytes of whole pages at `offset`, which are in `place`, all given back or none. Says how many
    /// are there now; fewer where some memory is just being given back.
    fn bring(&mut self, place: Place, offset: u64, len: u64) -> io::Result<u64> {
        let host = place.host + (offset - place.offset);
        let gone = self.gone.has(offset);
        let any = !gone && self.read(offset, len)?;
        if gone {
            self.buffer.fill(0);
        }
        let zeros = !any && self.page == PAGE;
        let mut done = 0;
        while done < len {
            let filled = match zeros {
                true => self.uffd.zero(host + done, len - done),
                false => {
                    let rest = self.buffer.get(done as usize..len as usize);
                    self.uffd.copy(host + done, rest.unwrap_or_default())
                }
            };
            done += match filled? {
                Filled::Bytes(count) => count,
                // One that is there already: whoever waits for it looks again.
                Filled::Present => {
                    self.uffd.wake(host + done, self.page)?;
                    self.page
                }
                Filled::Later => break,
                // No memory of ours any more, so nobody waits for it.
                Filled::Nowhere => len - done,
            };
        }
        Ok(done)
    }

    fn on_fault(&mut self, host: u64) -> io::Result<()> {
        let Some(place) = self.at_host(host) else {
            return Ok(());
        };
        let offset = place.offset + (host - place.host) / self.page * self.page;
        if self.bring(place, offset, self.page)? == 0 {
            self.again.push(offset);
        }
        Ok(())
    }

    fn take_events(&mut self) -> io::Result<()> {
        while let Some(event) = self.uffd.next()? {
            match event {
                Event::Fault(host) => self.on_fault(host)?,
                Event::Removed(start, end) => {
                    if let Some(place) = self.at_host(start) {
                        let offset = place.offset + (start - place.host);
                        self.gone.add(offset, end.saturating_sub(start));
                    }
                }
            }
        }
        for offset in std::mem::take(&mut self.again) {
            if let Some(place) = self.at_offset(offset)
                && self.bring(place, offset, self.page)? == 0
            {
                self.again.push(offset);
            }
        }
        Ok(())
    }

    /// Brings a piece of what is wanted early.
    fn bring_early(&mut self) -> io::Result<()> {
        let Some((start, len)) = self.early.pop_front() else {
            return Ok(());
        };
        let end = start.saturating_add(len);
        let offset = start / self.page * self.page;
        let Some(place) = self.at_offset(offset) else {
            return Ok(());
        };
        let chunk = self.page.max(CHUNK);
        let most = end.min(place.offset + place.len);
        let mut to = ((offset / chunk + 1) * chunk).min(most.next_multiple_of(self.page));
        // What was given back is brought a page at a time.
        let pages = (offset..to).step_by(self.page as usize);
        if let Some(gone) = pages.skip(1).find(|page| self.gone.has(*page)) {
            to = gone;
        }
        if self.gone.has(offset) {
            to = offset + self.page;
        }
        // Another time, where memory is being given back: whoever needs it gets it before.
        let count = self.bring(place, offset, to - offset)?.max(self.page);
        if offset + count < end {
            self.early
                .push_front((offset + count, end - offset - count));
        }
        Ok(())
    }

    fn path(&self) -> PathBuf {
        let top = self.layers.first();
        top.map_or_else(PathBuf::new, |top| top.image.path.clone())
    }

    fn lost(&self, error: &io::Error) -> HandlerLost {
        HandlerLost::Failed {
            path: self.path(),
            error: error.to_string(),
        }
    }
}

impl Provider for Lazy {
    fn always_answers(&self) -> bool {
        true
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    fn attend(&mut self) -> Result<(), HandlerLost> {
        self.take_events().map_err(|error| self.lost(&error))
    }

    fn idle(&mut self) -> Result<bool, HandlerLost> {
        self.bring_early().map_err(|error| self.lost(&error))?;
        Ok(!self.early.is_empty() || !self.again.is_empty())
    }

    fn silent(&self, what: &'static str, patience: Duration) -> HandlerLost {
        let path = self.path();
        HandlerLost::Failed {
            path,
            error: format!("what is needed to {what} has not come within {patience:?}"),
        }
    }
}

impl std::fmt::Debug for Lazy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut lazy = f.debug_struct("Lazy");
        lazy.field("places", &self.places).field("page", &self.page);
        lazy.field("fd", &self.uffd.as_fd().as_raw_fd()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_were_given_back_are_known() {
        let mut gone = Gone {
            page: PAGE,
            bits: Vec::new(),
        };
        assert!(!gone.has(0));
        gone.add(63 * PAGE, 2 * PAGE);
        gone.add(1 << 30, PAGE);
        let pages = [62, 63, 64, 65, 1 << 18, (1 << 18) + 1].map(|page| gone.has(page * PAGE));
        assert_eq!(pages, [false, true, true, false, true, false]);
    }
}
