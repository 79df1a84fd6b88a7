//! The host's end of the agent's UART (COM2): bytes from the guest, waiting for the vmm thread.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Most bytes that wait. The agent's window is far smaller; a guest that sends more is broken,
/// and what does not fit is dropped, which its protocol then shows.
const LIMIT: usize = 256 * 1024;

/// Filled on vCPU threads, emptied on the vmm thread.
#[derive(Debug)]
pub struct AgentPort {
    waiting: Mutex<Vec<u8>>,
    event: EventFd,
}

impl AgentPort {
    /// `event` is written when bytes begin to wait.
    pub fn new(event: EventFd) -> Arc<Self> {
        Arc::new(Self {
            waiting: Mutex::new(Vec::new()),
            event,
        })
    }

    /// Takes all that waits.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The writer that the UART gets.
    pub fn writer(self: &Arc<Self>) -> Box<dyn Write + Send> {
        Box::new(Writer(self.clone()))
    }
}

struct Writer(Arc<AgentPort>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = self
            .0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let first = waiting.is_empty();
        let room = LIMIT - waiting.len();
        waiting.extend(bytes.iter().take(room));
        drop(waiting);
        if first {
            self.0.event.write(1)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_wait_in_order_and_bounded() {
        let port = AgentPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut writer = port.writer();
        writer.write_all(b"ab").unwrap();
        writer.write_all(b"c").unwrap();
        assert_eq!(port.event.read().unwrap(), 1);
        assert_eq!(port.take(), b"abc");
        for _ in 0..LIMIT / 1024 + 5 {
            writer.write_all(&[0; 1024]).unwrap();
        }
        assert_eq!(port.take().len(), LIMIT);
    }
}
