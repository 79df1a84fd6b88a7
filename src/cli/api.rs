//! `bulle api`: a microVM that is configured and commanded over a REST API.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::run::read_config;
use crate::api::MAX_BODY;
use crate::session::{self, Serve};
use crate::telemetry;

/// Longest name of a microVM.
const MAX_ID: usize = 64;

/// Arguments of `bulle api`.
#[derive(Debug, Args)]
pub struct ApiArgs {
    /// Unix socket to serve the API on; nothing may be there yet
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Name of the microVM: 1 to 64 letters, digits and '-'
    #[arg(long, value_name = "ID", default_value = "anonymous-instance", value_parser = parse_id)]
    id: String,
    /// Start from this configuration at once, as `bulle run --print-config` prints it
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Virtio devices on a PCI bus with MSI-X instead of MMIO windows
    #[arg(long)]
    enable_pci: bool,
    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = MAX_BODY)]
    http_api_max_payload_size: usize,
    /// Show bulle's log at this level: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    level: log::LevelFilter,
}

fn parse_id(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_alphanumeric() || c == '-';
    if text.is_empty() || text.chars().count() > MAX_ID || !text.chars().all(allowed) {
        return Err(format!("give 1 to {MAX_ID} letters, digits and '-'"));
    }
    Ok(text.to_owned())
}

/// Runs the subcommand.
pub fn run(args: ApiArgs) -> Result<u8> {
    telemetry::init(args.level);
    let config = args.config_file.as_deref().map(read_config).transpose()?;
    Ok(session::serve(Serve {
        socket: args.api_sock,
        id: args.id,
        max_body: args.http_api_max_payload_size,
        config,
        pci: args.enable_pci,
    })?)
}
