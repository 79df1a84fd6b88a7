//! `bulle api`: a microVM that is configured and commanded over a REST API; `firecracker`, the same under
//! that name.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::metadata;
use super::run::{parse_config, read_text};
use super::target::RuntimeArgs;
use crate::api::MAX_BODY;
use crate::config::{Config, Level, Logger, Metrics};
use crate::control::{DEFAULT_MEMORY_MIB, Instance};
use crate::session::{self, Serve, Startup};
use crate::snapshot;
use crate::telemetry;

/// Longest name of a microVM.
const MAX_ID: usize = 64;

/// Name of a microVM that got none.
const DEFAULT_ID: &str = "anonymous-instance";

/// Arguments of `bulle api`, which are those of Firecracker.
#[derive(Debug, Args)]
pub struct ApiArgs {
    /// Unix socket to serve the API on; nothing may be there yet
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Name of the microVM: 1 to 64 letters, digits and '-'
    #[arg(long, value_name = "ID", default_value = DEFAULT_ID, value_parser = parse_id)]
    id: String,
    /// Start from this configuration at once, as `bulle run --print-config` prints it
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Serve no API: the configuration file says all
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Virtio devices on a PCI bus with MSI-X instead of MMIO windows
    #[arg(long)]
    enable_pci: bool,
    /// Say in the log, at level Info, how long the guest took to boot, when it writes 123 to address 0xc0000000
    #[arg(long)]
    boot_timer: bool,
    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = MAX_BODY)]
    http_api_max_payload_size: usize,
    /// Append the log to this file, or to a pipe [default: stderr]
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// What is logged: Off, Error, Warn, Info, Debug or Trace [default: Warn]
    #[arg(long, value_name = "LEVEL")]
    level: Option<Level>,
    /// Log only what comes from the module with this path
    #[arg(long, value_name = "MODULE")]
    module: Option<String>,
    /// Say the level in each line of the log
    #[arg(long)]
    show_level: bool,
    /// Say the file and line of the source in each line of the log
    #[arg(long)]
    show_log_origin: bool,
    /// Write figures to this file or pipe as lines of JSON, each minute
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,
    /// Monotonic time at which this process was started, in microseconds, for the figures
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_us: Option<u64>,
    /// Processor time of this process before it was bulle, in microseconds, for the figures
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_cpu_us: Option<u64>,
    /// Processor time of this process's parent, in microseconds, for the figures
    #[arg(long, value_name = "MICROSECONDS")]
    parent_cpu_time_us: Option<u64>,
    /// Of no effect: bulle installs no filter of system calls
    #[arg(long)]
    no_seccomp: bool,
    /// Refused: such a file is for the system calls of the program that it was made for
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    seccomp_filter: Option<PathBuf>,
    /// Print the version of the state files of snapshots that are written, and end
    #[arg(long)]
    snapshot_version: bool,
    /// Print the version of this state file, and end
    #[arg(long, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
    /// Give the guest what this JSON file says, by the metadata service (docs/mmds.md)
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// Most bytes of the metadata [default: that of a request's body]
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// A microVM's name.
pub fn parse_id(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_alphanumeric() || c == '-';
    if text.is_empty() || text.chars().count() > MAX_ID || !text.chars().all(allowed) {
        return Err(format!("give 1 to {MAX_ID} letters, digits and '-'"));
    }
    Ok(text.to_owned())
}

/// A configuration file whose machine has as much memory as the API gives it if it does not say.
fn read_config(path: &Path) -> Result<Config> {
    #[derive(Deserialize)]
    struct Sections {
        #[serde(rename = "machine-config")]
        machine: Option<IgnoredAny>,
    }
    let text = read_text(path)?;
    let mut config = parse_config(path, &text)?;
    if serde_json::from_str::<Sections>(&text)?.machine.is_none() {
        config.machine_config.mem_size_mib = DEFAULT_MEMORY_MIB;
    }
    Ok(config)
}

impl ApiArgs {
    /// Whether there is a configuration file.
    pub fn has_config(&self) -> bool {
        self.config_file.is_some()
    }

    /// The version of state files, where that is asked for: one number, written as Firecracker writes its three.
    fn described(&self) -> Result<Option<String>> {
        let version = match &self.describe_snapshot {
            _ if self.snapshot_version => snapshot::format::VERSION,
            Some(path) => snapshot::format_version(path)?,
            None => return Ok(None),
        };
        Ok(Some(format!("v{version}.0.0\n")))
    }

    /// Refuses what would otherwise be taken for protection, or for what bulle does.
    fn refuse_filter(&self) -> Result<()> {
        if let Some(path) = &self.seccomp_filter {
            bail!(
                "--seccomp-filter {}: a filter allows the system calls of the program that it was made for, and \
                 Firecracker's would end bulle at the first other one; bulle installs none: leave the option out",
                path.display()
            );
        }
        Ok(())
    }

    fn startup(&self) -> Result<Startup> {
        let now = |clock| clock_gettime(clock).map(Duration::from);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let since = |begin: Option<u64>, now: Duration| match begin {
            Some(begin) => micros(now).saturating_sub(begin),
            None => 0,
        };
        let cpu = since(
            self.start_time_cpu_us,
            now(ClockId::CLOCK_PROCESS_CPUTIME_ID)?,
        );
        Ok(Startup {
            wall_us: since(self.start_time_us, now(ClockId::CLOCK_MONOTONIC)?),
            cpu_us: cpu.saturating_add(self.parent_cpu_time_us.unwrap_or(0)),
        })
    }
}

/// Runs the subcommand.
pub fn run(args: ApiArgs) -> Result<u8> {
    run_as(args, env!("CARGO_PKG_VERSION"))
}

/// Runs it with another version to say.
pub fn run_as(args: ApiArgs, version: &'static str) -> Result<u8> {
    if let Some(text) = args.described()? {
        let printed = io::stdout().write_all(text.as_bytes());
        printed.context("Cannot print to stdout")?;
        return Ok(0);
    }
    telemetry::init(log::LevelFilter::Warn);
    telemetry::name(&args.id);
    args.refuse_filter()?;
    let startup = args.startup()?;
    let config = args.config_file.as_deref().map(read_config).transpose()?;
    let name = Some(args.id.clone()).filter(|id| id != DEFAULT_ID);
    let place = args.runtime.place(name);
    let limit = args
        .mmds_size_limit
        .unwrap_or(args.http_api_max_payload_size);
    let mmds = metadata::read(args.metadata.as_deref(), limit)?;
    Ok(session::serve(Serve {
        socket: (!args.no_api).then_some(args.api_sock),
        instance: Instance {
            vmm_version: version,
            ..Instance::new(args.id)
        },
        max_body: args.http_api_max_payload_size,
        config,
        pci: args.enable_pci,
        boot_timer: args.boot_timer,
        logger: Logger {
            log_path: args.log_path,
            level: args.level,
            show_level: args.show_level.then_some(true),
            show_log_origin: args.show_log_origin.then_some(true),
            format: None,
            module: args.module,
        },
        metrics: args.metrics_path.map(Metrics::to),
        startup,
        place,
        mmds,
    })?)
}
