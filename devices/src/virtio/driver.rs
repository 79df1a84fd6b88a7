//! A scripted driver for tests: guest RAM between guard pages, a virtqueue, and either transport.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::core::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, Half, Parts, Reg, Ring, VirtioCore, VirtioState,
};
use super::device::VirtioDevice;
use super::transport::mmio::{self, Mmio, MmioInterrupt};
use super::worker::{IoLoop, LoopBackend};
use super::{GuestRam, Memory};
use crate::bus::BusDevice;
use crate::irq::mock::Counter;
use crate::lock;

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

pub fn ram() -> GuestRam {
    GuestMemoryMmap::from_regions(RAM.map(guarded).into()).unwrap()
}

/// A transport seen by its driver.
pub trait Port {
    /// The range on the bus.
    fn bus(&self) -> (&dyn BusDevice, u64);
    fn get(&self, reg: Reg) -> u32;
    fn set(&self, reg: Reg, value: u32);
    fn read_config(&self, offset: u64, data: &mut [u8]);
    fn write_config(&self, offset: u64, data: &[u8]);
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

/// Which transport a rig has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Mmio,
}

pub const TRANSPORTS: [Transport; 1] = [Transport::Mmio];

/// A device in a machine of its own.
pub struct Rig {
    pub ram: GuestRam,
    pub core: Arc<VirtioCore>,
    pub port: Box<dyn Port>,
    pub irq: Arc<Counter>,
    host: Arc<Mutex<IoLoop>>,
}

impl Rig {
    pub fn new(transport: Transport, device: Box<dyn VirtioDevice>) -> Self {
        Self::with(transport, device, ram(), VirtioState::default())
    }

    pub fn with(
        transport: Transport,
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        state: VirtioState,
    ) -> Self {
        let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
        let irq = Arc::new(Counter::default());
        let Transport::Mmio = transport;
        let parts = Parts {
            traits: device.traits(),
            config: device.config(),
            backend: Box::new(LoopBackend::inline(device, Arc::clone(&host))),
            interrupt: Arc::new(MmioInterrupt::new(Arc::clone(&irq) as _)),
            memory: Memory::new(ram.clone()),
        };
        let core = Arc::new(VirtioCore::new(parts, state).unwrap());
        let port = Box::new(Mmio::new(Arc::clone(&core)));
        Self {
            ram,
            core,
            port,
            irq,
            host,
        }
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

    /// Negotiates `features`, or all that are offered.
    pub fn negotiate(&self, features: Option<u64>) -> u64 {
        let port = &self.port;
        port.set(Reg::Status, 0);
        assert_eq!(port.get(Reg::Status), 0);
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

    pub fn set_queue(&self, queue: u16, size: u16, rings: [u64; 3]) {
        let port = &self.port;
        port.set(Reg::QueueSel, queue.into());
        port.set(Reg::QueueSize, size.into());
        for (ring, addr) in [Ring::Desc, Ring::Avail, Ring::Used].into_iter().zip(rings) {
            for half in [Half::Low, Half::High] {
                port.set(Reg::QueueAddr(ring, half), half.of(addr));
            }
        }
        port.set(Reg::QueueReady, 1);
    }

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

    pub fn kick(&self, vq: &Vq) {
        self.port.set(Reg::QueueNotify, vq.index.into());
    }
}

/// A buffer: guest address, length, and whether the device writes it.
pub type Buf = (u64, u32, bool);

/// A split virtqueue, driver's side. Queue `i` has its rings at `0x1000 + i * 0x1000`.
pub struct Vq {
    pub index: u16,
    pub size: u16,
    pub avail: u16,
    seen: u16,
    next: u16,
    ram: GuestRam,
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

    pub fn rings(&self) -> [u64; 3] {
        [self.base, self.base + 0x400, self.base + 0x800]
    }

    pub fn desc(&self, at: u16, (addr, len, write): Buf, next: Option<u16>) {
        let flags = u16::from(next.is_some()) | u16::from(write) << 1;
        self.raw_desc(at, addr, len, flags, next.unwrap_or(0));
    }

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

pub fn write_desc(ram: &GuestRam, to: GuestAddress, addr: u64, len: u32, flags: u16, next: u16) {
    let words = [
        addr,
        u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48,
    ];
    ram.write_obj(words, to).unwrap();
}
