//! Metadata service: a JSON document that the guest reads over HTTP, at a link-local address of its network.
//!
//! The document and its tokens ([`Mmds`]) are shared by the vmm thread, which changes them, and by the
//! I/O thread, which answers the guest. A [`Stack`] is the service on one network interface: it takes
//! the frames for the service's address out of the device's way and is owned by the device, so by its
//! I/O thread. TCP is smoltcp's. Whatever the guest sends, there are at most [`MAX_CONNECTIONS`]
//! connections with one request of [`MAX_REQUEST`] bytes and one answer each, and `MAX_OUTGOING` frames.

mod connection;
mod counters;
mod http;
mod link;
mod stack;
mod store;
mod tokens;

#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;

pub use connection::MAX_REQUEST;
pub use counters::Counters;
pub use stack::{MAX_CONNECTIONS, Stack};
pub use store::{Mmds, MmdsError, Service};

/// Where the service is if nothing else is asked for.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Most bytes of the document if nothing else is asked for.
pub const DEFAULT_LIMIT: usize = 51_200;
