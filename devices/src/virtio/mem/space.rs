//! Configuration space (section 5.15.4), and what the I/O thread and the handle share.

use std::sync::Mutex;

use super::super::device::{ConfigSpace, read_config};
use crate::lock;

/// What the driver sees, under a lock that is held for a few instructions.
#[derive(Debug)]
pub(super) struct Space {
    pub block: u64,
    pub address: u64,
    pub len: u64,
    inner: Mutex<Inner>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Inner {
    /// Bytes that are plugged.
    pub plugged: u64,
    /// Bytes that the host wants to be plugged.
    pub requested: u64,
    generation: u32,
}

impl Space {
    pub fn new([block, address, len]: [u64; 3], plugged: u64, requested: u64) -> Self {
        let inner = Mutex::new(Inner {
            plugged,
            requested,
            generation: 0,
        });
        Self {
            block,
            address,
            len,
            inner,
        }
    }

    pub fn get(&self) -> Inner {
        *lock(&self.inner)
    }

    pub fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = lock(&self.inner);
        change(&mut inner);
        inner.generation = inner.generation.wrapping_add(1);
    }
}

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.get();
        let words = [
            self.block,
            // No NUMA node, and padding.
            0,
            self.address,
            self.len,
            // All of it may be plugged; where is the driver's choice.
            self.len,
            inner.plugged,
            inner.requested,
        ];
        read_config(words.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn generation(&self) -> u32 {
        self.get().generation
    }
}
