//! Confinement of bulle's own process and threads.

pub mod child;
pub mod confine;
pub mod jail;
pub mod reaper;
pub mod thread;
