//! `bulle inspect`: all that is known of a microVM, as JSON.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::target::Target;
use crate::remote::Remote;

/// Arguments of `bulle inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    target: Target,
}

/// Runs the subcommand.
pub fn run(args: &InspectArgs) -> Result<u8> {
    let entry = args.target.find()?;
    let mut vm = Remote::connect(&entry)?;
    let all = json!({
        "name": entry.name,
        "socket": entry.socket(),
        "process": entry.about,
        "instance": vm.get("/")?,
        "config": vm.get("/vm/config")?,
        "statistics": vm.get("/vm/statistics")?,
    });
    let text = serde_json::to_string_pretty(&all)?;
    writeln!(io::stdout(), "{text}").context("Cannot print to stdout")?;
    Ok(0)
}
