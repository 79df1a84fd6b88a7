//! The balloon: it fits into guest RAM.

use crate::config::Balloon;

/// A balloon that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BalloonError {
    /// Nothing would be left.
    #[error(
        "a balloon of {amount} MiB leaves nothing of the guest's {mib} MiB: give a smaller size, or \
         0 for one that is inflated later"
    )]
    Size {
        /// As asked, in MiB.
        amount: u64,
        /// Guest RAM in MiB.
        mib: u64,
    },
}

pub(super) fn validate(balloon: &Balloon, mib: u64) -> Result<(), BalloonError> {
    let amount = balloon.amount_mib;
    match amount < mib {
        true => Ok(()),
        false => Err(BalloonError::Size { amount, mib }),
    }
}
