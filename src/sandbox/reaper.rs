//! A thread that closes what takes long to close, such as a virtual machine that is over, off the path
//! of whoever had it.

use std::any::Any;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::sandbox::thread::{Role, ThreadError, spawn};

/// Things that wait to be closed, at most: who has more waits, so that they do not pile up.
const MOST: usize = 64;

/// The thread. Dropping this waits until all is closed.
#[derive(Debug)]
pub struct Reaper {
    sender: Option<SyncSender<Box<dyn Any + Send>>>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    /// Starts it.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn new() -> Result<Self, ThreadError> {
        let (sender, receiver) = sync_channel::<Box<dyn Any + Send>>(MOST);
        let thread = spawn(Role::Reaper, move || receiver.iter().for_each(drop))?;
        Ok(Self {
            sender: Some(sender),
            thread: Some(thread),
        })
    }

    /// Has it drop `over`.
    pub fn reap(&self, over: impl Send + 'static) {
        if let Some(sender) = &self.sender
            && let Err(over) = sender.send(Box::new(over))
        {
            // Its thread is gone: then here.
            drop(over);
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the reaper panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Counted(Arc<AtomicUsize>, std::thread::ThreadId);

    impl Drop for Counted {
        fn drop(&mut self) {
            assert_ne!(std::thread::current().id(), self.1);
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn all_is_closed_elsewhere_before_it_is_gone() {
        let reaper = Reaper::new().unwrap();
        let (count, here) = (Arc::default(), std::thread::current().id());
        (0..200).for_each(|_| reaper.reap(Counted(Arc::clone(&count), here)));
        drop(reaper);
        assert_eq!(count.load(Ordering::Relaxed), 200);
    }
}
