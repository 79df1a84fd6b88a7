//! A microVM that is configured, started and commanded over the API.
//!
//! The vmm thread waits for actions, first for a configuration in pieces, and from InstanceStart on in
//! the foreground's loop. A start that fails is answered and forgotten: the next may do better.

use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::launch::{LaunchError, Prepared, Session, block_signals};
use super::outcome::Outcome;
use super::runtime::Runtime;
use super::signals::Signals;
use crate::api::{ApiThread, ServerError};
use crate::config::Config;
use crate::control::{Action, ActionError, Preboot, Reply, Requests, chain, channel};

/// Signals that end a microVM which was not started.
const ENDING: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// How a microVM is served.
#[derive(Debug)]
pub struct Serve {
    /// Path of the API's socket.
    pub socket: PathBuf,
    /// Name of the microVM.
    pub id: String,
    /// Most bytes of a request's body.
    pub max_body: usize,
    /// What is known of its configuration; a complete one is started at once.
    pub config: Option<Config>,
    /// Virtio devices on a PCI bus.
    pub pci: bool,
}

/// A microVM that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The API.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The session.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The configuration given at the start.
    #[error(transparent)]
    Start(#[from] ActionError),
    /// No event descriptor.
    #[error("Cannot create an event descriptor")]
    Event(#[source] std::io::Error),
    /// Waiting failed.
    #[error("Cannot wait for the API")]
    Wait(#[source] Errno),
}

/// Serves a microVM to its end and returns the exit code.
pub fn serve(options: Serve) -> Result<u8, ServeError> {
    let signals = block_signals()?;
    let (caller, requests) = channel().map_err(ServeError::Event)?;
    let at_once = options.config.is_some();
    let preboot = Preboot::new(options.id, options.config, options.pci);
    // Ends after all that answers it, so that it waits for nobody then.
    let _api = ApiThread::start(&options.socket, options.max_body, caller)?;
    if at_once {
        start(&preboot, requests, signals)
    } else {
        configure(preboot, requests, signals)
    }
}

fn start(preboot: &Preboot, requests: Requests, signals: Signals) -> Result<u8, ServeError> {
    let session = build(preboot)?;
    Ok(session.run(signals, Some(runtime(preboot, requests)))?)
}

fn build(preboot: &Preboot) -> Result<Session, ActionError> {
    let start = |error: LaunchError| ActionError::Start {
        text: chain(&error),
    };
    let prepared = Prepared::new(preboot.spec()?).map_err(start)?;
    Session::build(prepared).map_err(start)
}

fn runtime(preboot: &Preboot, requests: Requests) -> Runtime {
    Runtime::new(
        requests,
        preboot.instance().clone(),
        preboot.config().clone(),
    )
}

/// Takes the configuration in, until there is a start that works.
fn configure(
    mut preboot: Preboot,
    requests: Requests,
    mut signals: Signals,
) -> Result<u8, ServeError> {
    loop {
        let ready = {
            let mut fds = [
                PollFd::new(requests.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(ServeError::Wait(errno)),
            }
            fds.map(|fd| fd.any().unwrap_or(false))
        };
        let [called, signalled] = ready;
        if signalled
            && let Some(signal) = signals.next()
            && ENDING.contains(&signal)
        {
            return Ok(Outcome::Signal(signal as i32).exit_code(false));
        }
        if !called {
            continue;
        }
        while let Some(call) = requests.next() {
            if call.action != Action::InstanceStart {
                let result = preboot.act(call.action.clone());
                call.answer(result);
                continue;
            }
            match build(&preboot) {
                Ok(session) => {
                    call.answer(Ok(Reply::Done));
                    let runtime = runtime(&preboot, requests);
                    return Ok(session.run(signals, Some(runtime))?);
                }
                Err(error) => call.answer(Err(error)),
            }
        }
    }
}
