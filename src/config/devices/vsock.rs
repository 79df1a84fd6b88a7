//! The socket device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Sockets between guest and host (AF_VSOCK in the guest, Unix sockets on the host).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Name, of no consequence.
    #[serde(alias = "id", default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's CID, 3 to 2³² − 2. It need not be unique on the host.
    #[serde(alias = "cid", default = "first_cid")]
    pub guest_cid: u32,
    /// Socket that the host's programs connect to; a port and `_` before it are added for what the
    /// guest connects to.
    #[serde(alias = "path")]
    pub uds_path: PathBuf,
}

fn first_cid() -> u32 {
    3
}
