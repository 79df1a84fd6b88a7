//! Entropy device (section 5.4): fills the driver's buffers from the host's `getrandom`, as fast as its
//! limits allow.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{
    ConfigSpace, DeviceError, DeviceState, NoConfig, Source, Traits, VirtioDevice,
};
use super::io::{Io, write_at};
use super::limiter::Limiter;
use super::pace::Pace;
use crate::counters::{Counter, Values};
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
    pace: Option<Pace>,
    counters: Arc<Counters>,
}

/// What an entropy device has done.
#[derive(Debug, Default)]
struct Counters {
    entropy_event_count: Counter,
    entropy_bytes: Counter,
    host_rng_fails: Counter,
    throttled: Counter,
    limiter_events: Counter,
}

/// The side of an entropy device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct EntropyHandle {
    counters: Arc<Counters>,
}

impl EntropyHandle {
    /// What the device has done.
    pub fn counters(&self) -> Values {
        let counters = &self.counters;
        let all = [
            ("entropy_event_count", &counters.entropy_event_count),
            ("entropy_bytes", &counters.entropy_bytes),
            ("host_rng_fails", &counters.host_rng_fails),
            ("entropy_rate_limiter_throttled", &counters.throttled),
            ("rate_limiter_event_count", &counters.limiter_events),
        ];
        all.map(|(name, counter)| (name, counter.get())).into()
    }
}

impl Entropy {
    /// Makes the device without limits.
    pub fn new(_: EntropyState) -> Self {
        Self {
            buffer: Box::new([0; MAX_BYTES]),
            pace: None,
            counters: Arc::default(),
        }
    }

    /// Makes the device, with these limits of requests and random bytes, and its handle.
    pub fn limited(
        limiter: Option<Arc<Limiter>>,
        state: EntropyState,
    ) -> io::Result<(Self, EntropyHandle)> {
        let pace = limiter.map(Pace::new).transpose()?;
        let entropy = Self {
            pace: pace.map(|(pace, _)| pace),
            ..Self::new(state)
        };
        let counters = Arc::clone(&entropy.counters);
        Ok((entropy, EntropyHandle { counters }))
    }
}

impl VirtioDevice for Entropy {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_RNG,
            features: 0,
            queues: vec![QUEUE_SIZE],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
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
        let counters = &self.counters;
        counters.entropy_event_count.one();
        loop {
            if let Some(pace) = &mut self.pace
                && pace.must_wait(&counters.throttled)?
            {
                return Ok(());
            }
            let Some(chain) = io.pop(queue)? else {
                return Ok(());
            };
            let wanted = super::io::total(chain.writable());
            let len = usize::try_from(wanted).unwrap_or(MAX_BYTES).min(MAX_BYTES);
            let bytes = self.buffer.get_mut(..len).unwrap_or_default();
            fill(bytes).map_err(|source| {
                counters.host_rng_fails.one();
                DeviceError::Host {
                    what: "give random bytes",
                    source,
                }
            })?;
            let written = write_at(io.ram(), chain.writable(), 0, bytes)?;
            io.complete(chain, written as u32)?;
            counters.entropy_bytes.add(written as u64);
            if let Some(pace) = &mut self.pace {
                pace.charge(written as u64);
            }
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Entropy(EntropyState {})
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Entropy(_) | DeviceState::Reset)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::virtio::driver::{Rig, Transport};
    use crate::virtio::limiter::{BucketConfig, LimiterConfig};

    #[test]
    fn limits_delay_what_comes_next_and_all_is_counted() {
        let limits = LimiterConfig {
            ops: Some(BucketConfig {
                size: 2,
                refill_time: 100,
                one_time_burst: 0,
            }),
            bandwidth: None,
        };
        let limiter = Arc::new(Limiter::new(limits));
        let (entropy, handle) = Entropy::limited(Some(limiter), EntropyState::default()).unwrap();
        let rig = Rig::new(Transport::Mmio, Box::new(entropy));
        let mut vqs = rig.start(None);
        let begin = Instant::now();
        for at in 0..6 {
            vqs[0].add(&[(0x8000 + at * 64, 32, true)]);
        }
        rig.kick(&vqs[0]);
        rig.run(0);
        let mut served = vqs[0].used().len();
        assert!(served >= 2, "{served}");
        while served < 6 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            rig.run(20);
            served += vqs[0].used().len();
        }
        assert!(begin.elapsed() >= Duration::from_millis(140));
        let counted = handle.counters();
        let of = |name: &str| counted.iter().find(|(one, _)| *one == name).unwrap().1;
        assert_eq!((of("entropy_bytes"), of("host_rng_fails")), (6 * 32, 0));
        assert!(of("entropy_rate_limiter_throttled") > 0);
    }
}
