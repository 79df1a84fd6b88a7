//! What the host reads out of a guest's console: that its kernel panicked, and its last lines.
//!
//! Both take the byte stream in pieces of any size, hold a bounded part of it and never fail.
//! Owned by the thread that copies console output.

use std::collections::VecDeque;

const PANIC: &[u8] = b"Kernel panic - not syncing";
const PANIC_END: &[u8] = b"---[ end Kernel panic";
/// Bytes of a line that are looked at: room for all that printk puts before the text.
const MAX_LINE: usize = 128;

/// How far a kernel panic has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PanicMark {
    /// The kernel says that it panics; registers and a stack trace may follow.
    Begin,
    /// The kernel has printed all it will.
    End,
}

/// Notices a Linux kernel's panic in its console output.
///
/// The text must be at the start of a line, after what printk puts there: a level `<0>`, a time
/// `[   12.345678]` and a caller `[    T1]`, each optional. Anything that writes to the console can
/// imitate it.
#[derive(Debug, Default)]
pub struct PanicDetector {
    line: Vec<u8>,
    seen: Option<PanicMark>,
}

impl PanicDetector {
    /// A detector at the start of a line.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes console output; the furthest mark so far if these bytes reached it.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<PanicMark> {
        let before = self.seen;
        for byte in bytes {
            self.push(*byte);
        }
        self.seen.filter(|_| self.seen != before)
    }

    fn push(&mut self, byte: u8) {
        if matches!(byte, b'\n' | b'\r') {
            self.line.clear();
            return;
        }
        if self.line.len() >= MAX_LINE {
            return;
        }
        self.line.push(byte);
        let reached = match strip_printk(&self.line) {
            text if text == PANIC => PanicMark::Begin,
            text if text == PANIC_END => PanicMark::End,
            _ => return,
        };
        self.seen = self.seen.max(Some(reached));
    }
}

/// The line without what printk puts before the text.
fn strip_printk(line: &[u8]) -> &[u8] {
    let line = strip_bracketed(line, b'<', b'>', u8::is_ascii_digit).unwrap_or(line);
    let is_time = |b: &u8| b.is_ascii_digit() || matches!(b, b' ' | b'.');
    let line = strip_bracketed(line, b'[', b']', is_time).unwrap_or(line);
    let is_caller = |b: &u8| b.is_ascii_digit() || matches!(b, b' ' | b'C' | b'T');
    let caller = line.strip_prefix(b" ").unwrap_or(line);
    let line = strip_bracketed(caller, b'[', b']', is_caller).unwrap_or(line);
    line.strip_prefix(b" ").unwrap_or(line)
}

/// What follows `open`, bytes of a kind, and `close`.
fn strip_bracketed(line: &[u8], open: u8, close: u8, kind: impl Fn(&u8) -> bool) -> Option<&[u8]> {
    let inner = line.strip_prefix(&[open])?;
    let end = inner.iter().position(|b| !kind(b))?;
    inner.get(end..)?.strip_prefix(&[close])
}

/// The last bytes of a console, for the report of a crash.
#[derive(Clone, Debug)]
pub struct LastLines {
    ring: VecDeque<u8>,
    capacity: usize,
    cut: bool,
    /// Bytes so far, with those that are dropped.
    total: u64,
}

impl LastLines {
    /// Keeps the last `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            ring: VecDeque::new(),
            capacity,
            cut: false,
            total: 0,
        }
    }

    /// What came from `position` on, counted in bytes since the beginning, and how many of those bytes are
    /// dropped already.
    pub fn since(&self, position: u64) -> (Vec<u8>, u64) {
        let first = self.total - self.ring.len() as u64;
        let dropped = first.saturating_sub(position);
        let at = usize::try_from(position.saturating_sub(first)).unwrap_or(usize::MAX);
        (self.ring.iter().skip(at).copied().collect(), dropped)
    }

    /// Takes console output.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let kept = bytes
            .get(bytes.len().saturating_sub(self.capacity)..)
            .unwrap_or_default();
        let excess = (self.ring.len() + kept.len()).saturating_sub(self.capacity);
        self.cut |= excess > 0 || kept.len() < bytes.len();
        self.ring.drain(..excess);
        self.ring.extend(kept);
    }

    /// The last `count` lines that hold text, oldest first, as safe to print on a terminal:
    /// without escape sequences and control characters, a tab as a space. Once bytes have been
    /// dropped, the first line may not be whole and is left out unless there is no other.
    pub fn lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.ring.iter().copied().collect();
        let mut lines: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
        if self.cut && lines.len() > 1 {
            lines.remove(0);
        }
        let mut lines: Vec<String> = lines.into_iter().map(clean).collect();
        lines.retain(|line| !line.trim().is_empty());
        lines.split_off(lines.len().saturating_sub(count))
    }
}

/// A guest's text as safe to print on a terminal: in one line, without escape sequences and control
/// characters; a tab or newline becomes a space.
pub fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut cleaned = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => skip_escape(&mut chars),
            '\t' | '\n' => cleaned.push(' '),
            c if c.is_control() => {}
            c => cleaned.push(c),
        }
    }
    cleaned
}

/// Skips the rest of an escape sequence (ECMA-48): a CSI up to its final character, else one
/// character.
fn skip_escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    if chars.next_if_eq(&'[').is_none() {
        chars.next_if(|c| !c.is_control());
        return;
    }
    while chars.next_if(|c| (' '..='?').contains(c)).is_some() {}
    chars.next_if(|c| ('@'..='~').contains(c));
}

#[cfg(test)]
mod tests;
