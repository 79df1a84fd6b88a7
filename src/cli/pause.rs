//! `bulle pause` and `bulle resume`: the vCPUs of microVMs stand still, and go on.

use anyhow::Result;
use clap::Args;

use super::target::Targets;
use crate::remote::Remote;

/// Arguments of `bulle pause` and `bulle resume`.
#[derive(Debug, Args)]
pub struct PauseArgs {
    #[command(flatten)]
    targets: Targets,
}

/// `bulle pause`.
pub fn pause(args: &PauseArgs) -> Result<u8> {
    set(args, "Paused")
}

/// `bulle resume`.
pub fn resume(args: &PauseArgs) -> Result<u8> {
    set(args, "Resumed")
}

fn set(args: &PauseArgs, state: &str) -> Result<u8> {
    let body = format!(r#"{{"state":"{state}"}}"#);
    args.targets.each(|entry| {
        Remote::connect(entry)?.ask("PATCH", "/vm", &body)?;
        Ok(())
    })
}
