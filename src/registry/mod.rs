//! Where the microVMs of this user are found, without a daemon: a directory for each.
//!
//! `BASE/NAME/` holds `state.json`, what the microVM was started with, and `api.sock`, its control socket.
//! The process of the microVM holds a lock (flock) on `state.json` as long as it lives, from before the file
//! has its name; so an entry whose lock is free is stale, whatever the numbers of processes say, and whoever
//! notices removes it. `claim` is the microVM's side, `list` that of the commands.

mod claim;
mod list;
mod process;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::config::Config;

pub use claim::{Claim, Place, random_name};
pub use list::{Entry, find, list};
pub use process::Process;

/// The variable that names another base directory.
pub const BASE_VARIABLE: &str = "BULLE_RUNTIME_DIR";
/// What the microVM was started with.
const STATE: &str = "state.json";
/// Its control socket, or a link to it.
const SOCKET: &str = "api.sock";

/// What a microVM was started with. What it is at present, its control socket says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its process.
    pub pid: i32,
    /// When it was started, in milliseconds since 1970.
    pub created_ms: u64,
    /// The process's arguments.
    pub arguments: Vec<String>,
    /// The command in the guest; empty where there is none, or none is known yet.
    #[serde(default)]
    pub command: Vec<String>,
    /// Kernel, where it is known.
    pub kernel: Option<PathBuf>,
    /// Number of vCPUs, where it is known.
    pub vcpu_count: Option<u16>,
    /// RAM in MiB, where it is known.
    pub mem_size_mib: Option<u64>,
}

impl About {
    /// This process, with what is known of its machine.
    pub fn new(config: Option<&Config>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let guest = config.and_then(|config| config.guest.as_ref());
        let machine = config.map(|config| &config.machine_config);
        Self {
            pid: nix::unistd::getpid().as_raw(),
            created_ms: now.map_or(0, |now| now.as_millis() as u64),
            arguments: std::env::args_os()
                .map(|argument| argument.to_string_lossy().into_owned())
                .collect(),
            command: guest.map_or(Vec::new(), |guest| guest.command.clone()),
            kernel: config.map(|config| config.boot_source.kernel_image_path.clone()),
            vcpu_count: machine.map(|machine| machine.vcpu_count),
            mem_size_mib: machine.map(|machine| machine.mem_size_mib),
        }
    }
}

/// Something of the registry does not work.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No place for entries.
    #[error(
        "Cannot tell where this user's microVMs are: XDG_RUNTIME_DIR is not set; set it, or name a directory \
         with --runtime-dir"
    )]
    NoBase,
    /// A file or directory.
    #[error("Cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// A living microVM has the name.
    #[error(
        "A microVM called '{name}' runs already: choose another name, or end it with `bulle stop {name}`"
    )]
    Taken {
        /// The name.
        name: String,
    },
    /// No such microVM.
    #[error("No microVM is called '{name}'{}", offer(near))]
    Unknown {
        /// As asked for.
        name: String,
        /// Names that are like it.
        near: Vec<String>,
    },
    /// Several begin so.
    #[error("'{name}' is the beginning of several names, {}: write more of the one that is meant", names.join(", "))]
    Ambiguous {
        /// As asked for.
        name: String,
        /// Which.
        names: Vec<String>,
    },
}

fn offer(names: &[String]) -> String {
    match names {
        [] => ": `bulle ps` lists those that run".to_owned(),
        names => format!("; there is {}", names.join(", ")),
    }
}

/// The base directory: as asked for, else /run/bulle for root and $XDG_RUNTIME_DIR/bulle for others.
pub fn base(asked: Option<PathBuf>) -> Result<PathBuf, RegistryError> {
    if let Some(asked) = asked {
        return Ok(asked);
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/run/bulle"));
    }
    let user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let user = user.filter(|path| path.is_absolute());
    user.map(|path| path.join("bulle"))
        .ok_or(RegistryError::NoBase)
}

fn failed(path: &Path, source: io::Error) -> RegistryError {
    RegistryError::File {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
