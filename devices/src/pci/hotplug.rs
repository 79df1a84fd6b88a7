//! How a guest learns of functions that come and go, and how it gives them up.
//!
//! Three registers that methods of the ACPI tables use (`_EJ0`, and one that the generic event device
//! runs). The VMM's thread says what has come and what is to go, vCPU threads read it and eject; then
//! the function is off the bus, and an event tells the VMM to take the device away. A guest ejects only
//! what it was asked for: any other is ignored.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PciBus;
use crate::bus::{BusDevice, Effect};
use crate::lock;

/// Bytes the registers take; each has four and is accessed as a whole.
pub const LEN: u64 = 12;
/// Offset of the slots, a bit each, with a function that has come. Reading clears it.
pub const ADDED: u64 = 0;
/// Offset of the slots whose function is to go. Reading clears it.
pub const LEAVING: u64 = 4;
/// Offset of the register that takes the slots that the guest gives up.
pub const EJECT: u64 = 8;

/// The registers as plain data; the default is the state after reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotplugState {
    /// Slots that the guest has not read yet: with a new function,
    pub added: u32,
    /// and with one that is to go.
    pub leaving: u32,
    /// Slots that the guest may eject.
    pub asked: u32,
}

/// The registers.
pub struct Hotplug {
    bus: Arc<PciBus>,
    state: Mutex<HotplugState>,
    ejected: EventFd,
}

impl Hotplug {
    /// Registers of `bus`.
    ///
    /// # Errors
    /// When there is no event descriptor.
    pub fn new(bus: Arc<PciBus>, state: HotplugState) -> io::Result<Self> {
        Ok(Self {
            bus,
            state: Mutex::new(state),
            ejected: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// The bus.
    pub fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// Readable when the guest has ejected something.
    pub fn ejected(&self) -> &EventFd {
        &self.ejected
    }

    /// The registers as they are.
    pub fn save(&self) -> HotplugState {
        *lock(&self.state)
    }

    /// Has the registers go back to `state`.
    pub fn restore(&self, state: HotplugState) {
        *lock(&self.state) = state;
    }

    /// There is a new function in `slot`.
    pub fn add(&self, slot: usize) {
        let mut state = lock(&self.state);
        state.added |= bit(slot);
        state.leaving &= !bit(slot);
        state.asked &= !bit(slot);
    }

    /// The function in `slot` is to go.
    pub fn ask_for(&self, slot: usize) {
        let mut state = lock(&self.state);
        state.leaving |= bit(slot);
        state.asked |= bit(slot);
    }

    /// The function in `slot` is gone, whatever the guest does. It is told to eject it nevertheless, so
    /// that it forgets it.
    pub fn take(&self, slot: usize) {
        let mut state = lock(&self.state);
        self.bus.remove(slot);
        state.added &= !bit(slot);
        state.asked &= !bit(slot);
        state.leaving |= bit(slot);
    }

    fn eject(&self, slots: u32) {
        let mut state = lock(&self.state);
        let ejected = state.asked & slots;
        state.asked &= !ejected;
        state.leaving &= !ejected;
        // Under the lock: a slot that was freed otherwise may have another function by now.
        for slot in (0..32).filter(|slot| ejected & bit(*slot) != 0) {
            self.bus.remove(slot);
        }
        drop(state);
        if ejected != 0 {
            // Only a counter at its maximum refuses, and that is readable.
            let _ = self.ejected.write(1);
        }
    }
}

/// The bit of a slot; there is none of a slot that is none.
fn bit(slot: usize) -> u32 {
    let slot = u32::try_from(slot).ok();
    slot.and_then(|slot| 1_u32.checked_shl(slot)).unwrap_or(0)
}

impl BusDevice for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let mut state = lock(&self.state);
        let value = match offset {
            ADDED => std::mem::take(&mut state.added),
            LEAVING => std::mem::take(&mut state.leaving),
            EJECT => 0,
            _ => return,
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let (EJECT, Ok(slots)) = (offset, <[u8; 4]>::try_from(data)) {
            self.eject(u32::from_le_bytes(slots));
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::super::PciFunction;
    use super::*;

    struct Nothing;

    impl PciFunction for Nothing {
        fn read_config(&self, _: u16, data: &mut [u8]) {
            data.fill(0x11);
        }

        fn write_config(&self, _: u16, _: &[u8]) {}
    }

    fn hotplug(slots: &[usize]) -> Hotplug {
        let bus = Arc::new(PciBus::new());
        for slot in slots {
            bus.insert(*slot, Arc::new(Nothing)).unwrap();
        }
        Hotplug::new(bus, HotplugState::default()).unwrap()
    }

    fn read(hotplug: &Hotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        hotplug.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(hotplug: &Hotplug, slots: u32) {
        let effect = hotplug.write(EJECT, &slots.to_le_bytes());
        assert_eq!(effect, Effect::None);
    }

    #[test]
    fn a_guest_reads_each_change_once() {
        let hotplug = hotplug(&[1, 3]);
        hotplug.add(1);
        hotplug.ask_for(3);
        assert_eq!(read(&hotplug, ADDED), 1 << 1);
        assert_eq!(read(&hotplug, LEAVING), 1 << 3);
        assert_eq!([ADDED, LEAVING, EJECT].map(|at| read(&hotplug, at)), [0; 3]);
    }

    #[test]
    fn what_nobody_asked_for_is_not_ejected() {
        let hotplug = hotplug(&[1, 3]);
        eject(&hotplug, u32::MAX);
        assert!(hotplug.bus().has(0) && hotplug.bus().has(1) && hotplug.bus().has(3));
        assert!(hotplug.ejected().read().is_err());
        hotplug.ask_for(3);
        eject(&hotplug, u32::MAX);
        assert!(hotplug.bus().has(1) && !hotplug.bus().has(3));
        assert_eq!(hotplug.ejected().read().unwrap(), 1);
        eject(&hotplug, u32::MAX);
        assert!(hotplug.ejected().read().is_err());
        assert_eq!(hotplug.save(), HotplugState::default());
    }

    #[test]
    fn what_is_taken_is_gone_at_once_and_the_guest_told() {
        let hotplug = hotplug(&[2]);
        hotplug.ask_for(2);
        hotplug.take(2);
        assert!(!hotplug.bus().has(2));
        assert_eq!(read(&hotplug, ADDED), 0);
        assert_eq!(read(&hotplug, LEAVING), 1 << 2);
        hotplug.bus().insert(2, Arc::new(Nothing)).unwrap();
        eject(&hotplug, u32::MAX);
        assert!(hotplug.bus().has(2));
        assert!(hotplug.ejected().read().is_err());
    }

    #[test]
    fn accesses_of_another_shape_do_nothing() {
        let hotplug = hotplug(&[2]);
        hotplug.ask_for(2);
        for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (LEAVING, 2), (12, 4)] {
            let mut data = vec![0; len];
            hotplug.read(offset, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{offset} {len}");
            let wide = vec![0xff; len.max(5)];
            assert_eq!(hotplug.write(EJECT, &wide), Effect::None);
        }
        assert_eq!(hotplug.save().leaving, 1 << 2);
        // Slots that are none have no bit.
        hotplug.ask_for(32);
        hotplug.ask_for(usize::MAX);
        assert_eq!(hotplug.save().asked, 1 << 2);
        eject(&hotplug, 1 << 2);
        assert!(!hotplug.bus().has(2));
    }
}
