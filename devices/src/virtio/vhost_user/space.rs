//! The configuration space (section 5.2.4) as the backend tells it. bulle goes by nothing in it.

use std::sync::Mutex;

use virtio_bindings::virtio_blk::*;

use crate::lock;
use crate::virtio::device::{ConfigSpace, read_config};

/// Bytes of it: all but what secure erase and zones have, which are not offered.
pub(super) const LEN: usize = 60;
/// Where the number of queues is.
const NUM_QUEUES: usize = 34;

/// Features of block devices that a backend may have. The write cache cannot be switched, because that
/// would have vCPUs wait for the backend.
pub(super) const OFFERED: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// What vCPUs read.
#[derive(Debug)]
pub(super) struct Space {
    queues: u16,
    now: Mutex<([u8; LEN], u32)>,
}

impl Space {
    /// The backend's, but for the number of queues.
    pub fn new(config: [u8; LEN], queues: u16) -> Self {
        let space = Self {
            queues,
            now: Mutex::new(([0; LEN], 0)),
        };
        *lock(&space.now) = (space.with_queues(config), 0);
        space
    }

    /// Takes what the backend says now.
    pub fn update(&self, config: [u8; LEN]) {
        let config = self.with_queues(config);
        let (now, generation) = &mut *lock(&self.now);
        if *now != config {
            *now = config;
            *generation = generation.wrapping_add(1);
        }
    }

    /// The capacity in sectors.
    pub fn capacity(&self) -> u64 {
        let mut sectors = [0; 8];
        self.read(0, &mut sectors);
        u64::from_le_bytes(sectors)
    }

    fn with_queues(&self, mut config: [u8; LEN]) -> [u8; LEN] {
        if let Some(to) = config.get_mut(NUM_QUEUES..NUM_QUEUES + 2) {
            to.copy_from_slice(&self.queues.to_le_bytes());
        }
        config
    }
}

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&lock(&self.now).0, offset, data);
    }

    fn generation(&self) -> u32 {
        lock(&self.now).1
    }
}
