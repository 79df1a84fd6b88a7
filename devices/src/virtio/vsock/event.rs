//! The transport reset (section 5.10.6.7): how a restored driver hears that its connections are gone.
//!
//! A driver may look at packets before it looks at events, and then would drop connections that it made
//! since. So nothing is given to it until it has seen the event, which it shows by making that buffer
//! available again.

use super::VsockState;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, Io, write_at};

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How far the driver is.
#[derive(Debug, Default)]
pub enum Reset {
    /// It knows all there is to know.
    #[default]
    Known,
    /// It has to be told.
    Due,
    /// It was told. Its other buffers for events are taken, so that it says when there is another.
    Told(Vec<Chain>),
}

impl Reset {
    /// For a driver that was saved as in `state`, of a device that has `cid` now.
    pub fn of(state: VsockState, cid: u32) -> Self {
        match state.connected || state.cid != 0 && state.cid != cid {
            true => Self::Due,
            false => Self::Known,
        }
    }

    /// Whether there is something that the driver does not know yet.
    pub fn is_pending(&self) -> bool {
        !matches!(self, Self::Known)
    }

    /// Whether packets have to wait.
    pub fn holds(&self) -> bool {
        matches!(self, Self::Told(_))
    }

    /// Goes on as far as the driver has buffers in queue `event`.
    pub fn proceed(&mut self, event: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match self {
            Self::Known => Ok(()),
            Self::Due => self.tell(event, io),
            Self::Told(_) => {
                if let Some(chain) = io.pop(event)? {
                    io.unpop(chain);
                    self.release(io);
                    *self = Self::Known;
                }
                Ok(())
            }
        }
    }

    fn tell(&mut self, event: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(event)? {
            let written = write_at(io.ram(), chain.writable(), 0, &TRANSPORT_RESET)?;
            io.complete(chain, written as u32)?;
            if written == TRANSPORT_RESET.len() {
                let mut others = Vec::new();
                while let Some(chain) = io.pop(event)? {
                    others.push(chain);
                }
                *self = Self::Told(others);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Puts the driver's buffers back. A driver that has not seen the event is told again.
    pub fn release(&mut self, io: &mut Io<'_>) {
        if let Self::Told(chains) = std::mem::replace(self, Self::Due) {
            chains.into_iter().rev().for_each(|chain| io.unpop(chain));
        }
    }
}
