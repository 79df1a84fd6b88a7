//! The process that becomes a clone: `bulle shell`, which a pool starts.
//!
//! It confines itself before anything else. It has a template before it makes the machine that waits, and what it
//! is to become, the host's side of it, only with the order, which another template may come with: one of the same
//! shape takes the machine that waits. All of KVM is open by then.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use devices::mmds::Mmds;

use super::launch::{After, Have, LaunchError, Prepared, block_signals, give_command, launch_with};
use super::launch_error::session;
use super::snapshots::Saved;
use crate::config::{Config, Console};
use crate::control::{chain, startable};
use crate::pool::{Order, Word, receive, send};
use crate::registry::Place;
use crate::sandbox::confine;
use crate::snapshot::template;
use crate::vm::limits::allow_most_open_files;
use crate::vm::{Host, Shell};

/// Becomes what is ordered at the other end of `socket`, runs it to its end and returns the exit code.
///
/// # Errors
/// As of a launch; told at the other end too, while it listens.
pub fn become_clone(socket: OwnedFd, mmds: &Arc<Mmds>) -> Result<u8, LaunchError> {
    // Before anything else is open.
    confine::waiting(socket.as_fd()).map_err(|error| session("confinement", error))?;
    let socket = UnixStream::from(socket);
    let told = socket.try_clone();
    let told = told.map_err(|error| session("the pool's socket", error))?;
    let result = wait(socket, mmds);
    if let Err(error) = &result {
        // The pool may be gone, or not listen any more.
        let _ = send(&told, &Word::Failed(chain(error)));
    }
    result
}

fn wait(socket: UnixStream, mmds: &Arc<Mmds>) -> Result<u8, LaunchError> {
    let talk = |error| session("the pool's socket", error);
    let mut snapshot = template::receive(&socket)?;
    own_output(&mut snapshot.config);
    // Before the vCPUs' threads are made.
    let _signals = block_signals()?;
    allow_most_open_files();
    let host = Host::open(&startable(&snapshot.config)?, 0)?;
    let shell = Shell::can_wait_for(&snapshot)
        .then(|| Shell::new(host.clone(), &snapshot))
        .transpose()?;
    send(&socket, &Word::Ready).map_err(talk)?;
    let Some((order, another)) = receive::<(Order, bool)>(&socket).map_err(talk)? else {
        return Ok(0);
    };
    let mut fits = true;
    if another {
        snapshot = template::receive(&socket)?;
        own_output(&mut snapshot.config);
        fits = shell.as_ref().is_some_and(|shell| shell.takes(&snapshot));
    }
    let have = match fits {
        true => Have::Host(Box::new(host), shell.map(Box::new)),
        false => Have::Nothing,
    };
    let (saved, mut config) = Saved::of(snapshot, &order.load, &Config::new("".into()))?;
    give_command(&mut config, &saved, order.command)?;
    let spec = startable(&config)?;
    let name = order.name;
    let place = order.base.map(|base| Place { base, name });
    let begun = Box::new(move || {
        if let Err(error) = send(&socket, &Word::Begun) {
            log::debug!("nobody is told of the start: {error}");
        }
        // What is left to do here is not to keep the vCPU waiting that has this thread's processor.
        std::thread::yield_now();
    });
    let after = After {
        save: None,
        begun: Some(begun),
    };
    launch_with(spec, mmds, place, after, |spec| {
        Prepared::load(spec, saved, have, mmds)
    })
}

/// Files and ports of the host that the template's machine has are not for its clones, and need not be named.
pub fn own_output(config: &mut Config) {
    config.serial = None;
    config.console = match config.console.take() {
        Some(Console::File(_)) => Some(Console::Off),
        Some(Console::Hvc0File(_)) => Some(Console::Hvc0),
        console => console,
    };
    for net in &mut config.network_interfaces {
        net.publish.clear();
    }
}
