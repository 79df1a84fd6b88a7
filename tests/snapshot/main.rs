//! Saved and loaded machines on this machine's /dev/kvm, with bare-metal guests.
//!
//! Not part of a plain `cargo test`, since it needs KVM: `cargo test --test snapshot`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod background;
mod board;
mod broken;
mod cancel;
#[path = "../api/client.rs"]
mod client;
#[path = "../common/mod.rs"]
mod common;
mod gc;
mod goes_on;
mod golden;
mod huge;
mod killed;
mod lazy;
mod lies;
#[path = "../common/machine.rs"]
mod machine;
mod pager;
mod plugged;
mod rebind;
mod saved;
#[path = "../api/served.rs"]
mod served;
#[path = "../common/state_file.rs"]
mod state_file;
mod stuck;
mod uffd;
mod working_set;
