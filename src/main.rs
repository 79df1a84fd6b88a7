//! The `bulle` command.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: bulle::cli::Allocator = bulle::cli::Allocator;

fn main() -> ExitCode {
    bulle::cli::main()
}
