//! PCI: a root bus with up to 32 functions, their configuration space and MSI-X.
//!
//! Called on vCPU threads, but for [`msix::Msix::signal`] and what changes the set of functions, which
//! is the VMM's ([`hotplug`]). Where their BARs are is the guest's choice within the bus's memory window,
//! so the window is one range of the address bus and finds the function by itself.
//! Sections are those of "PCI Local Bus Specification" 3.0.

pub mod bus;
pub mod config;
pub mod hotplug;
pub mod msix;

#[cfg(test)]
mod tests;

use crate::bus::Effect;

pub use self::bus::{ConfigPorts, Ecam, PciBus, PciError, PciWindow};

/// A place in one of a function's BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarOffset {
    /// Index of the BAR, 0 to 5.
    pub bar: usize,
    /// Offset in it.
    pub offset: u64,
}

/// A function on the bus. Offsets, widths and data are the guest's choice.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space at `offset` (below 4096).
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space at `offset` (below 4096).
    fn write_config(&self, offset: u16, data: &[u8]);
    /// Which of its BARs answers all of `len` bytes at the guest physical address `addr`, now.
    /// None has any, if not overridden.
    fn claim(&self, _addr: u64, _len: usize) -> Option<BarOffset> {
        None
    }
    /// Reads from a BAR; `data` comes filled with 0xff.
    fn read_bar(&self, _at: BarOffset, _data: &mut [u8]) {}
    /// Writes to a BAR.
    fn write_bar(&self, _at: BarOffset, _data: &[u8]) -> Effect {
        Effect::None
    }
}

/// A level-triggered interrupt pin (INTx). The root crate implements it.
pub trait IntxLine: Send + Sync {
    /// Asserts or deasserts the pin. Never blocks and never fails towards the device.
    fn set(&self, asserted: bool);
}
