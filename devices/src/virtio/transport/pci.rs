//! virtio over PCI, without the legacy interface (section 4.1).
//!
//! Registers run on vCPU threads, interrupts on the I/O thread. Beyond the core it has the PCI
//! configuration space, MSI-X, and which vector is whose. All structures are in BAR 0; the
//! configuration access capability (4.1.4.9) reaches them without it.

use std::iter;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};
use vmm_sys_util::eventfd::EventFd;

use super::Kick;
use crate::bus::Effect;
use crate::ioapic::MsiSink;
use crate::lock;
use crate::pci::config::{ConfigState, Ids, PciConfig};
use crate::pci::msix::{Msix, MsixState};
use crate::pci::{BarOffset, IntxLine, PciFunction};
use crate::virtio::core::{DRIVER_OK, Half, Reg, Ring, VirtioCore};
use crate::virtio::device::Traits;
use crate::virtio::notifier::{Vector, VirtioInterrupt};

use self::direct::DirectQueues;

mod direct;
#[cfg(test)]
mod tests;

/// Bytes of BAR 0; its address is a multiple of it.
pub const BAR_LEN: u64 = 1 << 16;

const COMMON: u64 = 0x0000;
const COMMON_LEN: u64 = 0x38;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x4000;
const PENDING: u64 = 0x6000;
const TABLE: u64 = 0x8000;
/// `notify_off_multiplier`.
const NOTIFY_STEP: u64 = 4;

const VENDOR: u16 = 0x1af4;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// `VIRTIO_MSI_NO_VECTOR`.
const NO_VECTOR: u16 = 0xffff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Core(Reg),
    ConfigVector,
    QueueVector,
    NotifyOffset,
}

/// `virtio_pci_common_cfg` (section 4.1.4.3): offset, bytes, what it is. Registers of 64 bits are
/// accessed by halves.
const FIELDS: [(u64, usize, Field); 19] = [
    (0x00, 4, Field::Core(Reg::DeviceFeaturesSel)),
    (0x04, 4, Field::Core(Reg::DeviceFeatures)),
    (0x08, 4, Field::Core(Reg::DriverFeaturesSel)),
    (0x0c, 4, Field::Core(Reg::DriverFeatures)),
    (0x10, 2, Field::ConfigVector),
    (0x12, 2, Field::Core(Reg::NumQueues)),
    (0x14, 1, Field::Core(Reg::Status)),
    (0x15, 1, Field::Core(Reg::ConfigGeneration)),
    (0x16, 2, Field::Core(Reg::QueueSel)),
    (0x18, 2, Field::Core(Reg::QueueSize)),
    (0x1a, 2, Field::QueueVector),
    (0x1c, 2, Field::Core(Reg::QueueReady)),
    (0x1e, 2, Field::NotifyOffset),
    (0x20, 4, Field::Core(Reg::QueueAddr(Ring::Desc, Half::Low))),
    (0x24, 4, Field::Core(Reg::QueueAddr(Ring::Desc, Half::High))),
    (0x28, 4, Field::Core(Reg::QueueAddr(Ring::Avail, Half::Low))),
    (
        0x2c,
        4,
        Field::Core(Reg::QueueAddr(Ring::Avail, Half::High)),
    ),
    (0x30, 4, Field::Core(Reg::QueueAddr(Ring::Used, Half::Low))),
    (0x34, 4, Field::Core(Reg::QueueAddr(Ring::Used, Half::High))),
];

fn field(offset: u64, len: usize) -> Option<Field> {
    let entry = FIELDS
        .iter()
        .find(|(at, size, _)| (*at, *size) == (offset, len))?;
    Some(entry.2)
}

/// State of the transport; the default is the state after reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// Configuration space.
    pub config: ConfigState,
    /// MSI-X.
    pub msix: MsixState,
    /// Vector of configuration changes; `None` for none.
    pub config_vector: Option<u16>,
    /// Vector of each queue; empty for reset.
    pub queue_vectors: Vec<Option<u16>>,
}

/// The interrupts of a virtio PCI device: messages, or a pin before the guest turns MSI-X on.
pub struct PciInterrupt {
    msix: Msix,
    line: Option<Arc<dyn IntxLine>>,
    line_disabled: AtomicBool,
    /// Whether the pin is asserted; held while the ISR status is read with it.
    asserted: Mutex<bool>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    direct: DirectQueues,
}

impl PciInterrupt {
    /// Interrupts of a device with these traits: to `sink`, and to `line` where there is one.
    pub fn new(
        sink: Arc<dyn MsiSink>,
        line: Option<Arc<dyn IntxLine>>,
        traits: &Traits,
        state: &PciState,
    ) -> Self {
        let vectors = u16::try_from(traits.queues.len() + 1).unwrap_or(u16::MAX);
        let msix = Msix::new(sink, vectors, state.msix.clone());
        let vector = |v: Option<u16>| AtomicU16::new(v.unwrap_or(NO_VECTOR));
        let queues = (0..traits.queues.len()).map(|i| state.queue_vectors.get(i).copied());
        Self {
            line,
            line_disabled: AtomicBool::new(false),
            asserted: Mutex::new(false),
            config_vector: vector(state.config_vector),
            queue_vectors: queues.map(|v| vector(v.flatten())).collect(),
            msix,
            direct: DirectQueues::default(),
        }
    }

    fn restore(&self, state: &PciState) {
        self.msix.restore(state.msix.clone());
        let queues = state
            .queue_vectors
            .iter()
            .copied()
            .chain(iter::repeat(None));
        for (to, from) in self.queue_vectors.iter().zip(queues) {
            to.store(from.unwrap_or(NO_VECTOR), Ordering::SeqCst);
        }
        let config = state.config_vector.unwrap_or(NO_VECTOR);
        self.config_vector.store(config, Ordering::SeqCst);
        self.follow_direct();
        *lock(&self.asserted) = false;
    }

    fn vector(&self, vector: Vector) -> Option<&AtomicU16> {
        match vector {
            Vector::Config => Some(&self.config_vector),
            Vector::Queue(queue) => self.queue_vectors.get(usize::from(queue)),
        }
    }

    fn get(&self, vector: Vector) -> u16 {
        let vector = self.vector(vector);
        vector.map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    /// Section 4.1.5.1.2: a vector that is not there reads back as none.
    fn set(&self, vector: Vector, value: u16) {
        let known = value < self.msix.vectors();
        if let Some(vector) = self.vector(vector) {
            vector.store(if known { value } else { NO_VECTOR }, Ordering::SeqCst);
        }
    }

    /// What queues whose interrupts the host's kernel sends are to send has changed.
    fn follow_direct(&self) {
        let vector = |queue| self.get(Vector::Queue(queue));
        self.direct.follow(&self.msix, vector);
    }

    fn reset(&self) {
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.follow_direct();
        self.set_line(&mut lock(&self.asserted), false);
    }

    fn set_line(&self, asserted: &mut bool, on: bool) {
        let Some(line) = &self.line else {
            return;
        };
        if std::mem::replace(asserted, on) != on {
            line.set(on);
        }
    }

    /// Reads the ISR status, which deasserts the pin.
    fn take_isr(&self, core: &VirtioCore) -> u32 {
        let mut asserted = lock(&self.asserted);
        let isr = core.take_isr();
        self.set_line(&mut asserted, false);
        isr
    }

    /// The guest turned the pin or MSI-X on or off; `isr` is what it has not read yet.
    fn follow(&self, line_disabled: bool, isr: u32) {
        self.line_disabled.store(line_disabled, Ordering::SeqCst);
        let on = isr != 0 && !line_disabled && !self.msix.enabled();
        self.set_line(&mut lock(&self.asserted), on);
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn signal(&self, vector: Vector) {
        if self.msix.enabled() {
            self.msix.signal(self.get(vector));
        } else if !self.line_disabled.load(Ordering::SeqCst) {
            self.set_line(&mut lock(&self.asserted), true);
        }
    }

    fn direct(&self, queue: u16, event: Option<&EventFd>) {
        self.direct.set(queue, event);
        self.follow_direct();
    }
}

struct Config {
    space: PciConfig,
    msix: u16,
    access: u16,
}

/// Told when a device's BAR is put elsewhere, with the eventfds of its queues.
pub type Moved = Box<dyn Fn(&[EventFd]) + Send + Sync>;

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    core: Arc<VirtioCore>,
    interrupt: Arc<PciInterrupt>,
    config: Mutex<Config>,
    /// Where BAR 0 answers; all ones for nowhere.
    base: AtomicU64,
    /// Told when BAR 0 answers elsewhere than `bar`, where its ioeventfds may be.
    moved: Moved,
    bar: u64,
}

impl VirtioPci {
    /// Puts `core`, which was made with `interrupt`, on the PCI bus with BAR 0 at `bar` (a
    /// multiple of [`BAR_LEN`]), or where the guest moved it in `state`. `moved` is called when it is
    /// put elsewhere: ioeventfds at the first place would take the kicks of whoever comes there.
    pub fn new(
        core: Arc<VirtioCore>,
        interrupt: Arc<PciInterrupt>,
        bar: u64,
        state: &PciState,
        moved: Moved,
    ) -> Self {
        let mut config = header(&core, &interrupt, bar);
        config.space.restore(&state.config);
        let device = Self {
            core,
            interrupt,
            config: Mutex::new(config),
            base: AtomicU64::new(bar),
            moved,
            bar,
        };
        device.follow_messages(&lock(&device.config));
        // Its edge came before it was saved; the device repeats it when it goes on.
        let disabled = lock(&device.config).space.intx_disabled();
        device
            .interrupt
            .line_disabled
            .store(disabled, Ordering::SeqCst);
        device
    }

    /// The device behind.
    pub fn core(&self) -> &Arc<VirtioCore> {
        &self.core
    }

    /// The writes to register as ioeventfds, as offsets in BAR 0. Where the guest moves the BAR
    /// (none does without need), kicks take the way through [`PciFunction::write_bar`].
    pub fn kicks(&self) -> impl Iterator<Item = Kick<'_>> {
        let kicks = self.core.kicks().iter().enumerate();
        kicks.map(|(queue, fd)| Kick {
            offset: NOTIFY + queue as u64 * NOTIFY_STEP,
            data: None,
            fd,
        })
    }

    /// Goes back to a state of this device; no interrupt is sent. The core goes by itself.
    pub fn restore(&self, state: &PciState) {
        let mut config = lock(&self.config);
        config.space.restore(&state.config);
        self.interrupt.restore(state);
        self.follow_messages(&config);
        let disabled = config.space.intx_disabled();
        self.interrupt
            .line_disabled
            .store(disabled, Ordering::SeqCst);
    }

    /// State of the transport; the core is saved by itself.
    pub fn save(&self) -> PciState {
        let some = |vector: u16| (vector != NO_VECTOR).then_some(vector);
        let queues = 0..self.interrupt.queue_vectors.len();
        PciState {
            config: lock(&self.config).space.save(),
            msix: self.interrupt.msix.save(),
            config_vector: some(self.interrupt.get(Vector::Config)),
            queue_vectors: queues
                .map(|q| some(self.interrupt.get(Vector::Queue(q as u16))))
                .collect(),
        }
    }

    /// Takes over what the configuration space says.
    fn follow(&self, config: &Config) {
        self.follow_messages(config);
        let isr = self.core.notifier().isr();
        self.interrupt.follow(config.space.intx_disabled(), isr);
    }

    /// As far as it is about the BAR and messages.
    fn follow_messages(&self, config: &Config) {
        let base = config.space.bar(0).map_or(u64::MAX, |(base, _)| base);
        let before = self.base.swap(base, Ordering::SeqCst);
        // Nowhere is where sizing puts it for a moment: nobody else is at its place then.
        if before != base && base != u64::MAX && base != self.bar {
            (self.moved)(self.core.kicks());
        }
        let mut control = [0; 2];
        config.space.read(config.msix + 2, &mut control);
        self.interrupt.msix.set_control(u16::from_le_bytes(control));
        self.interrupt.follow_direct();
    }

    /// The access that the configuration access capability is set up for.
    fn access(config: &Config) -> Option<(BarOffset, usize)> {
        let mut window = [0; 16];
        config.space.read(config.access, &mut window);
        let [_, _, _, _, bar, _, _, _, a, b, c, d, length @ ..] = window;
        let offset = u64::from(u32::from_le_bytes([a, b, c, d]));
        let len = u32::from_le_bytes(length) as usize;
        let valid = bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len as u64)
            && offset + len as u64 <= BAR_LEN;
        valid.then_some((BarOffset { bar: 0, offset }, len))
    }

    /// Whether a configuration access begins at `pci_cfg_data`.
    fn is_window(config: &Config, offset: u16) -> bool {
        offset == config.access + 16
    }

    fn selected(&self) -> Vector {
        // A queue that is not there has no vector.
        let queue = self.core.read(Reg::QueueSel);
        Vector::Queue(u16::try_from(queue).unwrap_or(u16::MAX))
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let value = match field(offset, data.len()) {
            Some(Field::Core(reg)) => self.core.read(reg),
            Some(Field::ConfigVector) => self.interrupt.get(Vector::Config).into(),
            Some(Field::QueueVector) => self.interrupt.get(self.selected()).into(),
            Some(Field::NotifyOffset) => self.core.read(Reg::QueueSel),
            None => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let bytes = data.iter().rev();
        let value = bytes.fold(0_u32, |value, byte| value << 8 | u32::from(*byte));
        match field(offset, data.len()) {
            Some(Field::Core(reg)) => {
                self.core.write(reg, value);
                if (reg, value) == (Reg::Status, 0) {
                    self.interrupt.reset();
                }
            }
            Some(Field::ConfigVector) => self.interrupt.set(Vector::Config, value as u16),
            // A queue register, and frozen like the others.
            Some(Field::QueueVector) if self.core.read(Reg::Status) & u32::from(DRIVER_OK) == 0 => {
                self.interrupt.set(self.selected(), value as u16);
            }
            Some(Field::QueueVector | Field::NotifyOffset) | None => {}
        }
    }
}

fn header(core: &VirtioCore, interrupt: &PciInterrupt, bar: u64) -> Config {
    let id = core.traits().id;
    let mut space = PciConfig::new(Ids {
        vendor: VENDOR,
        device: 0x1040 + id as u16,
        revision: 1,
        class: match id {
            VIRTIO_ID_NET => 0x02_0000,
            VIRTIO_ID_BLOCK => 0x01_8000,
            VIRTIO_ID_CONSOLE => 0x07_8000,
            _ => 0xff_0000,
        },
        subsystem_vendor: VENDOR,
        subsystem: 0x1100,
    });
    space.add_bar(0, bar, BAR_LEN);
    if interrupt.line.is_some() {
        space.add_interrupt_pin();
    }
    let notify_len = core.traits().queues.len() as u64 * NOTIFY_STEP;
    let mut add = |kind: u8, at: u64, len: u64, extra: &[u8], writable: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
        body.extend_from_slice(&(at as u32).to_le_bytes());
        body.extend_from_slice(&(len as u32).to_le_bytes());
        body.extend_from_slice(extra);
        space.add_capability(CAP_VENDOR, &body, writable)
    };
    // Section 4.1.4: the kinds are common, notify, ISR, device, and configuration access.
    add(1, COMMON, COMMON_LEN, &[], &[]);
    add(
        2,
        NOTIFY,
        notify_len,
        &(NOTIFY_STEP as u32).to_le_bytes(),
        &[],
    );
    add(3, ISR, 1, &[], &[]);
    add(4, DEVICE, 0x1000, &[], &[]);
    // Of the last, BAR, offset and length can be written, and the data is the window itself.
    let mut writable = [0; 14];
    for at in [2, 6, 7, 8, 9, 10, 11, 12, 13] {
        if let Some(mask) = writable.get_mut(at) {
            *mask = 0xff;
        }
    }
    let access = add(5, 0, 0, &[0; 4], &writable).unwrap_or(0);
    let size = interrupt.msix.vectors() - 1;
    let mut body = Vec::from(size.to_le_bytes());
    body.extend_from_slice(&(TABLE as u32).to_le_bytes());
    body.extend_from_slice(&(PENDING as u32).to_le_bytes());
    let msix = space
        .add_capability(CAP_MSIX, &body, &[0, 0xc0])
        .unwrap_or(0);
    Config {
        space,
        msix,
        access,
    }
}

/// Where a register is, and how wide; for the driver of tests.
#[cfg(any(test, feature = "test-util"))]
pub(crate) fn place(reg: Reg) -> Option<(u64, usize)> {
    let is = |f: &&(u64, usize, Field)| f.2 == Field::Core(reg);
    FIELDS.iter().find(is).map(|(at, len, _)| (*at, *len))
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut config = lock(&self.config);
        if Self::is_window(&config, offset) {
            let access = Self::access(&config);
            drop(config);
            data.fill(0);
            if let Some((at, len)) = access
                && let Some(data) = data.get_mut(..len)
            {
                self.read_bar(at, data);
            }
            return;
        }
        config
            .space
            .set_intx_status(self.core.notifier().isr() != 0 && !self.interrupt.msix.enabled());
        config.space.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = lock(&self.config);
        if Self::is_window(&config, offset) {
            let access = Self::access(&config);
            drop(config);
            if let Some((at, len)) = access
                && let Some(data) = data.get(..len)
            {
                let _ = self.write_bar(at, data);
            }
            return;
        }
        config.space.write(offset, data);
        self.follow(&config);
    }

    fn claim(&self, addr: u64, len: usize) -> Option<BarOffset> {
        let offset = addr.checked_sub(self.base.load(Ordering::SeqCst))?;
        let end = offset.checked_add(len as u64)?;
        (end <= BAR_LEN).then_some(BarOffset { bar: 0, offset })
    }

    fn read_bar(&self, at: BarOffset, data: &mut [u8]) {
        data.fill(0);
        match at.offset {
            ISR => {
                if let [isr] = data {
                    *isr = self.interrupt.take_isr(&self.core) as u8;
                }
            }
            DEVICE..0x3000 => self.core.read_config(at.offset - DEVICE, data),
            PENDING..TABLE => self.interrupt.msix.read_pending(at.offset - PENDING, data),
            TABLE.. => self.interrupt.msix.read_table(at.offset - TABLE, data),
            offset if data.len() == 8 => {
                let (low, high) = data.split_at_mut(4);
                self.read_common(offset, low);
                self.read_common(offset + 4, high);
            }
            offset => self.read_common(offset, data),
        }
    }

    fn write_bar(&self, at: BarOffset, data: &[u8]) -> Effect {
        match at.offset {
            DEVICE..0x3000 => self.core.write_config(at.offset - DEVICE, data),
            NOTIFY..PENDING => {
                let offset = at.offset - NOTIFY;
                if offset.is_multiple_of(NOTIFY_STEP) {
                    self.core
                        .write(Reg::QueueNotify, (offset / NOTIFY_STEP) as u32);
                }
            }
            TABLE.. => {
                self.core.notifier().message_changed();
                self.interrupt.msix.write_table(at.offset - TABLE, data);
                self.interrupt.follow_direct();
            }
            offset if data.len() == 8 => {
                let (low, high) = data.split_at(4);
                self.write_common(offset, low);
                self.write_common(offset + 4, high);
            }
            offset => self.write_common(offset, data),
        }
        Effect::None
    }
}
