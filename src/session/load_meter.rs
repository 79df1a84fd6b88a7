//! How far a load is: told to those who listen, and whether it is still wanted. The vmm thread has it, which loads.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::events::Events;
use crate::control::Event;

/// Time between two events.
const SAY_EVERY: Duration = Duration::from_millis(100);

/// What watches one load.
pub struct LoadMeter {
    path: PathBuf,
    /// Becomes true when nobody wants it.
    cancelled: Option<Arc<AtomicBool>>,
    said: Mutex<(Events, Instant)>,
}

impl LoadMeter {
    /// For what is made of the state file `path`; the listeners are lent.
    pub fn new(path: &Path, cancelled: Option<Arc<AtomicBool>>, events: Events) -> Self {
        Self {
            path: path.to_owned(),
            cancelled,
            said: Mutex::new((events, Instant::now())),
        }
    }

    /// So many bytes of all are read; whether to go on.
    pub fn watch(&self, read_bytes: u64, total_bytes: u64) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let (events, last) = &mut *said;
        if last.elapsed() >= SAY_EVERY || read_bytes == total_bytes {
            *last = Instant::now();
            events.emit(&Event::LoadProgress {
                path: self.path.clone(),
                read_bytes,
                total_bytes,
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
    pub fn take_events(&self) -> Events {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut said.0)
    }
}
