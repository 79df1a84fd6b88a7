//! virtio 1.2 as a driver sees it: finding devices over MMIO and PCI, their registers, and queues.
//!
//! The crate virtio-drivers is not used: its queues have 16 entries at most where throughput is
//! measured with 32 requests, and it cannot be made to do what a hostile driver does.

pub mod disk;
pub mod pci;
pub mod queue;

use crate::{io, tsc};
use pci::Function;

/// Status bits (section 2.1).
pub mod status {
    /// The driver noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device gave up.
    pub const NEEDS_RESET: u8 = 64;
}

/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// The windows that may hold MMIO devices.
const WINDOWS: u64 = 0xd000_0000;
const WINDOW: u64 = 0x1000;
const MAX_WINDOWS: u64 = 32;
const MAGIC: u32 = 0x7472_6976;
/// No device of these tests has more.
const MAX_QUEUES: u16 = 64;

/// One of the three parts of a queue.
#[derive(Clone, Copy)]
pub enum Part {
    /// Descriptor table.
    Desc,
    /// Available ring, the driver's.
    Avail,
    /// Used ring, the device's.
    Used,
}

/// Where registers are.
#[derive(Clone, Copy)]
pub enum Transport {
    /// A window at this address.
    Mmio(u64),
    /// A function of bus 0.
    Pci(Function),
}

/// A device.
#[derive(Clone, Copy)]
pub struct Device {
    /// Where it is.
    pub transport: Transport,
    /// Device ID (section 5).
    pub id: u32,
}

/// All devices: windows first, then PCI functions in order.
pub fn devices() -> impl Iterator<Item = Device> {
    windows(WINDOWS, WINDOW).chain(pci::functions().map(|function| Device {
        id: function.virtio_id(),
        transport: Transport::Pci(function),
    }))
}

/// The devices in windows that are `step` bytes apart from `start` on, at most 32 of them.
pub fn windows(start: u64, step: u64) -> impl Iterator<Item = Device> {
    let windows = (0..MAX_WINDOWS).map(move |n| start + n * step);
    windows.filter_map(|base| {
        let (magic, version): (u32, u32) = (io::read(base), io::read(base + 4));
        let id = io::read(base + 8);
        let transport = Transport::Mmio(base);
        ((magic, version) == (MAGIC, 2) && id != 0).then_some(Device { transport, id })
    })
}

/// The first device with this number; where another monitor has its windows, if told where they start:
/// QEMU's microvm has them 512 bytes apart, Firecracker a multiple of that.
pub fn find(id: u32, start: Option<u64>) -> Option<Device> {
    let wanted = |device: &Device| device.id == id;
    match start {
        Some(start) => windows(start, 0x200).find(wanted),
        None => devices().find(wanted),
    }
}

impl Device {
    /// The status register.
    pub fn status(&self) -> u8 {
        match self.transport {
            Transport::Mmio(base) => io::read::<u32>(base + 0x70) as u8,
            Transport::Pci(f) => io::read(f.common + 0x14),
        }
    }

    /// Writes the status register.
    pub fn set_status(&self, status: u8) {
        match self.transport {
            Transport::Mmio(base) => io::write(base + 0x70, u32::from(status)),
            Transport::Pci(f) => io::write(f.common + 0x14, status),
        }
    }

    /// Resets the device and waits until it is; false if it never is.
    pub fn reset(&self) -> bool {
        self.set_status(0);
        tsc::wait(tsc::LONG, || self.status() == 0)
    }

    /// The features it offers.
    pub fn features(&self) -> u64 {
        let half = |select: u32| match self.transport {
            Transport::Mmio(base) => {
                io::write(base + 0x14, select);
                io::read::<u32>(base + 0x10)
            }
            Transport::Pci(f) => {
                io::write(f.common, select);
                io::read::<u32>(f.common + 4)
            }
        };
        u64::from(half(0)) | u64::from(half(1)) << 32
    }

    /// Says which features the driver takes.
    pub fn accept(&self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            match self.transport {
                Transport::Mmio(base) => {
                    io::write(base + 0x24, select);
                    io::write(base + 0x20, half);
                }
                Transport::Pci(f) => {
                    io::write(f.common + 8, select);
                    io::write(f.common + 0xc, half);
                }
            }
        }
    }

    /// Chooses the queue that the following calls are about.
    pub fn select(&self, queue: u16) {
        match self.transport {
            Transport::Mmio(base) => io::write(base + 0x30, u32::from(queue)),
            Transport::Pci(f) => io::write(f.common + 0x16, queue),
        }
    }

    /// The largest size of the selected queue, 0 where it does not exist. Over PCI only before
    /// [`set_queue_size`](Self::set_queue_size).
    pub fn queue_max(&self) -> u16 {
        match self.transport {
            Transport::Mmio(base) => io::read::<u32>(base + 0x34) as u16,
            Transport::Pci(f) => io::read(f.common + 0x18),
        }
    }

    /// Sets the size of the selected queue.
    pub fn set_queue_size(&self, size: u16) {
        match self.transport {
            Transport::Mmio(base) => io::write(base + 0x38, u32::from(size)),
            Transport::Pci(f) => io::write(f.common + 0x18, size),
        }
    }

    /// Sets the address of a part of the selected queue.
    pub fn set_address(&self, part: Part, address: u64) {
        let at = match (self.transport, part) {
            (Transport::Mmio(base), Part::Desc) => base + 0x80,
            (Transport::Mmio(base), Part::Avail) => base + 0x90,
            (Transport::Mmio(base), Part::Used) => base + 0xa0,
            (Transport::Pci(f), Part::Desc) => f.common + 0x20,
            (Transport::Pci(f), Part::Avail) => f.common + 0x28,
            (Transport::Pci(f), Part::Used) => f.common + 0x30,
        };
        io::write(at, address as u32);
        io::write(at + 4, (address >> 32) as u32);
    }

    /// Makes the selected queue ready, or tries to take that back.
    pub fn set_ready(&self, ready: u16) {
        match self.transport {
            Transport::Mmio(base) => io::write(base + 0x44, u32::from(ready)),
            Transport::Pci(f) => io::write(f.common + 0x1c, ready),
        }
    }

    /// Kicks a queue.
    pub fn notify(&self, queue: u16) {
        match self.transport {
            Transport::Mmio(base) => io::write(base + 0x50, u32::from(queue)),
            Transport::Pci(f) => io::write(f.notify(queue), queue),
        }
    }

    /// Address of the device-specific configuration.
    pub fn config(&self) -> u64 {
        match self.transport {
            Transport::Mmio(base) => base + 0x100,
            Transport::Pci(f) => f.config,
        }
    }

    /// The registers, as an address and a length: everything that a guest can reach of the device
    /// but PCI configuration space.
    pub fn registers(&self) -> (u64, u64) {
        match self.transport {
            Transport::Mmio(base) => (base, WINDOW),
            Transport::Pci(f) => (f.bar, f.bar_len),
        }
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        let there = |queue: &u16| {
            self.select(*queue);
            self.queue_max() != 0
        };
        (0..MAX_QUEUES).take_while(there).count() as u16
    }

    /// Up to and with FEATURES_OK; false if the device does not agree.
    pub fn negotiate(&self, wanted: u64) -> bool {
        use status::{ACKNOWLEDGE, DRIVER, FEATURES_OK};
        let reset = self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(self.features() & (wanted | VERSION_1));
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        reset && self.status() & FEATURES_OK != 0
    }

    /// Lets it run.
    pub fn driver_ok(&self) {
        self.set_status(15);
    }

    /// Resets it and lets it run with all its queues empty, whose rings begin at `base`; false if
    /// it does not.
    pub fn start_all(&self, base: u64) -> bool {
        let agrees = self.negotiate(0);
        for n in 0..self.queues() {
            self.select(n);
            let size = self.queue_max().min(16);
            queue::Queue::new(base + u64::from(n) * 0x1000, n, size).announce(self);
        }
        self.driver_ok();
        agrees && self.runs()
    }

    /// Whether it runs and has not given up.
    pub fn runs(&self) -> bool {
        self.status() & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }
}
