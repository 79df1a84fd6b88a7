//! Entropy device (section 5.4): fills the driver's buffers from the host's `getrandom`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{ConfigSpace, DeviceError, DeviceState, NoConfig, Traits, VirtioDevice};
use super::io::{Io, write_at};
use crate::random::fill;

/// Most random bytes given for one request; the driver asks again for more.
const MAX_BYTES: usize = 4096;
/// Size of the one queue.
const QUEUE_SIZE: u16 = 256;

/// What is saved of an entropy device: nothing, each VM gets its own randomness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {}

/// The entropy device.
#[derive(Debug)]
pub struct Entropy {
    buffer: Box<[u8; MAX_BYTES]>,
}

impl Entropy {
    /// Makes the device.
    pub fn new(_: EntropyState) -> Self {
        Self {
            buffer: Box::new([0; MAX_BYTES]),
        }
    }
}

impl VirtioDevice for Entropy {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_RNG,
            features: 0,
            queues: vec![QUEUE_SIZE],
            shm: Vec::new(),
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            let wanted = super::io::total(chain.writable());
            let len = usize::try_from(wanted).unwrap_or(MAX_BYTES).min(MAX_BYTES);
            let bytes = self.buffer.get_mut(..len).unwrap_or_default();
            fill(bytes).map_err(|source| DeviceError::Host {
                what: "give random bytes",
                source,
            })?;
            let written = write_at(io.ram(), chain.writable(), 0, bytes)?;
            io.complete(chain, written as u32)?;
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Entropy(EntropyState {})
    }
}
