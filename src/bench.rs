//! How long clones take in this process, and what they cost: what `bulle bench clone` and the project's
//! own benchmark measure. Owned by the thread that measures.
//!
//! All ways are taken in turns, so that a noisy machine is noisy for each. A time is split into bulle's
//! part, until the vCPUs are told to run, and the rest, which is KVM's and the guest's.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arch::state::ClockPolicy;
use devices::mmds::Mmds;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::board::plan::{PlanError, open_files, plan};
use crate::board::{SerialEnd, Wiring};
use crate::config::{ConfigError, Spec};
use crate::snapshot::ram::MapError;
use crate::snapshot::{Paging, Snapshot};
use crate::vm::limits::allow_most_open_files;
use crate::vm::reset::{Origin, ResetError};
use crate::vm::{BuildError, Host, PauseError, Shell, Vm};

/// Shells that wait at any time.
const POOL: usize = 8;
/// Rounds that are not counted.
const WARM_UP: usize = 3;
/// How long a guest may take for a sign of life, or to leave the guest.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clones made to tell the rate.
const RATE: usize = 20;

/// Clones cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The snapshot's configuration.
    #[error("The snapshot's machine cannot be made here")]
    Config(#[source] ConfigError),
    /// What devices need.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A clone.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The memory to go back to.
    #[error(transparent)]
    Map(#[from] MapError),
    /// It does not pause.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// It does not go back.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// An event descriptor, or a file of /proc.
    #[error("Cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

/// What is known of the guest in the snapshot.
pub trait Guest {
    /// Where the console of the next clone goes.
    fn console(&mut self) -> Box<dyn Write + Send>;
    /// Asks a machine that is not started for a sign of life.
    fn ask(&mut self, vm: &Vm);
    /// Waits for the sign, and says when it came; `None`: it does not. Its vCPUs were told to run at
    /// `start`.
    fn answer(&mut self, vm: &Vm, start: Instant) -> Option<Instant>;
    /// Has a machine that runs write to memory.
    fn dirty(&mut self, vm: &Vm);
}

/// A guest of which nothing is known: its sign of life is its first exit to bulle.
#[derive(Debug)]
pub struct AnyGuest;

impl Guest for AnyGuest {
    fn console(&mut self) -> Box<dyn Write + Send> {
        Box::new(io::sink())
    }

    fn ask(&mut self, _: &Vm) {}

    fn answer(&mut self, vm: &Vm, start: Instant) -> Option<Instant> {
        loop {
            let answer = first_exit(vm, start);
            if answer.is_some() || start.elapsed() > Duration::from_millis(20) {
                return answer;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn dirty(&mut self, _: &Vm) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// When the first exit of any vCPU behind `start` was answered, if there was one.
fn first_exit(vm: &Vm, start: Instant) -> Option<Instant> {
    let exits = vm.vcpus().iter().map(|vcpu| vcpu.counts().first());
    exits.flatten().filter(|when| *when > start).min()
}

/// Times of one way, each until the vCPUs are told to run, until the guest's first exit and until its sign of
/// life.
#[derive(Debug, Default)]
pub struct Samples {
    /// bulle's part.
    ours: Vec<Duration>,
    /// Until the guest has run.
    entered: Vec<Duration>,
    /// All of it, where the guest gave a sign.
    all: Vec<Duration>,
}

impl Samples {
    fn line(&mut self, what: &str) -> String {
        line(what, [&mut self.ours, &mut self.entered], &mut self.all)
    }
}

/// One line of the report: times until the vCPUs are told to run and until the guest's first exit, and all.
pub fn line(what: &str, parts: [&mut [Duration]; 2], all: &mut [Duration]) -> String {
    let micros = |time: Option<Duration>| match time {
        Some(time) => format!("{:>10.1}", time.as_secs_f64() * 1e6),
        None => format!("{:>10}", "-"),
    };
    let parts = parts.map(|times| at(times, 50));
    let all = [50, 99, 100].map(|p| at(all, p));
    let figures: String = parts.into_iter().chain(all).map(micros).collect();
    format!("{what:<40}{figures}")
}

/// The time that so many percent of the samples are not above; `None` where there is none.
pub fn at(samples: &mut [Duration], percent: usize) -> Option<Duration> {
    samples.sort_unstable();
    let index = (samples.len() * percent).div_ceil(100).max(1) - 1;
    samples.get(index).copied()
}

/// How a clone is made.
enum Way<'a> {
    /// Of nothing.
    New(&'a Snapshot),
    /// Of a machine that waits.
    Pooled(Box<Shell>),
}

/// Makes clones of one snapshot.
pub struct Cloner {
    spec: Spec,
    host: Host,
    snapshot: Snapshot,
    pool: VecDeque<Shell>,
    filling: Vec<Duration>,
    closing: Vec<Duration>,
}

impl Cloner {
    /// For clones of `snapshot`, as many at once as the limit on open files allows.
    ///
    /// # Errors
    /// What its configuration or the host does not allow.
    pub fn new(snapshot: Snapshot) -> Result<Self, BenchError> {
        let spec = snapshot.config.clone().validate();
        let spec = spec.map_err(BenchError::Config)?;
        let files = open_files(&plan(&spec, &Arc::new(Mmds::new(0)))?.0);
        allow_most_open_files();
        let host = Host::open(&spec, files)?;
        Ok(Self {
            spec,
            host,
            snapshot,
            pool: VecDeque::new(),
            filling: Vec::new(),
            closing: Vec::new(),
        })
    }

    fn wiring(&self, console: Box<dyn Write + Send>) -> Result<Wiring, BenchError> {
        let end = |out| {
            let drained = EventFd::new(EFD_CLOEXEC);
            let drained = drained.map_err(|e| BenchError::Host("create an event descriptor", e))?;
            Ok::<_, BenchError>(SerialEnd { out, drained })
        };
        Ok(Wiring {
            console: end(console)?,
            agent: end(Box::new(io::sink()))?,
            watchdog: self.spec.config().watchdog,
            boot_timer: None,
            io: Vec::new(),
            devices: plan(&self.spec, &Arc::new(Mmds::new(0)))?.0,
        })
    }

    fn shell(&mut self) -> Result<Shell, BenchError> {
        let begin = Instant::now();
        let shell = Shell::new(self.host.clone(), &self.snapshot)?;
        self.filling.push(begin.elapsed());
        Ok(shell)
    }

    fn fill(&mut self) -> Result<(), BenchError> {
        while self.pool.len() < POOL {
            let shell = self.shell()?;
            self.pool.push_back(shell);
        }
        Ok(())
    }

    /// A clone that runs.
    fn clone(
        &self,
        way: Way<'_>,
        guest: &mut dyn Guest,
        samples: &mut Samples,
    ) -> Result<Vm, BenchError> {
        let console = guest.console();
        let begin = Instant::now();
        let wiring = self.wiring(console)?;
        let policy = ClockPolicy::Advance;
        let vm = match way {
            Way::New(snapshot) => Vm::restore(self.host.clone(), snapshot, policy, wiring)?.0,
            Way::Pooled(shell) => shell.adopt(&self.snapshot, policy, wiring)?,
        };
        start(&vm, guest, begin, samples);
        Ok(vm)
    }

    fn close(&mut self, vm: Vm) {
        let begin = Instant::now();
        drop(vm);
        self.closing.push(begin.elapsed());
    }

    /// How long a new clone takes to its sign of life; `None` where the guest gives none.
    ///
    /// # Errors
    /// What a clone meets.
    pub fn sample(&mut self, guest: &mut dyn Guest) -> Result<Option<Duration>, BenchError> {
        let mut samples = Samples::default();
        let vm = self.clone(Way::New(&self.snapshot), guest, &mut samples)?;
        self.close(vm);
        Ok(samples.all.pop())
    }

    /// Takes `count` samples of each way, and writes a line for each.
    ///
    /// # Errors
    /// What a clone meets.
    pub fn times(
        &mut self,
        guest: &mut dyn Guest,
        count: usize,
        out: &mut dyn FnMut(String),
    ) -> Result<(), BenchError> {
        let mut ways = [(); 5].map(|()| Samples::default());
        let [new, brought, pooled, paused, pausing] = &mut ways;
        let lazy = lazily(&self.snapshot);
        let origin = Origin::new(&self.snapshot)?;
        let shell = self.shell()?;
        let looped = self.clone(Way::Pooled(Box::new(shell)), guest, &mut Samples::default())?;
        // It is not to take the others' processor.
        looped.pause(PATIENCE)?;
        let (mut loads, mut resets) = (Ok(()), Ok(()));
        for round in 0..count + WARM_UP {
            if round == WARM_UP {
                for samples in [&mut *new, brought, pooled, paused, pausing] {
                    *samples = Samples::default();
                }
                (self.filling, self.closing) = (Vec::new(), Vec::new());
            }
            self.fill()?;
            let vm = self.clone(Way::New(&self.snapshot), guest, new)?;
            self.close(vm);
            if loads.is_ok() {
                loads = self.clone(Way::New(&lazy), guest, brought).map(drop);
            }
            if let Some(shell) = self.pool.pop_front() {
                let vm = self.clone(Way::Pooled(Box::new(shell)), guest, pooled)?;
                self.close(vm);
            }
            if resets.is_ok() {
                resets = reset(&looped, &origin, guest, (paused, pausing));
            }
        }
        out(new.line("new"));
        match loads {
            Ok(()) => out(brought.line("new, memory brought page by page")),
            Err(error) => out(format!("memory brought page by page: {error}")),
        }
        out(pooled.line("pooled"));
        match resets {
            Ok(()) => {
                out(paused.line("reset in place"));
                out(pausing.line("  pausing it before"));
            }
            Err(error) => out(format!("reset in place: {error}")),
        }
        for (what, times) in [
            ("  making one for the pool", &mut self.filling),
            ("  closing a clone", &mut self.closing),
        ] {
            out(line(what, [times, &mut []], &mut []));
        }
        Ok(())
    }

    /// Makes `alive` clones that live at once, or as many as files may be open, paused once they gave their sign, and
    /// writes what each costs, and how many are made a second beside 100 and at the end.
    ///
    /// # Errors
    /// What a clone meets.
    pub fn cost(
        &mut self,
        guest: &mut dyn Guest,
        mut alive: usize,
        out: &mut dyn FnMut(String),
    ) -> Result<(), BenchError> {
        self.pool.clear();
        let (limit, files) = (allow_most_open_files(), open_now()?);
        let ignored = &mut Samples::default();
        let before = (available()?, own()?);
        let mut clones = Vec::with_capacity(alive);
        let mut first = None;
        while clones.len() < alive {
            let more = RATE.min(alive - clones.len());
            let mut making = Duration::ZERO;
            for _ in 0..more {
                let begin = Instant::now();
                let vm = self.clone(Way::New(&self.snapshot), guest, ignored)?;
                making += begin.elapsed();
                // One that waits costs memory, not the time of the others.
                vm.pause(PATIENCE)?;
                clones.push(vm);
            }
            let rate = more as f64 / making.as_secs_f64();
            let count = clones.len();
            let each = (open_now()? - files).div_ceil(count as u64);
            let fits = (limit.saturating_sub(files) / each.max(1)) as usize;
            if fits < alive {
                out(format!(
                    "not {alive} at once but {fits}: each has {each} open files, of at most {limit} (ulimit -Hn)"
                ));
                alive = fits;
            }
            if count == 100 || count == alive {
                let each = |now: u64, then: u64| now.saturating_sub(then) / count as u64;
                let (memory, pss) = (each(before.0, available()?), each(own()?, before.1));
                let first = *first.get_or_insert(rate);
                out(format!(
                    "{count} alive: {memory} KiB each (MemAvailable), {pss} KiB each (PSS); {rate:.0} made \
                     a second, {:.0} % of the first figure",
                    100.0 * rate / first
                ));
            }
        }
        Ok(())
    }
}

/// The same snapshot, whose memory is brought page by page.
fn lazily(snapshot: &Snapshot) -> Snapshot {
    Snapshot {
        id: snapshot.id,
        path: snapshot.path.clone(),
        config: snapshot.config.clone(),
        machine: snapshot.machine.clone(),
        guest: snapshot.guest.clone(),
        layers: snapshot.layers.clone(),
        paging: Paging::Lazy(None),
        origin: snapshot.origin.clone(),
        reading: None,
    }
}

/// The heading of the lines of [`Cloner::times`].
pub fn heading(count: usize) -> String {
    format!(
        "{:<40}{:>10}{:>10}{:>10}{:>10}{:>10}",
        format!("µs, {count} samples"),
        "ours p50",
        "exit p50",
        "p50",
        "p99",
        "max"
    )
}

fn start(vm: &Vm, guest: &mut dyn Guest, begin: Instant, samples: &mut Samples) {
    guest.ask(vm);
    // A vCPU may take this thread's processor before it returns.
    let start = Instant::now();
    vm.start();
    let answer = guest.answer(vm, start);
    samples.ours.push(start - begin);
    let since = |when: Option<Instant>| when.map(|when| when - begin);
    samples.entered.extend(since(first_exit(vm, start)));
    samples.all.extend(since(answer));
}

fn reset(
    vm: &Vm,
    origin: &Origin,
    guest: &mut dyn Guest,
    (paused, pausing): (&mut Samples, &mut Samples),
) -> Result<(), BenchError> {
    vm.start();
    guest.dirty(vm);
    let begin = Instant::now();
    vm.pause(PATIENCE)?;
    pausing.ours.push(begin.elapsed());
    let begin = Instant::now();
    vm.reset(origin, ClockPolicy::Advance, PATIENCE)?;
    start(vm, guest, begin, paused);
    vm.pause(PATIENCE)?;
    Ok(())
}

/// A figure in KiB of a file of /proc.
fn figure(file: &str, key: &str) -> Result<u64, BenchError> {
    let text = std::fs::read_to_string(file);
    let text = text.map_err(|e| BenchError::Host("read a file of /proc", e))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.ok_or_else(|| BenchError::Host("find a figure in /proc", io::ErrorKind::NotFound.into()))
}

fn available() -> Result<u64, BenchError> {
    figure("/proc/meminfo", "MemAvailable:")
}

/// Open files of this process.
fn open_now() -> Result<u64, BenchError> {
    let list = std::fs::read_dir("/proc/self/fd");
    let list = list.map_err(|e| BenchError::Host("list open files", e))?;
    Ok(list.count() as u64)
}

fn own() -> Result<u64, BenchError> {
    figure("/proc/self/smaps_rollup", "Pss:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let mut times: Vec<_> = (1..=200).rev().map(Duration::from_micros).collect();
        let at = |percent, times: &mut [Duration]| at(times, percent).map(|t| t.as_micros());
        assert_eq!(at(50, &mut times), Some(100));
        assert_eq!(at(99, &mut times), Some(198));
        assert_eq!(at(100, &mut times), Some(200));
        assert_eq!(at(99, &mut times[..1]), Some(1));
        assert_eq!(at(50, &mut []), None);
    }
}
