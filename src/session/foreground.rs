//! The vmm thread's event loop while a VM runs in the foreground.
//!
//! Everything here is owned by that thread. Nothing blocks: input is taken when the guest has
//! room, output is written when its reader does. The loop ends when there is an [`Outcome`].

mod door;
mod ready;

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::signal::Signal;
use nix::sys::timerfd::TimerFd;
use vmm_sys_util::eventfd::EventFd;

use super::agent::AgentLink;
use super::console::ConsoleTap;
use super::escape::{HELP, Request};
use super::hvc::{self, Hvc};
use super::input::Input;
use super::managed::{Door, Managed};
use super::outcome::Outcome;
use super::output::{Output, read_input};
use super::progress::Progress;
use super::readers::Console;
use super::runtime::{Behind, Runtime};
use super::signals::Signals;
use super::terminal::window_size;
use super::timer::{arm, timer, timer_fd};
use super::token::{Token, watch};
use crate::board::BoardWatchdog;
use crate::control::SnapshotCreate;
use crate::vm::{Vm, VmExit};
use std::sync::Arc;

/// How long a guest may take to power off after a first SIGTERM.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// How long the text of a kernel panic may take to be complete.
const PANIC_GRACE: Duration = Duration::from_secs(2);
/// How long a guest with pvpanic may take to report a panic that its console shows.
const PVPANIC_GRACE: Duration = Duration::from_secs(10);
/// How long after the start commands find the machine. One that ends before has nothing of it.
const DOOR_AFTER: Duration = Duration::from_millis(10);
/// Bytes of stdin taken at once.
const INPUT_CHUNK: usize = 16 * 1024;
/// Times that a virtio console is asked for the last words of a guest that ended.
const LAST_WORDS: u32 = 256;

/// The descriptors that tell the loop of the guest's side.
pub struct GuestEvents {
    /// A panic was noticed on the console.
    pub panic: EventFd,
    /// COM1 has room.
    pub console_room: EventFd,
    /// COM1 has output, for those who read along.
    pub console_output: EventFd,
    /// COM2 has room.
    pub agent_room: EventFd,
    /// COM2 has bytes.
    pub agent_data: EventFd,
}

/// What is left of a foreground run when the VM has ended.
pub struct Rest {
    /// stdout and stderr, with what still waits.
    pub outputs: [Output; 2],
    /// Still blocked while it lives.
    pub signals: Signals,
    /// The time limit.
    pub timeout: Option<TimerFd>,
    /// A snapshot that is being written.
    pub behind: Behind,
}

/// The state of a foreground run.
pub struct Foreground<'a> {
    vm: &'a Vm,
    tap: Arc<ConsoleTap>,
    agent: Option<AgentLink>,
    hvc: Option<Hvc>,
    runtime: Runtime,
    /// After the runtime, for which its thread may be waiting.
    managed: Option<Managed>,
    client_watched: bool,
    /// Becomes `managed` when the timer says so, which stays: the loop knows it.
    door: Option<Door>,
    door_timer: Option<TimerFd>,
    /// Somebody asked the guest to switch itself off.
    stop_asked: bool,
    events: GuestEvents,
    signals: Signals,
    timeout: Option<(TimerFd, Duration)>,
    grace: TimerFd,
    /// What the end of the grace period means.
    after_grace: Option<Outcome>,
    input: Input,
    stdout: Output,
    stderr: Output,
    outputs_watched: [bool; 2],
    /// The power button is to be pressed again when the command runs.
    press_again: bool,
    progress: Progress,
    /// Where the machine is saved when its agent waits for a command.
    save_to: Option<SnapshotCreate>,
    outcome: Option<Outcome>,
}

impl<'a> Foreground<'a> {
    /// For `vm`, not started yet. `raw` says that stdin is a raw terminal.
    pub fn new(
        vm: &'a Vm,
        (tap, events): (Arc<ConsoleTap>, GuestEvents),
        (agent, hvc): (Option<AgentLink>, Option<Hvc>),
        (signals, runtime): (Signals, Runtime),
        raw: bool,
        progress: Progress,
    ) -> io::Result<Self> {
        let (stdout, stderr) = super::output::standard();
        Ok(Self {
            vm,
            tap,
            agent,
            hvc,
            runtime,
            managed: None,
            client_watched: false,
            door: None,
            door_timer: None,
            stop_asked: false,
            events,
            signals,
            timeout: None,
            grace: timer()?,
            after_grace: None,
            input: Input::new(raw),
            stdout,
            stderr,
            outputs_watched: [false; 2],
            press_again: false,
            progress,
            save_to: None,
            outcome: None,
        })
    }

    /// Ends the VM when `limit` is over, of which `used` is gone.
    pub fn limit(&mut self, limit: Duration, used: Duration) -> io::Result<()> {
        let timer = timer()?;
        // A timer of zero would be none.
        arm(
            &timer,
            limit.saturating_sub(used).max(Duration::from_nanos(1)),
        )?;
        self.timeout = Some((timer, limit));
        Ok(())
    }

    /// Writes figures, where there is a place for them.
    pub fn write_figures(&mut self) {
        let console = console(self.vm, &self.tap, &self.hvc);
        self.runtime.flush(console);
    }

    /// The machine runs.
    pub fn begun(&mut self) {
        self.runtime.begun(self.vm);
        // An agent that waits already is told at once.
        self.pump_agent();
    }

    /// Passes on what readers of the console and others at the API wait for.
    fn serve_streams(&mut self) {
        if self.runtime.has_streams() {
            let console = console(self.vm, &self.tap, &self.hvc);
            self.runtime.serve_streams(console, self.agent.as_mut());
            self.pump_agent();
        }
    }

    /// The end, once there is one.
    pub fn outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// Hands over what output is left, and what may cut its writing short.
    pub fn into_rest(mut self) -> Rest {
        self.write_figures();
        self.serve_streams();
        Rest {
            outputs: [self.stdout, self.stderr],
            signals: self.signals,
            timeout: self.timeout.map(|(timer, _)| timer),
            behind: self.runtime.take_behind(),
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.progress.clear();
        if self.outcome.is_none() {
            self.runtime.ended(&outcome);
            self.outcome = Some(outcome);
        }
    }

    fn end_after(&mut self, grace: Duration, outcome: Outcome) {
        match arm(&self.grace, grace) {
            Ok(()) => self.after_grace = Some(outcome),
            Err(_) => self.end(outcome),
        }
    }

    fn on_exit(&mut self) {
        let Some(exit) = self.vm.exit().take() else {
            return;
        };
        // They are in memory that nobody brings.
        if !matches!(exit, VmExit::HandlerLost(_)) {
            self.take_last_words();
        }
        // A kernel that panicked resets itself: the panic is the reason.
        let outcome = match Outcome::from(exit) {
            Outcome::Reset if self.tap.panicked() => Outcome::Panicked,
            // Asked for by SIGTERM: no success of the command that it ended.
            Outcome::PowerOff if self.after_grace.is_some() && self.agent.is_some() => {
                self.after_grace.take().unwrap_or(Outcome::PowerOff)
            }
            Outcome::PowerOff if self.stop_asked && self.agent.is_some() => Outcome::Stopped,
            Outcome::PowerOff if self.agent.as_ref().is_some_and(|agent| !agent.is_running()) => {
                Outcome::AgentLost("the guest switched itself off before the command began".into())
            }
            outcome => outcome,
        };
        self.end(outcome);
    }

    /// What the guest said before it ended, some of which its devices may not have looked at yet.
    fn take_last_words(&mut self) {
        for _ in 0..LAST_WORDS {
            self.vm.board().devices.settle_console();
            if !self.on_agent_data() && !self.on_hvc(true) {
                return;
            }
        }
    }

    /// Passes on the output of hvc0, where its reader takes it; says whether there was any.
    fn on_hvc(&mut self, all: bool) -> bool {
        let Some(hvc) = &mut self.hvc else {
            return false;
        };
        if self.stdout.is_waiting() && !all {
            return false;
        }
        let bytes = hvc.output();
        self.stdout.push(&bytes);
        self.flush();
        !bytes.is_empty()
    }

    fn on_signal(&mut self) {
        while let Some(signal) = self.signals.next() {
            match signal {
                Signal::SIGWINCH => self.resize(),
                Signal::SIGUSR1 => self.request(Request::PowerButton),
                Signal::SIGUSR2 => self.request(Request::CtrlAltDel),
                Signal::SIGIO => self.vm.board().devices.look_at_disks(),
                Signal::SIGTERM => self.terminate(),
                _ => self.interrupt(signal),
            }
        }
    }

    /// SIGINT and its like: the command's, where one runs; a second one ends the VM.
    fn interrupt(&mut self, signal: Signal) {
        let forwarded = self
            .agent
            .as_mut()
            .is_some_and(|agent| agent.forward_once(signal));
        if forwarded {
            self.pump_agent();
        } else {
            self.end(Outcome::Signal(signal as i32));
        }
    }

    /// SIGTERM: the guest may switch itself off; a second one ends the VM.
    fn terminate(&mut self) {
        let signal = Outcome::Signal(Signal::SIGTERM as i32);
        if self.after_grace.is_some() {
            return self.end(signal);
        }
        match &mut self.agent {
            Some(agent) if agent.is_running() => agent.power_off(),
            Some(_) => return self.end(signal),
            None => self.vm.board().power.press_power_button(),
        }
        self.end_after(SHUTDOWN_GRACE, signal);
        self.pump_agent();
    }

    /// The guest may switch itself off, as long as it likes.
    fn shut_down(&mut self) {
        self.stop_asked = true;
        match &mut self.agent {
            Some(agent) if agent.is_running() => agent.power_off(),
            _ => self.request(Request::PowerButton),
        }
        self.pump_agent();
    }

    fn resize(&mut self) {
        let Some(size) = window_size() else { return };
        if let Some(agent) = &mut self.agent {
            agent.resize(size);
            self.pump_agent();
        }
        if let Some(console) = self.vm.board().devices.console() {
            hvc::resize(&console, size);
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::End => self.end(Outcome::Quit),
            Request::Help => {
                self.stderr.push(HELP.as_bytes());
                self.flush();
            }
            Request::PowerButton => {
                self.vm.board().power.press_power_button();
                // A guest that still boots has no driver for it yet.
                self.press_again = self.agent.as_ref().is_some_and(|agent| !agent.is_running());
            }
            Request::CtrlAltDel => {
                if !self.vm.board().keyboard.ctrl_alt_del() {
                    log::warn!("the guest does not read its keyboard: Ctrl-Alt-Del is lost");
                }
            }
        }
    }

    /// The console showed a panic. A guest whose agent found pvpanic should say so through that;
    /// for others the text decides, once it is complete.
    fn on_panic(&mut self) {
        if !self.tap.panicked() {
            return;
        }
        self.runtime.panicked();
        if self.agent.as_ref().is_some_and(AgentLink::has_pvpanic) {
            self.end_after(PVPANIC_GRACE, Outcome::Panicked);
        } else if self.tap.panic_complete() {
            self.end(Outcome::Panicked);
        } else {
            self.end_after(PANIC_GRACE, Outcome::Panicked);
        }
    }

    fn on_stdin(&mut self) {
        let mut buffer = vec![0; INPUT_CHUNK];
        match read_input(&mut buffer) {
            Ok(Some(count)) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                match &mut self.input.escapes {
                    None => self.input.waiting.extend_from_slice(bytes),
                    Some(escapes) => {
                        let requests = escapes.filter(bytes, &mut self.input.waiting);
                        requests
                            .into_iter()
                            .for_each(|request| self.request(request));
                    }
                }
            }
            Ok(None) => self.input.ended = true,
            Err(error) => {
                log::warn!("no more input: {error}");
                self.input.ended = true;
            }
        }
        self.pump_input();
    }

    /// Gives waiting input to whoever takes it.
    fn pump_input(&mut self) {
        let taken = match (&mut self.agent, &self.hvc) {
            (None, Some(hvc)) => hvc.input(&self.input.waiting),
            (None, None) => self.vm.board().console.input(&self.input.waiting),
            (Some(agent), _) => {
                let taken = agent.input(&self.input.waiting);
                if self.input.ended && taken == self.input.waiting.len() {
                    agent.input_ended();
                }
                taken
            }
        };
        self.input.waiting.drain(..taken);
        self.pump_agent();
    }

    /// Moves what the client has to say into its channel, as far as that takes it.
    fn pump_agent(&mut self) {
        if let Some(agent) = &mut self.agent {
            agent.pump(&self.vm.board().agent);
        }
    }

    /// Takes what the agent has sent; says whether there was anything.
    fn on_agent_data(&mut self) -> bool {
        let Some(agent) = &mut self.agent else {
            return false;
        };
        let (ended, any) = agent.receive(&mut self.stdout, &mut self.stderr);
        if agent.is_running() {
            self.progress.clear();
            if std::mem::take(&mut self.press_again) {
                self.vm.board().power.press_power_button();
            }
        }
        self.flush();
        self.pump_input();
        if let Some(outcome) = ended {
            self.end(outcome);
        }
        self.save_if_ready();
        any
    }

    fn flush(&mut self) {
        let written = self.stdout.flush() + self.stderr.flush();
        if let Some(agent) = &mut self.agent {
            agent.written(written);
        }
    }

    /// Watches exactly what can make progress.
    fn update_interest(&mut self, ops: &mut EventOps) {
        while self.input.unpollable && self.wants_input() {
            self.on_stdin();
        }
        let wants = self.wants_input();
        let stdin = (libc::STDIN_FILENO, Token::Stdin, EventSet::IN);
        if watch(ops, stdin, wants, &mut self.input.watched).is_err() {
            self.input.unpollable = true;
            return self.update_interest(ops);
        }
        if let Some(hvc) = &mut self.hvc {
            let source = (hvc.output_event(), Token::Hvc, EventSet::IN);
            if let Err(error) = watch(ops, source, !self.stdout.is_waiting(), &mut hvc.watched) {
                log::error!("cannot watch hvc0: {error:?}");
            }
        }
        if let Some((fd, wants)) = self.managed.as_ref().map(Managed::socket) {
            let source = (fd, Token::Client, EventSet::IN);
            if let Err(error) = watch(ops, source, wants, &mut self.client_watched) {
                log::error!("cannot watch the control socket: {error:?}");
            }
        }
        let watched = &mut self.outputs_watched;
        let outputs = [(&self.stdout, Token::Stdout), (&self.stderr, Token::Stderr)];
        for ((output, token), watched) in outputs.into_iter().zip(watched) {
            let source = (output.as_raw_fd(), token, EventSet::OUT);
            if let Err(error) = watch(ops, source, output.is_waiting(), watched) {
                log::error!("cannot watch {token:?}: {error:?}");
            }
        }
    }

    fn wants_input(&self) -> bool {
        let listening = self.agent.as_ref().is_none_or(AgentLink::takes_input);
        !self.input.ended && self.input.waiting.is_empty() && listening && self.outcome.is_none()
    }

    fn on_token(&mut self, token: Token) {
        match token {
            Token::Exit => self.on_exit(),
            Token::Signal => self.on_signal(),
            Token::Timeout => {
                if let Some((_, limit)) = &self.timeout {
                    let limit = *limit;
                    self.end(Outcome::Timeout(limit));
                }
            }
            Token::Grace => {
                if let Some(outcome) = self.after_grace.take() {
                    self.end(outcome);
                }
            }
            Token::Panic => {
                drain(&self.events.panic);
                self.on_panic();
            }
            Token::Stdin => self.on_stdin(),
            Token::ConsoleRoom => {
                drain(&self.events.console_room);
                self.pump_input();
            }
            Token::AgentRoom => {
                drain(&self.events.agent_room);
                self.pump_input();
            }
            Token::AgentData => {
                drain(&self.events.agent_data);
                self.on_agent_data();
            }
            Token::Watchdog => {
                let watchdog = self.vm.board().watchdog.as_ref();
                if let Some(reason) = watchdog.and_then(BoardWatchdog::on_alarm) {
                    self.vm.exit().set(VmExit::Guest(reason));
                }
            }
            Token::Hvc => {
                self.on_hvc(false);
            }
            Token::Stdout | Token::Stderr => {
                self.flush();
                self.pump_agent();
            }
            Token::Calls => {
                let console = console(self.vm, &self.tap, &self.hvc);
                self.runtime.serve(console, self.agent.as_mut());
                // What was taken from the agent to be saved.
                self.on_agent_data();
                if self.runtime.take_stop() {
                    self.shut_down();
                }
            }
            Token::ConsoleOutput => drain(&self.events.console_output),
            Token::Door => self.open_door(),
            Token::Client => {
                if let Some(managed) = &mut self.managed {
                    managed.serve();
                }
            }
        }
    }
}

impl MutEventSubscriber for Foreground<'_> {
    fn init(&mut self, ops: &mut EventOps) {
        let events = &self.events;
        let mut sources = vec![
            (self.vm.exit().as_raw_fd(), Token::Exit),
            (self.signals.as_raw_fd(), Token::Signal),
            (timer_fd(&self.grace), Token::Grace),
            (events.panic.as_raw_fd(), Token::Panic),
            (events.console_room.as_raw_fd(), Token::ConsoleRoom),
            (events.console_output.as_raw_fd(), Token::ConsoleOutput),
            (events.agent_room.as_raw_fd(), Token::AgentRoom),
            (events.agent_data.as_raw_fd(), Token::AgentData),
        ];
        if let Some((timer, _)) = &self.timeout {
            sources.push((timer_fd(timer), Token::Timeout));
        }
        if let Some(timer) = &self.door_timer {
            sources.push((timer_fd(timer), Token::Door));
        }
        if let Some(watchdog) = &self.vm.board().watchdog {
            sources.push((watchdog.as_raw_fd(), Token::Watchdog));
        }
        if let Some([data, room]) = self.agent.as_ref().and_then(AgentLink::events) {
            sources.extend([(data, Token::AgentData), (room, Token::AgentRoom)]);
        }
        if let Some(hvc) = &self.hvc {
            sources.push((hvc.room_event(), Token::ConsoleRoom));
        }
        sources.push((self.runtime.as_raw_fd(), Token::Calls));
        for (fd, token) in sources {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token as u32, EventSet::IN)) {
                log::error!("cannot watch {token:?}: {error:?}");
            }
        }
        self.update_interest(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Some(token) = Token::from_data(events.data()) {
            self.on_token(token);
            self.serve_streams();
        }
        self.update_interest(ops);
    }
}

/// The console, beside what else belongs to the foreground.
fn console<'a>(vm: &'a Vm, tap: &'a ConsoleTap, hvc: &'a Option<Hvc>) -> Console<'a> {
    let hvc = hvc.as_ref();
    Console { vm, tap, hvc }
}

fn drain(event: &EventFd) {
    // Empty is fine: one wake-up may stand for several.
    let _ = event.read();
}
