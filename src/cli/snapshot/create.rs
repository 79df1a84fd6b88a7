//! `bulle snapshot create`: one is taken of a microVM that another process runs, with its progress on a
//! terminal; Ctrl-C ends it and leaves all as it was.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::target::Target;
use super::{make, memory, state};
use crate::control::{SnapshotState, SnapshotStatistics, VmStatistics};
use crate::registry::Entry;
use crate::remote::{Remote, RemoteStream};
use crate::telemetry::tell;

/// How long the files may take to be written.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Time between two looks at a snapshot that is being written.
const LOOK_EVERY: u16 = 20;
/// Added to the number of a signal, as shells do.
pub const SIGNAL_BASE: u8 = 128;

#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    target: Target,
    /// Directory for it, made where it is not there; a snapshot in it is replaced
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Only what changed since the snapshot that it was made of, or that was taken last
    #[arg(long)]
    diff: bool,
    /// The microVM goes on while it is written
    #[arg(long, conflicts_with_all = ["pause", "kill"])]
    background: bool,
    /// Leave the microVM paused
    #[arg(long)]
    pause: bool,
    /// End the microVM when it is saved
    #[arg(long, conflicts_with = "pause")]
    kill: bool,
}

/// How far a snapshot is, where somebody looks.
pub struct Bar(ProgressBar);

impl Bar {
    /// Nothing yet.
    pub fn new() -> Self {
        if !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(0);
        let template = "bulle: {bar:32} {bytes} of {total_bytes} ({bytes_per_sec})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// So many bytes of all.
    pub fn show(&self, written: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(written);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The signals that cancel, which end nothing else from here on.
pub struct Interrupts(SignalFd);

impl Interrupts {
    /// Blocks them.
    pub fn new() -> nix::Result<Self> {
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        set.thread_block()?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map(Self)
    }

    /// Waits for one of them or for another descriptor, for so long; which of the others are readable, or the
    /// signal.
    pub fn wait<const N: usize>(
        &self,
        others: [BorrowedFd<'_>; N],
        patience: PollTimeout,
    ) -> Result<[bool; N], Signal> {
        let mut fds = vec![PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        fds.extend(others.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let _ = poll(&mut fds, patience);
        let ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if let Ok(Some(info)) = self.0.read_signal() {
            return Err(Signal::try_from(info.ssi_signo as i32).unwrap_or(Signal::SIGINT));
        }
        let mut of = ready.into_iter().skip(1);
        Ok(std::array::from_fn(|_| of.next().unwrap_or(false)))
    }
}

/// Runs the subcommand.
pub fn run(args: &CreateArgs) -> Result<u8> {
    let entry = args.target.find()?;
    make(&args.directory)?;
    let directory = std::path::absolute(&args.directory)?;
    let state = state(&directory);
    let body = json!({
        "snapshot_path": state,
        "mem_file_path": memory(&directory),
        "snapshot_type": if args.diff { "Diff" } else { "Full" },
        "background": args.background,
        "cancellable": true,
    });
    let interrupts = Interrupts::new()?;
    let cancelled = match args.background {
        true => {
            let mut vm = Remote::connect(&entry)?.patience(PATIENCE);
            vm.ask("PUT", "/snapshot/create", &body.to_string())?;
            written(vm, &state, &interrupts)?
        }
        false => create(args, &entry, &body, &interrupts)?,
    };
    Ok(match cancelled {
        None => 0,
        Some(signal) => {
            tell("the snapshot was cancelled");
            SIGNAL_BASE + signal as u8
        }
    })
}

/// Has the microVM stand still for it; says which signal cancelled it.
fn create(
    args: &CreateArgs,
    entry: &Entry,
    body: &Value,
    interrupts: &Interrupts,
) -> Result<Option<Signal>> {
    let connect = || Remote::connect(entry).map(|vm| vm.patience(PATIENCE));
    let mut vm = connect()?;
    let was_paused = vm.state()? == "Paused";
    let set = |vm: &mut Remote, state: &str| {
        vm.ask("PATCH", "/vm", &json!({ "state": state }).to_string())
    };
    set(&mut vm, "Paused")?;
    let created = write(entry, vm, body, interrupts);
    let saved = matches!(created, Ok(None));
    if args.kill && saved {
        super::super::kill::kill(entry, &super::super::kill::open(entry)?)?;
    } else if !(was_paused || args.pause && saved) {
        set(&mut connect()?, "Resumed")?;
    }
    created
}

/// Asks for the snapshot, and waits until that is answered; says which signal cancelled it.
fn write(
    entry: &Entry,
    mut vm: Remote,
    body: &Value,
    interrupts: &Interrupts,
) -> Result<Option<Signal>> {
    let mut events = Remote::connect(entry)?.stream("GET", "/events", "")?;
    let bar = Bar::new();
    let mut heard = Vec::new();
    vm.send("PUT", "/snapshot/create", &body.to_string())?;
    loop {
        let fds = [vm.as_fd(), events.as_fd()];
        match interrupts.wait(fds, PollTimeout::NONE) {
            // Its end ends the snapshot.
            Err(signal) => return Ok(Some(signal)),
            Ok([true, _]) => return Ok(vm.receive().map(|_| None)?),
            Ok([_, true]) if !hear(&mut events, &mut heard, &bar)? => {
                // Only the answer is left to come.
                return Ok(vm.receive().map(|_| None)?);
            }
            Ok(_) => {}
        }
    }
}

/// What is said of how far it is.
#[derive(Deserialize)]
struct Progress {
    written_bytes: u64,
    total_bytes: u64,
}

/// Takes in events; false at their end.
fn hear(events: &mut RemoteStream, heard: &mut Vec<u8>, bar: &Bar) -> Result<bool> {
    let Some(more) = events.read()? else {
        return Ok(false);
    };
    heard.extend(more);
    while let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = heard.drain(..=end).collect();
        let data = line.strip_prefix(b"data: ");
        // Other events have other fields.
        if let Some(Ok(progress)) = data.map(serde_json::from_slice::<Progress>) {
            bar.show(progress.written_bytes, progress.total_bytes);
        }
    }
    Ok(true)
}

/// Waits for the end of the snapshot that is being written in the background to `path`; says which signal
/// cancelled it.
fn written(mut vm: Remote, path: &Path, interrupts: &Interrupts) -> Result<Option<Signal>> {
    let bar = Bar::new();
    loop {
        let statistics = vm.ask("GET", "/vm/statistics", "")?;
        let statistics: VmStatistics = vm.parse(&statistics)?;
        let Some(snapshot) = statistics.snapshot.filter(|snapshot| snapshot.path == path) else {
            bail!("the microVM began another snapshot: of this one nothing is known");
        };
        match snapshot.state {
            SnapshotState::Writing => bar.show(snapshot.written_bytes, snapshot.total_bytes),
            SnapshotState::Failed => bail!(
                "the snapshot was not saved: {}",
                snapshot.error.unwrap_or_default()
            ),
            SnapshotState::Saved => {
                tell_of(&snapshot);
                return Ok(None);
            }
        }
        if let Err(signal) = interrupts.wait([], PollTimeout::from(LOOK_EVERY)) {
            match vm.ask("DELETE", "/snapshot/create", "") {
                // Ended meanwhile: how is said by the next look.
                Err(error) if error.is_refused("no-snapshot") => {}
                answer => return Ok(answer.map(|_| Some(signal))?),
            }
        }
    }
}

fn tell_of(snapshot: &SnapshotStatistics) {
    if let Some(why) = &snapshot.waited {
        tell(format_args!(
            "the microVM stood still until its snapshot was written: {why}"
        ));
    }
}
