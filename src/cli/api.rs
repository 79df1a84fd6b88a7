//! `bulle api`: a microVM that is configured and commanded over a REST API; `firecracker`, the same under
//! that name.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
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
    /// Of no effect: bulle installs no filter of system calls yet
    #[arg(long)]
    no_seccomp: bool,
    /// Give the guest what this JSON file says, by the metadata service (docs/mmds.md)
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// Most bytes of the metadata [default: that of a request's body]
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    #[command(flatten)]
    runtime: RuntimeArgs,
    #[command(flatten)]
    absent: Absent,
}

/// What Firecracker has and bulle has not yet: said, rather than left to be guessed.
#[derive(Debug, Args)]
struct Absent {
    #[arg(long, value_name = "FILE", hide = true)]
    seccomp_filter: Option<PathBuf>,
    #[arg(long, hide = true)]
    snapshot_version: bool,
    #[arg(long, value_name = "FILE", hide = true)]
    describe_snapshot: Option<PathBuf>,
}

impl Absent {
    fn check(&self) -> Result<()> {
        let snapshots = self.snapshot_version || self.describe_snapshot.is_some();
        for (asked, option, what) in [
            (
                self.seccomp_filter.is_some(),
                "--seccomp-filter",
                "filters of system calls",
            ),
            (
                snapshots,
                "--snapshot-version and --describe-snapshot",
                "snapshots",
            ),
        ] {
            if asked {
                bail!("{option} cannot be used: bulle has not got {what} yet");
            }
        }
        Ok(())
    }
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
    telemetry::init(log::LevelFilter::Warn);
    telemetry::name(&args.id);
    args.absent.check()?;
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
            module: args.module,
        },
        metrics: args
            .metrics_path
            .map(|metrics_path| Metrics { metrics_path }),
        startup,
        place,
        mmds,
    })?)
}
