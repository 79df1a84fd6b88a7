//! `bulle bench`: how long things take on this machine.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::lazy::Lazy;
use super::snapshot::DirectoryArgs;
use crate::bench::{AnyGuest, Cloner, heading};

/// Arguments of `bulle bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Make clones of a snapshot in this process, new, pooled and reset in place, and print their times
    #[command(after_help = "\
        Times are in microseconds: bulle's own part until the vCPUs are told to run, and all of it to the first \
        exit of the guest to bulle, where one comes soon.")]
    Clone(Lazy<CloneArgs>),
}

#[derive(Debug, Args)]
struct CloneArgs {
    #[command(flatten)]
    snapshot: DirectoryArgs,
    /// Samples of each way
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Clones that live at once, for what each costs; 0: none
    #[arg(long, value_name = "N", default_value_t = 100)]
    alive: u16,
}

/// Runs the subcommand.
pub fn run(args: &BenchArgs) -> Result<u8> {
    let BenchCommand::Clone(args) = &args.command;
    let (count, alive) = (args.count as usize, usize::from(args.alive));
    let mut cloner = Cloner::new(args.snapshot.open()?)?;
    let mut printed = Ok(());
    let mut print = |line: String| {
        if printed.is_ok() {
            printed = writeln!(io::stdout(), "{line}");
        }
    };
    print(heading(count));
    cloner.times(&mut AnyGuest, count, &mut print)?;
    cloner.cost(&mut AnyGuest, alive, &mut print)?;
    printed.context("Cannot print to stdout")?;
    Ok(0)
}
