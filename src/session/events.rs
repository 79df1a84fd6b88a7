//! Listeners to what happens, each behind a socket whose buffer bounds what waits for it.
//!
//! They get server-sent events (WHATWG HTML, section 9.2). Nothing here blocks: a listener that does not take
//! what there is gets a last event that says so, for which there is always room, and is let go.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;

use super::duplex::{is_there, pair};
use crate::control::{ActionError, Event, Stream, chain};

/// Listeners at a time.
const MOST: usize = 16;
/// Bytes of the socket's buffer, as the kernel counts them.
const BUFFER: usize = 128 << 10;
/// Bytes that may wait before another event is written.
const LIMIT: libc::c_int = 96 << 10;
/// Content type of the stream.
const CONTENT_TYPE: &str = "text/event-stream";

nix::ioctl_read_bad!(
    /// Bytes that were sent and not received (`SIOCOUTQ`).
    unsent,
    libc::TIOCOUTQ,
    libc::c_int
);

/// All listeners.
#[derive(Debug, Default)]
pub struct Events {
    listeners: Vec<UnixStream>,
    /// Events so far.
    count: u64,
}

/// An event with what is said of each.
#[derive(Serialize)]
struct Record<'a> {
    #[serde(flatten)]
    event: &'a Event,
    time_ms: u64,
}

impl Events {
    /// Whether nobody listens.
    pub fn is_empty(&self) -> bool {
        self.listeners.is_empty()
    }

    /// One more listener, who hears `first` at once.
    pub fn listen(&mut self, first: &Event) -> Result<Stream, ActionError> {
        self.listeners.retain(is_there);
        if self.listeners.len() >= MOST {
            return Err(ActionError::TooMany {
                what: "listeners to events",
                most: MOST,
            });
        }
        let failed = |error: io::Error| ActionError::Failed {
            text: chain(&error),
        };
        let (mut ours, theirs) = bounded_pair().map_err(failed)?;
        if tell(&mut ours, self.count, first) {
            self.listeners.push(ours);
        }
        Ok(Stream {
            content_type: CONTENT_TYPE,
            end: Arc::new(theirs),
        })
    }

    /// Tells all listeners.
    pub fn emit(&mut self, event: &Event) {
        self.count += 1;
        let count = self.count;
        self.listeners
            .retain_mut(|listener| tell(listener, count, event));
    }
}

/// Both ends of a listener's stream, with room for what waits.
fn bounded_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = pair()?;
    setsockopt(&ours, sockopt::SndBuf, &BUFFER)?;
    Ok((ours, theirs))
}

/// Tells a listener; `false` where it is let go.
fn tell(listener: &mut UnixStream, count: u64, event: &Event) -> bool {
    let mut waiting = 0;
    // SAFETY: SIOCOUTQ writes an int, to a local.
    let asked = unsafe { unsent(listener.as_raw_fd(), &mut waiting) };
    let slow = asked.is_err() || waiting > LIMIT;
    let event = if slow { &Event::Lagging } else { event };
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let time_ms = since.map_or(0, |since| since.as_millis() as u64);
    let Ok(data) = serde_json::to_string(&Record { event, time_ms }) else {
        return false;
    };
    let text = format!("id: {count}\nevent: {}\ndata: {data}\n\n", event.name());
    listener.write_all(text.as_bytes()).is_ok() && !slow
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn text(stream: &Stream) -> String {
        let mut text = Vec::new();
        let _ = (&*stream.end).read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn each_listener_hears_all_from_its_beginning() {
        let mut events = Events::default();
        events.emit(&Event::Started);
        let first = events.listen(&Event::Paused).unwrap();
        events.emit(&Event::Resumed);
        let second = events.listen(&Event::Resumed).unwrap();
        let said = text(&first);
        assert!(said.starts_with("id: 1\nevent: paused\ndata: {\"event\":\"paused\",\"time_ms\":"));
        assert!(said.contains("\n\nid: 2\nevent: resumed\n") && said.ends_with("}\n\n"));
        assert!(text(&second).starts_with("id: 2\nevent: resumed\n"));
        drop(first);
        events.emit(&Event::Panicked);
        assert_eq!(events.listeners.len(), 1);
    }

    #[test]
    fn a_slow_listener_is_let_go_with_a_last_word_and_holds_up_nobody() {
        let mut events = Events::default();
        let slow = events.listen(&Event::Started).unwrap();
        let mut count = 0;
        while !events.is_empty() {
            events.emit(&Event::Paused);
            count += 1;
            assert!(count < 10_000);
        }
        let said = text(&slow);
        assert_eq!(said.matches("event: paused\n").count(), count - 1);
        assert!(count > 50);
        assert!(said.contains("event: lagging\n"), "{count}");
    }

    #[test]
    fn listeners_are_counted_while_they_are_there() {
        let mut events = Events::default();
        let all: Vec<_> = (0..MOST)
            .map(|_| events.listen(&Event::Started).unwrap())
            .collect();
        let error = events.listen(&Event::Started).unwrap_err();
        assert_eq!(error.code(), "too-many");
        drop(all);
        events.listen(&Event::Started).unwrap();
        assert_eq!(events.listeners.len(), 1);
    }
}
