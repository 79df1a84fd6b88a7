//! Everything of bulle that depends on the processor architecture.
//!
//! A facade, not a trait: each architecture has a module with the same function names, and this
//! file alone picks one. Facts come in as plain structs from the root crate; nothing here knows
//! a device or a thread.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("bulle runs on x86_64 hosts; no other architecture is implemented");
