//! The kernel command line: bulle's own parameters first, the user's after them.
//!
//! Linux takes the last of two equal parameters, so the user always wins. Only printable ASCII
//! passes: a NUL would cut the line, a newline would forge log lines.

pub use linux_loader::loader::Cmdline;
use linux_loader::loader::load_cmdline;
use thiserror::Error;
use vm_memory::GuestAddress;

use super::layout;
use super::memory::GuestMemory;

/// Why a command line was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel or bulle takes.
    #[error(
        "the kernel command line has {length} bytes, this kernel takes at most {max}: \
         shorten the appended parameters ({user} bytes of it)"
    )]
    TooLong {
        /// Length in bytes without the NUL.
        length: usize,
        /// Longest allowed, without the NUL.
        max: usize,
        /// How much of it the user gave.
        user: usize,
    },
    /// A character that no kernel command line may hold.
    #[error(
        "the kernel command line has {character:?} at byte {position}: only printable ASCII is allowed"
    )]
    Character {
        /// The offending character.
        character: char,
        /// Its byte offset in the part it was given in.
        position: usize,
    },
    /// The line does not fit into guest memory.
    #[error("the kernel command line cannot be written at {address:#x} in guest memory")]
    Write {
        /// Where it should have gone.
        address: u64,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
}

/// Joins `own` and `user` with a space.
///
/// `max` is the longest line in bytes without the NUL, see
/// [`LoadedKernel::cmdline_max`](super::kernel::LoadedKernel::cmdline_max).
pub fn build(own: &str, user: &str, max: usize) -> Result<Cmdline, CmdlineError> {
    let (own, user) = (own.trim(), user.trim());
    for part in [own, user] {
        if let Some((position, character)) = part.char_indices().find(|(_, c)| !printable(*c)) {
            return Err(CmdlineError::Character {
                character,
                position,
            });
        }
    }
    let space = usize::from(!own.is_empty() && !user.is_empty());
    let length = own.len() + space + user.len();
    let max = max.min(layout::CMDLINE_MAX_SIZE - 1);
    let too_long = |_| CmdlineError::TooLong {
        length,
        max,
        user: user.len(),
    };
    if length > max {
        return Err(too_long(linux_loader::cmdline::Error::TooLarge));
    }
    // The capacity counts the NUL.
    let mut line = Cmdline::new(max + 1).map_err(too_long)?;
    for part in [own, user].into_iter().filter(|part| !part.is_empty()) {
        line.insert_str(part).map_err(too_long)?;
    }
    Ok(line)
}

/// Writes `line`, NUL-terminated, at [`layout::CMDLINE_START`].
pub fn write(memory: &GuestMemory, line: &Cmdline) -> Result<(), CmdlineError> {
    let address = layout::CMDLINE_START;
    load_cmdline(memory, GuestAddress(address), line)
        .map_err(|source| CmdlineError::Write { address, source })
}

fn printable(character: char) -> bool {
    matches!(character, ' '..='~')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    fn text(line: &Cmdline) -> String {
        line.as_cstring().unwrap().into_string().unwrap()
    }

    #[test]
    fn own_parts_come_first() {
        assert_eq!(text(&build("a=1 b", "c", 100).unwrap()), "a=1 b c");
        assert_eq!(text(&build("a", "  ", 100).unwrap()), "a");
        assert_eq!(text(&build("", "c -- init", 100).unwrap()), "c -- init");
        assert_eq!(text(&build("", "", 100).unwrap()), "");
    }

    #[test]
    fn both_lengths_are_named() {
        assert_eq!(text(&build("12345", "789", 9).unwrap()), "12345 789");
        let error = build("12345", "7890", 9).unwrap_err();
        assert_eq!(
            error,
            CmdlineError::TooLong {
                length: 10,
                max: 9,
                user: 4
            }
        );
        let message = error.to_string();
        assert!(
            message.contains("10 bytes") && message.contains("at most 9"),
            "{message}"
        );
    }

    #[test]
    fn never_longer_than_its_room() {
        let long = "x".repeat(layout::CMDLINE_MAX_SIZE);
        assert!(matches!(
            build("", &long, usize::MAX),
            Err(CmdlineError::TooLong { .. })
        ));
        assert!(build("", &long[1..], usize::MAX).is_ok());
    }

    #[test]
    fn control_and_foreign_characters_are_refused() {
        for (bad, character) in [
            ("a\0b", '\0'),
            ("a\nb", '\n'),
            ("a\u{e9}", '\u{e9}'),
            ("a\tb", '\t'),
        ] {
            let expected = CmdlineError::Character {
                character,
                position: 1,
            };
            assert_eq!(build("", bad, 100).unwrap_err(), expected);
            assert_eq!(build(bad, "", 100).unwrap_err(), expected);
        }
    }

    #[test]
    fn written_with_its_nul() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory
            .write_slice(&[0xff; 16], GuestAddress(layout::CMDLINE_START))
            .unwrap();
        write(&memory, &build("console=ttyS0", "", 100).unwrap()).unwrap();
        let mut bytes = [0u8; 14];
        memory
            .read_slice(&mut bytes, GuestAddress(layout::CMDLINE_START))
            .unwrap();
        assert_eq!(&bytes, b"console=ttyS0\0");
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(own in ".{0,80}", user in ".{0,80}", max in 0usize..200) {
            if let Ok(line) = build(&own, &user, max) {
                prop_assert!(text(&line).len() <= max);
            }
        }
    }
}
