//! Control messages (section 5.3.6.2). What the driver has to be told of a port is a set of bits,
//! so that no driver makes it grow, however long it gives no buffers.

use super::SizeOrder;
use super::port::Port;

/// The driver has looked at the device.
pub const DEVICE_READY: u16 = 0;
/// A new port.
pub const PORT_ADD: u16 = 1;
/// A port goes.
pub const PORT_REMOVE: u16 = 2;
/// The driver has a port.
pub const PORT_READY: u16 = 3;
/// A port is a console.
pub const CONSOLE_PORT: u16 = 4;
/// A console's size.
pub const RESIZE: u16 = 5;
/// A port is open on the other side, or no more.
pub const PORT_OPEN: u16 = 6;
/// A port's name.
pub const PORT_NAME: u16 = 7;

/// The order in which the driver gets what is pending for a port.
const ORDER: [u16; 6] = [
    PORT_REMOVE,
    PORT_ADD,
    CONSOLE_PORT,
    PORT_NAME,
    RESIZE,
    PORT_OPEN,
];

/// What the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub id: u32,
    pub event: u16,
    pub value: u16,
}

/// Bytes of a message.
pub const LEN: usize = 8;

impl Message {
    pub fn parse(bytes: [u8; LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

impl Port {
    /// Has the driver told of `event`.
    pub fn tell(&mut self, event: u16) {
        self.state.pending |= 1 << event;
    }

    /// Has the driver told whether the host has the port open, if it does not know.
    pub fn tell_open(&mut self) {
        if self.state.ready && self.end.is_open() != self.state.host_open {
            self.tell(PORT_OPEN);
        }
    }

    /// The driver has the port: all it has to know.
    pub fn introduce(&mut self, size: (u16, u16)) {
        self.state.ready = true;
        self.state.host_open = false;
        if self.console {
            self.tell(CONSOLE_PORT);
            if size != (0, 0) {
                self.tell(RESIZE);
            }
        }
        if !self.name.is_empty() {
            self.tell(PORT_NAME);
        }
        self.tell_open();
    }

    /// The next message for the driver, which is then pending no more.
    pub fn next_message(
        &mut self,
        id: u32,
        (cols, rows): (u16, u16),
        order: SizeOrder,
    ) -> Option<Vec<u8>> {
        let pending = self.state.pending;
        let event = ORDER.into_iter().find(|e| pending >> e & 1 != 0);
        let Some(event) = event else {
            // Bits that a saved state should not have.
            self.state.pending = 0;
            return None;
        };
        self.state.pending &= !(1 << event);
        let mut value = 1;
        if event == PORT_OPEN {
            self.state.host_open = self.end.is_open();
            value = self.state.host_open.into();
        }
        let mut bytes = Message { id, event, value }.bytes();
        match event {
            PORT_NAME => bytes.extend(self.name.bytes()),
            RESIZE => {
                let (first, second) = match order {
                    SizeOrder::RowsFirst => (rows, cols),
                    SizeOrder::ColsFirst => (cols, rows),
                };
                bytes.extend(first.to_le_bytes());
                bytes.extend(second.to_le_bytes());
            }
            _ => {}
        }
        Some(bytes)
    }
}
