//! Named ports: names that a guest can have files of, each once.

use crate::config::{AGENT_PORT, Port};

/// Most ports that can be named: the device has 32, of which two are bulle's.
const MAX_PORTS: usize = 30;
/// Longest name, in bytes.
const MAX_NAME: usize = 128;

/// Ports that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PortsError {
    /// Too many.
    #[error("{count} named ports cannot be had: give at most {MAX_PORTS}")]
    Count {
        /// As asked.
        count: usize,
    },
    /// A name that cannot be one.
    #[error(
        "port name '{}' cannot be used: give 1 to {MAX_NAME} printable ASCII characters without \
         '/' and spaces, not '{AGENT_PORT}', and each name once",
        name.escape_debug()
    )]
    Name {
        /// As given.
        name: String,
    },
}

pub(super) fn validate(ports: &[Port]) -> Result<(), PortsError> {
    if ports.len() > MAX_PORTS {
        let count = ports.len();
        return Err(PortsError::Count { count });
    }
    for (index, Port { name, .. }) in ports.iter().enumerate() {
        let printable = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        let length = (1..=MAX_NAME).contains(&name.len());
        let taken = ports.iter().take(index).any(|other| other.name == *name);
        let reserved = [AGENT_PORT, ".", ".."].contains(&name.as_str());
        if !printable || !length || taken || reserved {
            let name = name.clone();
            return Err(PortsError::Name { name });
        }
    }
    Ok(())
}
