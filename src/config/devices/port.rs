//! Named ports of the virtio console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Name of the port that belongs to bulle's agent.
pub const AGENT_PORT: &str = "bulle.agent";

/// A byte stream between guest and host that the guest finds by its name
/// (`/dev/virtio-ports/NAME`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Name, unique among ports.
    pub name: String,
    /// The host's end.
    pub to: PortTo,
}

/// The host's end of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortTo {
    /// A Unix socket that bulle listens on; one client at a time has the port.
    Socket(PathBuf),
    /// A file to which what the guest writes is appended.
    File(PathBuf),
}

impl Port {
    /// Reads `NAME=socket:PATH` or `NAME=file:PATH`.
    ///
    /// # Errors
    /// What to write instead.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text
            .split_once('=')
            .and_then(|(name, to)| Some((name, to.split_once(':')?)));
        let (name, to) = match parts {
            Some((name, ("socket", path))) if !path.is_empty() => {
                (name, PortTo::Socket(path.into()))
            }
            Some((name, ("file", path))) if !path.is_empty() => (name, PortTo::File(path.into())),
            _ => return Err("write NAME=socket:PATH or NAME=file:PATH".to_string()),
        };
        let name = name.to_string();
        Ok(Self { name, to })
    }
}
