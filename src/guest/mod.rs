//! What goes into a guest and how bulle talks to it: the initramfs with the agent, kernel modules,
//! the default root, and the host's side of the agent protocol.
//!
//! Pure of KVM and of threads: the initramfs is a byte string, the client a state machine.

pub mod busybox;
pub mod client;
pub mod filesystem;
pub mod initramfs;
pub mod modules;
pub mod prepare;

pub use client::{AgentClient, AgentEvent, StartRequest};
pub use initramfs::{Initramfs, InitramfsError};

/// The guest's init: a static ELF executable, built from resources/guest/agent.
pub const AGENT: &[u8] = include_bytes!(env!("BULLE_AGENT"));

/// Where the agent lies in the guest; the kernel's `rdinit=`.
pub const AGENT_PATH: &str = "/.bulle/init";
