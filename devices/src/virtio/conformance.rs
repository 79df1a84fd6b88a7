//! What holds for every device on every transport. A device joins by its line in [`devices`].

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::balloon::BalloonOptions;
use super::balloon::tests::options as balloon_options;
use super::block::tests::temporary_disk;
use super::block::{BlockOptions, EngineKind};
use super::console::tests::options as console_options;
use super::core::{DRIVER_OK, Half, NEEDS_RESET, Reg, Ring, VirtioState};
use super::device::{DeviceState, VirtioDevice};
use super::driver::{RAM, RAM_LEN, Rig, TRANSPORTS, Transport, Vq, ram, reused_ram, write_desc};
use super::fs::FsOptions;
use super::mem::tests::options as mem_options;
use super::net::tests::on_socket;
use super::pmem::tests::options as pmem_options;
use super::registry::{DeviceConfig, build};
use super::rtc::tests::options as rtc_options;
use super::vsock::VsockEnd;
use super::vsock::tests::options as vsock_options;

/// Makes one device again and again, on the same host resources.
type Make = Box<dyn Fn(&DeviceState) -> Box<dyn VirtioDevice>>;

/// Every device of the registry.
fn devices() -> Vec<(&'static str, Make)> {
    fn make(config: impl Fn() -> DeviceConfig + 'static) -> Make {
        Box::new(move |state| build(config(), state).unwrap().0)
    }
    let block = |engine, queues, read_only| {
        make(move || {
            let options = BlockOptions {
                engine,
                queues,
                ..BlockOptions::default()
            };
            DeviceConfig::Block(temporary_disk(1 << 20, read_only), options)
        })
    };
    vec![
        ("entropy", make(|| DeviceConfig::Entropy(None))),
        (
            "vsock",
            make(|| DeviceConfig::Vsock(VsockEnd::bind(vsock_options()).unwrap())),
        ),
        ("rtc", make(|| DeviceConfig::Rtc(rtc_options()))),
        ("console", make(|| DeviceConfig::Console(console_options()))),
        ("block, io_uring", block(EngineKind::IoUring, 2, false)),
        ("block, read-only", block(EngineKind::Auto, 1, true)),
        ("block, sync", block(EngineKind::Sync, 1, false)),
        ("net", make(|| DeviceConfig::Net(on_socket().0))),
        (
            "fs",
            make(|| DeviceConfig::Fs(FsOptions::new("share", env!("CARGO_MANIFEST_DIR")))),
        ),
        ("mem", make(|| DeviceConfig::Mem(mem_options()))),
        (
            "pmem",
            make(|| DeviceConfig::Pmem(pmem_options(5000, false))),
        ),
        ("balloon", make(|| DeviceConfig::Balloon(balloon_options()))),
        (
            "balloon, huge pages",
            make(|| {
                DeviceConfig::Balloon(BalloonOptions {
                    host_page: 1 << 16,
                    ..balloon_options()
                })
            }),
        ),
    ]
}

fn for_all(test: impl Fn(&str, Transport, &Make)) {
    for (name, make) in devices() {
        for transport in TRANSPORTS {
            test(name, transport, &make);
        }
    }
}

fn new(transport: Transport, make: &Make) -> Rig {
    let state = VirtioState::default();
    Rig::with(transport, make(&DeviceState::Reset), reused_ram(), state)
}

#[test]
fn reset_is_new() {
    for_all(|name, transport, make| {
        let rig = new(transport, make);
        let fresh = rig.core.save();
        rig.start(None);
        for offset in 0..64 {
            rig.port.write_config(offset, &[0]);
        }
        assert_ne!(rig.core.save(), fresh, "{name}");
        rig.port.set(Reg::Status, 0);
        assert_eq!(rig.core.save(), fresh, "{name} {transport:?}");
        assert_eq!(rig.port.get(Reg::Status), 0);
    });
}

#[test]
fn stop_and_start_is_identity() {
    for_all(|name, transport, make| {
        let rig = new(transport, make);
        let mut vqs = rig.start(None);
        for vq in &mut vqs {
            vq.add(&[(0x8_0000, 64, false), (0x9_0000, 64, true)]);
            rig.kick(vq);
        }
        rig.run(10);
        let running = rig.core.save();
        rig.core.pause();
        assert_eq!(rig.core.save(), running, "{name} {transport:?}");
        rig.core.resume();
        // A repeated interrupt is all that a resume may add.
        let VirtioState { isr, .. } = running;
        let mut resumed = rig.core.save();
        resumed.isr = isr;
        assert_eq!(resumed, running, "{name} {transport:?}");
    });
}

#[test]
fn save_and_new_is_identity() {
    for_all(|name, transport, make| {
        let rig = new(transport, make);
        for running in [false, true] {
            if running {
                let mut vqs = rig.start(None);
                for vq in &mut vqs {
                    vq.add(&[(0x8_0000, 64, false), (0x9_0000, 64, true)]);
                    rig.kick(vq);
                }
                rig.run(10);
            }
            let state = rig.core.save();
            let json = serde_json::to_string(&state).unwrap();
            let loaded: VirtioState = serde_json::from_str(&json).unwrap();
            assert_eq!(loaded, state);
            let pci = rig.transport_state();
            let json = serde_json::to_string(&pci).unwrap();
            let loaded = (loaded, serde_json::from_str(&json).unwrap());
            rig.core.pause();
            let device = make(&state.device);
            let again = Rig::restored(transport, device, rig.ram.clone(), loaded);
            assert_eq!(again.core.save(), state, "{name} {transport:?}");
            assert_eq!(again.transport_state(), pci, "{name}");
            // An interrupt for each queue, since any may have been on its way.
            assert_eq!(again.irq.take(), 0, "{name} {transport:?}");
            again.core.resume();
            let ready = state.queues.iter().filter(|queue| queue.ready).count();
            assert!(again.irq.take() >= ready, "{name} {transport:?}");
            again.core.pause();
            let queues = again.core.save().queues;
            assert_eq!(queues, state.queues, "{name} {transport:?}");
        }
    });
}

#[test]
fn queue_registers_freeze_at_driver_ok() {
    for_all(|name, transport, make| {
        let rig = new(transport, make);
        rig.start(None);
        let before = rig.core.save();
        for queue in 0..=u16::try_from(before.queues.len()).unwrap() {
            rig.set_queue(queue, 4, [0x10, 0x20, 0x30]);
            rig.port.set(Reg::QueueReady, 0);
        }
        let after = rig.core.save();
        assert_eq!(after.queues, before.queues, "{name} {transport:?}");
    });
}

#[test]
fn a_queue_is_not_made_ready_after_driver_ok() {
    for_all(|name, transport, make| {
        let rig = new(transport, make);
        rig.negotiate(None);
        rig.driver_ok();
        let before = rig.core.save();
        for queue in 0..u16::try_from(before.queues.len()).unwrap() {
            let vq = Vq::new(rig.ram.clone(), queue, 4);
            rig.set_queue(queue, 4, vq.rings());
            assert_eq!(rig.port.get(Reg::QueueReady), 0);
            rig.kick(&vq);
        }
        rig.run(0);
        let after = rig.core.save();
        assert_eq!(after.queues, before.queues, "{name} {transport:?}");
    });
}

/// One step of a hostile guest.
#[derive(Clone, Debug)]
enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Register(Reg, u32),
    /// Status bits as a driver would set them.
    Start,
    Run,
    Pause,
}

fn register() -> impl Strategy<Value = Reg> {
    let half = || prop_oneof![Just(Half::Low), Just(Half::High)];
    let ring = prop_oneof![Just(Ring::Desc), Just(Ring::Avail), Just(Ring::Used)];
    prop_oneof![
        Just(Reg::Status),
        Just(Reg::QueueSel),
        Just(Reg::QueueSize),
        Just(Reg::QueueReady),
        Just(Reg::QueueNotify),
        Just(Reg::DriverFeatures),
        Just(Reg::DriverFeaturesSel),
        Just(Reg::DeviceFeaturesSel),
        (ring, half()).prop_map(|(r, h)| Reg::QueueAddr(r, h)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![0..0x200_u64, 0..0x9000_u64, any::<u64>()];
    let width = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8), 1..9_usize];
    let data = prop::collection::vec(any::<u8>(), 1..9);
    let value = prop_oneof![0..16_u32, Just(0xffff), Just(u32::MAX), any::<u32>()];
    prop_oneof![
        (offset.clone(), width).prop_map(|(o, w)| Step::Read(o, w)),
        (offset, data).prop_map(|(o, d)| Step::Write(o, d)),
        (register(), value).prop_map(|(r, v)| Step::Register(r, v)),
        Just(Step::Start),
        Just(Step::Run),
        Just(Step::Pause),
    ]
}

/// A descriptor as a hostile driver writes it.
#[derive(Clone, Debug)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x8000..RAM_LEN,
        // Requests, where `attack` puts them.
        4 => (0..256_u64).prop_map(|i| 0x8000 + 16 * i),
        1 => RAM_LEN - 64..RAM_LEN + 64,
        1 => RAM[1]..RAM[1] + RAM_LEN + 64,
        1 => any::<u64>(),
        1 => u64::MAX - 64..=u64::MAX,
        // The rings themselves.
        1 => 0x1000..0x2000_u64,
    ]
}

fn desc() -> impl Strategy<Value = Desc> {
    let len = prop_oneof![
        0..64_u32,
        Just(16),
        Just(512),
        0..0x2_0000_u32,
        Just(u32::MAX),
        any::<u32>()
    ];
    let flags = prop_oneof![8 => 0..4_u16, 2 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    (address(), len, flags, next).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    })
}

#[derive(Clone, Debug)]
struct Hostile {
    descs: Vec<Desc>,
    /// Bytes all over the buffers, so that requests parse now and then.
    header: [u32; 4],
    heads: Vec<u16>,
    avail: Option<u16>,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    let head = prop_oneof![8 => 0..16_u16, 1 => any::<u16>(), 1 => Just(0xffff)];
    let word = || prop_oneof![4 => 0..16_u32, 1 => any::<u32>()];
    (
        prop::collection::vec(desc(), 16),
        [word(), word(), word(), word()],
        prop::collection::vec(head, 0..20),
        prop::option::weighted(0.2, any::<u16>()),
    )
        .prop_map(|(descs, header, heads, avail)| Hostile {
            descs,
            header,
            heads,
            avail,
        })
}

fn attack(rig: &Rig, vq: &mut Vq, hostile: &Hostile) {
    for at in (0x8000..0x9000).step_by(16) {
        rig.ram.write_obj(hostile.header, GuestAddress(at)).unwrap();
    }
    for (at, d) in hostile.descs.iter().enumerate() {
        // Once in the ring and once where an indirect table may be looked for.
        vq.raw_desc(at as u16, d.addr, d.len, d.flags, d.next);
        let to = GuestAddress(0xa000 + 16 * at as u64);
        write_desc(&rig.ram, to, d.addr, d.len, d.flags & 3, d.next);
    }
    for head in &hostile.heads {
        vq.publish(*head);
    }
    if let Some(avail) = hostile.avail {
        vq.set_avail(avail);
    }
    rig.kick(vq);
    rig.run(0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_register_access_is_survived(steps in prop::collection::vec(step(), 1..60)) {
        for_all(|_, transport, make| {
            let rig = new(transport, make);
            let (bus, len) = rig.port.bus();
            for step in &steps {
                match step {
                    Step::Read(offset, width) => {
                        bus.read(offset % len, &mut [0xff; 8][..*width]);
                    }
                    Step::Write(offset, data) => {
                        let _ = bus.write(offset % len, data);
                    }
                    Step::Register(reg, value) => rig.port.set(*reg, *value),
                    Step::Start => drop(rig.start(None)),
                    Step::Run => rig.run(0),
                    Step::Pause => {
                        rig.core.pause();
                        rig.core.resume();
                    }
                }
            }
            // Whatever the guest did, what can be saved can be restored.
            let state = rig.core.save();
            let again = Rig::with(transport, make(&state.device), rig.ram.clone(), state.clone());
            assert_eq!(again.core.save(), state);
            // And a reset brings the device back.
            rig.start(None);
            let status = rig.port.get(Reg::Status) as u8;
            assert_eq!(status & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
        });
    }

    #[test]
    fn hostile_queues_are_survived(attacks in prop::collection::vec(hostile(), 1..4)) {
        for_all(|name, transport, make| {
            let rig = new(transport, make);
            let mut vqs = rig.start(None);
            for hostile in &attacks {
                for vq in &mut vqs {
                    attack(&rig, vq, hostile);
                }
                rig.core.pause();
                rig.core.resume();
            }
            rig.core.pause();
            // A reset brings the device back, and it still works on the queue.
            let vqs = rig.start(None);
            assert!(!vqs.is_empty());
            let status = rig.port.get(Reg::Status) as u8;
            assert_eq!(status & (DRIVER_OK | NEEDS_RESET), DRIVER_OK, "{name}");
        });
    }
}

#[test]
fn ram_is_guarded() {
    // The hostile tests rely on it: what is outside of RAM is outside of the address space.
    let ram = ram();
    assert!(ram.write_obj(1_u8, GuestAddress(RAM_LEN)).is_err());
    assert!(
        ram.write_obj(1_u8, GuestAddress(RAM[1] + RAM_LEN - 1))
            .is_ok()
    );
}
