//! Guest RAM given back to the host: ranges of guest addresses, merged and cut to whole host pages.
//!
//! Owned by the device that discards. Nothing outside of RAM, and no host page of which only a
//! part is in a range, is ever dropped. What was dropped reads as zeros, or as the file behind a
//! private mapping, and is had again from the host when it is touched.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::GuestRam;

/// Failures of one device that are logged; a guest can repeat them at will.
const MAX_LOGGED: u32 = 8;

/// How much a device gave back, since it was made.
#[derive(Debug, Default)]
pub(super) struct Discarded {
    /// Bytes, counted as often as they were given back.
    bytes: AtomicU64,
    /// Calls to the host's kernel.
    calls: AtomicU64,
    /// Bytes that are not in RAM.
    outside: AtomicU64,
    /// Calls that the host's kernel refused.
    refused: AtomicU32,
}

impl Discarded {
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub fn outside(&self) -> u64 {
        self.outside.load(Ordering::Relaxed)
    }

    pub fn refused(&self) -> u32 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// Sorts `ranges` and joins those that touch or overlap.
pub(super) fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut last = 0;
    for at in 1..ranges.len() {
        let Some(next) = ranges.get(at).cloned() else {
            break;
        };
        match ranges.get_mut(last) {
            Some(range) if next.start <= range.end => range.end = range.end.max(next.end),
            _ => {
                last += 1;
                if let Some(slot) = ranges.get_mut(last) {
                    *slot = next;
                }
            }
        }
    }
    ranges.truncate(last + 1);
}

/// Gives the whole host pages of `page` bytes (a power of two) in `ranges` back to the host, and
/// empties `ranges`.
pub(super) fn discard(ram: &GuestRam, ranges: &mut Vec<Range<u64>>, page: u64, done: &Discarded) {
    merge(ranges);
    for range in ranges.drain(..) {
        let mut outside = range.end - range.start;
        for region in GuestMemoryBackend::iter(ram) {
            let base = region.start_addr().0;
            let end = base.saturating_add(region.len());
            let (from, to) = (range.start.max(base), range.end.min(end));
            if from < to {
                outside -= to - from;
                whole_pages(region, from - base..to - base, page, done);
            }
        }
        done.outside.fetch_add(outside, Ordering::Relaxed);
    }
}

/// `range` is in bytes from the start of `region`, and inside of it.
fn whole_pages(region: &GuestRegionMmap, range: Range<u64>, page: u64, done: &Discarded) {
    let start = range.start.next_multiple_of(page);
    let end = range.end - range.end % page;
    if start >= end {
        return;
    }
    done.calls.fetch_add(1, Ordering::Relaxed);
    match drop_pages(region, start, end - start) {
        Ok(()) => {
            done.bytes.fetch_add(end - start, Ordering::Relaxed);
        }
        Err(error) => {
            if done.refused.fetch_add(1, Ordering::Relaxed) < MAX_LOGGED {
                log::warn!(
                    "the host does not take back {:#x} bytes of guest memory at {:#x}: {error}",
                    end - start,
                    region.start_addr().0 + start
                );
            }
        }
    }
}

/// Drops whole host pages of `region`: for all who share them if a file is behind it. Of a private
/// mapping of a file, such as that of a snapshot, the guest's copies go; what the file has is there
/// again. So it is with a shared mapping that has become private, when its file was sealed for clones.
fn drop_pages(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
    let advise = |advice| {
        let start = region.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the range was cut to the region, which is mapped as long as it is borrowed. It is guest
        // RAM, of which nothing in this process relies on the content.
        match unsafe { libc::madvise(start.cast(), len as usize, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    if region.flags() & libc::MAP_SHARED != 0 && region.file_offset().is_some() {
        // A hole in the file, of which who brings the mapping's pages is told.
        match advise(libc::MADV_REMOVE) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {}
            done => return done,
        }
    }
    advise(libc::MADV_DONTNEED)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn merged_ranges_are_the_same_bytes_in_order(
            ranges in prop::collection::vec((0..200_u64, 0..20_u64), 0..40)
        ) {
            let ranges: Vec<Range<u64>> = ranges.iter().map(|(at, len)| *at..at + len).collect();
            let mut merged = ranges.clone();
            merge(&mut merged);
            for byte in 0..220 {
                let before = ranges.iter().any(|range| range.contains(&byte));
                let after = merged.iter().filter(|range| range.contains(&byte)).count();
                prop_assert_eq!(after, usize::from(before));
            }
            prop_assert!(merged.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
