use std::mem::offset_of;
use std::sync::atomic::AtomicU32;

use proptest::prelude::*;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::Memory;
use crate::virtio::core::{Parts, VirtioState};
use crate::virtio::device::VirtioDevice;
use crate::virtio::driver::{BAR, PciPort, Port, reused_ram};
use crate::virtio::entropy::Entropy;
use crate::virtio::worker::{IoLoop, LoopBackend};

/// Section 4.1.4.3 of the specification, as it is written there.
#[repr(C)]
struct CommonCfg {
    device_feature_select: u32,
    device_feature: u32,
    driver_feature_select: u32,
    driver_feature: u32,
    config_msix_vector: u16,
    num_queues: u16,
    device_status: u8,
    config_generation: u8,
    queue_select: u16,
    queue_size: u16,
    queue_msix_vector: u16,
    queue_enable: u16,
    queue_notify_off: u16,
    queue_desc: u64,
    queue_driver: u64,
    queue_device: u64,
}

#[test]
fn offsets_are_those_of_the_specification() {
    let halves = |at: usize, ring| {
        [Half::Low, Half::High].map(|half| {
            (
                at + 4 * (half == Half::High) as usize,
                4,
                Reg::QueueAddr(ring, half),
            )
        })
    };
    let mut expected = vec![
        (
            offset_of!(CommonCfg, device_feature_select),
            4,
            Reg::DeviceFeaturesSel,
        ),
        (
            offset_of!(CommonCfg, device_feature),
            4,
            Reg::DeviceFeatures,
        ),
        (
            offset_of!(CommonCfg, driver_feature_select),
            4,
            Reg::DriverFeaturesSel,
        ),
        (
            offset_of!(CommonCfg, driver_feature),
            4,
            Reg::DriverFeatures,
        ),
        (offset_of!(CommonCfg, num_queues), 2, Reg::NumQueues),
        (offset_of!(CommonCfg, device_status), 1, Reg::Status),
        (
            offset_of!(CommonCfg, config_generation),
            1,
            Reg::ConfigGeneration,
        ),
        (offset_of!(CommonCfg, queue_select), 2, Reg::QueueSel),
        (offset_of!(CommonCfg, queue_size), 2, Reg::QueueSize),
        (offset_of!(CommonCfg, queue_enable), 2, Reg::QueueReady),
    ];
    expected.extend(halves(offset_of!(CommonCfg, queue_desc), Ring::Desc));
    expected.extend(halves(offset_of!(CommonCfg, queue_driver), Ring::Avail));
    expected.extend(halves(offset_of!(CommonCfg, queue_device), Ring::Used));
    for (at, len, reg) in &expected {
        assert_eq!(place(*reg), Some((*at as u64, *len)), "{reg:?}");
    }
    let others = [
        (
            offset_of!(CommonCfg, config_msix_vector),
            Field::ConfigVector,
        ),
        (offset_of!(CommonCfg, queue_msix_vector), Field::QueueVector),
        (offset_of!(CommonCfg, queue_notify_off), Field::NotifyOffset),
    ];
    for (at, other) in others {
        assert_eq!(field(at as u64, 2), Some(other));
    }
    assert_eq!(FIELDS.len(), expected.len() + others.len());
    assert_eq!(COMMON_LEN as usize, size_of::<CommonCfg>());
}

#[derive(Default)]
struct Host {
    messages: Mutex<Vec<(u64, u32)>>,
    line: AtomicU32,
    /// What the kernel would send at events.
    direct: Arc<Mutex<Vec<(u64, u32)>>>,
}

/// A message that the kernel sends for as long as it lives.
struct Way(Arc<Mutex<Vec<(u64, u32)>>>, (u64, u32));

impl Drop for Way {
    fn drop(&mut self) {
        self.0.lock().unwrap().retain(|message| *message != self.1);
    }
}

impl MsiSink for Host {
    fn send(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }

    fn direct(&self, address: u64, data: u32, _: &EventFd) -> Option<Box<dyn Send>> {
        self.direct.lock().unwrap().push((address, data));
        Some(Box::new(Way(self.direct.clone(), (address, data))))
    }
}

impl IntxLine for Host {
    fn set(&self, asserted: bool) {
        self.line.store(asserted.into(), Ordering::SeqCst);
    }
}

fn device(host: &Arc<Host>, state: &PciState) -> Arc<VirtioPci> {
    let entropy = Box::new(Entropy::new(Default::default()));
    let traits = entropy.traits();
    let line = Some(Arc::clone(host) as _);
    let interrupt = Arc::new(PciInterrupt::new(
        Arc::clone(host) as _,
        line,
        &traits,
        state,
    ));
    let io_loop = Arc::new(Mutex::new(IoLoop::new().unwrap()));
    let parts = Parts {
        config: entropy.config(),
        traits,
        backend: Box::new(LoopBackend::inline(entropy, io_loop)),
        interrupt: Arc::clone(&interrupt) as _,
        memory: Memory::new(reused_ram()),
    };
    let core = Arc::new(VirtioCore::new(parts, VirtioState::default()).unwrap());
    Arc::new(VirtioPci::new(
        core,
        interrupt,
        BAR,
        state,
        Box::new(|_| {}),
    ))
}

#[test]
fn a_driver_finds_the_structures() {
    let port = PciPort::new(device(&Arc::default(), &PciState::default()));
    assert_eq!(port.read_space(0), 0x1044_1af4);
    assert_eq!(port.read_space(0x08), 0xff00_0001);
    assert_eq!(port.read_space(0x10), BAR as u32 | 4);
    assert_eq!(port.read_space(0x14), (BAR >> 32) as u32);
    for (kind, at, len) in [
        (1, 0, 0x38),
        (2, 0x4000, 4),
        (3, 0x1000, 1),
        (4, 0x2000, 0x1000),
    ] {
        let cap = port.capability(9, Some(kind)).unwrap();
        assert_eq!(port.read_space(cap + 4) & 0xff, 0, "BAR 0");
        assert_eq!(port.read_space(cap + 8), at);
        assert_eq!(port.read_space(cap + 12), len);
    }
    let notify = port.capability(9, Some(2)).unwrap();
    assert_eq!(port.read_space(notify + 16), 4);
    let msix = port.capability(0x11, None).unwrap();
    assert_eq!(port.read_space(msix) >> 16, 0x8001, "on, two vectors");
    assert_eq!(port.read_space(msix + 4), 0x8000);
    assert_eq!(port.read_space(msix + 8), 0x6000);
    // Behind what is there: nothing; on other slots and functions: nobody.
    assert_eq!(port.read_space(0x100), 0);
    let mut data = [0; 4];
    for other in [0x8000 * 2, 0x8000 + 0x1000] {
        port.ecam.read(other, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    port.ecam.read(8, &mut data);
    assert_eq!(u32::from_le_bytes(data) >> 8, 0x06_0000, "host bridge");
}

#[test]
fn the_bar_is_sized_and_moves() {
    let port = PciPort::new(device(&Arc::default(), &PciState::default()));
    let (bus, _) = port.bus();
    let answers = || {
        let mut data = [0xee; 2];
        bus.read(0x12, &mut data);
        u16::from_le_bytes(data) == 1
    };
    assert!(answers());
    port.write_space(0x04, &[4, 0]);
    assert!(!answers(), "memory is off");
    for (at, size) in [(0x10, 0xffff_0004_u32), (0x14, 0xffff_ffff)] {
        port.write_space(at, &[0xff; 4]);
        assert_eq!(port.read_space(at), size);
    }
    port.write_space(0x10, &(BAR as u32 + 0x10_0000).to_le_bytes());
    port.write_space(0x14, &[0; 4]);
    port.write_space(0x04, &[6, 0]);
    assert!(!answers());
    let at = BAR + 0x10_0012;
    assert_eq!(port.device.claim(at, 2).map(|at| at.offset), Some(0x12));
    assert_eq!(port.device.claim(BAR + 0x10_ffff, 2), None);
    assert_eq!(port.device.claim(u64::MAX, 8), None);
}

#[test]
fn masked_messages_wait() {
    let host = Arc::new(Host::default());
    let port = PciPort::new(device(&host, &PciState::default()));
    let sent = || std::mem::take(&mut *host.messages.lock().unwrap());
    let (bus, _) = port.bus();
    let pending = || {
        let mut data = [0xee; 8];
        bus.read(0x6000, &mut data);
        u64::from_le_bytes(data)
    };
    let notifier = port.device.core().notifier();
    port.bind(Vector::Queue(0));
    notifier.used(0);
    assert_eq!(sent(), [(0xfee0_0000, 1)]);
    // Masked by its own bit, then by the function's.
    let _ = bus.write(0x8000 + 16 + 12, &1_u32.to_le_bytes());
    notifier.used(0);
    notifier.used(0);
    assert_eq!((sent(), pending()), (vec![], 2));
    let _ = bus.write(0x8000 + 16 + 12, &0_u32.to_le_bytes());
    assert_eq!((sent(), pending()), (vec![(0xfee0_0000, 1)], 0));
    let msix = port.capability(0x11, None).unwrap();
    port.write_space(msix + 2, &0xc000_u16.to_le_bytes());
    notifier.config_changed();
    assert_eq!((sent(), pending()), (vec![], 1));
    // A table entry may change while masked; 8 bytes at once.
    let changes = notifier.message_changes();
    let _ = bus.write(0x8008, &[0x77, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(notifier.message_changes(), changes + 1);
    port.write_space(msix + 2, &0x8000_u16.to_le_bytes());
    assert_eq!((sent(), pending()), (vec![(0xfee0_0000, 0x77)], 0));
    // Vectors that are not there are none.
    port.set(Reg::QueueSel, 0);
    let _ = bus.write(0x1a, &7_u16.to_le_bytes());
    let mut data = [0; 2];
    bus.read(0x1a, &mut data);
    assert_eq!(data, [0xff; 2]);
    notifier.used(0);
    assert_eq!(sent(), []);
    // Frozen at DRIVER_OK, and forgotten with a reset; the table is not.
    port.bind(Vector::Queue(0));
    let features = crate::virtio::core::CORE_FEATURES;
    port.set(Reg::DriverFeaturesSel, 1);
    port.set(Reg::DriverFeatures, (features >> 32) as u32);
    for status in [3, 11, 15] {
        port.set(Reg::Status, status);
    }
    assert_eq!(port.get(Reg::Status), 15);
    let _ = bus.write(0x1a, &0_u16.to_le_bytes());
    assert_eq!(port.device.save().queue_vectors, [Some(1)]);
    port.set(Reg::Status, 0);
    assert_eq!(port.device.save().queue_vectors, [None]);
    assert_eq!(port.device.save().msix.entries[0].data, 0x77);
}

#[test]
fn the_kernel_sends_what_is_not_masked() {
    let host = Arc::new(Host::default());
    let port = PciPort::new(device(&host, &PciState::default()));
    let direct = || host.direct.lock().unwrap().clone();
    let (bus, _) = port.bus();
    let notifier = port.device.core().notifier();
    let event = EventFd::new(0).unwrap();
    port.bind(Vector::Queue(0));
    assert_eq!(direct(), []);
    notifier.direct(0, Some(&event));
    let message = (0xfee0_0000, 1);
    assert_eq!(direct(), [message]);
    // Masked by its own bit, by the function's, switched off: the device is to do it.
    let _ = bus.write(0x8000 + 16 + 12, &1_u32.to_le_bytes());
    assert_eq!(direct(), []);
    let _ = bus.write(0x8000 + 16 + 8, &0x55_u32.to_le_bytes());
    assert_eq!(direct(), [], "changes while it is masked");
    let _ = bus.write(0x8000 + 16 + 12, &0_u32.to_le_bytes());
    let message = (message.0, 0x55);
    assert_eq!(direct(), [message]);
    let msix = port.capability(0x11, None).unwrap();
    for control in [0xc000_u16, 0x4000, 0] {
        port.write_space(msix + 2, &control.to_le_bytes());
        assert_eq!(direct(), []);
        port.write_space(msix + 2, &0x8000_u16.to_le_bytes());
        assert_eq!(direct(), [message]);
    }
    // A queue without a vector has no message, nor has one that the device has back.
    let saved = port.device.save();
    port.set(Reg::Status, 0);
    assert_eq!(direct(), []);
    port.device.restore(&saved);
    assert_eq!(direct(), [message]);
    notifier.direct(0, None);
    assert_eq!(direct(), []);
}

#[test]
fn the_pin_works_without_messages() {
    let host = Arc::new(Host::default());
    let port = PciPort::new(device(&host, &PciState::default()));
    let asserted = || host.line.load(Ordering::SeqCst) == 1;
    assert_eq!(port.read_space(0x3c) >> 8 & 0xff, 1, "INTA");
    let msix = port.capability(0x11, None).unwrap();
    port.write_space(msix + 2, &[0, 0]);
    let notifier = port.device.core().notifier();
    notifier.used(0);
    assert!(asserted());
    assert_eq!(port.read_space(0x04) >> 19 & 1, 1, "interrupt status");
    let (bus, _) = port.bus();
    let mut isr = [0];
    bus.read(0x1000, &mut isr);
    assert_eq!(isr, [1]);
    assert!(!asserted());
    bus.read(0x1000, &mut isr);
    assert_eq!(isr, [0], "read clears");
    // Switched off it waits, and comes when it is on again.
    port.write_space(0x04, &0x406_u16.to_le_bytes());
    notifier.config_changed();
    assert!(!asserted());
    port.write_space(0x04, &0x006_u16.to_le_bytes());
    assert!(asserted());
    port.set(Reg::Status, 0);
    assert!(!asserted());
    assert_eq!(host.messages.lock().unwrap().len(), 0);
}

#[test]
fn configuration_access_reaches_the_bar() {
    let port = PciPort::new(device(&Arc::default(), &PciState::default()));
    // Memory is off: this is for firmware that has not assigned it.
    port.write_space(0x04, &[0, 0]);
    let cap = port.capability(9, Some(5)).unwrap();
    let access = |offset: u32, len: u32| {
        port.write_space(cap + 8, &offset.to_le_bytes());
        port.write_space(cap + 12, &len.to_le_bytes());
    };
    access(0x12, 2);
    assert_eq!(port.read_space(cap + 16), 1, "number of queues");
    access(0x14, 1);
    port.write_space(cap + 16, &[3]);
    assert_eq!(port.get(Reg::Status), 3);
    assert_eq!(port.read_space(cap + 16), 3);
    for (offset, len) in [
        (0x13, 2),
        (0x12, 3),
        (0xffff, 4),
        (0xffff_fffc, 4),
        (0, 0),
        (0, 8),
    ] {
        access(offset, len);
        port.write_space(cap + 16, &[0; 4]);
        assert_eq!(port.read_space(cap + 16), 0);
    }
    assert_eq!(port.get(Reg::Status), 3);
}

#[test]
fn ports_reach_the_same_space() {
    let bus = crate::pci::PciBus::new();
    let function = device(&Arc::default(), &PciState::default());
    assert_eq!(bus.insert(1, function), Ok(()));
    let bus = Arc::new(bus);
    let ports = crate::pci::ConfigPorts::new(Arc::clone(&bus), 0);
    let read = |address: u32, port: u64, len: usize| {
        let _ = ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        ports.read(port, &mut data[..len]);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(0x8000_0800, 4, 4), 0x1044_1af4);
    assert_eq!(read(0x8000_0800, 6, 2), 0x1044);
    assert_eq!(read(0x8000_0800, 5, 2), 0xffff, "crosses");
    assert_eq!(read(0x0000_0800, 4, 4), u32::MAX, "not enabled");
    assert_eq!(read(0x8001_0800, 4, 4), u32::MAX, "bus 1");
    assert_eq!(read(0x8000_0900, 4, 4), u32::MAX, "function 1");
    assert_eq!(ports.save(), 0x8000_0900);
    let _ = ports.write(0, &0x8000_0804_u32.to_le_bytes());
    let _ = ports.write(4, &[6, 0]);
    assert_eq!(read(0x8000_0804, 4, 2), 6);
}

proptest! {
    #[test]
    fn any_access_is_survived_and_saved(
        accesses in prop::collection::vec(
            (0..0x1_1000_u64, prop::collection::vec(any::<u8>(), 1..9)),
            0..100,
        ),
    ) {
        let host = Arc::default();
        let port = PciPort::new(device(&host, &PciState::default()));
        let (bus, _) = port.bus();
        for (offset, data) in accesses {
            let _ = bus.write(offset, &data);
            bus.read(offset, &mut data.clone());
        }
        let state = port.device.save();
        let json = serde_json::to_string(&state).unwrap();
        let loaded: PciState = serde_json::from_str(&json).unwrap();
        let again = device(&host, &loaded);
        prop_assert_eq!(again.save(), state);
        for at in [BAR, BAR + 0x4000, 0, u64::MAX - 8] {
            prop_assert_eq!(again.claim(at, 4), port.device.claim(at, 4));
        }
    }

    #[test]
    fn any_state_can_be_loaded(
        config in prop::collection::vec(any::<u8>(), 0..300),
        entries in 0..5_usize,
        vector in any::<Option<u16>>(),
    ) {
        let state = PciState {
            config: serde_json::from_value(serde_json::json!(config)).unwrap(),
            msix: MsixState { control: 0xffff, entries: vec![Default::default(); entries] },
            config_vector: vector,
            queue_vectors: vec![vector; entries],
        };
        let device = device(&Arc::default(), &state);
        device.core().notifier().config_changed();
        let mut id = [0; 4];
        device.read_config(0, &mut id);
        prop_assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
    }
}
