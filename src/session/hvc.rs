//! The session's end of hvc0, the guest's console on the virtio console device.
//!
//! The device's I/O thread fills and empties a bounded pipe; what the terminal does not take stays
//! there, and a terminal that takes nothing for a second loses output rather than stop the guest.

use std::os::fd::AsRawFd;

use devices::console::LastLines;
use devices::virtio::console::{ConsoleHandle, HostPort};

use super::console::KEPT;

/// hvc0 on bulle's terminal.
pub struct Hvc {
    port: HostPort,
    /// Its last output.
    last: LastLines,
    /// Its output is in the epoll set now.
    pub watched: bool,
}

impl Hvc {
    /// Over the host's end of the console.
    pub fn new(port: HostPort) -> Self {
        Self {
            port,
            last: LastLines::new(KEPT),
            watched: false,
        }
    }

    /// Readable when there is output; only looked at while that can be passed on.
    pub fn output_event(&self) -> i32 {
        self.port.readable().as_raw_fd()
    }

    /// Readable when there is room for input again.
    pub fn room_event(&self) -> i32 {
        self.port.writable().as_raw_fd()
    }

    /// Input; says how much was taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.port.write(bytes).unwrap_or(0)
    }

    /// All output that waits.
    pub fn output(&mut self) -> Vec<u8> {
        let bytes = self.port.take().unwrap_or_default();
        self.last.push(&bytes);
        bytes
    }

    /// Output from `position` on, and how many bytes of it are not kept any more.
    pub fn since(&self, position: u64) -> (Vec<u8>, u64) {
        self.last.since(position)
    }
}

/// Tells the guest the size of its console, as rows and columns.
pub fn resize(console: &ConsoleHandle, (rows, cols): (u16, u16)) {
    if let Err(error) = console.resize(cols, rows) {
        log::warn!("the console's size was not told: {error}");
    }
}
