//! The root bus: configuration accesses by ECAM or by ports, and the memory window of all BARs.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::config::{Ids, PciConfig};
use super::{BarOffset, PciFunction};
use crate::bus::{BusDevice, Effect};
use crate::lock;

/// Devices on a bus; each has function 0 only.
pub const SLOTS: usize = 32;
/// Bytes of the ECAM range of one bus.
pub const ECAM_LEN: u64 = 1 << 20;
/// Where PCs have the configuration ports.
pub const PORTS_BASE: u64 = 0xcf8;
/// Number of configuration ports.
pub const PORTS_LEN: u64 = 8;

/// "Red Hat QEMU PCIe host bridge", which no driver asks more of.
const HOST_BRIDGE: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// A function could not be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// All slots are taken.
    #[error("no free slot on the PCI bus: it has room for 31 devices")]
    Full,
    /// The slot is taken, or there is none such.
    #[error("PCI slot {slot} is taken or above 31")]
    Slot {
        /// As asked for.
        slot: usize,
    },
}

/// Read-only, and so without state.
struct HostBridge(PciConfig);

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&self, _: u16, _: &[u8]) {}
}

type Slots = [Option<Arc<dyn PciFunction>>; SLOTS];

/// A root bus. Functions come and go while vCPUs look for them: the lock is held for that look only,
/// never while a function answers.
pub struct PciBus {
    slots: RwLock<Slots>,
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PciBus {
    /// A bus with a host bridge in slot 0.
    pub fn new() -> Self {
        let mut slots = [const { None }; SLOTS];
        let bridge = HostBridge(PciConfig::new(HOST_BRIDGE));
        if let Some(slot) = slots.first_mut() {
            *slot = Some(Arc::new(bridge) as _);
        }
        let slots = RwLock::new(slots);
        Self { slots }
    }

    fn look<T>(&self, at: impl FnOnce(&Slots) -> T) -> T {
        at(&self.slots.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<T>(&self, at: impl FnOnce(&mut Slots) -> T) -> T {
        at(&mut self.slots.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts `function` into `slot`.
    ///
    /// # Errors
    /// A slot that is taken, or that is none.
    pub fn insert(&self, slot: usize, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        self.change(|slots| match slots.get_mut(slot) {
            Some(free @ None) => {
                *free = Some(function);
                Ok(())
            }
            _ => Err(PciError::Slot { slot }),
        })
    }

    /// The first free slot.
    ///
    /// # Errors
    /// When there is none.
    pub fn free(&self) -> Result<usize, PciError> {
        let free = self.look(|slots| slots.iter().position(Option::is_none));
        free.ok_or(PciError::Full)
    }

    /// Whether `function` is in `slot`.
    pub fn holds(&self, slot: usize, function: &Arc<dyn PciFunction>) -> bool {
        let holds = |there: &Arc<_>| Arc::ptr_eq(there, function);
        self.look(|slots| slots.get(slot)?.as_ref().map(holds)) == Some(true)
    }

    /// Whether there is a function in `slot`.
    #[cfg(test)]
    pub(crate) fn has(&self, slot: usize) -> bool {
        self.look(|slots| slots.get(slot).is_some_and(Option::is_some))
    }

    /// Takes the function out of `slot`. A vCPU that is at it goes on with it for one access.
    pub fn remove(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.change(|slots| slots.get_mut(slot)?.take())
    }

    /// The function at an ECAM address: 8 bits of device and function, 12 of register.
    fn function(&self, address: u64) -> Option<(Arc<dyn PciFunction>, u16)> {
        let (devfn, register) = (address >> 12, (address & 0xfff) as u16);
        let slot = usize::try_from(devfn >> 3).ok()?;
        let function = self.look(|slots| slots.get(slot)?.clone())?;
        (devfn & 7 == 0).then_some((function, register))
    }

    fn read_config(&self, address: u64, data: &mut [u8]) {
        match self.function(address) {
            Some((function, register)) => function.read_config(register, data),
            // Section 6.1: nobody there.
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, address: u64, data: &[u8]) {
        if let Some((function, register)) = self.function(address) {
            function.write_config(register, data);
        }
    }

    fn claim(&self, addr: u64, len: usize) -> Option<(Arc<dyn PciFunction>, BarOffset)> {
        self.look(|slots| {
            slots.iter().flatten().find_map(|function| {
                let at = function.claim(addr, len)?;
                Some((function.clone(), at))
            })
        })
    }
}

/// Whether an access is one of 1, 2 or 4 bytes that does not cross a dword.
fn is_config_access(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64)
}

/// Configuration space in memory, [`ECAM_LEN`] bytes for bus 0.
pub struct Ecam(pub Arc<PciBus>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match is_config_access(offset, data.len()) {
            true => self.0.read_config(offset, data),
            false => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if is_config_access(offset, data.len()) {
            self.0.write_config(offset, data);
        }
        Effect::None
    }
}

/// Configuration space by ports (mechanism 1): an address at 0, a window at 4 to 7.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// Ports of `bus`, with the address register as saved (0 after reset).
    pub fn new(bus: Arc<PciBus>, address: u32) -> Self {
        Self {
            bus,
            address: Mutex::new(address),
        }
    }

    /// Has this address register.
    pub fn restore(&self, address: u32) {
        *lock(&self.address) = address;
    }

    /// The address register.
    pub fn save(&self) -> u32 {
        *lock(&self.address)
    }

    /// The ECAM address that port `offset` stands for.
    fn target(&self, offset: u64, len: usize) -> Option<u64> {
        let address = *lock(&self.address);
        let byte = offset.checked_sub(4)?;
        let on_bus_0 = address & 0x80ff_0000 == 0x8000_0000;
        if !on_bus_0 || !is_config_access(byte, len) {
            return None;
        }
        let devfn = u64::from(address >> 8 & 0xff);
        Some(devfn << 12 | u64::from(address & 0xfc) | byte)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.save().to_le_bytes();
        } else if let Some(address) = self.target(offset, data.len()) {
            self.bus.read_config(address, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let (0, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            *lock(&self.address) = u32::from_le_bytes(data);
        } else if let Some(address) = self.target(offset, data.len()) {
            self.bus.write_config(address, data);
        }
        Effect::None
    }
}

/// The guest physical memory in which BARs may be.
pub struct PciWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl PciWindow {
    /// The window of `bus` that is at `base` on the address bus.
    pub fn new(bus: Arc<PciBus>, base: u64) -> Self {
        Self { bus, base }
    }
}

impl BusDevice for PciWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let addr = self.base.wrapping_add(offset);
        if let Some((function, at)) = self.bus.claim(addr, data.len()) {
            function.read_bar(at, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let addr = self.base.wrapping_add(offset);
        match self.bus.claim(addr, data.len()) {
            Some((function, at)) => function.write_bar(at, data),
            None => Effect::None,
        }
    }
}
