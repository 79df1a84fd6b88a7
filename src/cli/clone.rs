//! `bulle clone`: many microVMs of one snapshot; and what `bulle fork` has in common with it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::api::parse_id;
use super::chain;
use super::pool;
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
    /// Keep N processes waiting and make a clone for each line of stdin, which is its name (empty: eight
    /// digits), until there are no more
    #[arg(long, value_name = "N", conflicts_with_all = ["count", "clone"], value_parser = clap::value_parser!(u16).range(1..))]
    pool: Option<u16>,
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
    if let Some(size) = args.pool {
        let options = (&args.options, &args.command[..]);
        return pool::serve(&template, size.into(), |number, name| {
            order(&template, &base, options, (number, name))
        });
    }
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
        let name = options.name.as_ref().map(|name| match options.count {
            1 => name.clone(),
            _ => format!("{name}-{number}"),
        });
        let (order, config) = order(template, &base, (options, command), (number, name))?;
        orders.push(order);
        configs.push(config);
    }
    exclusive::check(parent, &configs)?;
    let program = program()?;
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

/// bulle itself.
pub fn program() -> Result<PathBuf> {
    std::env::current_exe().context("Cannot tell where bulle's program is")
}

/// What clone `number` is told to become, and the configuration that it has then.
fn order(
    template: &Template,
    base: &Path,
    (options, command): (&CloneOptions, &[String]),
    (number, name): (usize, Option<String>),
) -> Result<(Order, Config)> {
    let mut load = SnapshotLoad::new(PathBuf::new(), PathBuf::new());
    options.rebind.of_clone(number).apply(&mut load)?;
    let mut config = template.config.clone();
    own_output(&mut config);
    overrides(&load).apply(&mut config)?;
    let name = match name {
        None => registry::random_name().context("Cannot get random numbers for a name")?,
        Some(name) => name,
    };
    let order = Order {
        load,
        base: Some(base.to_owned()),
        name: Some(name),
        command: command.to_vec(),
    };
    Ok((order, config))
}
