//! `bulle kill`: a signal to the processes of microVMs, which ends them at once if nothing else is said.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal;
use rustix::process::Signal;

use super::target::Targets;
use crate::registry::{Entry, Process};
use crate::remote::RemoteError;

/// How long the kernel may take to end a process that is killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Arguments of `bulle kill`.
#[derive(Debug, Args)]
pub struct KillArgs {
    #[command(flatten)]
    targets: Targets,
    /// Signal for bulle's process: a name such as TERM, or a number
    #[arg(long, short, value_name = "SIGNAL", default_value = "KILL", value_parser = parse_signal)]
    signal: Signal,
}

fn parse_signal(text: &str) -> Result<Signal, String> {
    let known = match text.parse::<i32>() {
        Ok(number) => signal::Signal::try_from(number).ok(),
        Err(_) => {
            let name = text.to_ascii_uppercase();
            format!("SIG{}", name.trim_start_matches("SIG"))
                .parse()
                .ok()
        }
    };
    let known = known.and_then(|known: signal::Signal| Signal::from_named_raw(known as i32));
    known.ok_or_else(|| "there is no such signal".to_owned())
}

/// Runs the subcommand.
pub fn run(args: &KillArgs) -> Result<u8> {
    args.targets.each(|entry| {
        let process = open(entry)?;
        if args.signal == Signal::KILL {
            return kill(entry, &process);
        }
        process.signal(args.signal).with_context(|| not_sent(entry))
    })
}

/// The process of a microVM that is there.
pub fn open(entry: &Entry) -> Result<Process> {
    let name = entry.name.clone();
    let process = Process::open(entry).with_context(|| not_sent(entry))?;
    Ok(process.ok_or(RemoteError::Gone { name })?)
}

/// Ends it, waits for that and removes what is left of it.
pub fn kill(entry: &Entry, process: &Process) -> Result<()> {
    process
        .signal(Signal::KILL)
        .with_context(|| not_sent(entry))?;
    if !process.wait(PATIENCE)? {
        bail!(
            "The process of the microVM '{}' does not end although it was killed: it waits in the kernel",
            entry.name
        );
    }
    entry.clean_up();
    Ok(())
}

fn not_sent(entry: &Entry) -> String {
    format!("Cannot send a signal to the microVM '{}'", entry.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "term", "SIGTERM", "15"] {
            assert_eq!(parse_signal(text).unwrap(), Signal::TERM, "{text}");
        }
        for text in ["", "SIG", "0", "-1", "99", "NOTHING"] {
            parse_signal(text).unwrap_err();
        }
    }
}
