//! One VM in the foreground: prepared, run to its end, reported.
//!
//! `launch` goes from a checked configuration to an exit code; `serve` does so for one that comes in
//! pieces over the API. `foreground` is the vmm thread's event loop while the machine runs, with
//! `runtime` and `commands` for the API's actions. The rest are its parts: terminal, escapes, signals, output, the
//! host's ends of both UARTs and of the virtio console, and the outcome.

mod agent;
mod agent_port;
mod clone;
mod commands;
mod console;
mod duplex;
mod escape;
mod events;
mod exec;
mod figures;
mod foreground;
mod hotplug;
mod hvc;
mod input;
mod launch;
mod launch_error;
mod managed;
mod meter;
mod outcome;
mod output;
mod progress;
mod readers;
mod runtime;
mod serve;
mod signals;
mod snapshots;
mod statistics;
mod terminal;
mod timer;
mod token;
mod touched;

pub use clone::{become_clone, own_output};
pub use figures::Startup;
pub use launch::{LaunchError, launch, launch_saved, save_ready};
pub use outcome::{
    CODE_FAILURE, CODE_NO_STATUS, CODE_PANIC, CODE_TIMEOUT, CODE_VM_FAILURE, CODE_WATCHDOG, Outcome,
};
pub use serve::{Serve, ServeError, serve};
pub use snapshots::overrides;
pub use terminal::restore as restore_terminal;
pub use terminal::{RawTerminal, end_on_panic, window_size};
