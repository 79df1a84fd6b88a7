//! The host's ends of the agent's channels: a port of the virtio console, and COM2 for guests that
//! have no driver for that. The agent takes one of them; who speaks first has it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use devices::legacy::serial::Serial;
use devices::virtio::console::HostPort;
use vmm_sys_util::eventfd::EventFd;

/// Most bytes that wait. The agent's window is far smaller; a guest that sends more is broken,
/// and what does not fit is dropped, which its protocol then shows.
const LIMIT: usize = 256 * 1024;

/// The way to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Not known yet.
    Either,
    /// COM2.
    Uart,
    /// The port.
    Port,
}

/// Both channels, owned by the vmm thread.
#[derive(Debug)]
pub struct Channel {
    uart: Arc<AgentPort>,
    port: Option<HostPort>,
    way: Way,
}

impl Channel {
    /// COM2, and the port where the machine has it.
    pub fn new(uart: Arc<AgentPort>, port: Option<HostPort>) -> Self {
        let way = Way::Either;
        Self { uart, port, way }
    }

    /// As [`Self::new`], for an agent that may have chosen the port, or COM2.
    pub fn chosen(uart: Arc<AgentPort>, port: Option<HostPort>, by_port: Option<bool>) -> Self {
        let way = match by_port {
            None => Way::Either,
            Some(true) => Way::Port,
            Some(false) => Way::Uart,
        };
        Self { uart, port, way }
    }

    /// Whether the agent has chosen the port, or COM2.
    pub fn choice(&self) -> Option<bool> {
        match self.way {
            Way::Either => None,
            Way::Uart => Some(false),
            Way::Port => Some(true),
        }
    }

    /// Bytes for the agent that are neither here nor in the guest.
    pub fn unread(&self) -> Vec<u8> {
        let port = self.port.as_ref().filter(|_| self.is_lossless());
        port.map(HostPort::unread).unwrap_or_default()
    }

    /// The port, whose events are the channel's as well as those of COM2.
    pub fn port(&self) -> Option<&HostPort> {
        self.port.as_ref()
    }

    /// Whether bytes are never lost.
    pub fn is_lossless(&self) -> bool {
        self.way == Way::Port
    }

    /// The agent has said Hello.
    pub fn settle(&mut self) {
        if self.way == Way::Either {
            self.way = Way::Uart;
        }
    }

    /// Takes all that waits. Only the agent has the port open, so its first byte decides; on the UART
    /// there may be noise.
    pub fn take(&mut self) -> Vec<u8> {
        let bytes = self.port.as_ref().and_then(HostPort::take);
        match bytes {
            Some(bytes) if !bytes.is_empty() && self.way != Way::Uart => {
                self.way = Way::Port;
                bytes
            }
            _ if self.way == Way::Port => Vec::new(),
            _ => self.uart.take(),
        }
    }

    /// Moves as many of `bytes` to the agent as there is room for; says how many.
    pub fn write(&mut self, bytes: &[u8], uart: &Serial) -> usize {
        match (self.way, &self.port) {
            (Way::Port, Some(port)) => port.write(bytes).unwrap_or(0),
            (Way::Port | Way::Either, _) => 0,
            (Way::Uart, _) => uart.input(bytes),
        }
    }
}

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
    fn who_speaks_first_has_the_channel() {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let uart = AgentPort::new(event());
        let (port, _end) = devices::virtio::console::PortEnd::pipe(64).unwrap();
        let mut channel = Channel::new(uart.clone(), Some(port));
        uart.writer().write_all(b"noise").unwrap();
        assert_eq!(channel.take(), b"noise");
        assert_eq!(channel.take(), b"");
        assert!(!channel.is_lossless());
        channel.settle();
        uart.writer().write_all(b"more").unwrap();
        assert_eq!(channel.take(), b"more");
        assert!(!channel.is_lossless());
    }

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
