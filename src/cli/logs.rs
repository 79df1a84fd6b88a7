//! `bulle logs`: what a guest wrote to its console.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Args;

use super::target::Target;
use crate::remote::Remote;

const AFTER_HELP: &str = "\
The last 64 KiB are kept. It is what the guest wrote: escape sequences reach the terminal.";

/// Arguments of `bulle logs`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct LogsArgs {
    #[command(flatten)]
    target: Target,
    /// Go on with what the guest writes, until it ends
    #[arg(long, short)]
    follow: bool,
}

/// Runs the subcommand.
pub fn run(args: &LogsArgs) -> Result<u8> {
    let entry = args.target.find()?;
    let mut vm = Remote::connect(&entry)?;
    let mut out = io::stdout().lock();
    let failed = "Cannot print to stdout";
    if !args.follow {
        let log = vm.ask("GET", "/console/log", "")?;
        out.write_all(&log).context(failed)?;
        return Ok(0);
    }
    let mut stream = vm.stream("GET", "/console", "")?;
    while let Some(bytes) = stream.read()? {
        out.write_all(&bytes)
            .and_then(|()| out.flush())
            .context(failed)?;
    }
    Ok(0)
}
