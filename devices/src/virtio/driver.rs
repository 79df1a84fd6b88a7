//! A scripted driver for tests and fuzz targets: guest RAM between guard pages, a virtqueue, and
//! either transport. It panics where the test is wrong or a device does not keep its word.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::core::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, Half, Parts, Reg, Ring, VirtioCore, VirtioState,
};
use super::device::VirtioDevice;
use super::notifier::Vector;
use super::transport::mmio::{self, Mmio, MmioInterrupt};
use super::transport::pci::{self, PciInterrupt, PciState, VirtioPci};
use super::worker::{IoLoop, LoopBackend};
use super::{GuestRam, Memory};
use crate::bus::{BusDevice, Effect};
use crate::ioapic::MsiSink;
use crate::irq::Interrupt;
use crate::irq::mock::Counter;
use crate::lock;
use crate::pci::{BarOffset, Ecam, PciBus, PciFunction, PciWindow};

/// Where the two pieces of RAM are, and how long each is.
pub const RAM: [u64; 2] = [0, 0x1000_0000];
/// Bytes of each piece.
pub const RAM_LEN: u64 = 1 << 20;

const PAGE: usize = 4096;

/// RAM surrounded by pages that nobody may touch: an access outside ends the test.
fn guarded(base: u64) -> GuestRegionMmap<()> {
    let len = RAM_LEN as usize;
    let none = libc::PROT_NONE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let area = unsafe { libc::mmap(std::ptr::null_mut(), len + 2 * PAGE, none, flags, -1, 0) };
    assert_ne!(area, libc::MAP_FAILED);
    let start = area.cast::<u8>().wrapping_add(PAGE);
    // SAFETY: inside the mapping just made, which lives as long as the process.
    let region = unsafe {
        assert_eq!(libc::mprotect(start.cast(), len, rw), 0);
        MmapRegion::build_raw(start, len, rw, flags).unwrap()
    };
    GuestRegionMmap::new(region, GuestAddress(base)).unwrap()
}

/// Two pieces of RAM, [`RAM_LEN`] bytes at each place of [`RAM`].
pub fn ram() -> GuestRam {
    GuestMemoryMmap::from_regions(RAM.map(guarded).into()).unwrap()
}

/// The same RAM for all calls of a thread, zeroed: guarded RAM is never unmapped.
pub fn reused_ram() -> GuestRam {
    thread_local!(static REUSED: GuestRam = ram());
    let ram = REUSED.with(Clone::clone);
    for base in RAM {
        let zeros = vec![0; RAM_LEN as usize];
        ram.write_slice(&zeros, GuestAddress(base)).unwrap();
    }
    ram
}

/// A transport seen by its driver.
pub trait Port {
    /// The range on the bus.
    fn bus(&self) -> (&dyn BusDevice, u64);
    /// Reads a register by the table of the transport.
    fn get(&self, reg: Reg) -> u32;
    /// Writes a register.
    fn set(&self, reg: Reg, value: u32);
    /// Reads the device's configuration space.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device's configuration space.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// Gives `vector` an interrupt of its own, where the transport has such.
    fn bind(&self, vector: Vector) {
        let _ = vector;
    }
}

impl Port for Mmio {
    fn bus(&self) -> (&dyn BusDevice, u64) {
        (self, mmio::LEN)
    }

    fn get(&self, reg: Reg) -> u32 {
        let mut data = [0xff; 4];
        self.read(mmio::offset(reg).unwrap(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, reg: Reg, value: u32) {
        let _ = self.write(mmio::offset(reg).unwrap(), &value.to_le_bytes());
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.read(0x100 + offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = self.write(0x100 + offset, data);
    }
}

/// A virtio device in slot 1 of a PCI bus, its BAR in front and its configuration space behind.
pub struct PciPort {
    /// The function.
    pub device: Arc<VirtioPci>,
    window: PciWindow,
    /// The bus's configuration space.
    pub ecam: Ecam,
}

/// Where the BAR is, and where the configuration space in the bus.
pub const BAR: u64 = 0xe000_0000;
const SLOT: u64 = 1 << 15;

impl PciPort {
    /// Puts `device` on a bus, with MSI-X on and a message for each vector.
    pub fn new(device: Arc<VirtioPci>) -> Self {
        let bus = PciBus::new();
        assert_eq!(bus.insert(1, Arc::clone(&device) as _), Ok(()));
        let bus = Arc::new(bus);
        let port = Self {
            device,
            window: PciWindow::new(Arc::clone(&bus), BAR),
            ecam: Ecam(bus),
        };
        port.write_space(0x04, &6_u16.to_le_bytes());
        for vector in 0..=port.device.core().traits().queues.len() as u64 {
            let words = [0xfee0_0000, 0, vector as u32, 0];
            for (i, word) in (0_u64..).zip(words) {
                let at = 0x8000 + 16 * vector + 4 * i;
                let _ = port.window.write(at, &word.to_le_bytes());
            }
        }
        let msix = port.capability(0x11, None).unwrap();
        port.write_space(msix + 2, &0x8000_u16.to_le_bytes());
        port.bind(Vector::Config);
        port
    }

    /// Four bytes of configuration space.
    pub fn read_space(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.ecam.read(SLOT + offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes configuration space.
    pub fn write_space(&self, offset: u64, data: &[u8]) {
        let _ = self.ecam.write(SLOT + offset, data);
    }

    /// Walks the list as a driver does: a capability by its ID and virtio's kind.
    pub fn capability(&self, id: u8, kind: Option<u8>) -> Option<u64> {
        let mut at = u64::from(self.read_space(0x34) as u8);
        for _ in 0..48 {
            let [this, next, _, this_kind] = self.read_space(at).to_le_bytes();
            if at == 0 {
                return None;
            }
            if this == id && kind.is_none_or(|kind| kind == this_kind) {
                return Some(at);
            }
            at = next.into();
        }
        panic!("the capabilities do not end");
    }

    fn bar(offset: u64) -> BarOffset {
        BarOffset { bar: 0, offset }
    }
}

impl BusDevice for PciPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(pci::BAR_LEN) {
            Some(offset) => self.ecam.read(SLOT + offset, data),
            None => self.window.read(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        match offset.checked_sub(pci::BAR_LEN) {
            Some(offset) => self.ecam.write(SLOT + offset, data),
            None => self.window.write(offset, data),
        }
    }
}

/// Goes by the BAR itself, wherever a hostile test left it.
impl Port for PciPort {
    fn bus(&self) -> (&dyn BusDevice, u64) {
        (self, pci::BAR_LEN + 0x1000)
    }

    fn get(&self, reg: Reg) -> u32 {
        if reg == Reg::InterruptStatus {
            return self.device.core().take_isr();
        }
        let (at, len) = pci::place(reg).unwrap();
        let mut data = [0; 4];
        self.device.read_bar(Self::bar(at), &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn set(&self, reg: Reg, value: u32) {
        let data = value.to_le_bytes();
        let (at, len) = match reg {
            // A queue that is not there has no place; the last place there is takes it.
            Reg::QueueNotify => (0x4000 + 4 * u64::from(value.min(0x7ff)), 2),
            _ => pci::place(reg).unwrap(),
        };
        let _ = self.device.write_bar(Self::bar(at), &data[..len]);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_bar(Self::bar(0x2000 + offset), data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = self.device.write_bar(Self::bar(0x2000 + offset), data);
    }

    fn bind(&self, vector: Vector) {
        let (at, vector) = match vector {
            Vector::Config => (0x10, 0),
            Vector::Queue(queue) => (0x1a, queue + 1),
        };
        let _ = self.device.write_bar(Self::bar(at), &vector.to_le_bytes());
    }
}

/// Counts messages.
struct Sink(Arc<Counter>);

impl MsiSink for Sink {
    fn send(&self, _: u64, _: u32) {
        self.0.signal();
    }
}

/// Which transport a rig has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A window with registers.
    Mmio,
    /// A function of a PCI bus.
    Pci,
}

/// Both.
pub const TRANSPORTS: [Transport; 2] = [Transport::Mmio, Transport::Pci];

/// A device in a machine of its own.
pub struct Rig {
    /// The guest's RAM.
    pub ram: GuestRam,
    /// The device's registers.
    pub core: Arc<VirtioCore>,
    /// The transport.
    pub port: Box<dyn Port>,
    /// Counts interrupts of all vectors.
    pub irq: Arc<Counter>,
    function: Option<Arc<VirtioPci>>,
    host: Arc<Mutex<IoLoop>>,
}

impl Rig {
    /// A device in a machine with new RAM.
    pub fn new(transport: Transport, device: Box<dyn VirtioDevice>) -> Self {
        Self::with(transport, device, ram(), VirtioState::default())
    }

    /// A device in a machine with `ram`, from a saved state, at a transport that was reset.
    pub fn with(
        transport: Transport,
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        state: VirtioState,
    ) -> Self {
        Self::restored(transport, device, ram, (state, PciState::default()))
    }

    /// A device in a machine with `ram`, from a saved state, and its transport too.
    pub fn restored(
        transport: Transport,
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        (state, pci): (VirtioState, PciState),
    ) -> Self {
        let mut function = None;
        let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
        let irq = Arc::new(Counter::default());
        let traits = device.traits();
        let mut parts = Parts {
            traits: traits.clone(),
            config: device.config(),
            backend: Box::new(LoopBackend::inline(device, Arc::clone(&host))),
            interrupt: Arc::new(MmioInterrupt::new(Arc::clone(&irq) as _)),
            memory: Memory::new(ram.clone()),
        };
        let (core, port): (_, Box<dyn Port>) = match transport {
            Transport::Mmio => {
                let core = Arc::new(VirtioCore::new(parts, state).unwrap());
                (Arc::clone(&core), Box::new(Mmio::new(core)))
            }
            Transport::Pci => {
                let sink = Arc::new(Sink(Arc::clone(&irq)));
                let interrupt = Arc::new(PciInterrupt::new(sink, None, &traits, &pci));
                parts.interrupt = Arc::clone(&interrupt) as _;
                let core = Arc::new(VirtioCore::new(parts, state).unwrap());
                let device =
                    VirtioPci::new(Arc::clone(&core), interrupt, BAR, &pci, Box::new(|_| {}));
                let device = function.insert(Arc::new(device));
                (core, Box::new(PciPort::new(Arc::clone(device))))
            }
        };
        Self {
            ram,
            core,
            port,
            irq,
            function,
            host,
        }
    }

    /// The state of the transport; that of MMIO is the core's.
    pub fn transport_state(&self) -> PciState {
        let function = self.function.as_ref();
        function.map_or_else(PciState::default, |function| function.save())
    }

    /// Lets the device run until it has nothing to do for `ms` milliseconds.
    pub fn run(&self, ms: i32) {
        for _ in 0..10_000 {
            if lock(&self.host).run_with_timeout(ms).unwrap() == 0 {
                return;
            }
        }
        panic!("the device is busy without end");
    }

    /// Handles what is there now, once.
    pub fn turn(&self) {
        lock(&self.host).run_with_timeout(0).unwrap();
    }

    /// Negotiates `features`, or all that are offered.
    pub fn negotiate(&self, features: Option<u64>) -> u64 {
        let port = &self.port;
        port.set(Reg::Status, 0);
        assert_eq!(port.get(Reg::Status), 0);
        port.bind(Vector::Config);
        port.set(Reg::Status, ACKNOWLEDGE.into());
        port.set(Reg::Status, (ACKNOWLEDGE | DRIVER).into());
        let mut offered = 0;
        for (select, half) in [(0, Half::Low), (1, Half::High)] {
            port.set(Reg::DeviceFeaturesSel, select);
            half.set(&mut offered, port.get(Reg::DeviceFeatures));
        }
        let features = features.unwrap_or(offered);
        for (select, half) in [(0, Half::Low), (1, Half::High)] {
            port.set(Reg::DriverFeaturesSel, select);
            port.set(Reg::DriverFeatures, half.of(features));
        }
        port.set(Reg::Status, (ACKNOWLEDGE | DRIVER | FEATURES_OK).into());
        offered
    }

    /// Sets a queue up with its rings, and makes it ready.
    pub fn set_queue(&self, queue: u16, size: u16, rings: [u64; 3]) {
        let port = &self.port;
        port.set(Reg::QueueSel, queue.into());
        port.set(Reg::QueueSize, size.into());
        for (ring, addr) in [Ring::Desc, Ring::Avail, Ring::Used].into_iter().zip(rings) {
            for half in [Half::Low, Half::High] {
                port.set(Reg::QueueAddr(ring, half), half.of(addr));
            }
        }
        port.bind(Vector::Queue(queue));
        port.set(Reg::QueueReady, 1);
    }

    /// Sets DRIVER_OK.
    pub fn driver_ok(&self) {
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.port.set(Reg::Status, status.into());
    }

    /// Negotiates and sets up all queues with up to 16 descriptors; the device runs.
    pub fn start(&self, features: Option<u64>) -> Vec<Vq> {
        self.negotiate(features);
        let queues = &self.core.traits().queues;
        let vqs: Vec<Vq> = queues
            .iter()
            .enumerate()
            .map(|(i, max)| Vq::new(self.ram.clone(), i as u16, (*max).min(16)))
            .collect();
        for vq in &vqs {
            self.set_queue(vq.index, vq.size, vq.rings());
        }
        self.driver_ok();
        vqs
    }

    /// Notifies the device of a queue.
    pub fn kick(&self, vq: &Vq) {
        self.port.set(Reg::QueueNotify, vq.index.into());
    }
}

/// A buffer: guest address, length, and whether the device writes it.
pub type Buf = (u64, u32, bool);

/// A split virtqueue, driver's side. Queue `i` has its rings at `0x1000 + i * 0x1000`.
pub struct Vq {
    /// Its index.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// The next available index.
    pub avail: u16,
    seen: u16,
    next: u16,
    ram: GuestRam,
    /// Where the rings begin.
    pub base: u64,
}

impl Vq {
    /// A queue with empty rings.
    pub fn new(ram: GuestRam, index: u16, size: u16) -> Self {
        let base = 0x1000 + u64::from(index) * 0x1000;
        ram.write_slice(&[0; 0x1000], GuestAddress(base)).unwrap();
        Self {
            index,
            size,
            avail: 0,
            seen: 0,
            next: 0,
            ram,
            base,
        }
    }

    /// Addresses of descriptors, available and used ring.
    pub fn rings(&self) -> [u64; 3] {
        [self.base, self.base + 0x400, self.base + 0x800]
    }

    /// Writes descriptor `at`, and whether another follows.
    pub fn desc(&self, at: u16, (addr, len, write): Buf, next: Option<u16>) {
        let flags = u16::from(next.is_some()) | u16::from(write) << 1;
        self.raw_desc(at, addr, len, flags, next.unwrap_or(0));
    }

    /// Writes descriptor `at` as it is said.
    pub fn raw_desc(&self, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let to = GuestAddress(self.base + 16 * u64::from(at));
        write_desc(&self.ram, to, addr, len, flags, next);
    }

    /// Makes `head` available.
    pub fn publish(&mut self, head: u16) {
        let slot = self.base + 0x404 + 2 * u64::from(self.avail % self.size);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    /// Sets the index of the available ring.
    pub fn set_avail(&self, index: u16) {
        let at = GuestAddress(self.base + 0x402);
        self.ram.write_obj(index, at).unwrap();
    }

    /// Adds a chain of direct descriptors and returns its head.
    pub fn add(&mut self, bufs: &[Buf]) -> u16 {
        let head = self.next;
        for (i, buf) in bufs.iter().enumerate() {
            let at = self.next;
            self.next = (self.next + 1) % self.size;
            self.desc(at, *buf, (i + 1 < bufs.len()).then_some(self.next));
        }
        self.publish(head);
        head
    }

    /// Adds a chain through an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, bufs: &[Buf]) -> u16 {
        for (i, (addr, len, write)) in bufs.iter().enumerate() {
            let more = i + 1 < bufs.len();
            let flags = u16::from(more) | u16::from(*write) << 1;
            let to = GuestAddress(table + 16 * i as u64);
            write_desc(&self.ram, to, *addr, *len, flags, i as u16 + 1);
        }
        let head = self.next;
        self.next = (self.next + 1) % self.size;
        self.raw_desc(head, table, 16 * bufs.len() as u32, 4, 0);
        self.publish(head);
        head
    }

    /// The index of the used ring.
    pub fn used_index(&self) -> u16 {
        self.ram.read_obj(GuestAddress(self.base + 0x802)).unwrap()
    }

    /// Chains used since the last call: head to length.
    pub fn used(&mut self) -> BTreeMap<u32, u32> {
        let mut used = BTreeMap::new();
        while self.seen != self.used_index() {
            let at = self.base + 0x804 + 8 * u64::from(self.seen % self.size);
            let [head, len]: [u32; 2] = self.ram.read_obj(GuestAddress(at)).unwrap();
            used.insert(head, len);
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    /// `used_event`: interrupt when this index is passed.
    pub fn set_used_event(&self, index: u16) {
        let at = self.base + 0x404 + 2 * u64::from(self.size);
        self.ram.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// `flags` of the available ring.
    pub fn set_avail_flags(&self, flags: u16) {
        let at = GuestAddress(self.base + 0x400);
        self.ram.write_obj(flags, at).unwrap();
    }

    /// `avail_event`: the device wants a kick when this index is passed.
    pub fn avail_event(&self) -> u16 {
        let at = self.base + 0x804 + 8 * u64::from(self.size);
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }
}

/// Writes a descriptor anywhere in RAM.
pub fn write_desc(ram: &GuestRam, to: GuestAddress, addr: u64, len: u32, flags: u16, next: u16) {
    let words = [
        addr,
        u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48,
    ];
    ram.write_obj(words, to).unwrap();
}
