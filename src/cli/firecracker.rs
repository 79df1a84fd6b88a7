//! bulle under the name `firecracker`: its arguments, its `--version`, its exit codes.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use super::api::{self, ApiArgs};
use super::chain;
use crate::telemetry::tell;

/// The name.
pub const NAME: &str = "firecracker";
/// Version of Firecracker whose API is served.
pub const VERSION: &str = "1.17.0";
/// Anything else went wrong.
const CODE_GENERIC: u8 = 1;
/// The configuration is not valid.
const CODE_CONFIG: u8 = 152;
/// The arguments are not valid.
const CODE_ARGUMENTS: u8 = 153;

#[derive(Debug, Parser)]
#[command(name = NAME, about = "bulle, serving Firecracker's API", max_term_width = 100)]
struct Firecracker {
    #[command(flatten)]
    args: ApiArgs,
    /// Print the version of the API that is served, and end
    #[arg(long)]
    version: bool,
}

/// The arguments of a program under one of Firecracker's names; else the code to exit with, after help or
/// what is wrong, which is `code` then.
pub fn parse<T: Parser>(arguments: Vec<OsString>, code: u8) -> Result<T, ExitCode> {
    T::try_parse_from(arguments).map_err(|error| {
        if !error.use_stderr() {
            return printed(error.print());
        }
        tell(error.to_string().trim_start_matches("error: ").trim_end());
        ExitCode::from(code)
    })
}

/// The code to exit with after printing.
pub fn printed(result: io::Result<()>) -> ExitCode {
    ExitCode::from(if result.is_ok() { 0 } else { CODE_GENERIC })
}

/// Does what `arguments` say.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let parsed = match parse::<Firecracker>(arguments, CODE_ARGUMENTS) {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    if parsed.version {
        let text = format!(
            "Firecracker v{VERSION}\n\nbulle {}, which serves that API\n",
            env!("CARGO_PKG_VERSION")
        );
        return printed(io::stdout().write_all(text.as_bytes()));
    }
    let has_config = parsed.args.has_config();
    let result = api::run_as(parsed.args, VERSION);
    ExitCode::from(result.unwrap_or_else(|error| {
        tell(chain(&error));
        if has_config {
            CODE_CONFIG
        } else {
            CODE_GENERIC
        }
    }))
}
