//! The virtio console: hvc0, the agent's port, named ports. Their files and sockets are opened here.
//!
//! A guest with an agent has the device for the agent's sake, without being asked, where there is
//! room for it; others have it when something on it is asked for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::virtio::console::{ConsoleOptions, HostPort, PortEnd, PortOptions, SizeOrder};
use devices::virtio::registry::DeviceConfig;
use devices::virtio::uds::{ListenError, Listener, SocketType};

use super::Plan;
use crate::config::{AGENT_PORT, Config, Console, Port, PortTo, Spec};

/// Bytes that wait between the device and the vmm thread, each way.
const CAPACITY: usize = 64 * 1024;
/// The first kernel that reads columns before rows when a console changes its size.
const COLS_FIRST: (u32, u32) = (6, 15);

/// The host's end of a port or of hvc0 cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// A socket.
    #[error("port '{name}'")]
    Socket {
        /// The port's name.
        name: String,
        /// What went wrong.
        #[source]
        source: ListenError,
    },
    /// A file.
    #[error("cannot open {path:?} for {what}: name a file that this user can write")]
    File {
        /// As given.
        path: PathBuf,
        /// What it is for.
        what: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// No event descriptors.
    #[error("cannot make the host's end of the virtio console")]
    Pipe(#[source] io::Error),
}

/// The ends of the console device that the session has.
#[derive(Debug, Default)]
pub struct ConsoleEnds {
    /// The agent's port.
    pub agent: Option<HostPort>,
    /// hvc0, where it is on bulle's terminal.
    pub terminal: Option<HostPort>,
}

/// Whether something on the device is asked for.
pub(super) fn is_asked_for(config: &Config) -> bool {
    !config.ports.is_empty() || config.console().is_hvc0()
}

/// Makes the host's ends.
pub(super) fn plan(spec: &Spec) -> Result<(Plan, ConsoleEnds), PortError> {
    let mut ends = ConsoleEnds::default();
    let mut ports = Vec::new();
    let pipe = || PortEnd::pipe(CAPACITY).map_err(PortError::Pipe);
    match spec.console() {
        // Beside an agent stdin and stdout are the command's.
        Console::Hvc0 if spec.guest().is_some() => {
            let stderr = io::stderr().as_fd().try_clone_to_owned();
            let end = stderr.and_then(|fd| PortEnd::fds(None, Some(fd)));
            ports.push(PortOptions::console(end.map_err(PortError::Pipe)?));
        }
        Console::Hvc0 => {
            let (terminal, end) = pipe()?;
            ends.terminal = Some(terminal);
            ports.push(PortOptions::console(end));
        }
        Console::Hvc0File(path) => {
            let end = file(&path, || "the console".to_string())?;
            ports.push(PortOptions::console(end));
        }
        Console::Tty | Console::Off | Console::File(_) => {}
    }
    if spec.guest().is_some() {
        let (agent, end) = pipe()?;
        ends.agent = Some(agent);
        ports.push(PortOptions::named(AGENT_PORT, end));
    }
    for port in &spec.config().ports {
        ports.push(PortOptions::named(&port.name, named(port)?));
    }
    let plan = Plan {
        id: "console".to_string(),
        config: DeviceConfig::Console(ConsoleOptions {
            ports,
            ..ConsoleOptions::default()
        }),
    };
    Ok((plan, ends))
}

/// Tells hvc0 how large it is, as rows and columns, and how a kernel of `release` wants to hear of
/// changes.
pub fn fit(plans: &mut [Plan], size: Option<(u16, u16)>, release: &str) {
    for plan in plans {
        if let DeviceConfig::Console(options) = &mut plan.config {
            let (rows, cols) = size.unwrap_or_default();
            options.size = (cols, rows);
            options.order = order(release);
        }
    }
}

fn order(release: &str) -> SizeOrder {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let version: (u32, u32) = (number(), number());
    if version >= COLS_FIRST {
        SizeOrder::ColsFirst
    } else {
        SizeOrder::RowsFirst
    }
}

fn named(port: &Port) -> Result<PortEnd, PortError> {
    let name = || port.name.clone();
    match &port.to {
        PortTo::Socket(path) => match Listener::bind(path, SocketType::Stream) {
            Ok(listener) => Ok(PortEnd::clients(listener)),
            Err(source) => Err(PortError::Socket {
                name: name(),
                source,
            }),
        },
        PortTo::File(path) => file(path, || format!("port '{}'", name())),
    }
}

/// Appends to `path`, made if absent, readable by its owner only. A FIFO without a reader is not
/// waited for.
fn file(path: &Path, what: impl Fn() -> String) -> Result<PortEnd, PortError> {
    let open = |path: &Path| -> io::Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
    };
    open(path)
        .and_then(|file| PortEnd::fds(None, Some(OwnedFd::from(file))))
        .map_err(|source| PortError::File {
            path: path.to_path_buf(),
            what: what(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_kernels_read_columns_first() {
        for (release, expected) in [
            ("6.1.0-48-amd64", SizeOrder::RowsFirst),
            ("6.14.9", SizeOrder::RowsFirst),
            ("6.15-rc1", SizeOrder::ColsFirst),
            ("7.0.1", SizeOrder::ColsFirst),
            ("", SizeOrder::RowsFirst),
        ] {
            assert_eq!(order(release), expected, "{release}");
        }
    }
}
