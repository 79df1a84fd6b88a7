//! The REST face: HTTP and JSON over a Unix socket, as Firecracker's clients speak it.
//!
//! [`Server`] runs on a thread of its own, which only waits: for connections, for bytes, and for the
//! vmm thread's answer to one action at a time. `http` is pure, `router` turns requests into
//! `control::Action`s, `error` is the only map to `fault_message`. Nothing here knows a machine.

mod connection;
mod counts;
mod error;
pub mod http;
mod prometheus;
pub mod router;
mod routes;
mod server;

pub use counts::Counts;
pub use http::MAX_BODY;
pub use server::{ApiThread, ServerError};

/// Every endpoint: method and path, in which a segment in braces stands for a name.
pub fn endpoints() -> impl Iterator<Item = (&'static str, &'static str)> {
    routes::ROUTES
        .iter()
        .map(|route| (route.method.name(), route.path))
}
