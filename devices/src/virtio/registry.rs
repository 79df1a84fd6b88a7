//! The only list of virtio devices: from a configuration and a saved state to a device.
//!
//! A new device is its module, an arm of [`DeviceConfig`] and one of [`DeviceState`].

use super::device::{DeviceState, VirtioDevice};
use super::entropy::{Entropy, EntropyState};

/// What a device is made of, one arm per device type.
#[derive(Debug)]
pub enum DeviceConfig {
    /// Entropy source.
    Entropy,
}

/// A device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The saved state is of another type of device.
    #[error("the saved state of a virtio device is of another type than {device}")]
    State {
        /// What is to be made.
        device: &'static str,
    },
}

/// Makes a device from its configuration and a saved state, or [`DeviceState::Reset`].
pub fn build(
    config: DeviceConfig,
    state: &DeviceState,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    match config {
        DeviceConfig::Entropy => {
            let state = match state {
                DeviceState::Reset => EntropyState::default(),
                DeviceState::Entropy(state) => *state,
            };
            Ok(Box::new(Entropy::new(state)))
        }
    }
}
