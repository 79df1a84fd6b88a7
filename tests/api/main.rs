//! `bulle api` on this machine's /dev/kvm, with bare-metal guests.
//!
//! Not part of a plain `cargo test`, since it needs KVM: `cargo test --test api`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod client;
mod clients;
#[path = "../common/mod.rs"]
mod common;
mod configure;
mod cpu;
mod description;
mod devices;
mod events;
mod fuzzed;
mod hotplug;
mod http;
mod jailer;
mod lifecycle;
mod manage;
mod many;
mod mmds;
mod rows;
mod served;
mod snapshot_command;
mod snapshots;
mod telemetry;
mod vhost_user;
