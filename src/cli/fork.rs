//! `bulle fork`: copies of a microVM that goes on.

use std::os::unix::net::UnixListener;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::clone::{AFTER_HELP, CloneOptions, make};
use super::target::Target;
use crate::remote::Remote;
use crate::snapshot::template::{self, Template};

/// Arguments of `bulle fork`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ForkArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    options: CloneOptions,
}

/// Runs the subcommand.
pub fn run(args: &ForkArgs) -> Result<u8> {
    let entry = args.target.find()?;
    let directory = tempfile::tempdir().context("Cannot make a directory for a socket")?;
    let path = directory.path().join("template");
    let listener = UnixListener::bind(&path).context("Cannot make a socket")?;
    let body = json!({ "uds_path": path }).to_string();
    Remote::connect(&entry)?.ask("PUT", "/fork", &body)?;
    // It has connected and sent all before it answered.
    let (socket, _) = listener.accept().context("Cannot accept a connection")?;
    let template = Template::new(template::receive(&socket)?)?;
    make(
        &template,
        Some(&template.config),
        args.target.base()?,
        (&args.options, &[]),
    )
}
