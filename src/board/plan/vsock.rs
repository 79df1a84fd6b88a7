//! The socket device: its Unix sockets listen from here on.

use devices::virtio::registry::DeviceConfig;
use devices::virtio::vsock::{VsockEnd, VsockError, VsockOptions};

use super::Plan;
use crate::config::Vsock;

/// Makes the sockets of `vsock`.
pub(super) fn plan(vsock: &Vsock) -> Result<Plan, VsockError> {
    let end = VsockEnd::bind(VsockOptions::new(vsock.guest_cid, &vsock.uds_path))?;
    Ok(Plan {
        id: vsock
            .vsock_id
            .clone()
            .unwrap_or_else(|| "vsock".to_string()),
        config: DeviceConfig::Vsock(end),
    })
}
