//! `bulle shell`: the process that becomes a clone. A pool starts it; it is no subcommand for people.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use clap::Args;
use devices::mmds::DEFAULT_LIMIT;

use super::metadata;
use crate::session;

/// Arguments of `bulle shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {}

/// Runs the subcommand: standard input is the pool's socket.
pub fn run(_: &ShellArgs) -> Result<u8> {
    // Not of the terminal of whoever wanted a clone.
    let _ = nix::unistd::setsid();
    let stdin = rustix::stdio::stdin();
    let socket: OwnedFd = rustix::io::fcntl_dupfd_cloexec(stdin, 3).context("No socket")?;
    let null = std::fs::File::open("/dev/null").context("Cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("Cannot replace standard input")?;
    // Whoever is next closes all but the socket.
    drop(null);
    let mmds = metadata::read(None, DEFAULT_LIMIT)?;
    Ok(session::become_clone(socket, &mmds)?)
}
