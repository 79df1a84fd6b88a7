//! How far the vmm thread is with a snapshot that it writes or loads: told to those who listen, and whether it is
//! still wanted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::events::Events;
use crate::control::Event;

/// Time between two events.
const SAY_EVERY: Duration = Duration::from_millis(100);

/// What is done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// It is written.
    Write,
    /// A machine is made of it.
    Load,
}

/// What watches one of them.
pub struct Meter {
    task: Task,
    path: PathBuf,
    /// Becomes true when nobody wants it.
    cancelled: Option<Arc<AtomicBool>>,
    said: Mutex<(Events, Instant)>,
}

impl Meter {
    /// For the snapshot with the state file `path`; the listeners are lent.
    pub fn new(
        task: Task,
        path: &Path,
        cancelled: Option<Arc<AtomicBool>>,
        events: &mut Events,
    ) -> Self {
        let events = std::mem::take(events);
        Self {
            task,
            path: path.to_owned(),
            cancelled,
            said: Mutex::new((events, Instant::now())),
        }
    }

    /// So many bytes of all are written or read; whether to go on.
    pub fn watch(&self, done: u64, total_bytes: u64) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let (events, last) = &mut *said;
        let loaded = self.task == Task::Load && done == total_bytes;
        if last.elapsed() >= SAY_EVERY || loaded {
            *last = Instant::now();
            let path = self.path.clone();
            events.emit(&match self.task {
                Task::Write => Event::SnapshotProgress {
                    path,
                    written_bytes: done,
                    total_bytes,
                },
                Task::Load => Event::LoadProgress {
                    path,
                    read_bytes: done,
                    total_bytes,
                },
            });
        }
        !self.is_cancelled()
    }

    /// Whether nobody wants it any more.
    pub fn is_cancelled(&self) -> bool {
        let cancelled = self.cancelled.as_ref();
        cancelled.is_some_and(|cancelled| cancelled.load(Ordering::SeqCst))
    }

    /// Gives the listeners back.
    pub fn give_back(&self, events: &mut Events) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        *events = std::mem::take(&mut said.0);
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
        let cancelled = Arc::new(AtomicBool::new(false));
        let wish = Some(cancelled.clone());
        let meter = Meter::new(Task::Write, Path::new("/s"), wish, &mut events);
        assert!(meter.watch(1, 9));
        std::thread::sleep(SAY_EVERY);
        assert!(meter.watch(2, 9) && meter.watch(3, 9));
        cancelled.store(true, Ordering::SeqCst);
        assert!(!meter.watch(4, 9) && meter.is_cancelled());
        meter.give_back(&mut events);
        drop(events);
        let mut text = String::new();
        (&*stream.end).read_to_string(&mut text).unwrap();
        assert!(text.matches("snapshot_progress").count() >= 2, "{text}");
        assert!(
            text.contains(r#""written_bytes":2,"total_bytes":9"#),
            "{text}"
        );
    }
}
