//! `bulle snapshot`: microVMs to directories of two files, and back.

mod create;
mod gc;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use devices::mmds::DEFAULT_LIMIT;
use nix::poll::PollTimeout;
use serde_json::json;

use self::create::{Bar, Interrupts, SIGNAL_BASE};
use super::api::parse_id;
use super::lazy::Lazy;
use super::metadata;
use super::rebind::RebindArgs;
use super::target::{RuntimeArgs, Target};
use crate::control::{
    MemoryBackend, MemoryBackendType, SnapshotCreate, SnapshotLoad, SnapshotType,
};
use crate::remote::Remote;
use crate::session;
use crate::snapshot::gc::{MEMORY, STATE};
use crate::snapshot::{Snapshot, merge};
use crate::telemetry::tell;

/// Arguments of `bulle snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Save a microVM to a directory
    Create(Lazy<create::CreateArgs>),
    /// Make a microVM of a snapshot and run it to its end
    Restore(Lazy<RestoreArgs>),
    /// Note beside its snapshot which memory a microVM touched so far: later restores bring that early
    Record(Lazy<RecordArgs>),
    /// Print what a snapshot is of
    Info(Lazy<InfoArgs>),
    /// Compare all of a snapshot with its checksums
    Verify(Lazy<DirectoryArgs>),
    /// Write a snapshot of changes as one that needs nothing else
    Rebase(Lazy<RebaseArgs>),
    /// Remove what interrupted snapshots left, and snapshots that are not needed
    Gc(Lazy<gc::GcArgs>),
}

/// A snapshot.
#[derive(Debug, Args)]
pub struct DirectoryArgs {
    /// Directory of the snapshot, which has the files `state` and `memory`
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

impl DirectoryArgs {
    /// Opens it.
    pub fn open(&self) -> Result<Snapshot> {
        Ok(Snapshot::open(
            &state(&self.directory),
            &memory(&self.directory),
        )?)
    }
}

#[derive(Debug, Args)]
struct RestoreArgs {
    #[command(flatten)]
    snapshot: DirectoryArgs,
    /// Name by which other commands find it: 1 to 64 letters, digits and '-' [default: eight digits]
    #[arg(long, value_name = "NAME", value_parser = parse_id)]
    name: Option<String>,
    /// Memory is not in the directory: the process that listens at this socket brings it, as
    /// Firecracker's page fault handlers do
    #[arg(long, value_name = "SOCKET")]
    uffd: Option<PathBuf>,
    /// Bring each page of memory from the directory when it is touched, also into reserved huge pages,
    /// which are filled before the guest runs otherwise
    #[arg(long, conflicts_with = "uffd")]
    lazy: bool,
    /// When it ends, note which memory it touched: later restores bring that early
    #[arg(long, conflicts_with = "uffd")]
    record: bool,
    #[command(flatten)]
    rebind: RebindArgs,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Command to run in the guest, and its arguments, if it was saved with `bulle run --save`
    /// [default: a shell]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct RecordArgs {
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct InfoArgs {
    #[command(flatten)]
    snapshot: DirectoryArgs,
    /// For programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct RebaseArgs {
    #[command(flatten)]
    snapshot: DirectoryArgs,
    /// Directory for the whole snapshot [default: that of the changes]
    #[arg(value_name = "TO")]
    to: Option<PathBuf>,
}

/// Runs the subcommand.
pub fn run(args: SnapshotArgs) -> Result<u8> {
    match args.command {
        SnapshotCommand::Create(args) => create::run(&args),
        SnapshotCommand::Restore(args) => restore(*args.0),
        SnapshotCommand::Info(args) => info(&args),
        SnapshotCommand::Verify(args) => {
            args.open()?.verify()?;
            Ok(0)
        }
        SnapshotCommand::Record(args) => record(&args),
        SnapshotCommand::Rebase(args) => rebase(&args),
        SnapshotCommand::Gc(args) => gc::run(&args),
    }
}

/// Where a machine goes that is saved to `directory`, which is made.
pub fn target(directory: &Path) -> Result<SnapshotCreate> {
    make(directory)?;
    Ok(SnapshotCreate {
        snapshot_path: state(directory),
        mem_file_path: memory(directory),
        snapshot_type: SnapshotType::Full,
        background: false,
        cancellable: false,
    })
}

fn state(directory: &Path) -> PathBuf {
    directory.join(STATE)
}

fn memory(directory: &Path) -> PathBuf {
    directory.join(MEMORY)
}

/// A directory that only its owner reads, since guests have secrets.
fn make(directory: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("Cannot make the directory {}", directory.display()))
}

fn record(args: &RecordArgs) -> Result<u8> {
    let mut vm = Remote::connect(&args.target.find()?)?.patience(create::PATIENCE);
    vm.ask("PUT", "/snapshot/working-set", "")?;
    Ok(0)
}

fn restore(args: RestoreArgs) -> Result<u8> {
    let directory = &args.snapshot.directory;
    let mut load = SnapshotLoad::new(state(directory), memory(directory));
    args.rebind.apply(&mut load)?;
    let backend = match (args.uffd, args.lazy) {
        (Some(socket), _) => Some((MemoryBackendType::Uffd, socket)),
        (None, true) => Some((MemoryBackendType::Lazy, memory(directory))),
        (None, false) => None,
    };
    if let Some((backend_type, backend_path)) = backend {
        load.mem_file_path = None;
        load.mem_backend = Some(MemoryBackend {
            backend_type,
            backend_path,
        });
    }
    load.record_working_set = args.record;
    let place = args.runtime.place(args.name);
    let mmds = metadata::read(None, DEFAULT_LIMIT)?;
    let (bar, interrupts) = (Bar::new(), Interrupts::new()?);
    let cancelled = Arc::new(OnceLock::new());
    let by = cancelled.clone();
    let on_read = move |read, total| {
        bar.show(read, total);
        match interrupts.wait([], PollTimeout::ZERO) {
            Ok([]) => true,
            Err(signal) => {
                by.get_or_init(|| signal);
                false
            }
        }
    };
    let ended = session::launch_saved(&load, Box::new(on_read), args.command, &mmds, place);
    match (ended, cancelled.get()) {
        (Err(_), Some(signal)) => {
            tell("loading the snapshot was cancelled");
            Ok(SIGNAL_BASE + *signal as u8)
        }
        (ended, _) => Ok(ended?),
    }
}

fn info(args: &InfoArgs) -> Result<u8> {
    let snapshot = args.snapshot.open()?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&facts(&snapshot))? + "\n",
        false => lines(&snapshot),
    };
    let printed = io::stdout().write_all(text.as_bytes());
    printed.context("Cannot print to stdout")?;
    Ok(0)
}

/// Bytes of data in each file of the chain.
fn sizes(snapshot: &Snapshot) -> impl Iterator<Item = (&Path, u64)> {
    snapshot.layers.iter().map(|layer| {
        let bytes = layer.map.runs.iter().map(|run| run.len).sum();
        (layer.image.path.as_path(), bytes)
    })
}

fn facts(snapshot: &Snapshot) -> serde_json::Value {
    let files = sizes(snapshot).map(|(path, bytes)| json!({ "path": path, "data_bytes": bytes }));
    json!({
        "id": hex(&snapshot.id),
        "config": snapshot.config,
        "origin": snapshot.origin,
        "guest": snapshot.guest,
        "memory_files": files.collect::<Vec<_>>(),
    })
}

fn lines(snapshot: &Snapshot) -> String {
    let machine = &snapshot.config.machine_config;
    let mut text = format!(
        "id       {}\nvCPUs    {}\nmemory   {} MiB\n",
        hex(&snapshot.id),
        machine.vcpu_count,
        machine.mem_size_mib
    );
    if !snapshot.guest.release.is_empty() {
        text += &format!("kernel   {}\n", snapshot.guest.release);
    }
    if let Some(origin) = &snapshot.origin {
        let time = std::time::UNIX_EPOCH + Duration::from_secs(origin.time);
        let time = humantime::format_rfc3339_seconds(time);
        text += &format!(
            "taken    {time} by bulle {} on Linux {}\n",
            origin.bulle, origin.kernel
        );
    }
    for (path, bytes) in sizes(snapshot) {
        text += &format!(
            "file     {} ({} KiB of data)\n",
            path.display(),
            bytes >> 10
        );
    }
    text
}

fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn rebase(args: &RebaseArgs) -> Result<u8> {
    let snapshot = args.snapshot.open()?;
    let to = args.to.as_ref().unwrap_or(&args.snapshot.directory);
    make(to)?;
    merge(&snapshot, &state(to), &memory(to))?;
    Ok(0)
}
