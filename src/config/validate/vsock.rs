//! The socket device: the guest's CID.

use crate::config::Vsock;

/// A socket device that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VsockError {
    /// A CID that is taken: 0 to 2 are the hypervisor, loopback and the host, the last is anyone.
    #[error("the guest cannot have the vsock CID {cid}: give 3 to 4294967294")]
    Cid {
        /// As asked.
        cid: u32,
    },
}

pub(super) fn validate(vsock: Option<&Vsock>) -> Result<(), VsockError> {
    match vsock {
        Some(Vsock { guest_cid: cid, .. }) if !(3..u32::MAX).contains(cid) => {
            Err(VsockError::Cid { cid: *cid })
        }
        _ => Ok(()),
    }
}
