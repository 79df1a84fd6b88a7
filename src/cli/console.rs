//! `bulle console`: this terminal on a guest's console.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Args;

use super::target::Target;
use crate::remote::{Heard, Remote};
use crate::session::RawTerminal;
use crate::telemetry::tell;

/// Ctrl-], which ends it.
const DETACH: u8 = 0x1d;

const AFTER_HELP: &str = "\
Ctrl-] on a terminal detaches; the guest goes on. It begins with what is kept of the console. Several may be attached: all \
see what the guest writes, and what any of them types is the guest's input.";

/// Arguments of `bulle console`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ConsoleArgs {
    #[command(flatten)]
    target: Target,
}

/// Runs the subcommand.
pub fn run(args: &ConsoleArgs) -> Result<u8> {
    let entry = args.target.find()?;
    let mut stream = Remote::connect(&entry)?.stream("GET", "/console", "")?;
    let raw = RawTerminal::enter().context("Cannot set up the terminal")?;
    if raw.is_some() {
        tell(format_args!(
            "attached to '{}'; Ctrl-] detaches",
            entry.name
        ));
    }
    let mut listening = true;
    let mut out = io::stdout().lock();
    loop {
        match stream.hear(listening, None)? {
            Heard::Remote(bytes) => {
                let printed = out.write_all(&bytes).and_then(|()| out.flush());
                printed.context("Cannot print to stdout")?;
            }
            Heard::End | Heard::Other => break,
            Heard::Input(bytes) if bytes.is_empty() => {
                stream.finish()?;
                listening = false;
            }
            Heard::Input(bytes) => {
                let detach = bytes
                    .iter()
                    .position(|byte| *byte == DETACH && raw.is_some());
                stream.send(
                    bytes
                        .get(..detach.unwrap_or(bytes.len()))
                        .unwrap_or_default(),
                )?;
                if detach.is_some() {
                    break;
                }
            }
        }
    }
    drop(raw);
    Ok(0)
}
