//! The I/O APIC (Intel 82093AA, with version 0x20's EOI register) for KVM's split irqchip.
//!
//! Pins are raised from any thread, registers run on vCPU threads; one private mutex, released
//! before a message is sent. An interrupt that cannot be delivered yet (pin masked, or a level
//! interrupt still in service) is remembered and delivered later. For an edge on a masked pin that
//! is more than the 82093AA does, which forgets it; it costs a guest one interrupt at most that it
//! did not expect, and never loses one that it did.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};
use crate::irq::Interrupt;
use crate::lock;

/// Number of pins.
pub const PINS: usize = 24;
/// Where PCs have it.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of its MMIO window.
pub const LEN: u64 = 0x1000;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;
const REGISTER_EOI: u64 = 0x40;

const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_REDIRECTION: u8 = 0x10;
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0b111 << 8;
const LOWEST_PRIORITY: u64 = 0b001 << 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// The bits a guest can write: all but delivery status, remote IRR and the reserved ones.
const WRITABLE: u64 =
    0xff << DESTINATION_SHIFT | MASKED | LEVEL | 1 << 13 | LOGICAL | DELIVERY_MODE | VECTOR;

const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;
const MSI_REDIRECTION_HINT: u64 = 1 << 3;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;

/// Takes the messages of an I/O APIC to the local APICs. The root crate implements it by
/// `KVM_SIGNAL_MSI`.
pub trait MsiSink: Send + Sync {
    /// Delivers one message. Never blocks and never fails towards the device.
    fn send(&self, address: u64, data: u32);

    /// The guest changed how `pin` is delivered. KVM reports the end of a level interrupt
    /// (`KVM_EXIT_IOAPIC_EOI`) only for vectors in its GSI routes, so those must follow. A sink without
    /// routes serves pulses only.
    /// Of two vCPUs that write one entry at once, either may be reported last.
    fn route_changed(&self, pin: usize, message: MsiMessage) {
        let _ = (pin, message);
    }

    /// Has the host's kernel send the message at each event of `event`, for as long as what is returned
    /// lives. `None` where it does not.
    fn direct(&self, address: u64, data: u32, event: &EventFd) -> Option<Box<dyn Send>> {
        let _ = (address, data, event);
        None
    }
}

/// What a pin sends, as KVM's `kvm_irq_routing_msi` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// `0xfee00000`, destination, redirection hint and destination mode.
    pub address: u64,
    /// Vector, delivery mode, level and trigger mode.
    pub data: u32,
    /// The pin is masked: the message must not be sent.
    pub masked: bool,
}

impl MsiMessage {
    fn new(entry: u64) -> Self {
        let flag = |bit: u64, value: u64| if entry & bit != 0 { value } else { 0 };
        let lowest = entry & DELIVERY_MODE == LOWEST_PRIORITY;
        let trigger = if entry & LEVEL != 0 {
            MSI_LEVEL | MSI_ASSERT
        } else {
            0
        };
        Self {
            address: MSI_ADDRESS
                | (entry >> DESTINATION_SHIFT) << MSI_DESTINATION_SHIFT
                | flag(LOGICAL, MSI_LOGICAL)
                | if lowest { MSI_REDIRECTION_HINT } else { 0 },
            // Vector and delivery mode have the same place in both.
            data: (entry & (VECTOR | DELIVERY_MODE)) as u32 | trigger,
            masked: entry & MASKED != 0,
        }
    }
}

/// The registers as plain data; the default is the state after reset: all pins masked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// I/O APIC ID, 4 bits.
    pub id: u8,
    /// The register selected by the guest.
    pub index: u8,
    /// Redirection table, as the 82093AA has it.
    pub redirection: [u64; PINS],
    /// Pins with an edge not delivered yet, one bit each.
    pub pending: u32,
    /// Pins held asserted, one bit each.
    pub level: u32,
}

impl Default for IoApicState {
    fn default() -> Self {
        Self {
            id: 0,
            index: 0,
            redirection: [MASKED; PINS],
            pending: 0,
            level: 0,
        }
    }
}

impl IoApicState {
    /// Without bits that no guest can have set.
    fn possible(mut self) -> Self {
        for entry in &mut self.redirection {
            let remote_irr = *entry & LEVEL != 0 && *entry & REMOTE_IRR != 0;
            *entry = *entry & WRITABLE | if remote_irr { REMOTE_IRR } else { 0 };
        }
        self
    }

    fn read(&self) -> u32 {
        match self.index {
            INDEX_ID | INDEX_ARBITRATION => u32::from(self.id) << 24,
            INDEX_VERSION => VERSION,
            _ => match self.selected().and_then(|pin| self.redirection.get(pin)) {
                Some(entry) if self.index & 1 != 0 => (entry >> 32) as u32,
                Some(entry) => *entry as u32,
                None => u32::MAX,
            },
        }
    }

    /// The pin whose redirection entry is selected.
    fn selected(&self) -> Option<usize> {
        let pin = usize::from(self.index.checked_sub(INDEX_REDIRECTION)? / 2);
        (pin < PINS).then_some(pin)
    }

    /// Writes the selected register; the pin if that was a redirection entry.
    fn write(&mut self, value: u32) -> Option<usize> {
        if self.index == INDEX_ID {
            self.id = (value >> 24) as u8 & 0xf;
        }
        let pin = self.selected()?;
        let high = self.index & 1 != 0;
        let entry = self.redirection.get_mut(pin)?;
        let written = if high {
            u64::from(value) << 32 | (*entry & 0xffff_ffff)
        } else {
            (*entry & !0xffff_ffff) | u64::from(value)
        };
        // Guests switch a pin to edge and back to drop the remote IRR.
        let remote_irr = *entry & written & LEVEL != 0 && *entry & REMOTE_IRR != 0;
        *entry = written & WRITABLE | if remote_irr { REMOTE_IRR } else { 0 };
        Some(pin)
    }

    /// What `pin` sends now, if it may: that takes the edge, or puts the level in service.
    fn deliver(&mut self, pin: usize) -> Option<MsiMessage> {
        let bit = bit(pin)?;
        let entry = self.redirection.get_mut(pin)?;
        let level = *entry & LEVEL != 0;
        let wanted = self.pending & bit != 0 || (level && self.level & bit != 0);
        if !wanted || *entry & (MASKED | REMOTE_IRR) != 0 {
            return None;
        }
        self.pending &= !bit;
        // Only a held line waits for the end of its interrupt. A pulse is over: nothing may ever tell
        // its end, see [`MsiSink::route_changed`].
        if level && self.level & bit != 0 {
            *entry |= REMOTE_IRR;
        }
        Some(MsiMessage::new(*entry))
    }

    /// Ends the level interrupt of `pin` if it has this vector; it may be due again at once.
    fn end(&mut self, pin: usize, vector: u8) -> Option<MsiMessage> {
        let entry = self.redirection.get_mut(pin)?;
        if *entry & REMOTE_IRR == 0 || *entry & VECTOR != u64::from(vector) {
            return None;
        }
        *entry &= !REMOTE_IRR;
        self.deliver(pin)
    }
}

fn bit(pin: usize) -> Option<u32> {
    (pin < PINS).then(|| 1 << pin)
}

/// The I/O APIC. Pins from [`PINS`] on do not exist: to raise one does nothing.
pub struct IoApic {
    sink: Arc<dyn MsiSink>,
    state: Mutex<IoApicState>,
}

impl IoApic {
    /// An I/O APIC that sends to `sink`. Nothing is sent before a pin or a register changes.
    pub fn new(sink: Arc<dyn MsiSink>, state: IoApicState) -> Self {
        Self {
            sink,
            state: Mutex::new(state.possible()),
        }
    }

    /// Has these registers; nothing is sent.
    pub fn restore(&self, state: IoApicState) {
        *lock(&self.state) = state.possible();
    }

    /// The registers as they are.
    pub fn save(&self) -> IoApicState {
        lock(&self.state).clone()
    }

    /// An edge on `pin`. On a pin the guest set to level it is one interrupt too.
    pub fn pulse(&self, pin: usize) {
        let Some(bit) = bit(pin) else { return };
        let mut state = lock(&self.state);
        state.pending |= bit;
        let message = state.deliver(pin);
        drop(state);
        self.send(message);
    }

    /// Asserts or releases `pin`. A level pin interrupts again after each end of interrupt while
    /// asserted; on an edge pin only the rise counts.
    pub fn set_level(&self, pin: usize, asserted: bool) {
        let Some(bit) = bit(pin) else { return };
        let mut state = lock(&self.state);
        let rose = asserted && state.level & bit == 0;
        let edge = state.redirection.get(pin).is_some_and(|e| e & LEVEL == 0);
        if rose && edge {
            state.pending |= bit;
        }
        if asserted {
            state.level |= bit;
        } else {
            state.level &= !bit;
        }
        let message = state.deliver(pin);
        drop(state);
        self.send(message);
    }

    /// A local APIC ended the level interrupt `vector` (`KVM_EXIT_IOAPIC_EOI`).
    pub fn end_of_interrupt(&self, vector: u8) {
        for pin in 0..PINS {
            let message = lock(&self.state).end(pin, vector);
            self.send(message);
        }
    }

    /// What `pin` sends; `None` for a pin that does not exist.
    pub fn redirection(&self, pin: usize) -> Option<MsiMessage> {
        let state = lock(&self.state);
        state.redirection.get(pin).map(|e| MsiMessage::new(*e))
    }

    /// What each pin sends, in the order of the pins.
    pub fn routes(&self) -> [MsiMessage; PINS] {
        lock(&self.state).redirection.map(MsiMessage::new)
    }

    /// One pin as a device's edge-triggered interrupt line.
    pub fn line(self: &Arc<Self>, pin: usize) -> Arc<dyn Interrupt> {
        Arc::new(Line {
            ioapic: Arc::clone(self),
            pin,
        })
    }

    fn send(&self, message: Option<MsiMessage>) {
        if let Some(message) = message {
            self.sink.send(message.address, message.data);
        }
    }

    fn write_window(&self, value: u32) {
        let mut state = lock(&self.state);
        let Some(pin) = state.write(value) else {
            return;
        };
        let route = state.redirection.get(pin).map(|e| MsiMessage::new(*e));
        let message = state.deliver(pin);
        drop(state);
        // The route first: KVM must know the vector before its end of interrupt comes.
        if let Some(route) = route {
            self.sink.route_changed(pin, route);
        }
        self.send(message);
    }
}

struct Line {
    ioapic: Arc<IoApic>,
    pin: usize,
}

impl Interrupt for Line {
    fn signal(&self) {
        self.ioapic.pulse(self.pin);
    }
}

impl BusDevice for IoApic {
    /// Registers are 32 bits wide; a narrower read gets their low bytes.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            REGISTER_SELECT => u32::from(lock(&self.state).index),
            REGISTER_WINDOW => lock(&self.state).read(),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// The window takes 32-bit writes only; the other two registers have 8 bits.
    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (REGISTER_SELECT, [index, ..]) => lock(&self.state).index = *index,
            (REGISTER_WINDOW, [a, b, c, d, ..]) => {
                self.write_window(u32::from_le_bytes([*a, *b, *c, *d]));
            }
            (REGISTER_EOI, [vector, ..]) => self.end_of_interrupt(*vector),
            _ => {}
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
