//! From a checked configuration to an exit code.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arch::kernel::KernelImage;
use devices::legacy::boot_timer::{BootTimer, Times};
use devices::mmds::Mmds;
use devices::virtio::console::HostPort;
use devices::virtio::limiter::Limiter;
use devices::virtio::net::Mac;
use event_manager::{EventManager, SubscriberOps};
use nix::poll::PollTimeout;
use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::agent::{AgentLink, new_addresses};
use super::agent_port::{AgentPort, Channel};
use super::console::{ConsoleFileError, ConsoleTap, ConsoleWriter, Sink};
use super::events::Events;
use super::figures::Startup;
use super::foreground::{Foreground, GuestEvents, Rest};
use super::hvc::Hvc;
pub use super::launch_error::LaunchError;
use super::launch_error::session;
use super::managed::Door;
use super::outcome::{CODE_FAILURE, Outcome};
use super::output::{Output, finish};
use super::progress::Progress;
use super::runtime::{FigureParts, Runtime, has_command};
use super::signals::Signals;
use super::snapshots::{self, Saved, Saver};
use super::terminal::{RawTerminal, window_size};
use super::touched::Touched;
use crate::board::plan::{ConsoleEnds, Plan, fit, limits, open_files, plan};
use crate::board::{SerialEnd, Wiring};
use crate::config::{Config, Console, RateLimiter, Spec};
use crate::control::{Instance, SnapshotCreate, SnapshotLoad, State, channel, startable};
use crate::guest::prepare::prepare;
use crate::registry::Place;
use crate::snapshot::{GuestFacts, OnRead, ram};
use crate::telemetry::{Metrics, tell};
use crate::vm::build::Initrd;
use crate::vm::{Ahead, Host, Shell, Vm};

/// Milliseconds that output may wait for its reader when the end was asked for.
const OUTPUT_PATIENCE: u16 = 2000;

/// Runs the machine of `spec` to its end, tells what a person should know on stderr, and returns
/// the exit code. The guest finds `mmds` where the configuration has a metadata service; others find
/// the machine at `place` meanwhile.
pub fn launch(spec: Spec, mmds: &Arc<Mmds>, place: Option<Place>) -> Result<u8, LaunchError> {
    launch_with(spec, mmds, place, After::default(), |spec| {
        Prepared::new(spec, None, mmds)
    })
}

/// Boots the machine of `spec` until bulle's agent waits for a command in it, saves it as `create`
/// says, and returns the exit code.
pub fn save_ready(
    spec: Spec,
    mmds: &Arc<Mmds>,
    place: Option<Place>,
    create: SnapshotCreate,
) -> Result<u8, LaunchError> {
    snapshots::may_save(spec.config())?;
    let after = After {
        save: Some(create),
        begun: None,
    };
    launch_with(spec, mmds, place, after, |spec| {
        Prepared::new(spec, None, mmds)
    })
}

/// Makes a machine of the snapshot that `load` names and runs it to its end, as [`launch`] does, with
/// `command` in it where bulle's agent waits for one. `on_read` is told how far it is before that.
pub fn launch_saved(
    load: &SnapshotLoad,
    on_read: OnRead,
    command: Vec<String>,
    mmds: &Arc<Mmds>,
    place: Option<Place>,
) -> Result<u8, LaunchError> {
    let (mut saved, mut config) = Saved::open(load, &Config::new(PathBuf::new()))?;
    saved.snapshot.watch(on_read);
    give_command(&mut config, &saved, command)?;
    let spec = startable(&config)?;
    launch_with(spec, mmds, place, After::default(), |spec| {
        Prepared::load(spec, saved, Have::Nothing, mmds)
    })
}

/// Has the agent of a loaded machine run `command`.
pub fn give_command(
    config: &mut Config,
    saved: &Saved,
    command: Vec<String>,
) -> Result<(), LaunchError> {
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
    Ok(())
}

/// What happens once a machine is there.
#[derive(Default)]
pub struct After {
    /// It is saved so when its agent waits for a command.
    pub save: Option<SnapshotCreate>,
    /// Called when it has begun.
    pub begun: Option<Box<dyn FnOnce()>>,
}

/// Runs what `prepare` makes of `spec` to its end.
pub fn launch_with(
    spec: Spec,
    mmds: &Arc<Mmds>,
    place: Option<Place>,
    after: After,
    prepare: impl FnOnce(Spec) -> Result<Prepared, LaunchError>,
) -> Result<u8, LaunchError> {
    let metrics = spec.config().metrics.as_ref();
    let metrics = metrics
        .map(|metrics| Metrics::open(metrics, ""))
        .transpose()?;
    let (caller, requests) = channel().map_err(|error| session("the control channel", error))?;
    let door = place.map(|place| Door::new(place, spec.config(), caller));
    let door = door.transpose()?;
    let parts = FigureParts {
        metrics,
        api: None,
        startup: Startup::default(),
        events: Events::default(),
        mmds: mmds.clone(),
        loaded: None,
    };
    let instance = Instance::new(String::new());
    let config = spec.config().clone();
    let prepared = prepare(spec)?;
    let signals = block_signals()?;
    let mut session = Session::build(prepared)?;
    let machine = (config, session.take_saver());
    let runtime = Runtime::new(requests, (instance, session.state()), machine, parts)
        .map_err(|error| self::session("the control channel", error))?;
    session.after = after;
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
    /// A snapshot, and a machine that waits for it.
    Saved(Box<Saved>, Option<Box<Shell>>),
}

/// What of KVM is open before a machine of a snapshot is made.
pub enum Have {
    Nothing,
    Ahead(Ahead),
    /// All, and perhaps a machine that waits.
    Host(Box<Host>, Option<Box<Shell>>),
}

impl Prepared {
    /// Opens all that `spec` names, but for what is open. This is when its time limit begins.
    pub fn new(spec: Spec, ahead: Option<Ahead>, mmds: &Arc<Mmds>) -> Result<Self, LaunchError> {
        let (started, begin) = (Instant::now(), times());
        let progress = Progress::new();
        let (mut devices, ends) = plan(&spec, mmds)?;
        let host = Host::open_on(&spec, open_files(&devices), ahead)?;
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

    /// Opens all that `spec`, the machine of `saved`, names, but for what is open.
    pub fn load(
        spec: Spec,
        saved: Saved,
        have: Have,
        mmds: &Arc<Mmds>,
    ) -> Result<Self, LaunchError> {
        let (started, begin) = (Instant::now(), times());
        let (mut devices, ends) = plan(&spec, mmds)?;
        let files = open_files(&devices);
        let (host, shell) = match have {
            Have::Nothing => (Host::open(&spec, files)?, None),
            Have::Ahead(ahead) => (Host::open_on(&spec, files, Some(ahead))?, None),
            Have::Host(host, shell) => (*host, shell),
        };
        fit(&mut devices, window_size(), &saved.snapshot.guest.release);
        Ok(Self {
            spec,
            started,
            begin,
            progress: Progress::new(),
            devices,
            ends,
            host,
            source: Source::Saved(Box::new(saved), shell),
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
    touched: Touched,
    /// Whether it runs at once.
    runs: bool,
    /// What was going on with bulle's agent in a machine that was saved.
    guest: GuestFacts,
    /// Addresses that its network interfaces had, and that they have now.
    addresses: Vec<[Mac; 2]>,
    after: After,
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
        let (guest, addresses) = match &source {
            Source::Kernel(..) => (GuestFacts::default(), Vec::new()),
            Source::Saved(saved, _) => {
                let addresses = new_addresses(&spec, &saved.snapshot.machine.board);
                (saved.snapshot.guest.clone(), addresses)
            }
        };
        let mut touched = Touched::Ignored;
        let (vm, saver, runs) = match source {
            Source::Kernel(kernel, initrd) => {
                let vm = Vm::build(&spec, host, &kernel, initrd, wiring)?;
                (vm, Saver::booted(&spec, &kernel), true)
            }
            Source::Saved(saved, None) => {
                let snapshot = &saved.snapshot;
                let (vm, origin) = Vm::restore(host, snapshot, saved.policy, wiring)?;
                touched = Touched::of(snapshot, &vm, saved.record);
                (vm, Saver::loaded(snapshot, origin), saved.resume)
            }
            Source::Saved(saved, Some(shell)) => {
                let snapshot = &saved.snapshot;
                let vm = shell.adopt(snapshot, saved.policy, wiring)?;
                let origin = ram::origin(&snapshot.layers);
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
            touched,
            runs,
            guest,
            addresses,
            after: After::default(),
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
            touched,
            runs,
            guest,
            addresses,
            after,
        } = self;
        let mut agent = agent_link(&spec, guest, (port, ends.agent))?;
        if let Some(agent) = &mut agent {
            agent.change_addresses(&addresses);
        }
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
            begin(&mut foreground, runs.then_some(&vm), after, door)?;
            run(foreground)?
        };
        tap.close();
        vm.stop();
        touched.finish(&vm);
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

/// Lets the machine run if `vm` says which, does what comes `after` that, and has it found at `door`.
fn begin(
    foreground: &mut Foreground<'_>,
    vm: Option<&Vm>,
    after: After,
    door: Option<Door>,
) -> Result<(), LaunchError> {
    foreground.write_figures();
    if let Some(create) = after.save {
        foreground.save_when_ready(create);
    }
    if let Some(vm) = vm {
        vm.start();
    }
    if let Some(begun) = after.begun {
        begun();
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
    rest.behind.finish(&mut rest.signals);
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
