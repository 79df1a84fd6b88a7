//! Those who read the guest's console beside bulle's own terminal, and may type into it.
//!
//! The console keeps its last bytes; each reader has its place there. One that is slower than the guest misses
//! bytes, and is told how many, so that neither the guest nor another reader waits for it.

use nix::sys::epoll::{Epoll, EpollEvent};

use super::console::ConsoleTap;
use super::duplex::Duplex;
use super::hvc::Hvc;
use crate::control::{ActionError, Stream};
use crate::vm::Vm;

/// Readers at a time.
const MOST: usize = 16;
/// Bytes of input that wait for the guest to take them.
const INPUT: usize = 4096;
/// Content type of the stream.
const CONTENT_TYPE: &str = "application/octet-stream";

/// The guest's console: hvc0 where bulle's terminal is on that, else COM1.
#[derive(Clone, Copy)]
pub struct Console<'a> {
    /// Whose.
    pub vm: &'a Vm,
    /// What was written to COM1.
    pub tap: &'a ConsoleTap,
    /// hvc0.
    pub hvc: Option<&'a Hvc>,
}

impl Console<'_> {
    /// The bytes that are kept, from `position` on, and how many of those are not.
    pub fn since(&self, position: u64) -> (Vec<u8>, u64) {
        match self.hvc {
            Some(hvc) => hvc.since(position),
            None => self.tap.since(position),
        }
    }

    /// Types; says how much was taken.
    fn input(&self, bytes: &[u8]) -> usize {
        match self.hvc {
            Some(hvc) => hvc.input(bytes),
            None => self.vm.board().console.input(bytes),
        }
    }
}

struct Reader {
    client: Duplex,
    position: u64,
    /// Typed, and not taken by the guest yet.
    input: Vec<u8>,
}

/// All readers.
#[derive(Default)]
pub struct Readers(Vec<Reader>);

impl Readers {
    /// One more reader, from the first byte that is kept.
    pub fn begin(&mut self, console: Console<'_>, ready: &Epoll) -> Result<Stream, ActionError> {
        if self.0.len() >= MOST {
            return Err(ActionError::TooMany {
                what: "readers of the console",
                most: MOST,
            });
        }
        let (client, stream) = Duplex::new(CONTENT_TYPE)?;
        let (_, position) = console.since(0);
        let reader = Reader {
            client,
            position,
            input: Vec::new(),
        };
        // What it waits for is said when it is served, which is next.
        ready
            .add(&reader.client, EpollEvent::empty())
            .map_err(|errno| ActionError::Failed {
                text: errno.to_string(),
            })?;
        console.tap.follow(true);
        self.0.push(reader);
        self.serve(console, ready);
        Ok(stream)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Passes on what there is, both ways.
    pub fn serve(&mut self, console: Console<'_>, ready: &Epoll) {
        for reader in &mut self.0 {
            reader.serve(
                |position| console.since(position),
                |bytes| console.input(bytes),
            );
            let wanted = reader.client.wants(reader.input.is_empty());
            let mut event = EpollEvent::new(wanted, super::runtime::STREAM);
            if let Err(errno) = ready.modify(&reader.client, &mut event) {
                log::warn!("a reader of the console is not waited for: {errno}");
            }
        }
        // Closing it takes it out of the epoll set.
        self.0.retain(|reader| !reader.client.is_gone());
        console.tap.follow(!self.0.is_empty());
    }
}

impl Reader {
    /// Passes on what there is, both ways: what the console says `since` a position, and `input` for it.
    fn serve(&mut self, since: impl Fn(u64) -> (Vec<u8>, u64), input: impl Fn(&[u8]) -> usize) {
        self.client.flush();
        if self.client.waiting() == 0 {
            let (bytes, dropped) = since(self.position);
            if dropped > 0 {
                let text = format!("\r\n[{dropped} bytes are lost to this reader]\r\n");
                self.client.push(text.as_bytes());
            }
            self.position += dropped + bytes.len() as u64;
            self.client.push(&bytes);
        }
        if self.input.is_empty() {
            self.input = self.client.read(INPUT);
        }
        let taken = input(&self.input);
        self.input.drain(..taken);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use devices::console::LastLines;

    use super::*;

    #[test]
    fn a_reader_that_sleeps_is_told_what_it_missed_and_holds_nothing_up() {
        let (client, stream) = Duplex::new(CONTENT_TYPE).unwrap();
        let mut reader = Reader {
            client,
            position: 0,
            input: Vec::new(),
        };
        let mut console = LastLines::new(1000);
        let mut end = &*stream.end;
        end.write_all(b"typed").unwrap();
        let mut written = 0;
        while written < 4 << 20 {
            console.push(&[b'x'; 700]);
            written += 700;
            reader.serve(
                |position| console.since(position),
                |bytes| bytes.len().min(2),
            );
        }
        assert!(reader.input.is_empty());
        assert!(reader.client.waiting() <= 1100);
        let mut text = Vec::new();
        for _ in 0..3 {
            let _ = end.read_to_end(&mut text);
            reader.serve(|position| console.since(position), <[u8]>::len);
        }
        let text = String::from_utf8(text).unwrap();
        let lost = text.split("\r\n[").nth(1).unwrap().split_once(' ').unwrap();
        assert!(lost.1.starts_with("bytes are lost to this reader]"));
        let seen = text.matches('x').count();
        assert_eq!(seen + lost.0.parse::<usize>().unwrap(), written);
        drop(stream);
        reader.serve(|position| console.since(position), <[u8]>::len);
        assert!(reader.client.is_gone());
    }
}
