//! Virtual processors: one thread each, from parked to ended.
//!
//! `handle` is what the rest of bulle holds, `thread` is what runs, `exit` answers one KVM exit,
//! `failure` describes an end that the guest did not ask for, `flags` has it look at what it is told, `kick` gets it out of
//! KVM_RUN, `warm` enters KVM_RUN before there is a guest to run.

pub mod exit;
pub mod failure;
mod flags;
pub mod handle;
mod kick;
mod spent;
mod thread;
mod warm;

/// What [`flags`] is made of, which loom has of its own.
mod sync {
    pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
}

pub use exit::ExitCounts;
pub use failure::{Failure, FailureCause};
pub use handle::{Given, Has, Reach, Vcpu, VcpuHandle};
pub use spent::Spent;
