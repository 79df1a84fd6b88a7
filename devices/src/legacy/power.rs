//! Power registers of a hardware-reduced ACPI machine, and its Generic Event Device.
//!
//! ACPI 6.5: sleep control and status registers (4.8.3.7), reset register (4.8.3.6), Generic Event
//! Device (5.6.9). Register accesses run on vCPU threads, the events on the vmm thread; one
//! private mutex, released before the interrupt is raised.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::{BusDevice, Effect, ExitReason};
use crate::irq::Interrupt;
use crate::lock;

/// Bytes the registers take: sleep control, sleep status, reset, event status.
pub const LEN: u64 = 4;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Offset of the event status register, which the event device's `_EVT` method reads; that clears
/// it.
pub const EVENT_STATUS: u64 = 3;
/// The value of `SLP_TYP` for soft-off, to be given in the DSDT's `_S5`.
pub const SLP_TYP_S5: u8 = 5;
/// What to write to the reset register, to be given in the FADT.
pub const RESET_VALUE: u8 = 1;
/// The power button's bit in the event status register.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// The bit that says that the machine goes on from an old state.
pub const EVENT_GENERATION: u8 = 1 << 1;
/// The bit that says that PCI functions have come or are to go (see [`crate::pci::hotplug`]).
pub const EVENT_PCI: u8 = 1 << 2;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;

/// The registers as plain data; the default is the state after reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// `SLP_TYP` as last written; `SLP_EN` always reads as 0.
    pub sleep_control: u8,
    /// Events the guest has not read yet.
    pub events: u8,
}

/// The power registers.
pub struct Power {
    ged: Arc<dyn Interrupt>,
    state: Mutex<PowerState>,
}

impl Power {
    /// Power registers whose event device has the interrupt `ged`.
    pub fn new(ged: Arc<dyn Interrupt>, state: PowerState) -> Self {
        Self {
            ged,
            state: Mutex::new(state),
        }
    }

    /// Has these registers, without an interrupt.
    pub fn restore(&self, state: PowerState) {
        *lock(&self.state) = state;
    }

    /// The registers as they are.
    pub fn save(&self) -> PowerState {
        lock(&self.state).clone()
    }

    /// Asks the guest to shut down, as by its power button.
    pub fn press_power_button(&self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// Tells the guest that it goes on from an old state, with a new generation id in its memory.
    pub fn announce_generation(&self) {
        self.raise(EVENT_GENERATION);
    }

    /// Tells the guest that PCI functions have come or are to go.
    pub fn announce_pci(&self) {
        self.raise(EVENT_PCI);
    }

    fn raise(&self, event: u8) {
        lock(&self.state).events |= event;
        self.ged.signal();
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.state);
        super::read_bytes(offset, data, |register| match register {
            SLEEP_CONTROL => state.sleep_control,
            SLEEP_STATUS | RESET => 0,
            EVENT_STATUS => std::mem::take(&mut state.events),
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let mut state = lock(&self.state);
        super::write_bytes(offset, data, |register, value| match register {
            SLEEP_CONTROL => {
                state.sleep_control = value & SLP_TYP_MASK;
                let s5 = state.sleep_control == SLP_TYP_S5 << SLP_TYP_SHIFT;
                if s5 && value & SLP_EN != 0 {
                    Effect::Exit(ExitReason::PowerOff)
                } else {
                    Effect::None
                }
            }
            RESET if value == RESET_VALUE => Effect::Exit(ExitReason::Reset),
            _ => Effect::None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::mock::Counter;

    fn power() -> (Power, Arc<Counter>) {
        let ged = Arc::new(Counter::default());
        (Power::new(ged.clone(), PowerState::default()), ged)
    }

    fn read(power: &Power, offset: u64) -> u8 {
        let mut data = [0xff];
        power.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_s5_with_slp_en_powers_off() {
        let (power, _) = power();
        assert_eq!(power.write(SLEEP_CONTROL, &[5 << 2]), Effect::None);
        assert_eq!(read(&power, SLEEP_CONTROL), 5 << 2);
        assert_eq!(power.write(SLEEP_CONTROL, &[3 << 2 | 1 << 5]), Effect::None);
        assert_eq!(
            power.write(SLEEP_CONTROL, &[5 << 2 | 1 << 5]),
            Effect::Exit(ExitReason::PowerOff)
        );
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (power, _) = power();
        assert_eq!(power.write(RESET, &[0]), Effect::None);
        assert_eq!(power.write(RESET, &[1]), Effect::Exit(ExitReason::Reset));
        assert_eq!(
            power.write(SLEEP_CONTROL, &[0, 0, 1, 0]),
            Effect::Exit(ExitReason::Reset)
        );
    }

    #[test]
    fn events_that_the_guest_has_not_read_add_up() {
        let (power, ged) = power();
        power.announce_generation();
        power.press_power_button();
        assert_eq!(ged.take(), 2);
        let events = EVENT_POWER_BUTTON | EVENT_GENERATION;
        assert_eq!(power.save().events, events);
        assert_eq!(read(&power, EVENT_STATUS), events);
        assert_eq!(read(&power, EVENT_STATUS), 0);
    }

    #[test]
    fn the_button_is_an_event_that_reading_clears() {
        let (power, ged) = power();
        assert_eq!(read(&power, EVENT_STATUS), 0);
        power.press_power_button();
        assert_eq!(ged.take(), 1);
        assert_eq!(read(&power, EVENT_STATUS), EVENT_POWER_BUTTON);
        assert_eq!(read(&power, EVENT_STATUS), 0);
    }
}
