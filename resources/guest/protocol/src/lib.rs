//! The protocol between bulle (the host) and its agent (the guest's init), over a byte stream.
//!
//! Shared by both sides, so it needs neither std nor an allocator. [`frame`] finds frames in a byte
//! stream that may hold noise; [`message`] gives them meaning; [`start`] is the layout of the one
//! message that may be longer than a frame. The wire format is described in docs/agent-protocol.md.
//!
//! Invariants: memory is bounded on both sides, no input panics, and neither side sends more
//! payload of output (Stdout, Stderr) or input (Start, Stdin) than the other has granted.

#![no_std]
#![forbid(unsafe_code)]

pub mod frame;
pub mod message;
pub mod start;

pub use frame::{Decoder, Frame, MAX_FRAME, MAX_PAYLOAD, OVERHEAD, encode};
pub use message::{
    Exit, FromGuest, FromHost, Hello, Level, Malformed, Power, Stage, WinSize, features,
};
pub use start::{MAX_START, MAX_STRINGS, Start, StartError};

/// Version of the protocol; both sides must have the same.
pub const VERSION: u16 = 1;

/// Bytes of Start and Stdin payload that the agent can take before it grants more. Even as one-byte
/// frames they fit the tty buffer of a Linux UART (64 KiB), so nothing is lost on a busy guest.
pub const GUEST_WINDOW: u32 = 2048;

/// The same over a channel that loses nothing, such as a port of a virtio console, and the most that
/// the host takes for granted.
pub const MAX_GUEST_WINDOW: u32 = 64 * 1024;

/// Commands beside the main one, numbered from 1.
pub const MAX_EXTRA: usize = 7;

/// Bytes of Start and Stdin payload that the agent takes for one of those before it grants more, unless Hello has less.
pub const EXTRA_WINDOW: u32 = 8 * 1024;

/// Bytes of Stdout and Stderr payload that the host can take before it grants more.
pub const HOST_WINDOW: u32 = 32 * 1024;

/// The same over a channel that loses nothing: granted by a Credit as soon as the channel is known.
pub const MAX_HOST_WINDOW: u32 = 128 * 1024;

#[cfg(test)]
mod tests;
