//! The address bus: which device answers a port or an MMIO address.
//!
//! Built once before boot, then frozen: look-ups take no lock. Devices see offsets, never
//! addresses, and return [`Effect`]s for what the machine must do.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A device on the port or MMIO bus.
///
/// Both calls run on a vCPU thread; a guest chooses offset, width and data freely, so neither may
/// panic, block on the guest or allocate by a guest's number.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1 to 8) at `offset`; `data` comes filled with 0xff.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` (1 to 8 bytes) at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
}

/// What a register write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// The virtual machine ends for this reason.
    Exit(ExitReason),
    /// The guest reported a crash but goes on (pvpanic `CRASHLOADED`).
    CrashLoaded,
}

/// Why a guest ended the machine through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// ACPI S5 or an equivalent: the guest switched itself off.
    PowerOff,
    /// ACPI reset register, i8042 pulse or an equivalent: the guest reset itself.
    Reset,
    /// pvpanic: the guest kernel panicked.
    Panicked,
    /// A byte written to the debug-exit port.
    DebugExit(u8),
    /// The guest did not feed its watchdog.
    Watchdog,
}

/// Two devices claimed overlapping addresses, or one claimed none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("bus range at {base:#x} with {len:#x} bytes is empty or wraps around")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range meets one that is taken.
    #[error("bus range at {base:#x} with {len:#x} bytes overlaps the one at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range already there.
        other: u64,
    },
}

/// The widest access KVM reports, in bytes.
const MAX_WIDTH: usize = 8;

struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// A bus: ranges sorted by address. Fill it with [`Bus::insert`], then share it immutably.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
    unclaimed: AtomicU64,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.ranges.iter().map(|r| (r.base, r.len)))
            .finish()
    }
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let end = match base.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(BusError::Range { base, len }),
        };
        let at = self.ranges.partition_point(|r| r.base < base);
        let before = at.checked_sub(1).and_then(|i| self.ranges.get(i));
        if let Some(other) = before.filter(|r| r.base + r.len > base) {
            return Err(BusError::Overlap {
                base,
                len,
                other: other.base,
            });
        }
        if let Some(other) = self.ranges.get(at).filter(|r| r.base < end) {
            return Err(BusError::Overlap {
                base,
                len,
                other: other.base,
            });
        }
        self.ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    /// How many accesses no device answered so far.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// The device that holds the whole access, and the offset in it; counts a miss.
    fn find(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let found = self.lookup(addr, len);
        if found.is_none() {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    fn lookup(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        if !(1..=MAX_WIDTH).contains(&len) {
            return None;
        }
        let at = self.ranges.partition_point(|r| r.base <= addr);
        let range = self.ranges.get(at.checked_sub(1)?)?;
        let offset = addr - range.base;
        let fits = offset.checked_add(len as u64)? <= range.len;
        fits.then_some((range.device.as_ref(), offset))
    }

    /// Reads 1 to 8 bytes; `data` is all ones where no device answers. Says whether one did.
    ///
    /// An access that is not wholly inside one device's range is unclaimed.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(addr, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes 1 to 8 bytes; `None` where no device answers.
    pub fn write(&self, addr: u64, data: &[u8]) -> Option<Effect> {
        self.find(addr, data.len())
            .map(|(device, offset)| device.write(offset, data))
    }
}

#[cfg(test)]
mod tests;
