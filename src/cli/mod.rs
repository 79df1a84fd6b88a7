//! The command line: one file per subcommand, each from arguments to an exit code.

mod kernel;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::session::CODE_FAILURE;

/// A virtual machine monitor on KVM: microVMs from one command.
#[derive(Debug, Parser)]
#[command(name = "bulle", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a kernel and run a command in it
    Run(Box<run::RunArgs>),
}

/// Parses the process's arguments, runs the command and says with which code to exit. Errors are
/// printed here, once, with their causes.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let failed = error.use_stderr();
            // Nothing can be done about a terminal that takes no output.
            let _ = error.print();
            return ExitCode::from(if failed { CODE_FAILURE } else { 0 });
        }
    };
    let result = match cli.command {
        Command::Run(args) => run::run(*args),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        eprintln!("bulle: {error:#}");
        CODE_FAILURE
    }))
}
