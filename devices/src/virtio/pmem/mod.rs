//! Persistent memory (section 5.19): a file of the host as memory of the guest.
//!
//! The guest reads and writes the file's pages in a memory slot that the root crate registers; the
//! device itself only says where that is and carries out flushes, on its I/O thread and one for
//! all that wait.

mod file;

#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

pub use self::file::{ALIGN, Mapping};
use super::block::Holder;
use super::device::{
    ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice, read_config,
};
use super::io::{Chain, Io, read_at, total, write_at};
use super::limiter::Limiter;
use super::pace::{Pace, PaceHandle};
use crate::counters::{Counter, Values};

/// Size of the one queue.
const QUEUE_SIZE: u16 = 64;
/// Request: flush.
const FLUSH: u32 = 0;
/// Answer: done.
const OK: u32 = 0;
/// Answer: not done.
const FAILED: u32 = 1;
/// Bytes of requests and of answers.
const WORD: usize = 4;
/// Failed flushes that are logged; a guest can repeat them at will.
const MAX_LOGGED: u32 = 8;

/// A file cannot be memory of the guest.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// Not what it should be.
    #[error("persistent memory {path:?} is not a regular file")]
    Kind {
        /// As given.
        path: PathBuf,
    },
    /// Nothing in it, or too much.
    #[error(
        "persistent memory {path:?} has {size} bytes: want 1 byte to 32 TiB; `truncate -s SIZE` \
         makes a file of a size"
    )]
    Size {
        /// As given.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// In use.
    #[error(
        "persistent memory {path:?} is in use by {holder}; a file can be shared if all who have it \
         only read it"
    )]
    Held {
        /// As given.
        path: PathBuf,
        /// Who has it.
        holder: Holder,
    },
    /// Not where or as large as the saved driver knows it.
    #[error(
        "persistent memory {path:?} is {} bytes at {:#x}, and was {} bytes at {:#x} when the machine \
         was saved", .now.len, .now.address, .saved.len, .saved.address
    )]
    Place {
        /// As given.
        path: PathBuf,
        /// In the saved state.
        saved: PmemPlace,
        /// As it is.
        now: PmemPlace,
    },
    /// The host failed.
    #[error("cannot {what} persistent memory {path:?}")]
    Host {
        /// As given.
        path: PathBuf,
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a persistent memory is.
#[derive(Clone, Debug)]
pub struct PmemOptions {
    /// Its mapping.
    pub mapping: Arc<Mapping>,
    /// Guest physical address, a multiple of [`ALIGN`].
    pub address: u64,
    /// Limits of flushes, each of which counts as the whole file.
    pub limiter: Option<Arc<Limiter>>,
}

impl PmemOptions {
    /// Opens, locks and maps a file, which is to be at `address` once that is known.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, PmemError> {
        let mapping = Arc::new(Mapping::open(path, read_only)?);
        Ok(Self {
            mapping,
            address: 0,
            limiter: None,
        })
    }

    fn place(&self) -> PmemPlace {
        PmemPlace {
            address: self.address,
            len: self.mapping.len(),
        }
    }
}

/// What is saved of a persistent memory: where it is. Its content is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemState {
    /// Where the driver has it; `None` before there was a driver.
    pub place: Option<PmemPlace>,
}

/// A range of the guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemPlace {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Persistent memory.
#[derive(Debug)]
pub struct Pmem {
    options: PmemOptions,
    pace: Option<Pace>,
    counters: Arc<Counters>,
    failures: u32,
}

/// What a persistent memory has done.
#[derive(Debug, Default)]
struct Counters {
    queue_event_count: Counter,
    throttled: Counter,
    limiter_events: Counter,
}

/// The side of a persistent memory that the VMM keeps.
#[derive(Clone, Debug)]
pub struct PmemHandle {
    pace: Option<PaceHandle>,
    counters: Arc<Counters>,
}

impl PmemHandle {
    /// The limits, where there are any.
    pub fn pace(&self) -> Option<&PaceHandle> {
        self.pace.as_ref()
    }

    /// What the device has done.
    pub fn counters(&self) -> Values {
        vec![
            ("queue_event_count", self.counters.queue_event_count.get()),
            (
                "rate_limiter_throttled_events",
                self.counters.throttled.get(),
            ),
            (
                "rate_limiter_event_count",
                self.counters.limiter_events.get(),
            ),
        ]
    }
}

impl Pmem {
    /// Makes the device and its handle.
    ///
    /// # Errors
    /// A saved state of another size or place; no timer.
    pub fn new(options: PmemOptions, state: PmemState) -> Result<(Self, PmemHandle), PmemError> {
        let now = options.place();
        if let Some(saved) = state.place.filter(|saved| *saved != now) {
            let path = options.mapping.path().to_path_buf();
            return Err(PmemError::Place { path, saved, now });
        }
        options.mapping.warn_of_tail();
        let limits = options.limiter.clone().map(Pace::new).transpose();
        let (pace, pace_handle) = limits
            .map_err(|source| PmemError::Host {
                path: options.mapping.path().to_path_buf(),
                what: "create a timer for",
                source,
            })?
            .unzip();
        let handle = PmemHandle {
            pace: pace_handle,
            counters: Arc::default(),
        };
        let pmem = Self {
            options,
            pace,
            counters: Arc::clone(&handle.counters),
            failures: 0,
        };
        Ok((pmem, handle))
    }

    fn flush(&mut self) -> u32 {
        let Err(error) = self.options.mapping.flush() else {
            return OK;
        };
        self.failures = self.failures.saturating_add(1);
        if self.failures <= MAX_LOGGED {
            log::error!("persistent memory of the guest is not on the disk: {error}");
        }
        FAILED
    }
}

/// Where it is (section 5.19.4): address and bytes. Constant.
#[derive(Debug)]
struct Place([u64; 2]);

impl ConfigSpace for Place {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.0.map(u64::to_le_bytes);
        read_config(bytes.as_flattened(), offset, data);
    }
}

impl VirtioDevice for Pmem {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_PMEM,
            features: 0,
            queues: vec![QUEUE_SIZE],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        let PmemPlace { address, len } = self.options.place();
        Arc::new(Place([address, len]))
    }

    fn sources(&self) -> Vec<Source> {
        self.pace.iter().flat_map(Pace::sources).collect()
    }

    fn on_source(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if let Some(pace) = &mut self.pace {
            pace.on_source(token, &self.counters.limiter_events)?;
        }
        self.on_queue(0, io)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.counters.queue_event_count.one();
        if let Some(pace) = &mut self.pace
            && pace.must_wait(&self.counters.throttled)?
        {
            return Ok(());
        }
        let mut flushes: Vec<Chain> = Vec::new();
        while let Some(chain) = io.pop(queue)? {
            let mut request = [0; WORD];
            let got = read_at(io.ram(), chain.readable(), 0, &mut request)?;
            if got < WORD || total(chain.writable()) < WORD as u64 {
                return Err(chain.layout_error());
            }
            match u32::from_le_bytes(request) {
                FLUSH => flushes.push(chain),
                _ => answer(chain, FAILED, io)?,
            }
        }
        if flushes.is_empty() {
            return Ok(());
        }
        let result = self.flush();
        if let Some(pace) = &mut self.pace {
            pace.charge(self.options.mapping.len());
        }
        for chain in flushes {
            answer(chain, result, io)?;
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Pmem(PmemState {
            place: Some(self.options.place()),
        })
    }
}

fn answer(chain: Chain, result: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
    let len = write_at(io.ram(), chain.writable(), 0, &result.to_le_bytes())?;
    io.complete(chain, len as u32)
}
