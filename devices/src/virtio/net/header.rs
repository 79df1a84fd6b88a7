//! `struct virtio_net_hdr` (section 5.1.6): in front of every frame, and never trusted.

use virtio_bindings::virtio_net::*;

use super::space::Mac;
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Segment, read_at};

/// Bytes of the header.
pub const HEADER: u64 = 12;
/// Where `num_buffers` is in it.
pub const NUM_BUFFERS: u64 = 10;

/// Shortest frame: an Ethernet header.
pub const MIN_FRAME: u64 = 14;
/// Longest frame: an Ethernet header with a VLAN tag, and the longest IP packet.
pub const MAX_FRAME: u64 = 18 + 65535;

/// A header as it comes from a driver or goes to a tap.
pub type Header = [u8; HEADER as usize];

const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// The feature that lets a driver send frames of this kind.
fn feature_of(gso_type: u8) -> Option<u32> {
    Some(match u32::from(gso_type & !GSO_ECN) {
        VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP => VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_HDR_GSO_UDP_L4 => VIRTIO_NET_F_HOST_USO,
        _ => return None,
    })
}

/// The header of a driver's frame and the address that it says it is from; zeros where it is too short.
pub fn start(ram: &GuestRam, frame: &[Segment]) -> Result<(Header, Mac), DeviceError> {
    let mut start = [0; HEADER as usize + 12];
    read_at(ram, frame, 0, &mut start)?;
    let (header, addresses) = start.split_at(HEADER as usize);
    let source = addresses.last_chunk().copied();
    let header = header.first_chunk().copied();
    Ok((header.unwrap_or_default(), source.unwrap_or_default()))
}

/// A driver's header without what it did not negotiate; `None` for one that asks for work that was
/// not offered to it or that makes no sense.
pub fn clean(header: &Header, has: impl Fn(u32) -> bool) -> Option<Header> {
    let [flags, gso_type, rest @ ..] = *header;
    let needs_csum = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    let mut cleaned = [0; HEADER as usize];
    let partial = flags & needs_csum != 0 && has(VIRTIO_NET_F_CSUM);
    if partial {
        // csum_start and csum_offset, which the host's kernel checks against the frame.
        cleaned[0] = needs_csum;
        cleaned[6..10].copy_from_slice(&rest[4..8]);
    }
    if u32::from(gso_type) == VIRTIO_NET_HDR_GSO_NONE {
        return Some(cleaned);
    }
    let ecn = gso_type & GSO_ECN == 0 || has(VIRTIO_NET_F_HOST_ECN);
    let size = u16::from_le_bytes([rest[2], rest[3]]);
    if !feature_of(gso_type).is_some_and(has) || !ecn || !partial || size == 0 {
        return None;
    }
    cleaned[1] = gso_type;
    cleaned[2..6].copy_from_slice(&rest[..4]);
    Some(cleaned)
}
