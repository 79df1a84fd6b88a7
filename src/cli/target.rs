//! Which microVM a command is about.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::chain;
use crate::registry::{self, BASE_VARIABLE, Entry, Place, RegistryError};
use crate::session::CODE_FAILURE;
use crate::telemetry::tell;

/// Where microVMs are found.
#[derive(Debug, Args)]
pub struct RuntimeArgs {
    /// Directory in which microVMs are found by name [default: /run/bulle for root,
    /// $XDG_RUNTIME_DIR/bulle for others]
    #[arg(long, value_name = "DIR", env = BASE_VARIABLE, hide_env_values = true)]
    runtime_dir: Option<PathBuf>,
}

impl RuntimeArgs {
    /// The directory.
    pub fn base(&self) -> Result<PathBuf, RegistryError> {
        registry::base(self.runtime_dir.clone())
    }

    /// A place of its own for a microVM, where there is any.
    pub fn place(&self, name: Option<String>) -> Option<Place> {
        let base = self
            .base()
            .map_err(|error| log::debug!("commands will not find this microVM: {error}"))
            .ok()?;
        Some(Place { base, name })
    }
}

/// One microVM.
#[derive(Debug, Args)]
pub struct Target {
    /// Name of the microVM, or the beginning of it
    name: String,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

impl Target {
    /// The one that is meant.
    pub fn find(&self) -> Result<Entry> {
        Ok(registry::find(&self.base()?, &self.name)?)
    }

    /// Where it is found.
    pub fn base(&self) -> Result<PathBuf, RegistryError> {
        self.runtime.base()
    }
}

/// One microVM or several.
#[derive(Debug, Args)]
pub struct Targets {
    /// Names of microVMs, or the beginnings of them
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

impl Targets {
    /// Does something with each. What fails is told, and does not keep the others from being done.
    pub fn each(&self, act: impl Fn(&Entry) -> Result<()>) -> Result<u8> {
        let base = self.runtime.base()?;
        let mut code = 0;
        for name in &self.names {
            let found = registry::find(&base, name).map_err(anyhow::Error::from);
            if let Err(error) = found.and_then(|entry| act(&entry)) {
                tell(chain(&error));
                code = CODE_FAILURE;
            }
        }
        Ok(code)
    }
}
