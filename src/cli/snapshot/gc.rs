//! `bulle snapshot gc`: what may go of a directory of snapshots goes.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::snapshot::gc::{Why, garbage};

#[derive(Debug, Args)]
pub struct GcArgs {
    /// Directory of a snapshot, or with directories of snapshots
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Keep this snapshot of DIR and what it builds on, and remove all others there (repeatable)
    /// [default: all are kept]
    #[arg(long, value_name = "NAME")]
    keep: Vec<PathBuf>,
    /// Print what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &GcArgs) -> Result<u8> {
    let keep = (!args.keep.is_empty()).then_some(args.keep.as_slice());
    let mut out = io::stdout().lock();
    let mut bytes = 0;
    for garbage in garbage(&args.directory, keep)? {
        if !args.dry_run {
            let removed = garbage.remove();
            let removed =
                removed.with_context(|| format!("Cannot remove {}", garbage.path.display()))?;
            if !removed {
                continue;
            }
            if let Some(place) = garbage.path.parent().filter(|p| *p != args.directory) {
                // Unless there is something else in it.
                let _ = fs::remove_dir(place);
            }
        }
        bytes += garbage.bytes;
        let why = match garbage.why {
            Why::Unfinished => "not finished",
            Why::Replaced => "replaced",
            Why::Unneeded => "not needed",
        };
        let (path, kib) = (garbage.path.display(), garbage.bytes >> 10);
        writeln!(out, "{path}  {kib} KiB  {why}").context("Cannot print to stdout")?;
    }
    let verb = if args.dry_run { "could be" } else { "is" };
    writeln!(out, "{} KiB {verb} free", bytes >> 10).context("Cannot print to stdout")?;
    Ok(0)
}
