//! The configuration space of a network device (section 5.1.4), and what it counts.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::virtio::device::{ConfigSpace, read_config};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// What vCPU threads read.
#[derive(Debug)]
pub(super) struct Space {
    pub mac: Mac,
    pub pairs: u16,
    pub mtu: u16,
    /// Link status and generation in one: the link goes down once and stays down.
    pub downs: AtomicU32,
}

impl Space {
    pub fn link_is_up(&self) -> bool {
        self.downs.load(Ordering::SeqCst) == 0
    }
}

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let status = match self.link_is_up() {
            true => VIRTIO_NET_S_LINK_UP as u16,
            false => 0,
        };
        let mut space = [0; 12];
        let words = [status, self.pairs, self.mtu];
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        for (to, from) in space.iter_mut().zip(self.mac.into_iter().chain(words)) {
            *to = from;
        }
        read_config(&space, offset, data);
    }

    fn generation(&self) -> u32 {
        self.downs.load(Ordering::SeqCst)
    }
}

/// Frames and bytes in one direction, without headers of virtio.
#[derive(Debug, Default)]
pub(super) struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    logged: AtomicUsize,
}

/// Log lines of one direction.
const MAX_LOGGED: usize = 4;

/// What passed in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that got through.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that were lost here.
    pub dropped: u64,
}

impl Direction {
    pub fn passed(&self, bytes: u64) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Says why, the first times.
    pub fn dropped(&self, why: &str) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        if self.logged.fetch_add(1, Ordering::Relaxed) < MAX_LOGGED {
            log::debug!("a network frame is dropped: {why}");
        }
    }

    pub fn traffic(&self) -> Traffic {
        Traffic {
            frames: self.frames.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}

/// Both directions.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub rx: Direction,
    pub tx: Direction,
}
