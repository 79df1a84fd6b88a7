//! I/O threads: each runs the event loop on which virtio devices and their queues live.
//!
//! A device moves onto the loop when its driver starts it and back when it stops (see
//! `devices::virtio::worker`), so a thread holds nothing that anyone else touches. The owner is
//! the vmm thread, which stops vCPUs first, then the devices, then this.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use devices::virtio::worker::{IoLoop, Worker};
use event_manager::RemoteEndpoint;

use crate::sandbox::thread::{Role, ThreadError, spawn};

/// An I/O thread cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// No epoll or event descriptor.
    #[error("Cannot make the event loop of an I/O thread")]
    Loop(#[source] event_manager::Error),
    /// No thread.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// A running I/O thread. Dropping it ends and joins the thread, with the devices that are still
/// on its loop.
pub struct IoThread {
    endpoint: RemoteEndpoint<Worker>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts I/O thread number `index`.
    pub fn start(index: u16) -> Result<Self, IoError> {
        let io_loop = IoLoop::new().map_err(IoError::Loop)?;
        let endpoint = io_loop.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = spawn(Role::Io(index), move || run(io_loop, &flag))?;
        Ok(Self {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// The way onto the loop.
    pub fn endpoint(&self) -> RemoteEndpoint<Worker> {
        self.endpoint.clone()
    }
}

fn run(mut io_loop: IoLoop, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        match io_loop.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(errno))
                if io::Error::from_raw_os_error(errno.errno()).kind()
                    == io::ErrorKind::Interrupted => {}
            Err(error) => {
                // The guest sees its devices stand still; nothing that was acknowledged is lost.
                log::error!("an I/O thread ends early: {error}");
                return;
            }
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Err(error) = self.endpoint.kick() {
            log::error!("an I/O thread cannot be told to end and is left behind: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("an I/O thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_answers_until_it_is_dropped() {
        let thread = IoThread::start(3).unwrap();
        let endpoint = thread.endpoint();
        let name = || -> Result<_, event_manager::Error> {
            endpoint.call_blocking(|_| Ok(std::thread::current().name().map(str::to_owned)))
        };
        assert_eq!(name().unwrap().as_deref(), Some("io3"));
        drop(thread);
        assert!(name().is_err());
    }
}
