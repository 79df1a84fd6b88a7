//! The configuration space of a network device (section 5.1.4).

use std::sync::atomic::{AtomicU32, Ordering};

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
    /// Link status and generation in one: how often the link went down or up; it was up first.
    pub changes: AtomicU32,
}

impl Space {
    pub fn link_is_up(&self) -> bool {
        self.generation().is_multiple_of(2)
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
        self.changes.load(Ordering::SeqCst)
    }
}
