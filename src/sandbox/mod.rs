//! Confinement of bulle's own process and threads.

pub mod jail;
pub mod thread;
