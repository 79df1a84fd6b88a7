//! The `bulle` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulle::cli::main()
}
