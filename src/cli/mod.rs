//! The command line: one file per subcommand, each from arguments to an exit code.

mod api;
mod attach;
mod bench;
mod caller;
mod clone;
mod completion;
mod console;
mod devices;
mod exec;
mod firecracker;
mod fork;
mod inspect;
mod jailer;
mod kernel;
mod kill;
mod lazy;
mod logs;
mod man;
mod memory;
mod metadata;
mod pause;
mod pool;
mod ps;
mod rebind;
mod run;
mod share;
mod shell;
mod snapshot;
mod stats;
mod stop;
mod table;
mod target;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use lazy::Lazy;
pub use memory::Allocator;

use crate::session::{self, CODE_FAILURE};
use crate::telemetry::{self, tell};

/// A virtual machine monitor on KVM: microVMs from one command.
#[derive(Debug, Parser)]
#[command(name = "bulle", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a kernel and run a command in it
    Run(Lazy<run::RunArgs>),
    /// Serve a REST API that configures, starts and commands one microVM
    Api(Lazy<api::ApiArgs>),
    /// List the microVMs that run
    Ps(Lazy<ps::PsArgs>),
    /// Print all that is known of a microVM, as JSON
    Inspect(Lazy<inspect::InspectArgs>),
    /// Stop the vCPUs of microVMs
    Pause(Lazy<pause::PauseArgs>),
    /// Let the vCPUs of paused microVMs go on
    Resume(Lazy<pause::PauseArgs>),
    /// Add disks, network interfaces and persistent memory to a microVM that runs with --pci
    Attach(Lazy<attach::AttachArgs>),
    /// Take devices away from a microVM that runs, when its guest has let go of them
    Detach(Lazy<attach::DetachArgs>),
    /// Save microVMs to directories, and make microVMs of what was saved
    Snapshot(snapshot::SnapshotArgs),
    /// Make microVMs of a snapshot, each in a process of its own, and print their names
    Clone(Lazy<clone::CloneArgs>),
    /// Make copies of a microVM that goes on, each in a process of its own, and print their names
    Fork(Lazy<fork::ForkArgs>),
    /// Measure how long things take on this machine
    Bench(bench::BenchArgs),
    /// Wait to become a clone
    #[command(hide = true)]
    Shell(Lazy<shell::ShellArgs>),
    /// Have guests switch themselves off, and kill those that do not
    Stop(Lazy<stop::StopArgs>),
    /// Print what a guest wrote to its console
    Logs(Lazy<logs::LogsArgs>),
    /// Attach to a guest's console
    Console(Lazy<console::ConsoleArgs>),
    /// Run a command in a guest that runs, beside its first one
    Exec(Lazy<exec::ExecArgs>),
    /// Print what microVMs take and do
    Stats(Lazy<stats::StatsArgs>),
    /// End microVMs at once, or send their processes another signal
    Kill(Lazy<kill::KillArgs>),
    /// Print a script that completes bulle's arguments in a shell
    Completion(Lazy<completion::CompletionArgs>),
    /// Write manual pages
    #[command(hide = true)]
    Man(Lazy<man::ManArgs>),
}

/// Parses the process's arguments, runs the command and says with which code to exit. Errors are
/// printed here, once, with their causes.
pub fn main() -> ExitCode {
    session::end_on_panic();
    let arguments: Vec<_> = std::env::args_os().collect();
    if is_called(&arguments, firecracker::NAME) {
        return firecracker::main(arguments);
    }
    if is_called(&arguments, jailer::NAME) {
        return jailer::main(arguments);
    }
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = cli.command.run();
    ExitCode::from(result.unwrap_or_else(|error| {
        tell(chain(&error));
        CODE_FAILURE
    }))
}

impl Command {
    fn run(self) -> anyhow::Result<u8> {
        match &self {
            Self::Run(_) | Self::Api(_) => {}
            _ => telemetry::init(log::LevelFilter::Warn),
        }
        match self {
            Self::Run(args) => run::run(*args.0),
            Self::Api(args) => api::run(*args.0),
            Self::Ps(args) => ps::run(&args),
            Self::Inspect(args) => inspect::run(&args),
            Self::Pause(args) => pause::pause(&args),
            Self::Resume(args) => pause::resume(&args),
            Self::Attach(args) => attach::attach(&args),
            Self::Detach(args) => attach::detach(&args),
            Self::Snapshot(args) => snapshot::run(args),
            Self::Clone(args) => clone::run(&args),
            Self::Bench(args) => bench::run(&args),
            Self::Fork(args) => fork::run(&args),
            Self::Shell(args) => shell::run(&args),
            Self::Stop(args) => stop::run(&args),
            Self::Kill(args) => kill::run(&args),
            Self::Logs(args) => logs::run(&args),
            Self::Console(args) => console::run(&args),
            Self::Exec(args) => exec::run(&args),
            Self::Stats(args) => stats::run(&args),
            Self::Completion(args) => completion::run(&args),
            Self::Man(args) => man::run(&args),
        }
    }
}

/// Whether the process was started under that name.
fn is_called(arguments: &[OsString], name: &str) -> bool {
    let own = arguments.first().and_then(|own| Path::new(own).file_name());
    own.is_some_and(|own| own == name)
}

/// Help as asked for, or what is wrong with the arguments.
fn usage(error: &clap::Error) -> ExitCode {
    let text = error.to_string();
    if let Some(text) = text.strip_prefix("error: ") {
        tell(text.trim_end());
        return ExitCode::from(CODE_FAILURE);
    }
    let printed = error.print();
    let failed = error.use_stderr() || printed.is_err();
    ExitCode::from(if failed { CODE_FAILURE } else { 0 })
}

/// An error and its causes. Some libraries repeat a cause in their own text: it is left out then.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow!("no room")
            .context("library: no room")
            .context("bulle failed");
        assert_eq!(chain(&error), "bulle failed: library: no room");
    }
}
