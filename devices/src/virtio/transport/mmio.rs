//! virtio over MMIO, version 2 (section 4.2).
//!
//! Runs on vCPU threads and has no state of its own. Registers are 32 bits wide at aligned
//! offsets; any other access reads zero or is dropped. The configuration space takes any width.

use std::sync::Arc;

use super::Kick;
use crate::bus::{BusDevice, Effect};
use crate::irq::Interrupt;
use crate::virtio::core::{Half, Reg, Ring, VirtioCore};
use crate::virtio::notifier::{Vector, VirtioInterrupt};

#[cfg(test)]
mod tests;

/// Bytes of one device's range.
pub const LEN: u64 = 0x1000;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "bull", little-endian.
const VENDOR: u32 = 0x6c6c_7562;

const QUEUE_NOTIFY: u64 = 0x50;
const CONFIG: u64 = 0x100;

#[derive(Clone, Copy)]
enum Cell {
    Fixed(u32),
    Core(Reg),
}

/// Table 4.1 of section 4.2.2.
const TABLE: [(u64, Cell); 28] = [
    (0x000, Cell::Fixed(MAGIC)),
    (0x004, Cell::Fixed(VERSION)),
    (0x008, Cell::Core(Reg::DeviceId)),
    (0x00c, Cell::Fixed(VENDOR)),
    (0x010, Cell::Core(Reg::DeviceFeatures)),
    (0x014, Cell::Core(Reg::DeviceFeaturesSel)),
    (0x020, Cell::Core(Reg::DriverFeatures)),
    (0x024, Cell::Core(Reg::DriverFeaturesSel)),
    (0x030, Cell::Core(Reg::QueueSel)),
    (0x034, Cell::Core(Reg::QueueSizeMax)),
    (0x038, Cell::Core(Reg::QueueSize)),
    (0x044, Cell::Core(Reg::QueueReady)),
    (QUEUE_NOTIFY, Cell::Core(Reg::QueueNotify)),
    (0x060, Cell::Core(Reg::InterruptStatus)),
    (0x064, Cell::Core(Reg::InterruptAck)),
    (0x070, Cell::Core(Reg::Status)),
    (0x080, Cell::Core(Reg::QueueAddr(Ring::Desc, Half::Low))),
    (0x084, Cell::Core(Reg::QueueAddr(Ring::Desc, Half::High))),
    (0x090, Cell::Core(Reg::QueueAddr(Ring::Avail, Half::Low))),
    (0x094, Cell::Core(Reg::QueueAddr(Ring::Avail, Half::High))),
    (0x0a0, Cell::Core(Reg::QueueAddr(Ring::Used, Half::Low))),
    (0x0a4, Cell::Core(Reg::QueueAddr(Ring::Used, Half::High))),
    (0x0ac, Cell::Core(Reg::ShmSel)),
    (0x0b0, Cell::Core(Reg::ShmLen(Half::Low))),
    (0x0b4, Cell::Core(Reg::ShmLen(Half::High))),
    (0x0b8, Cell::Core(Reg::ShmBase(Half::Low))),
    (0x0bc, Cell::Core(Reg::ShmBase(Half::High))),
    (0x0fc, Cell::Core(Reg::ConfigGeneration)),
];

/// Registers that the driver reads. The specification leaves reads of the others undefined; they
/// read zero.
fn readable(reg: Reg) -> bool {
    matches!(
        reg,
        Reg::DeviceId
            | Reg::DeviceFeatures
            | Reg::QueueSizeMax
            | Reg::QueueReady
            | Reg::InterruptStatus
            | Reg::Status
            | Reg::ShmLen(_)
            | Reg::ShmBase(_)
            | Reg::ConfigGeneration
    )
}

/// The interrupt of an MMIO device: one edge for all vectors.
pub struct MmioInterrupt(Arc<dyn Interrupt>);

impl MmioInterrupt {
    /// Signals `line`.
    pub fn new(line: Arc<dyn Interrupt>) -> Self {
        Self(line)
    }
}

impl VirtioInterrupt for MmioInterrupt {
    fn signal(&self, _: Vector) {
        self.0.signal();
    }
}

/// A virtio device on the MMIO bus, [`LEN`] bytes long.
pub struct Mmio {
    core: Arc<VirtioCore>,
}

impl Mmio {
    /// Puts `core`, which was made with an [`MmioInterrupt`], behind MMIO registers.
    pub fn new(core: Arc<VirtioCore>) -> Self {
        Self { core }
    }

    /// The device behind.
    pub fn core(&self) -> &Arc<VirtioCore> {
        &self.core
    }

    /// The writes to register as ioeventfds.
    pub fn kicks(&self) -> impl Iterator<Item = Kick<'_>> {
        let kicks = self.core.kicks().iter().enumerate();
        kicks.map(|(queue, fd)| Kick {
            offset: QUEUE_NOTIFY,
            data: Some(queue as u32),
            fd,
        })
    }
}

fn cell(offset: u64) -> Option<Cell> {
    let entry = TABLE.iter().find(|(at, _)| *at == offset)?;
    Some(entry.1)
}

/// Where a register is.
#[cfg(any(test, feature = "test-util"))]
pub(crate) fn offset(reg: Reg) -> Option<u64> {
    let is = |cell: &Cell| matches!(cell, Cell::Core(r) if *r == reg);
    TABLE.iter().find(|(_, cell)| is(cell)).map(|(at, _)| *at)
}

impl BusDevice for Mmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.core.read_config(offset, data);
        }
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match cell(offset) {
            Some(Cell::Fixed(value)) => value,
            Some(Cell::Core(reg)) if readable(reg) => self.core.read(reg),
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.write_config(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && let Some(Cell::Core(reg)) = cell(offset)
        {
            self.core.write(reg, u32::from_le_bytes(data));
        }
        Effect::None
    }
}
