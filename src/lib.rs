//! bulle, a virtual machine monitor on KVM.
//!
//! A run, from the outside in: [`cli`] turns arguments into a [`config::Config`], [`session`]
//! prepares what goes into the guest ([`guest`]), builds a [`vm::Vm`] and serves its host side on
//! the vmm thread until it ends. A `Vm` is guest memory, an interrupt controller, the devices of
//! [`board`] and one thread for each of the [`vcpu`]s, which answer the guest's exits on the
//! frozen bus; virtio devices run on a thread of [`io`]. What the processor architecture decides is in the crate `arch`, device models are
//! in `devices`; neither knows this crate. Threads are made in [`sandbox::thread`] alone.

pub mod api;
pub mod bench;
pub mod board;
pub mod cli;
pub mod config;
pub mod control;
pub mod guest;
pub mod io;
pub mod pool;
pub mod registry;
pub mod remote;
pub mod sandbox;
pub mod session;
pub mod snapshot;
pub mod telemetry;
pub mod vcpu;
pub mod vm;
