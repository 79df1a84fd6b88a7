//! A microVM that is configured, started and commanded over the API.
//!
//! The vmm thread waits for actions, first for a configuration in pieces, and from InstanceStart on in
//! the foreground's loop. A start that fails is answered and forgotten: the next may do better.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use devices::mmds::Mmds;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::events::Events;
use super::figures::Startup;
use super::launch::{Have, LaunchError, Prepared, Session, block_signals};
use super::managed::Door;
use super::meter::{Meter, Task};
use super::outcome::Outcome;
use super::runtime::{FigureParts, Runtime};
use super::signals::{ENDING, Signals};
use super::snapshots::Saved;
use crate::api::{ApiThread, Counts, ServerError};
use crate::config::{Config, Logger, Metrics};
use crate::control::{
    Action, ActionError, Event, Instance, Preboot, Reply, Requests, SnapshotLoad, chain, channel,
    startable,
};
use crate::registry::{About, Claim, Place, RegistryError};
use crate::vm::Ahead;

/// How a microVM is served.
#[derive(Debug)]
pub struct Serve {
    /// Path of the API's socket; `None`: no API.
    pub socket: Option<PathBuf>,
    /// Name of the microVM, and the version that it says.
    pub instance: Instance,
    /// Most bytes of a request's body.
    pub max_body: usize,
    /// What is known of its configuration; a complete one is started at once.
    pub config: Option<Config>,
    /// Virtio devices on a PCI bus.
    pub pci: bool,
    /// The log says how long the guest takes to boot.
    pub boot_timer: bool,
    /// The log, in place of what the configuration says.
    pub logger: Logger,
    /// The metadata.
    pub mmds: Arc<Mmds>,
    /// Where figures go, in place of what the configuration says.
    pub metrics: Option<Metrics>,
    /// How long the start took.
    pub startup: Startup,
    /// Where others find it.
    pub place: Option<Place>,
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
    let mut config = options.config;
    let sections = config.as_mut();
    let (logger, metrics) = sections.map_or((None, None), |c| (c.logger.take(), c.metrics.take()));
    let mut preboot = Preboot::new(options.instance, config, options.pci, options.mmds);
    if options.boot_timer {
        preboot.time_boot();
    }
    let asked = Some(options.logger).filter(|logger| *logger != Logger::default());
    for logger in logger.iter().chain(&asked) {
        preboot.logger(logger)?;
    }
    if let Some(metrics) = options.metrics.or(metrics) {
        preboot.metrics(metrics)?;
    }
    // Ends after all that answers it, so that it waits for nobody then.
    let (mut api, mut door, mut _linked) = (None, None, None);
    let place = options.place.as_ref();
    let entry = || place.and_then(|place| entry(place, preboot.config()));
    match &options.socket {
        Some(socket) => {
            // Before anybody can know that this one is there, and be quicker with its name.
            let claim = entry();
            api = Some(ApiThread::start(socket, options.max_body, caller)?);
            _linked = claim.inspect(|claim| link(claim, socket));
        }
        None => door = entry().map(|claim| Door::held(claim, caller)),
    }
    let serving = Serving {
        preboot,
        requests,
        signals,
        startup: options.startup,
        counts: api.as_ref().map(|api| api.counts().clone()),
        door,
        events: Events::default(),
        loaded: None,
        ahead: None,
    };
    match at_once {
        true => serving.start(),
        false => serving.configure(),
    }
}

/// A microVM before its start.
struct Serving {
    preboot: Preboot,
    requests: Requests,
    signals: Signals,
    startup: Startup,
    counts: Option<Arc<Counts>>,
    /// Where it is served, if not at a socket that was asked for.
    door: Option<Door>,
    events: Events,
    /// How long a snapshot took to be loaded: as its caller saw it, and here.
    loaded: Option<[Duration; 2]>,
    /// What a start takes, opened while nobody asks for anything.
    ahead: Option<Ahead>,
}

/// An entry for a microVM. Clients give the same name to several microVMs: the second gets another.
fn entry(place: &Place, config: &Config) -> Option<Claim> {
    let about = About::new(Some(config));
    let any = Place {
        name: None,
        ..place.clone()
    };
    let claim = match Claim::new(place, &about) {
        Err(RegistryError::Taken { .. }) => Claim::new(&any, &about),
        other => other,
    };
    claim
        .map_err(|error| log::debug!("commands do not find this microVM: {}", chain(&error)))
        .ok()
}

/// Has an entry lead to the socket that was asked for.
fn link(claim: &Claim, socket: &Path) {
    if let Err(error) = claim.link(socket) {
        log::debug!("commands do not reach this microVM: {error}");
    }
}

fn build(preboot: &Preboot, ahead: Option<Ahead>) -> Result<Session, ActionError> {
    let start = |error: LaunchError| ActionError::Start {
        text: chain(&error),
    };
    let prepared = Prepared::new(preboot.spec()?, ahead, preboot.mmds()).map_err(start)?;
    Session::build(prepared).map_err(start)
}

/// The machine of a snapshot, whose configuration becomes that of `preboot`.
fn load(
    preboot: &mut Preboot,
    (load, ahead): (&SnapshotLoad, Option<Ahead>),
    meter: &Arc<Meter>,
) -> Result<Session, ActionError> {
    preboot.may_load(load)?;
    let failed = |error: LaunchError| ActionError::Load {
        text: chain(&error),
    };
    let (mut saved, config) = Saved::open(load, preboot.config())?;
    let watching = meter.clone();
    saved
        .snapshot
        .watch(Box::new(move |read, total| watching.watch(read, total)));
    let spec = startable(&config).map_err(|error| ActionError::Load {
        text: chain(&error),
    })?;
    let have = ahead.map_or(Have::Nothing, Have::Ahead);
    let prepared = Prepared::load(spec, saved, have, preboot.mmds()).map_err(failed)?;
    let session = Session::build(prepared).map_err(failed)?;
    if meter.is_cancelled() {
        return Err(ActionError::LoadCancelled);
    }
    preboot.adopt(config);
    Ok(session)
}

impl Serving {
    fn start(self) -> Result<u8, ServeError> {
        let session = build(&self.preboot, None)?;
        self.run(session, |_| ())
    }

    /// Runs a machine that is built to its end. `begun` is called when nothing keeps it from running.
    fn run(self, mut session: Session, begun: impl FnOnce(Reply)) -> Result<u8, ServeError> {
        let Self {
            mut preboot,
            requests,
            signals,
            startup,
            counts,
            door,
            events,
            loaded,
            ahead: _,
        } = self;
        let parts = FigureParts {
            metrics: preboot.take_metrics(),
            api: counts,
            startup,
            events,
            mmds: preboot.mmds().clone(),
            loaded,
        };
        let instance = (preboot.instance().clone(), session.state());
        let machine = (preboot.config().clone(), session.take_saver());
        // Others may have asked at the time of the start.
        requests.announce();
        let runtime =
            Runtime::new(requests, instance, machine, parts).map_err(ServeError::Event)?;
        begun(Reply::Done);
        Ok(session.run(signals, runtime, door)?)
    }

    /// Takes the configuration in, until there is a start that works.
    fn configure(mut self) -> Result<u8, ServeError> {
        loop {
            let [called, signalled] = self.wait()?;
            if signalled
                && let Some(signal) = self.signals.next()
                && ENDING.contains(&signal)
            {
                let outcome = Outcome::Signal(signal as i32);
                self.events.emit(&outcome.event(false));
                return Ok(outcome.exit_code(false));
            }
            if !called {
                continue;
            }
            while let Some(call) = self.requests.next() {
                let begin = Instant::now();
                let built = match &call.action {
                    Action::InstanceStart => build(&self.preboot, self.ahead.take()),
                    Action::LoadSnapshot(asked) => self.load(asked, call.cancelled()),
                    Action::Listen => {
                        let state = self.preboot.instance().state;
                        let stream = self.events.listen(&Event::State { state });
                        call.answer(stream.map(Reply::Stream));
                        continue;
                    }
                    action => {
                        let result = self.preboot.act(action.clone());
                        call.answer(result);
                        continue;
                    }
                };
                match built {
                    Ok(session) => {
                        let took = [call.asked(), begin].map(|moment| moment.elapsed());
                        let is_load = matches!(call.action, Action::LoadSnapshot(_));
                        self.loaded = is_load.then_some(took);
                        return self.run(session, |reply| call.answer(Ok(reply)));
                    }
                    Err(error) => call.answer(Err(error)),
                }
            }
            self.ahead = self.ahead.take().or_else(Ahead::open);
        }
    }

    /// Makes the machine of a snapshot, unless its caller goes meanwhile and said that this ends it. All that was opened
    /// for it is closed then.
    fn load(
        &mut self,
        asked: &SnapshotLoad,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Session, ActionError> {
        let cancelled = asked.cancellable.then_some(cancelled);
        let path = &asked.snapshot_path;
        let meter = Arc::new(Meter::new(Task::Load, path, cancelled, &mut self.events));
        let ahead = self.ahead.take();
        let loaded = load(&mut self.preboot, (asked, ahead), &meter);
        meter.give_back(&mut self.events);
        match loaded {
            Err(_) if meter.is_cancelled() => Err(ActionError::LoadCancelled),
            loaded => loaded,
        }
    }

    /// Waits for actions and signals, and says which there are.
    fn wait(&self) -> Result<[bool; 2], ServeError> {
        let mut fds = [
            PollFd::new(self.requests.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(ServeError::Wait(errno)),
        }
        Ok(fds.map(|fd| fd.any().unwrap_or(false)))
    }
}
