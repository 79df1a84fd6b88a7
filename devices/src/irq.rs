//! Interrupt output of a device.

/// One interrupt line of one device. The root crate implements it.
pub trait Interrupt: Send + Sync {
    /// Raises an edge on the line. Never blocks and never fails towards the device: a delivery
    /// error is the machine's, which counts and logs it.
    fn signal(&self);
}
