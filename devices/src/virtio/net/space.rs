//! The configuration space of a network device (section 5.1.4).

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

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
    /// Whether the driver is to announce itself and generation in one: how often that began or ended.
    pub announcements: AtomicU32,
}

impl Space {
    pub fn link_is_up(&self) -> bool {
        self.link_changes().is_multiple_of(2)
    }

    pub fn link_changes(&self) -> u32 {
        self.changes.load(Ordering::SeqCst)
    }

    fn announces(&self) -> bool {
        !self.announcements.load(Ordering::SeqCst).is_multiple_of(2)
    }

    /// Has the driver announce itself from now on, or no longer; says whether that is new. Called by the
    /// device's thread only.
    pub fn set_announces(&self, on: bool) -> bool {
        let new = self.announces() != on;
        self.announcements
            .fetch_add(u32::from(new), Ordering::SeqCst);
        new
    }
}

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bit = |on: bool, bit: u32| if on { bit as u16 } else { 0 };
        let status = bit(self.link_is_up(), VIRTIO_NET_S_LINK_UP)
            | bit(self.announces(), VIRTIO_NET_S_ANNOUNCE);
        let mut space = [0; 12];
        let words = [status, self.pairs, self.mtu];
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        for (to, from) in space.iter_mut().zip(self.mac.into_iter().chain(words)) {
            *to = from;
        }
        read_config(&space, offset, data);
    }

    fn generation(&self) -> u32 {
        let announcements = self.announcements.load(Ordering::SeqCst);
        self.link_changes().wrapping_add(announcements)
    }
}

/// An address of nobody's: unicast, locally administered.
///
/// # Errors
/// Of reading random numbers.
pub fn random_mac() -> io::Result<Mac> {
    let mut mac = [0; 6];
    File::open("/dev/urandom")?.read_exact(&mut mac)?;
    mac[0] = mac[0] & 0xfc | 2;
    Ok(mac)
}
