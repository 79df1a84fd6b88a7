//! `bulle stop`: guests switch themselves off; one that does not is killed.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use rustix::process::Signal;

use super::kill::{kill, open};
use super::target::Targets;
use crate::registry::Entry;
use crate::remote::{Remote, RemoteError};
use crate::telemetry::tell;

const AFTER_HELP: &str = "\
The guest is asked through bulle's agent, or by its power button where it has none or no command runs; after half \
of the time it gets Ctrl-Alt-Del. A microVM that is paused goes on for it.";

/// Arguments of `bulle stop`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct StopArgs {
    #[command(flatten)]
    targets: Targets,
    /// How long a guest may take before it is killed, such as 30s or 2m
    #[arg(long, short, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    timeout: Duration,
}

/// A time as words; a plain number is seconds.
fn parse_time(text: &str) -> Result<Duration, humantime::DurationError> {
    match text.parse::<u32>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds.into())),
        Err(_) => humantime::parse_duration(text),
    }
}

/// Runs the subcommand.
pub fn run(args: &StopArgs) -> Result<u8> {
    args.targets.each(|entry| stop(entry, args.timeout))
}

fn stop(entry: &Entry, timeout: Duration) -> Result<()> {
    let process = open(entry)?;
    match ask(entry) {
        Ok(true) => {}
        // There is no guest yet: this is the end of the process.
        Ok(false) => process.signal(Signal::TERM)?,
        Err(error) if error.is_gone() => {}
        Err(error @ RemoteError::Silent { .. }) => tell(error),
        Err(error) => return Err(error.into()),
    }
    if process.wait(timeout / 2)? {
        return Ok(());
    }
    let pressed = Remote::connect(entry).and_then(|mut vm| vm.action("SendCtrlAltDel"));
    if let Err(error) = pressed {
        log::debug!("{error}");
    }
    if process.wait(timeout - timeout / 2)? {
        return Ok(());
    }
    kill(entry, &process)?;
    tell(format_args!(
        "the microVM '{}' did not stop within {} and was killed",
        entry.name,
        humantime::format_duration(timeout)
    ));
    Ok(())
}

/// Asks the guest to switch itself off. `false`: there is none.
fn ask(entry: &Entry) -> Result<bool, RemoteError> {
    let mut vm = Remote::connect(entry)?;
    match vm.state()?.as_str() {
        "Not started" => return Ok(false),
        "Paused" => drop(vm.ask("PATCH", "/vm", r#"{"state":"Resumed"}"#)?),
        _ => {}
    }
    vm.action("Shutdown")?;
    Ok(true)
}
