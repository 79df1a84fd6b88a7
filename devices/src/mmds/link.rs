//! What smoltcp takes for a network interface: one IP packet in, some out, each with room in front for
//! an Ethernet header.

use std::collections::VecDeque;

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::ETHERNET_HEADER_LEN;

/// Longest packet to the guest.
const MTU: usize = 1500;
/// Most frames that wait for the guest's buffers.
pub(super) const MAX_OUTGOING: usize = 32;

/// The ends of the stack.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// A packet of the guest.
    pub incoming: Option<Vec<u8>>,
    /// Frames for the guest, their Ethernet headers blank.
    pub outgoing: VecDeque<Vec<u8>>,
}

impl Link {
    fn sender(&mut self) -> Option<Out<'_>> {
        let has_room = self.outgoing.len() < MAX_OUTGOING;
        has_room.then_some(Out(&mut self.outgoing))
    }
}

/// A packet to be taken.
pub(super) struct In(Vec<u8>);

/// Room for a packet.
pub(super) struct Out<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; ETHERNET_HEADER_LEN + len];
        let (_, packet) = frame.split_at_mut(ETHERNET_HEADER_LEN);
        let result = f(packet);
        self.0.push_back(frame);
        result
    }
}

impl phy::Device for Link {
    type RxToken<'a> = In;
    type TxToken<'a> = Out<'a>;

    fn receive(&mut self, _: Instant) -> Option<(In, Out<'_>)> {
        let packet = self.incoming.take()?;
        Some((In(packet), self.sender()?))
    }

    fn transmit(&mut self, _: Instant) -> Option<Out<'_>> {
        self.sender()
    }

    fn capabilities(&self) -> DeviceCapabilities {
        // The driver may have left the checksum to the device, and memory loses no bits.
        let mut checksum = ChecksumCapabilities::default();
        (checksum.ipv4, checksum.tcp) = (Checksum::Tx, Checksum::Tx);
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities.checksum = checksum;
        capabilities
    }
}
