//! From a checked configuration to an exit code.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arch::kernel::{KernelError, KernelImage};
use devices::legacy::boot_timer::{BootTimer, Times};
use devices::mmds::Mmds;
use devices::virtio::console::HostPort;
use devices::virtio::limiter::Limiter;
use event_manager::{EventManager, SubscriberOps};
use nix::poll::PollTimeout;
use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::agent::AgentLink;
use super::agent_port::{AgentPort, Channel};
use super::console::{ConsoleFileError, ConsoleTap, ConsoleWriter, Sink};
use super::events::Events;
use super::foreground::{Foreground, GuestEvents, Rest};
use super::hvc::Hvc;
use super::managed::Door;
use super::outcome::{CODE_FAILURE, Outcome};
use super::output::{Output, finish};
use super::progress::Progress;
use super::runtime::{FigureParts, Runtime, Startup, has_command};
use super::signals::Signals;
use super::snapshots::{Saved, Saver};
use super::terminal::{RawTerminal, window_size};
use crate::board::plan::{ConsoleEnds, Plan, PlanError, fit, limits, open_files, plan};
use crate::board::{SerialEnd, Wiring};
use crate::config::{Config, Console, RateLimiter, Spec};
use crate::control::{
    ActionError, Instance, SnapshotCreate, SnapshotLoad, State, channel, startable,
};
use crate::guest::client::{RequestError, TalkError};
use crate::guest::prepare::{PrepareError, prepare};
use crate::registry::{Place, RegistryError};
use crate::snapshot::GuestFacts;
use crate::telemetry::{LogFileError, Metrics, tell};
use crate::vm::build::Initrd;
use crate::vm::{BuildError, Host, Vm};

/// Milliseconds that output may wait for its reader when the end was asked for.
const OUTPUT_PATIENCE: u16 = 2000;

/// A run that never came to an outcome.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The kernel cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// What goes into the guest cannot be prepared.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The command does not fit the agent's protocol.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A device lacks something of the host.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// File of figures.
    #[error(transparent)]
    LogFile(#[from] LogFileError),
    /// The name.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Console file.
    #[error(transparent)]
    Console(#[from] ConsoleFileError),
    /// The host's side of the session.
    #[error("Cannot set up the session: {what}")]
    Session {
        /// Which part.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// A command for a guest without agent.
    #[error(
        "The snapshot's guest has no agent of bulle's that could run a command: leave the command out"
    )]
    NoAgent,
    /// A command for a guest that has one.
    #[error(
        "The snapshot's guest was saved with its command, which goes on: leave yours out, and run it with bulle exec"
    )]
    Busy,
    /// A conversation with the agent.
    #[error("The snapshot cannot be used")]
    Talk(#[from] TalkError),
    /// A snapshot.
    #[error(transparent)]
    Load(#[from] ActionError),
    /// The event loop.
    #[error("The event loop failed")]
    Loop(#[source] event_manager::Error),
}

/// Runs the machine of `spec` to its end, tells what a person should know on stderr, and returns
/// the exit code. The guest finds `mmds` where the configuration has a metadata service; others find
/// the machine at `place` meanwhile.
pub fn launch(spec: Spec, mmds: &Arc<Mmds>, place: Option<Place>) -> Result<u8, LaunchError> {
    launch_with(spec, mmds, place, None, |spec| Prepared::new(spec, mmds))
}

/// Boots the machine of `spec` until bulle's agent waits for a command in it, saves it as `create`
/// says, and returns the exit code.
pub fn save_ready(
    spec: Spec,
    mmds: &Arc<Mmds>,
    place: Option<Place>,
    create: SnapshotCreate,
) -> Result<u8, LaunchError> {
    launch_with(spec, mmds, place, Some(create), |spec| {
        Prepared::new(spec, mmds)
    })
}

/// Makes a machine of the snapshot that `load` names and runs it to its end, as [`launch`] does, with
/// `command` in it where bulle's agent waits for one.
pub fn launch_saved(
    load: &SnapshotLoad,
    command: Vec<String>,
    mmds: &Arc<Mmds>,
    place: Option<Place>,
) -> Result<u8, LaunchError> {
    let (saved, mut config) = Saved::open(load, &Config::new(PathBuf::new()))?;
    match &mut config.guest {
        Some(_) if saved.snapshot.guest.talk.is_some() => {
            if !command.is_empty() {
                return Err(LaunchError::Busy);
            }
        }
        Some(guest) => guest.command = command,
        None if command.is_empty() => {}
        None => return Err(LaunchError::NoAgent),
    }
    let spec = startable(&config)?;
    launch_with(spec, mmds, place, None, |spec| {
        Prepared::load(spec, saved, mmds)
    })
}

fn launch_with(
    spec: Spec,
    mmds: &Arc<Mmds>,
    place: Option<Place>,
    save: Option<SnapshotCreate>,
    prepare: impl FnOnce(Spec) -> Result<Prepared, LaunchError>,
) -> Result<u8, LaunchError> {
    let metrics = spec.config().metrics.as_ref();
    let metrics = metrics.map(Metrics::open).transpose()?;
    let (caller, requests) = channel().map_err(|error| session("the control channel", error))?;
    let door = place.map(|place| Door::new(place, spec.config(), caller));
    let door = door.transpose()?;
    let parts = FigureParts {
        metrics,
        api: None,
        startup: Startup::default(),
        events: Events::default(),
        mmds: mmds.clone(),
    };
    let instance = Instance::new(String::new());
    let config = spec.config().clone();
    let prepared = prepare(spec)?;
    let signals = block_signals()?;
    let mut session = Session::build(prepared)?;
    let machine = (config, session.take_saver());
    let runtime = Runtime::new(requests, (instance, session.state()), machine, parts)
        .map_err(|error| self::session("the control channel", error))?;
    session.save_when_ready = save;
    session.run(signals, runtime, door)
}

/// Signals that are to be answered, from here on, in threads made after this too.
pub fn block_signals() -> Result<Signals, LaunchError> {
    Signals::block().map_err(|error| session("signals", error.into()))
}

/// What a machine is made of, found and checked.
pub struct Prepared {
    spec: Spec,
    started: Instant,
    begin: Times,
    progress: Progress,
    devices: Vec<Plan>,
    ends: ConsoleEnds,
    host: Host,
    source: Source,
}

/// Time that passed, and processor time of this process.
fn times() -> Times {
    [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_PROCESS_CPUTIME_ID]
        .map(|clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from))
}

/// Where a machine's memory and state come from.
enum Source {
    /// A kernel that is booted.
    Kernel(Box<KernelImage>, Initrd),
    /// A snapshot.
    Saved(Box<Saved>),
}

impl Prepared {
    /// Opens all that `spec` names. This is when its time limit begins.
    pub fn new(spec: Spec, mmds: &Arc<Mmds>) -> Result<Self, LaunchError> {
        let (started, begin) = (Instant::now(), times());
        let progress = Progress::new();
        let (mut devices, ends) = plan(&spec, mmds)?;
        let host = Host::open(&spec, open_files(&devices))?;
        let kernel = KernelImage::open(&spec.config().boot_source.kernel_image_path)?;
        fit(
            &mut devices,
            window_size(),
            &kernel.version().unwrap_or_default(),
        );
        let initrd = prepare(&spec, &kernel, |step| progress.step(step))?;
        progress.step("starting the kernel".to_string());
        Ok(Self {
            spec,
            started,
            begin,
            progress,
            devices,
            ends,
            host,
            source: Source::Kernel(Box::new(kernel), initrd),
        })
    }

    /// Opens all that `spec`, the machine of `saved`, names.
    pub fn load(spec: Spec, saved: Saved, mmds: &Arc<Mmds>) -> Result<Self, LaunchError> {
        let (started, begin) = (Instant::now(), times());
        let (mut devices, ends) = plan(&spec, mmds)?;
        let host = Host::open(&spec, open_files(&devices))?;
        fit(&mut devices, window_size(), &saved.snapshot.guest.release);
        Ok(Self {
            spec,
            started,
            begin,
            progress: Progress::new(),
            devices,
            ends,
            host,
            source: Source::Saved(Box::new(saved)),
        })
    }
}

/// A machine that is built and not started, with the host's ends of it.
pub struct Session {
    spec: Spec,
    started: Instant,
    progress: Progress,
    ends: ConsoleEnds,
    vm: Vm,
    tap: Arc<ConsoleTap>,
    port: Arc<AgentPort>,
    events: GuestEvents,
    saver: Saver,
    /// Whether it runs at once.
    runs: bool,
    /// What was going on with bulle's agent in a machine that was saved.
    guest: GuestFacts,
    /// Where it is saved when its agent waits.
    save_when_ready: Option<SnapshotCreate>,
}

impl Session {
    /// Builds the machine. Signals are blocked by now.
    pub fn build(prepared: Prepared) -> Result<Self, LaunchError> {
        let Prepared {
            spec,
            started,
            begin,
            progress,
            devices,
            ends,
            host,
            source,
        } = prepared;
        let events = guest_events()?;
        let tap = ConsoleTap::new(clone(&events.panic)?, clone(&events.console_output)?);
        let port = AgentPort::new(clone(&events.agent_data)?);
        let wiring = Wiring {
            console: SerialEnd {
                out: Box::new(ConsoleWriter::new(
                    tap.clone(),
                    sink(&spec)?,
                    console_limiter(&spec),
                )),
                drained: clone(&events.console_room)?,
            },
            agent: SerialEnd {
                out: port.writer(),
                drained: clone(&events.agent_room)?,
            },
            watchdog: spec.config().watchdog,
            io: Vec::new(),
            boot_timer: spec
                .config()
                .boot_timer
                .then(|| BootTimer::new(times, begin)),
            devices,
        };
        let guest = match &source {
            Source::Kernel(..) => GuestFacts::default(),
            Source::Saved(saved) => saved.snapshot.guest.clone(),
        };
        let (vm, saver, runs) = match source {
            Source::Kernel(kernel, initrd) => {
                let vm = Vm::build(&spec, host, &kernel, initrd, wiring)?;
                (vm, Saver::booted(&spec, &kernel), true)
            }
            Source::Saved(saved) => {
                let snapshot = &saved.snapshot;
                let (vm, origin) = Vm::restore(host, snapshot, saved.policy, wiring)?;
                (vm, Saver::loaded(snapshot, origin), saved.resume)
            }
        };
        Ok(Self {
            spec,
            started,
            progress,
            ends,
            vm,
            tap,
            port,
            events,
            saver,
            runs,
            guest,
            save_when_ready: None,
        })
    }

    /// Whether it runs at once, or waits to be told.
    pub fn state(&self) -> State {
        match self.runs {
            true => State::Running,
            false => State::Paused,
        }
    }

    /// What saves the machine, for its runtime.
    pub fn take_saver(&mut self) -> Saver {
        std::mem::take(&mut self.saver)
    }

    /// Runs the machine to its end, with `runtime` to answer actions, also those at `door`; returns the
    /// exit code.
    pub fn run(
        self,
        signals: Signals,
        runtime: Runtime,
        door: Option<Door>,
    ) -> Result<u8, LaunchError> {
        let Self {
            spec,
            started,
            mut progress,
            ends,
            mut vm,
            tap,
            port,
            events,
            saver: _,
            runs,
            guest,
            save_when_ready,
        } = self;
        let agent = agent_link(&spec, guest, (port, ends.agent))?;
        let raw = if agent.as_ref().is_none_or(AgentLink::has_tty) {
            enter_raw()?
        } else {
            None
        };
        let console_shown = matches!(spec.console(), Console::Tty);
        if raw.is_some() || console_shown {
            // Its line would mix with what comes now.
            progress.clear();
        }
        if raw.is_some() {
            tell("Ctrl-A x ends the virtual machine, Ctrl-A h lists more");
        }
        let command = has_command(spec.config());
        let (outcome, rest) = {
            let parts = (tap.clone(), events);
            let ends = (agent, ends.terminal.map(Hvc::new));
            let mut foreground = Foreground::new(
                &vm,
                parts,
                ends,
                (signals, runtime),
                raw.is_some(),
                progress,
            )
            .map_err(|error| session("timers", error))?;
            if let Some(limit) = spec.timeout() {
                foreground
                    .limit(limit, started.elapsed())
                    .map_err(|error| session("the time limit", error))?;
            }
            begin(&mut foreground, runs.then_some(&vm), save_when_ready, door)?;
            run(foreground)?
        };
        tap.close();
        vm.stop();
        vm.board().log_unclaimed();
        vm.board().devices.log_memory();
        let lost = write_rest(rest, &outcome);
        drop(raw);
        if outcome.is_notable(command) {
            report(&outcome, &tap, console_shown);
        }
        Ok(match outcome.exit_code(command) {
            0 if lost => CODE_FAILURE,
            code => code,
        })
    }
}

/// Lets the machine run if `vm` says which, saves it as `save` says when it is ready, and has it found at
/// `door`.
fn begin(
    foreground: &mut Foreground<'_>,
    vm: Option<&Vm>,
    save: Option<SnapshotCreate>,
    door: Option<Door>,
) -> Result<(), LaunchError> {
    foreground.write_figures();
    if let Some(create) = save {
        foreground.save_when_ready(create);
    }
    if let Some(vm) = vm {
        vm.start();
    }
    foreground.begun();
    let opened = door.map_or(Ok(()), |door| foreground.open_soon(door));
    opened.map_err(|error| session("timers", error))
}

/// Writes what output is left and says whether any was lost. Output of a command that ended is
/// waited for as long as its reader takes, unless a signal or the time limit comes.
fn write_rest(mut rest: Rest, outcome: &Outcome) -> bool {
    let patience = match outcome {
        Outcome::Timeout(_) | Outcome::Signal(_) | Outcome::Quit => {
            PollTimeout::from(OUTPUT_PATIENCE)
        }
        _ => PollTimeout::NONE,
    };
    let timeout = rest.timeout.as_ref().map(AsFd::as_fd);
    let mut interrupts = vec![rest.signals.as_fd()];
    interrupts.extend(timeout.filter(|_| patience.is_none()));
    let lost = finish(&mut rest.outputs, &interrupts, patience);
    rest.behind.finish(&rest.signals);
    // Signals have their usual effect again before anything that may block is written.
    drop(rest.signals);
    if lost > 0 {
        tell(format_args!(
            "{lost} bytes of the command's output were not taken and are lost"
        ));
    }
    let failure = rest.outputs.iter().find_map(Output::failure);
    if let Some(error) = failure {
        tell(format_args!(
            "cannot write the command's output: {}",
            io::Error::from(error)
        ));
    }
    lost > 0 || failure.is_some()
}

fn run(foreground: Foreground<'_>) -> Result<(Outcome, Rest), LaunchError> {
    let mut manager = EventManager::new().map_err(LaunchError::Loop)?;
    let id = manager.add_subscriber(foreground);
    loop {
        manager.run().map_err(LaunchError::Loop)?;
        let outcome = manager
            .subscriber_mut(id)
            .map_err(LaunchError::Loop)?
            .outcome();
        if let Some(outcome) = outcome {
            let foreground = manager.remove_subscriber(id).map_err(LaunchError::Loop)?;
            return Ok((outcome, foreground.into_rest()));
        }
    }
}

fn report(outcome: &Outcome, tap: &ConsoleTap, shown: bool) {
    let lines = tap.last_lines();
    if outcome.wants_console() && !shown && !lines.is_empty() {
        tell(format_args!(
            "the console's last lines:\n{}",
            lines.join("\n")
        ));
    }
    tell(outcome);
}

fn session(what: &'static str, source: io::Error) -> LaunchError {
    LaunchError::Session { what, source }
}

fn event() -> Result<EventFd, LaunchError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| session("an event descriptor", error))
}

fn clone(event: &EventFd) -> Result<EventFd, LaunchError> {
    event
        .try_clone()
        .map_err(|error| session("an event descriptor", error))
}

fn guest_events() -> Result<GuestEvents, LaunchError> {
    Ok(GuestEvents {
        panic: event()?,
        console_room: event()?,
        console_output: event()?,
        agent_room: event()?,
        agent_data: event()?,
    })
}

/// Where the console's bytes go. Beside an agent it never goes to stdout, which is the command's.
fn sink(spec: &Spec) -> Result<Sink, ConsoleFileError> {
    match spec.console() {
        Console::Off | Console::Hvc0 | Console::Hvc0File(_) => Ok(Sink::None),
        Console::File(path) => Sink::file(&path),
        Console::Tty if spec.guest().is_some() => Ok(Sink::stderr()),
        Console::Tty => Ok(Sink::stdout()),
    }
}

/// The limits of the console's output.
fn console_limiter(spec: &Spec) -> Option<Limiter> {
    let bandwidth = spec.config().serial.as_ref()?.rate_limiter;
    let limits = RateLimiter {
        bandwidth: Some(bandwidth?),
        ..RateLimiter::default()
    };
    Some(Limiter::new(limits::limits(&limits)))
}

/// The session's end of the agent, where the guest has one.
fn agent_link(
    spec: &Spec,
    saved: GuestFacts,
    (port, host): (Arc<AgentPort>, Option<HostPort>),
) -> Result<Option<AgentLink>, LaunchError> {
    let Some(guest) = spec.guest() else {
        return Ok(None);
    };
    let tty = wants_tty(spec);
    Ok(Some(match (saved.talk, saved.agent) {
        (Some(talk), _) => AgentLink::restored(*talk, (port, host))?,
        (None, Some(ready)) => AgentLink::resumed(guest, tty, (port, host), &ready)?,
        (None, None) => AgentLink::new(guest, tty, Channel::new(port, host))?,
    }))
}

/// Whether the command gets a terminal: as asked, or when both stdin and stdout are one. With
/// only one of them, a terminal would mix stderr into a pipe or hide the end of a file.
fn wants_tty(spec: &Spec) -> bool {
    use std::io::IsTerminal;
    let both = || io::stdin().is_terminal() && io::stdout().is_terminal();
    spec.guest()
        .is_some_and(|guest| guest.tty.unwrap_or_else(both))
}

fn enter_raw() -> Result<Option<RawTerminal>, LaunchError> {
    RawTerminal::enter().map_err(|error| session("the terminal", error))
}
