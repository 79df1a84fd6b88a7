//! Linux's banner ("Linux version 6.1.0-56-amd64 (…") in an ELF kernel.

use super::bzimage::first_word;
use super::elf::Elf;
use super::source::Source;

const BANNER: &[u8] = b"Linux version ";
/// Longest release that is taken (`__NEW_UTS_LEN` is 64).
const RELEASE_MAX: usize = 64;
/// Bytes read at once.
const CHUNK: u64 = 1 << 20;
/// Most bytes searched.
const SEARCH_MAX: u64 = 256 << 20;

/// Searches the segments for the banner and returns the release in it.
pub(super) fn banner(source: &Source, elf: &Elf) -> Option<String> {
    let mut left = SEARCH_MAX;
    // A match may cross two chunks: chunks overlap by the longest one.
    let overlap = (BANNER.len() + RELEASE_MAX) as u64;
    for segment in &elf.segments {
        let mut done = 0;
        while done < segment.filesz && left > 0 {
            let length = (segment.filesz - done).min(CHUNK + overlap);
            let chunk = source.read("segment", segment.offset + done, length).ok()?;
            if let Some(release) = find(&chunk) {
                return Some(release);
            }
            done += CHUNK;
            left = left.saturating_sub(CHUNK);
        }
    }
    None
}

fn find(bytes: &[u8]) -> Option<String> {
    let mut rest = bytes;
    while let Some(at) = rest
        .windows(BANNER.len())
        .position(|window| window == BANNER)
    {
        rest = rest.get(at + BANNER.len()..)?;
        let text = rest.get(..RELEASE_MAX).unwrap_or(rest);
        // A format string has a percent sign there.
        if text.first().is_some_and(u8::is_ascii_digit) {
            return first_word(text);
        }
    }
    None
}
