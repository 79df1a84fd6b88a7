//! `bulle man`: manual pages, a file for each command. `make install` uses it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};

use super::Cli;

/// Arguments of `bulle man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory that they are written to; it has to be there
    directory: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &ManArgs) -> Result<u8> {
    clap_mangen::generate_to(Cli::command(), &args.directory)
        .with_context(|| format!("Cannot write manual pages to {}", args.directory.display()))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let args = ManArgs {
            directory: dir.path().to_owned(),
        };
        run(&args).unwrap();
        for command in ["", "-run", "-ps", "-stop"] {
            let page = std::fs::read_to_string(dir.path().join(format!("bulle{command}.1")));
            assert!(page.unwrap().contains(".SH SYNOPSIS"), "{command}");
        }
        assert!(!dir.path().join("bulle-man.1").exists());
    }
}
