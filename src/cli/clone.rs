//! `bulle clone`: many microVMs of one snapshot; and what `bulle fork` has in common with it.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::api::parse_id;
use super::chain;
use super::rebind::RebindArgs;
use super::snapshot::DirectoryArgs;
use super::target::RuntimeArgs;
use crate::config::Config;
use crate::control::SnapshotLoad;
use crate::pool::{Order, PoolError, Stdio, Waiting};
use crate::registry;
use crate::session::{CODE_FAILURE, overrides, own_output};
use crate::snapshot::{Template, exclusive};
use crate::telemetry::tell;

/// What the help of `bulle clone` and `bulle fork` ends with.
pub const AFTER_HELP: &str = "%n in --drive, --pmem, --share, --tap and --vsock stands for the number of the clone, \
    from 1 on.";
/// Processes that are started at once.
const BATCH: usize = 32;

/// How many clones there are to be, and what they are like.
#[derive(Debug, Args)]
pub struct CloneOptions {
    /// How many
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    count: u16,
    /// Name by which other commands find it, -1, -2 and so on added where there are several: 1 to 64
    /// letters, digits and '-' [default: eight digits]
    #[arg(id = "clone", long = "name", value_name = "NAME", value_parser = parse_id)]
    name: Option<String>,
    #[command(flatten)]
    rebind: RebindArgs,
}

/// Arguments of `bulle clone`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CloneArgs {
    #[command(flatten)]
    snapshot: DirectoryArgs,
    #[command(flatten)]
    options: CloneOptions,
    /// Copy the snapshot's memory first, so that no clone needs the disk and its files may change
    #[arg(long)]
    in_memory: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Command to run in each guest, and its arguments, if it was saved with `bulle run --save`
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs `bulle clone`.
pub fn run(args: &CloneArgs) -> Result<u8> {
    let snapshot = args.snapshot.open()?;
    let template = match args.in_memory {
        true => Template::in_memory(snapshot)?,
        false => Template::new(snapshot)?,
    };
    let base = args.runtime.base()?;
    make(&template, None, base, (&args.options, &args.command))
}

/// Makes clones of `template`, which may be that of a `parent` that runs, and prints their names. Those that
/// fail are told, and do not keep the others from being made.
pub fn make(
    template: &Template,
    parent: Option<&Config>,
    base: PathBuf,
    (options, command): (&CloneOptions, &[String]),
) -> Result<u8> {
    let mut orders = Vec::new();
    let mut configs = Vec::new();
    for number in 1..=usize::from(options.count) {
        let mut load = SnapshotLoad::new(PathBuf::new(), PathBuf::new());
        options.rebind.of_clone(number).apply(&mut load)?;
        let mut config = template.config.clone();
        own_output(&mut config);
        overrides(&load).apply(&mut config)?;
        configs.push(config);
        let name = match &options.name {
            None => registry::random_name().context("Cannot get random numbers for a name")?,
            Some(name) if options.count == 1 => name.clone(),
            Some(name) => format!("{name}-{number}"),
        };
        orders.push(Order {
            load,
            base: Some(base.clone()),
            name: Some(name),
            command: command.to_vec(),
        });
    }
    exclusive::check(parent, &configs)?;
    let program = std::env::current_exe().context("Cannot tell where bulle's program is")?;
    let mut code = 0;
    for orders in orders.chunks(BATCH) {
        let started: Vec<_> = orders
            .iter()
            .map(|order| -> Result<Waiting, PoolError> {
                let mut process = Waiting::start(&program, template, Stdio::default())?;
                process.order(order)?;
                Ok(process)
            })
            .collect();
        for (process, order) in started.into_iter().zip(orders) {
            let name = order.name.as_deref().unwrap_or_default();
            match process.and_then(Waiting::begun) {
                Ok(_) => writeln!(io::stdout(), "{name}").context("Cannot print to stdout")?,
                Err(error) => {
                    tell(format_args!("clone '{name}': {}", chain(&error.into())));
                    code = CODE_FAILURE;
                }
            }
        }
    }
    Ok(code)
}
