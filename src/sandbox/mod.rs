//! Confinement of bulle's own process and threads.

pub mod thread;
