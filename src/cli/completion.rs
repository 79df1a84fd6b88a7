//! `bulle completion`: scripts with which shells complete bulle's arguments.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use super::Cli;

/// Arguments of `bulle completion`.
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// The shell
    shell: Shell,
}

/// Runs the subcommand.
pub fn run(args: &CompletionArgs) -> Result<u8> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "bulle", &mut script);
    let printed = io::stdout().write_all(&script);
    printed.context("Cannot print to stdout")?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_know_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            generate(shell, &mut Cli::command(), "bulle", &mut script);
            let script = String::from_utf8(script).unwrap();
            for word in ["run", "inspect", "runtime-dir"] {
                assert!(script.contains(word), "no {word} for {shell}");
            }
        }
    }
}
