//! How far a snapshot is that the vmm thread writes: told to those who listen, and whether it is still
//! wanted.

use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::control::Event;
use crate::session::events::Events;

/// Time between two events.
const SAY_EVERY: Duration = Duration::from_millis(100);

/// What watches one snapshot.
pub struct Meter<'a> {
    path: &'a Path,
    /// Becomes true when nobody wants it.
    cancelled: Option<&'a AtomicBool>,
    said: RefCell<(&'a mut Events, Instant)>,
}

impl<'a> Meter<'a> {
    /// For what is written to the state file `path`.
    pub fn new(path: &'a Path, cancelled: Option<&'a AtomicBool>, events: &'a mut Events) -> Self {
        Self {
            path,
            cancelled,
            said: RefCell::new((events, Instant::now())),
        }
    }

    /// So many bytes of all are written; whether to go on.
    pub fn watch(&self, written_bytes: u64, total_bytes: u64) -> bool {
        let mut said = self.said.borrow_mut();
        let (events, last) = &mut *said;
        if last.elapsed() >= SAY_EVERY {
            *last = Instant::now();
            events.emit(&Event::SnapshotProgress {
                path: self.path.to_owned(),
                written_bytes,
                total_bytes,
            });
        }
        !self.is_cancelled()
    }

    /// Whether nobody wants it any more.
    pub fn is_cancelled(&self) -> bool {
        let cancelled = self.cancelled;
        cancelled.is_some_and(|cancelled| cancelled.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn listeners_hear_now_and_then_and_the_end_of_the_wish_is_noticed() {
        let mut events = Events::default();
        let stream = events.listen(&Event::Started).unwrap();
        let cancelled = AtomicBool::new(false);
        let meter = Meter::new(Path::new("/s"), Some(&cancelled), &mut events);
        assert!(meter.watch(1, 9));
        std::thread::sleep(SAY_EVERY);
        assert!(meter.watch(2, 9) && meter.watch(3, 9));
        cancelled.store(true, Ordering::SeqCst);
        assert!(!meter.watch(4, 9) && meter.is_cancelled());
        drop(events);
        let mut text = String::new();
        (&*stream.end).read_to_string(&mut text).unwrap();
        assert_eq!(text.matches("snapshot_progress").count(), 2, "{text}");
        assert!(
            text.contains(r#""written_bytes":2,"total_bytes":9"#),
            "{text}"
        );
    }
}
