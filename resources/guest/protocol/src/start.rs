//! The layout of the Start message: what to run and how.
//!
//! Strings are NUL-terminated, so that the agent can pass them to execve where they lie.

use crate::message::WinSize;

/// Longest Start layout.
pub const MAX_START: usize = 128 * 1024;
/// Most arguments and environment variables together.
pub const MAX_STRINGS: usize = 4096;

const FIXED: usize = 14;
const TTY: u8 = 1;

/// What to run. `S` is any kind of byte string without NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start<'a, S> {
    /// Bytes of Stdout and Stderr payload that may be sent before the first Credit.
    pub window: u32,
    /// Run on a pseudo-terminal of this size instead of three pipes.
    pub tty: Option<WinSize>,
    /// Working directory; empty for `/`.
    pub cwd: S,
    /// Program and arguments.
    pub argv: &'a [S],
    /// Environment, `NAME=value` each.
    pub env: &'a [S],
}

/// Why a Start cannot be encoded or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// No program is named.
    Empty,
    /// A string contains NUL.
    Nul,
    /// More than [`MAX_STRINGS`] strings.
    TooMany(usize),
    /// Longer than [`MAX_START`] bytes.
    TooLong(usize),
    /// The buffer is too small, or the bytes are not a Start.
    Malformed,
}

impl<S: AsRef<[u8]>> Start<'_, S> {
    fn strings(&self) -> impl Iterator<Item = &[u8]> {
        core::iter::once(&self.cwd)
            .chain(self.argv)
            .chain(self.env)
            .map(AsRef::as_ref)
    }

    /// Length of the layout in bytes.
    ///
    /// # Errors
    /// When a limit is broken or a string contains NUL.
    pub fn encoded_len(&self) -> Result<usize, StartError> {
        let count = self.argv.len() + self.env.len();
        if self.argv.is_empty() {
            return Err(StartError::Empty);
        }
        if count > MAX_STRINGS {
            return Err(StartError::TooMany(count));
        }
        let mut length = FIXED;
        for s in self.strings() {
            if s.contains(&0) {
                return Err(StartError::Nul);
            }
            length = length.saturating_add(s.len() + 1);
        }
        if length > MAX_START {
            return Err(StartError::TooLong(length));
        }
        Ok(length)
    }

    /// Writes the layout and returns its length.
    ///
    /// # Errors
    /// As [`Self::encoded_len`]; [`StartError::Malformed`] if `out` is too small.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, StartError> {
        let length = self.encoded_len()?;
        let out = out.get_mut(..length).ok_or(StartError::Malformed)?;
        let size = self.tty.unwrap_or_default();
        out[..4].copy_from_slice(&self.window.to_le_bytes());
        out[4] = if self.tty.is_some() { TTY } else { 0 };
        out[5] = 0;
        out[6..8].copy_from_slice(&size.rows.to_le_bytes());
        out[8..10].copy_from_slice(&size.cols.to_le_bytes());
        // Both counts are at most MAX_STRINGS.
        out[10..12].copy_from_slice(&(self.argv.len() as u16).to_le_bytes());
        out[12..FIXED].copy_from_slice(&(self.env.len() as u16).to_le_bytes());
        let mut rest = &mut out[FIXED..];
        for s in self.strings() {
            let (now, later) = rest.split_at_mut(s.len() + 1);
            now[..s.len()].copy_from_slice(s);
            now[s.len()] = 0;
            rest = later;
        }
        Ok(length)
    }
}

/// A Start as read from bytes. Every string ends with its NUL within the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartView<'a> {
    /// See [`Start::window`].
    pub window: u32,
    /// See [`Start::tty`].
    pub tty: Option<WinSize>,
    /// Number of arguments, at least one.
    pub argc: usize,
    /// Number of environment variables.
    pub envc: usize,
    strings: &'a [u8],
}

impl<'a> StartView<'a> {
    /// Reads a layout. Checks every count and that the strings are exactly as many as counted.
    ///
    /// # Errors
    /// [`StartError::Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StartError> {
        let Some((head, strings)) = bytes.split_first_chunk::<FIXED>() else {
            return Err(StartError::Malformed);
        };
        let short = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let (argc, envc) = (usize::from(short(10)), usize::from(short(12)));
        let nuls = strings.iter().filter(|&&b| b == 0).count();
        let ok = bytes.len() <= MAX_START
            && argc > 0
            && argc + envc <= MAX_STRINGS
            && nuls == 1 + argc + envc
            && strings.last() == Some(&0)
            && head[4] & !TTY == 0
            && head[5] == 0;
        if !ok {
            return Err(StartError::Malformed);
        }
        let tty = (head[4] & TTY != 0).then(|| WinSize {
            rows: short(6),
            cols: short(8),
        });
        let window = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        Ok(Self {
            window,
            tty,
            argc,
            envc,
            strings,
        })
    }

    /// Working directory (empty for `/`), then arguments, then environment; each with its NUL.
    pub fn strings(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.strings.split_inclusive(|&b| b == 0)
    }
}
