//! Configuration space of a function: a type 0 header and capabilities, 256 bytes of which each
//! bit can be written or not.

use serde::{Deserialize, Serialize};

/// Bytes of configuration space that are there; the rest of the 4096 reads zero.
pub const LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

/// COMMAND: the function answers memory accesses.
const MEMORY: u16 = 1 << 1;
/// COMMAND: the function may access memory.
const MASTER: u16 = 1 << 2;
/// COMMAND: the function does not assert INTx.
const INTX_DISABLE: u16 = 1 << 10;
/// STATUS: INTx is wanted.
const INTX_STATUS: u16 = 1 << 3;
const HAS_CAPABILITIES: u16 = 1 << 4;
/// A memory BAR of 64 bits.
const BAR_64: u64 = 0b100;

/// Identity of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface in the low 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What a guest wrote to a configuration space: all of its bytes, or none after reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState(Vec<u8>);

/// A configuration space.
#[derive(Clone, Debug)]
pub struct PciConfig {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    bars: [u64; 6],
    last_capability: usize,
    end: usize,
}

impl PciConfig {
    /// A type 0 header without BARs, capabilities or interrupt.
    pub fn new(ids: Ids) -> Self {
        let mut config = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            bars: [0; 6],
            last_capability: 0,
            end: FIRST_CAPABILITY,
        };
        config.put(0, &ids.vendor.to_le_bytes());
        config.put(2, &ids.device.to_le_bytes());
        // The revision is the lowest byte.
        let class = ids.class << 8 | u32::from(ids.revision);
        config.put(8, &class.to_le_bytes());
        config.put(SUBSYSTEM, &ids.subsystem_vendor.to_le_bytes());
        config.put(SUBSYSTEM + 2, &ids.subsystem.to_le_bytes());
        let command = MEMORY | MASTER | INTX_DISABLE;
        config.allow(COMMAND, &command.to_le_bytes());
        config
    }

    /// Adds a 64-bit memory BAR at `index` (0 to 4, even), `len` bytes (a power of two from 16)
    /// at `base`.
    pub fn add_bar(&mut self, index: usize, base: u64, len: u64) {
        let Some(slot) = self.bars.get_mut(index) else {
            return;
        };
        *slot = len;
        let mask = !(len - 1);
        let at = BARS + 4 * index;
        self.put(at, &(base & mask | BAR_64).to_le_bytes());
        self.allow(at, &mask.to_le_bytes());
    }

    /// Announces INTA.
    pub fn add_interrupt_pin(&mut self) {
        self.put(INTERRUPT_PIN, &[1]);
        self.allow(INTERRUPT_LINE, &[0xff]);
    }

    /// Appends a capability: its ID, the bytes behind the next-pointer, and which bits of those
    /// can be written. Returns its offset, or `None` where there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.end;
        // Capabilities are aligned to 4 bytes.
        let end = (at + 2 + body.len()).next_multiple_of(4);
        if end > LEN {
            return None;
        }
        self.end = end;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        match self.last_capability {
            0 => {
                self.put(CAPABILITIES, &[at as u8]);
                self.put(STATUS, &HAS_CAPABILITIES.to_le_bytes());
            }
            last => self.put(last + 1, &[at as u8]),
        }
        self.last_capability = at;
        u16::try_from(at).ok()
    }

    /// Takes over what a guest had written.
    pub fn restore(&mut self, state: &ConfigState) {
        self.write(0, &state.0);
    }

    /// What the guest wrote.
    pub fn save(&self) -> ConfigState {
        ConfigState(self.bytes.to_vec())
    }

    /// Reads; what is not there is zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes.iter().skip(offset.into());
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable);
        for ((byte, mask), new) in bytes.skip(offset.into()).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Where BAR `index` is, if the function answers memory accesses.
    pub fn bar(&self, index: usize) -> Option<(u64, u64)> {
        let len = *self.bars.get(index)?;
        let mut low = [0; 8];
        self.read((BARS + 4 * index) as u16, &mut low);
        let base = u64::from_le_bytes(low) & !0xf;
        (len > 0 && self.command() & MEMORY != 0).then_some((base, len))
    }

    /// The guest does not want INTx.
    pub fn intx_disabled(&self) -> bool {
        self.command() & INTX_DISABLE != 0
    }

    /// Shows in the status register whether INTx is wanted.
    pub fn set_intx_status(&mut self, wanted: bool) {
        let status = HAS_CAPABILITIES | if wanted { INTX_STATUS } else { 0 };
        self.put(STATUS, &status.to_le_bytes());
    }

    fn command(&self) -> u16 {
        let mut command = [0; 2];
        self.read(COMMAND as u16, &mut command);
        u16::from_le_bytes(command)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to = *from;
        }
    }
}
