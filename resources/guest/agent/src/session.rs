//! The main loop: one thread that waits for the host, the command, signals and the power button.
//!
//! Every buffer is bounded. What has no room is not read, so a command that writes faster than the
//! host takes simply blocks.

use core::fmt::Write;

use agent_protocol::start::StartView;
use agent_protocol::{
    Decoder, EXTRA_WINDOW, Exit, FromGuest, FromHost, Hello, Level, MAX_EXTRA, MAX_GUEST_WINDOW,
    MAX_START, Power, Stage, VERSION, features,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::job::{self, Job};
use crate::link::Link;
use crate::power::{Buttons, MAX_BUTTONS};
use crate::root::Trouble;
use crate::text::Text;
use crate::{net, setup, sys};

const HUP: u32 = 1;
const INT: u32 = 2;
const KILL: u32 = 9;
const USR1: u32 = 10;
const USR2: u32 = 12;
const TERM: u32 = 15;
const CONT: u32 = 18;
const PWR: u32 = 30;

/// What processes are sent for the guest to go down, and how long they then have (milliseconds).
/// An interactive shell ends at SIGHUP only; a stopped process must go on to end.
const STEPS: [(&[u32], u64); 3] = [(&[TERM, CONT], 200), (&[HUP], 1800), (&[KILL], 500)];
/// After so long the guest goes down whatever is left.
const PATIENCE_MS: u64 = 2500;
/// For the host to end the guest after the command's end; then the guest does it.
const GOODBYE_MS: u64 = 5000;

/// Files to wait on: channel, signals, buttons, those of each command.
const FIXED_FILES: usize = 2 + MAX_BUTTONS;
const FILES: usize = FIXED_FILES + (1 + MAX_EXTRA) * job::FILES;

/// Does the same with every command.
macro_rules! each_job {
    ($session:expr, $job:ident => $body:expr) => {{
        let $job = &mut $session.main;
        $body;
        for $job in &mut $session.extra {
            $body;
        }
    }};
}

/// The commands on behalf of one host.
pub struct Session {
    link: Link,
    signals: OwnedFd,
    buttons: Buttons,
    /// This is process 1 of a guest.
    is_init: bool,
    /// Why no command can run.
    trouble: Option<Trouble>,
    /// What has come of a Start, and for which command.
    start: [u8; MAX_START],
    start_len: usize,
    start_job: u8,
    /// A first message has come.
    talking: bool,
    main: Job<{ MAX_GUEST_WINDOW as usize }>,
    extra: [Job<{ EXTRA_WINDOW as usize }>; MAX_EXTRA],
    /// Whose output goes first.
    turn: usize,
    /// Exited or Failed has been sent at this time.
    done_at: Option<u64>,
    ending: Option<Ending>,
}

struct Ending {
    power: Power,
    begun: u64,
    /// The next of [`STEPS`], and when.
    step: usize,
    due: u64,
    /// No process is left.
    alone: bool,
}

impl Session {
    /// Takes over signals. `is_init` says whether to end the guest in the end.
    pub fn new(link: Link, buttons: Buttons, is_init: bool) -> Self {
        // Everything is blocked; SIGCHLD and what asks for the end is read from a file.
        sys::block_signals(!0);
        let bit = |signal: u32| 1u64 << (signal - 1);
        let mask = bit(17) | bit(INT) | bit(USR1) | bit(USR2) | bit(TERM) | bit(PWR);
        let signals = match sys::signal_file(mask) {
            Ok(file) => file,
            // Without it the end of the command would never be seen.
            Err(errno) => {
                sys::complain(format_args!(
                    "cannot make a signalfd: error {}; the kernel needs CONFIG_SIGNALFD",
                    errno.raw_os_error()
                ));
                if is_init {
                    crate::power::end(Power::Off)
                } else {
                    sys::exit(125)
                }
            }
        };
        let window = link.window();
        Self {
            link,
            signals,
            buttons,
            is_init,
            trouble: None,
            start: [0; MAX_START],
            start_len: 0,
            start_job: 0,
            talking: false,
            main: Job::new(0, window),
            extra: core::array::from_fn(|i| Job::new(i as u8 + 1, window.min(EXTRA_WINDOW))),
            turn: 0,
            done_at: None,
            ending: None,
        }
    }

    /// Refuses the command for this reason, if there is one.
    pub fn without_root(self, trouble: Option<Trouble>) -> Self {
        Self { trouble, ..self }
    }

    /// Runs until the guest is to end, and says how. `notes` are lines for the host's log.
    pub fn run(mut self, notes: &[u8]) -> Power {
        self.greet(notes);
        let mut decoder = Decoder::new();
        loop {
            if self.link.flush().is_err() {
                return self.lost();
            }
            if let Some(power) = self.advance() {
                self.link.drain();
                return power;
            }
            let ready = self.wait();
            if ready[1] {
                self.on_signals();
            }
            for index in 0..MAX_BUTTONS {
                if ready[2 + index] && self.buttons.was_pressed(index) {
                    self.end(Power::Off);
                }
            }
            if ready[0] && self.receive(&mut decoder).is_err() {
                return self.lost();
            }
            // Whoever has most to say leaves the others room.
            self.turn = (self.turn + 1) % (1 + MAX_EXTRA);
            for place in 0..=MAX_EXTRA {
                let number = (self.turn + place) % (1 + MAX_EXTRA);
                let files = FIXED_FILES + number * job::FILES;
                for index in [0, 1] {
                    if ready[files + 1 + index] {
                        self.pass_output(number, index);
                    }
                }
            }
        }
    }

    /// The channel is broken: nobody is there to run anything for.
    fn lost(&self) -> Power {
        sys::complain(format_args!("the channel to the host is broken"));
        Power::Off
    }

    fn greet(&mut self, notes: &[u8]) {
        let uname = rustix::system::uname();
        let mut have = 0;
        for (present, feature) in [
            (setup::has_pvpanic(), features::PVPANIC),
            (self.buttons.any(), features::POWER_BUTTON),
            (setup::has_pty(), features::PTY),
            (true, features::EXTRA),
            (true, features::ADDRESS),
        ] {
            have |= if present { feature } else { 0 };
        }
        let release = uname.release().to_bytes();
        self.link.send(&FromGuest::Hello(Hello {
            version: VERSION,
            features: have,
            window: self.link.window(),
            release,
        }));
        for line in notes.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
            self.link.send(&FromGuest::Log {
                level: Level::Warn,
                text: line,
            });
        }
    }

    /// Does what needs no waiting: input, credit, the ends of things. `Some` when all is over.
    fn advance(&mut self) -> Option<Power> {
        let running = self.main.is_running();
        if !running && self.done_at.is_some() {
            // Nobody reads input any more.
            self.main.clear_input();
        }
        let outcome = self.main.advance(&mut self.link);
        if let Some(exit) = outcome
            && self.ending.is_none()
        {
            // The host may end the guest at once. On a machine that goes on there is nothing to hurry.
            if self.is_init {
                rustix::fs::sync();
            }
            self.finish(&FromGuest::Exited(exit));
        }
        for (index, job) in self.extra.iter_mut().enumerate() {
            if let Some(exit) = job.advance(&mut self.link) {
                job.clear();
                self.link
                    .send_for(index as u8 + 1, &FromGuest::Exited(exit));
            }
        }
        if self.link.flush().is_err() {
            return Some(Power::Off);
        }
        self.advance_end()
    }

    fn advance_end(&mut self) -> Option<Power> {
        let now = sys::now_ms();
        if let (None, Some(done_at)) = (&self.ending, self.done_at)
            && now >= done_at + GOODBYE_MS
        {
            self.end(Power::Off);
        }
        // The command is forgotten when its output is complete.
        let said = !self.main.is_running();
        let ending = self.ending.as_mut()?;
        while !ending.alone
            && now >= ending.due
            && let Some((signals, pause)) = STEPS.get(ending.step)
        {
            ending.step += 1;
            ending.due = now + pause;
            for signal in *signals {
                if self.is_init {
                    sys::kill_everyone(*signal as i32);
                } else {
                    each_job!(self, job => job.signal(*signal as u8));
                }
            }
        }
        let late = now >= ending.begun + PATIENCE_MS;
        ((ending.alone && said && self.link.is_idle()) || late).then_some(ending.power)
    }

    /// When to look again though nothing has happened.
    fn timeout(&mut self) -> Option<u64> {
        let now = sys::now_ms();
        let mut command = None;
        each_job!(self, job => {
            let next = job.timeout(&self.link);
            command = [command, next].into_iter().flatten().min();
        });
        let ending = self.ending.as_ref().map(|e| {
            let over = e.alone || e.step == STEPS.len();
            let next = if over { e.begun + PATIENCE_MS } else { e.due };
            next.saturating_sub(now)
        });
        let goodbye = match self.ending {
            Some(_) => None,
            None => self.done_at.map(|at| (at + GOODBYE_MS).saturating_sub(now)),
        };
        [command, ending, goodbye].into_iter().flatten().min()
    }

    /// Waits for files to be ready; which are is said in the order of [`FIXED_FILES`].
    fn wait(&mut self) -> [bool; FILES] {
        let timeout = self.timeout().map(|ms| Timespec {
            tv_sec: (ms / 1000) as i64,
            tv_nsec: ((ms % 1000) * 1_000_000) as i64,
        });
        let link = if self.link.is_idle() {
            PollFlags::IN
        } else {
            PollFlags::IN | PollFlags::OUT
        };
        let buttons = self.buttons.files();
        let mut files: [PollFd<'_>; FILES] = core::array::from_fn(|index| {
            let (file, flags) = match index {
                0 => (Some(self.link.file()), link),
                1 => (Some(&self.signals), PollFlags::IN),
                index if index < FIXED_FILES => (buttons[index - 2].as_ref(), PollFlags::IN),
                index => match self.job_file(index - FIXED_FILES) {
                    Some((file, flags)) => (Some(file), flags),
                    None => (None, PollFlags::empty()),
                },
            };
            match file {
                Some(file) => PollFd::new(file, flags),
                None => PollFd::new(&self.signals, PollFlags::empty()),
            }
        });
        let mut ready = [false; FILES];
        if poll(&mut files, timeout.as_ref()).is_ok() {
            for (ready, file) in ready.iter_mut().zip(&files) {
                *ready = file
                    .revents()
                    .intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
            }
        }
        ready
    }

    /// File `index` of all commands together.
    fn job_file(&self, index: usize) -> Option<(&OwnedFd, PollFlags)> {
        match index / job::FILES {
            0 => self.main.file(index, &self.link),
            number => self.extra[number - 1].file(index % job::FILES, &self.link),
        }
    }

    fn on_signals(&mut self) {
        // struct signalfd_siginfo is 128 bytes and starts with the signal's number.
        let mut info = [0; 128];
        while let Ok(128) = rustix::io::read(&self.signals, &mut info) {
            match u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) {
                // Ctrl-alt-del; `reboot` of busybox.
                INT | TERM => self.end(Power::Reboot),
                // `halt` and `poweroff` of busybox.
                USR1 => self.end(Power::Halt),
                USR2 | PWR => self.end(Power::Off),
                // SIGCHLD, once for any number of children.
                _ => self.reap(),
            }
        }
    }

    /// Takes leave of every child that has ended, our own or adopted.
    fn reap(&mut self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(exit) = exit_of(status) {
                        each_job!(self, job => job.on_exit(pid, exit));
                    }
                }
                Ok(None) => return,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        if let Some(ending) = &mut self.ending {
            ending.alone = true;
        }
    }

    /// Starts to take the guest down. A second call while processes still end kills them.
    fn end(&mut self, power: Power) {
        let now = sys::now_ms();
        if let Some(ending) = &mut self.ending {
            let last = STEPS.len() - 1;
            if ending.step <= last {
                (ending.step, ending.due) = (last, now);
            }
            return;
        }
        self.link.send(&FromGuest::Stopping(power));
        self.ending = Some(Ending {
            power,
            begun: now,
            step: 0,
            due: now,
            alone: false,
        });
        self.reap();
    }

    fn receive(&mut self, decoder: &mut Decoder) -> Result<(), Errno> {
        let mut buffer = [0; 8192];
        let n = self.link.read(&mut buffer)?;
        let mut bytes = &buffer[..n];
        // Stale bytes may lie before the first frame; after it, bytes that are skipped were lost.
        let mut skipped = decoder.skipped();
        while let Some(frame) = decoder.decode(&mut bytes) {
            let first = !self.talking;
            let job = frame.job();
            let intact = FromHost::parse(frame)
                .ok()
                .is_some_and(|message| self.on_message(job, message));
            self.talking = true;
            if !intact {
                self.give_up("the agent received a message that breaks the protocol");
                return Ok(());
            }
            if first {
                skipped = decoder.skipped();
            }
        }
        if self.talking && decoder.skipped() != skipped {
            self.give_up("bytes from the host were damaged or lost on their way to the agent");
        }
        Ok(())
    }

    /// Acts on one message about the command `job`; `false` if it is out of place.
    fn on_message(&mut self, job: u8, message: FromHost<'_>) -> bool {
        match (message, job) {
            (FromHost::Start { last, bytes }, job) => self.on_start(job, last, bytes),
            (FromHost::Shutdown(power), _) => {
                self.end(power);
                true
            }
            (FromHost::Address { from, to }, _) => {
                self.change_address(from, to);
                true
            }
            (FromHost::Stdin(bytes), 0) if self.done_at.is_some() => {
                self.main.consumed(bytes.len());
                true
            }
            (message, 0) => self.main.on_message(message),
            (message, job) => match self.extra.get_mut(usize::from(job) - 1) {
                // What was on its way when the command ended is nobody's.
                Some(job) => !job.is_running() || job.on_message(message),
                None => false,
            },
        }
    }

    fn change_address(&mut self, from: [u8; 6], to: [u8; 6]) {
        if let Err((what, errno)) = net::change(from, to) {
            let mut text = Text::<96>::new();
            let errno = errno.raw_os_error();
            let _ = write!(
                text,
                "cannot {what} the network interface that gets another address: error {errno}"
            );
            self.link.send(&FromGuest::Log {
                level: Level::Warn,
                text: text.as_bytes(),
            });
        }
    }

    /// Takes a piece of a Start; `false` if it is out of place.
    fn on_start(&mut self, job: u8, last: bool, bytes: &[u8]) -> bool {
        let over = self.done_at.is_some();
        let busy = match job {
            0 => self.main.is_running() || over,
            job => match self.extra.get(usize::from(job) - 1) {
                Some(job) => job.is_running(),
                None => true,
            },
        };
        if busy || self.start_len > 0 && self.start_job != job {
            return false;
        }
        if self.start_len == 0 && job > 0 {
            self.extra[usize::from(job) - 1].clear();
        }
        let end = self.start_len + bytes.len();
        let Some(room) = self.start.get_mut(self.start_len..end) else {
            return false;
        };
        room.copy_from_slice(bytes);
        (self.start_len, self.start_job) = (end, job);
        match job {
            0 => self.main.consumed(bytes.len()),
            job => self.extra[usize::from(job) - 1].consumed(bytes.len()),
        }
        if !last {
            return true;
        }
        self.start_len = 0;
        let Ok(start) = StartView::parse(&self.start[..end]) else {
            return false;
        };
        if job > 0 {
            // Without the main command the guest is about to end, and nobody waits for an answer.
            if !over && self.ending.is_none() {
                let job = &mut self.extra[usize::from(job) - 1];
                job.grant(&start);
                if !job.start(&start, &mut self.link) {
                    job.clear();
                }
            }
            return true;
        }
        self.main.grant(&start);
        if self.ending.is_some() {
            return true;
        }
        if let Some(Trouble { errno, text }) = self.trouble.take() {
            self.finish(&FromGuest::Failed {
                stage: Stage::Root,
                errno: errno.raw_os_error() as u16,
                text: text.as_bytes(),
            });
        } else if !self.main.start(&start, &mut self.link) {
            self.done_at = Some(sys::now_ms());
        }
        true
    }

    /// Tells the host the last thing about the command.
    fn finish(&mut self, message: &FromGuest<'_>) {
        self.link.send(message);
        self.done_at = Some(sys::now_ms());
    }

    /// The host cannot be understood: says so and ends.
    fn give_up(&mut self, text: &str) {
        let failed = FromGuest::Failed {
            stage: Stage::Protocol,
            errno: 0,
            text: text.as_bytes(),
        };
        self.finish(&failed);
        self.end(Power::Off);
    }

    fn pass_output(&mut self, number: usize, index: usize) {
        match number {
            0 => self.main.pass_output(index, &mut self.link),
            number => self.extra[number - 1].pass_output(index, &mut self.link),
        }
    }
}

fn exit_of(status: WaitStatus) -> Option<Exit> {
    let small = |n: i32| u8::try_from(n).ok();
    match status.exit_status() {
        Some(code) => small(code).map(Exit::Code),
        None => status
            .terminating_signal()
            .and_then(small)
            .map(Exit::Signal),
    }
}
