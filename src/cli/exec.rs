//! `bulle exec`: a command in a guest that runs, beside its first one, with this process's input and outputs.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Deserialize;

use super::target::Target;
use crate::control::{ExecInput, ExecRequest, TerminalSize};
use crate::remote::{Heard, Remote, RemoteStream};
use crate::session::{RawTerminal, window_size};
use crate::telemetry::tell;

/// Added to the number of a signal.
const SIGNAL_BASE: u8 = 128;
/// A terminal whose size cannot be asked.
const DEFAULT_SIZE: (u16, u16) = (24, 80);

const AFTER_HELP: &str = "\
It runs through bulle's agent, in the environment and the directory of the guest's first command. The exit code is the command's, \
128+N when signal N killed it, 126 and 127 as in a shell, and 125 when it could not be run. When this process ends, the command \
gets SIGHUP; when the first command ends, so do all.";

/// Arguments of `bulle exec`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ExecArgs {
    #[command(flatten)]
    target: Target,
    /// Environment variable for the command (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Working directory of the command in the guest [default: that of the first command]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Whether the command gets a terminal [default: auto, when stdin and stdout are one]
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        hide_default_value = true
    )]
    tty: super::run::When,
    /// Command to run in the guest, and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What the microVM tells.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Started {},
    Stdout(String),
    Stderr(String),
    StdoutBase64(String),
    StderrBase64(String),
    Exited { code: u8 },
    Killed { signal: u8 },
    Failed { exit_code: u8, text: String },
    Refused { text: String },
}

/// Runs the subcommand.
pub fn run(args: &ExecArgs) -> Result<u8> {
    let entry = args.target.find()?;
    let both = || io::stdin().is_terminal() && io::stdout().is_terminal();
    let tty = args.tty.is_wanted(both);
    let size = || window_size().unwrap_or(DEFAULT_SIZE);
    let mut env = args.env.clone();
    if tty && let Ok(term) = std::env::var("TERM") {
        env.insert(0, format!("TERM={term}"));
    }
    let request = ExecRequest {
        command: args.command.clone(),
        env,
        cwd: args.cwd.clone(),
        tty: tty.then(|| {
            let (rows, cols) = size();
            TerminalSize { rows, cols }
        }),
        stdin: true,
    };
    let body = serde_json::to_string(&request)?;
    let mut stream = Remote::connect(&entry)?.stream("PUT", "/exec", &body)?;
    let raw = match tty {
        true => RawTerminal::enter().context("Cannot set up the terminal")?,
        false => None,
    };
    let resized = raw.as_ref().map(|_| resizes()).transpose()?;
    let code = talk(&mut stream, resized.as_ref());
    drop(raw);
    match code? {
        Some(code) => Ok(code),
        None => bail!(
            "The microVM '{}' has ended before the command did",
            entry.name
        ),
    }
}

/// Signals that say that the terminal has another size.
fn resizes() -> Result<SignalFd> {
    let set = SigSet::from_iter([Signal::SIGWINCH]);
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    Ok(SignalFd::with_flags(&set, flags)?)
}

/// Passes on input and output; the exit code, or `None` where nothing more comes before it.
fn talk(stream: &mut RemoteStream, resized: Option<&SignalFd>) -> Result<Option<u8>> {
    let (mut listening, mut waiting) = (true, Vec::new());
    loop {
        match stream.hear(listening, resized.map(AsFd::as_fd))? {
            Heard::Remote(bytes) => {
                waiting.extend(bytes);
                while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = waiting.drain(..=end).collect();
                    let line = serde_json::from_slice(&line);
                    let line = line.context("The microVM says what nobody understands")?;
                    if let Some(code) = print(line)? {
                        return Ok(Some(code));
                    }
                }
            }
            Heard::End => return Ok(None),
            Heard::Other => {
                while let Some(Ok(Some(_))) = resized.map(SignalFd::read_signal) {}
                if let Some((rows, cols)) = window_size() {
                    send(stream, &ExecInput::Resize { rows, cols })?;
                }
            }
            Heard::Input(bytes) if bytes.is_empty() => {
                send(stream, &ExecInput::CloseStdin)?;
                listening = false;
            }
            Heard::Input(bytes) => send(stream, &ExecInput::StdinBase64(BASE64.encode(bytes)))?,
        }
    }
}

fn send(stream: &mut RemoteStream, input: &ExecInput) -> Result<()> {
    let line = serde_json::to_string(input)? + "\n";
    Ok(stream.send(line.as_bytes())?)
}

/// Prints output; the exit code, if this is the end.
fn print(line: Line) -> Result<Option<u8>> {
    let decode = |text: String| BASE64.decode(text).context("The microVM says no base64");
    let (bytes, is_error) = match line {
        Line::Stdout(text) => (text.into_bytes(), false),
        Line::Stderr(text) => (text.into_bytes(), true),
        Line::StdoutBase64(text) => (decode(text)?, false),
        Line::StderrBase64(text) => (decode(text)?, true),
        Line::Started {} => return Ok(None),
        Line::Exited { code } => return Ok(Some(code)),
        Line::Killed { signal } => return Ok(Some(SIGNAL_BASE.saturating_add(signal))),
        Line::Failed { exit_code, text } => {
            tell(text);
            return Ok(Some(exit_code));
        }
        Line::Refused { text } => bail!("The microVM refuses input: {text}"),
    };
    let mut out: Box<dyn Write> = match is_error {
        true => Box::new(io::stderr()),
        false => Box::new(io::stdout().lock()),
    };
    let printed = out.write_all(&bytes).and_then(|()| out.flush());
    printed.context("Cannot print the command's output")?;
    Ok(None)
}
