//! Against the backend in `peer`, over both transports.

use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::peer::{Fault, Peer, PeerOptions, request};
use super::*;
use crate::virtio::GuestRam;
use crate::virtio::core::{NEEDS_RESET, Reg, VirtioState};
use crate::virtio::driver::{RAM, RAM_LEN, Rig, TRANSPORTS, Transport, Vq};

const HEADER: u64 = 0x2_0000;
const DATA: u64 = RAM[1];
const STATUS: u64 = 0x2_1000;

fn shared_ram() -> GuestRam {
    let files = RAM.map(|base| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(RAM_LEN).unwrap();
        (
            GuestAddress(base),
            RAM_LEN as usize,
            Some(FileOffset::new(file, 0)),
        )
    });
    GuestMemoryMmap::from_ranges_with_files(files).unwrap()
}

struct Setup {
    dir: TempDir,
    peer: Option<Peer>,
}

impl Setup {
    fn new(options: PeerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut setup = Self { dir, peer: None };
        setup.listen(options);
        setup
    }

    fn listen(&mut self, options: PeerOptions) {
        self.peer = Some(Peer::start(&self.dir.path().join("s"), 64, options));
    }

    fn peer(&self) -> &Peer {
        self.peer.as_ref().unwrap()
    }

    fn options(&self) -> VhostUserOptions {
        VhostUserOptions {
            socket: self.dir.path().join("s"),
            flush: true,
            queues: None,
            vcpus: 2,
            spawn: |body| {
                std::thread::spawn(body);
                Ok(())
            },
        }
    }

    fn open(&self) -> Result<(VhostUserBlock, VhostUserHandle), VhostUserError> {
        VhostUserBlock::new(&self.options())
    }

    /// What is wrong with a backend that does `fault`.
    fn refused(&self, fault: Fault) -> String {
        self.peer().set_fault(Some(fault));
        let error = self.open().unwrap_err();
        let source = std::error::Error::source(&error).unwrap();
        format!("{error}: {source}")
    }
}

struct Guest {
    rig: Rig,
    vqs: Vec<Vq>,
    handle: VhostUserHandle,
}

impl Guest {
    fn new(transport: Transport, setup: &Setup) -> Self {
        let (device, handle) = setup.open().unwrap();
        let state = VirtioState::default();
        let rig = Rig::with(transport, Box::new(device), shared_ram(), state);
        let vqs = rig.start(None);
        rig.run(0);
        Self { rig, vqs, handle }
    }

    /// A request of `kind` in queue `queue`: its status.
    fn ask(&mut self, queue: usize, kind: u32, sector: u64, len: u32) -> u8 {
        let ram = &self.rig.ram;
        ram.write_obj([u64::from(kind), sector], GuestAddress(HEADER))
            .unwrap();
        ram.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        let mut buffers = vec![(HEADER, 16, false)];
        if len > 0 {
            buffers.push((DATA, len, kind == 0));
        }
        buffers.push((STATUS, 1, true));
        self.rig.irq.take();
        let vq = &mut self.vqs[queue];
        vq.set_used_event(vq.used_index());
        vq.add(&buffers);
        self.rig.kick(&self.vqs[queue]);
        for _ in 0..12_000 {
            self.rig.run(5);
            if self.vqs[queue].used().len() == 1 {
                // The interrupt comes behind the used ring.
                let interrupted = (0..12_000).any(|_| {
                    self.rig.run(5);
                    self.rig.irq.take() > 0
                });
                assert!(interrupted);
                return self.rig.ram.read_obj(GuestAddress(STATUS)).unwrap();
            }
        }
        panic!("no answer");
    }

    fn needs_reset(&self) -> bool {
        self.rig.port.get(Reg::Status) & u32::from(NEEDS_RESET) != 0
    }

    fn fails(&self) {
        for _ in 0..12_000 {
            self.rig.run(5);
            if self.needs_reset() {
                return;
            }
        }
        panic!("the device is well");
    }
}

fn write(guest: &mut Guest, queue: usize, sector: u64, byte: u8) {
    guest
        .rig
        .ram
        .write_slice(&[byte; 1024], GuestAddress(DATA))
        .unwrap();
    assert_eq!(guest.ask(queue, 1, sector, 1024), 0);
}

fn read(guest: &mut Guest, sector: u64) -> u8 {
    guest
        .rig
        .ram
        .write_slice(&[0; 1024], GuestAddress(DATA))
        .unwrap();
    assert_eq!(guest.ask(0, 0, sector, 1024), 0);
    let mut data = [0; 1024];
    guest
        .rig
        .ram
        .read_slice(&mut data, GuestAddress(DATA))
        .unwrap();
    assert!(data.iter().all(|byte| *byte == data[0]));
    data[0]
}

#[test]
fn requests_pass_through_pauses_and_resets() {
    for transport in TRANSPORTS {
        let setup = Setup::new(PeerOptions::default());
        let mut guest = Guest::new(transport, &setup);
        assert_eq!(guest.vqs.len(), 2);
        for round in 1..6 {
            write(&mut guest, usize::from(round) % 2, round.into(), round);
            assert_eq!(setup.peer().read(512 * usize::from(round), 1), [round]);
            assert_eq!(read(&mut guest, round.into()), round);
            assert_eq!(guest.ask(1, 4, 0, 0), 0);
            assert_eq!(setup.peer().flushes(), u32::from(round));
            assert_ne!(guest.ask(0, 0, 64, 1024), 0, "behind the end");
            match round {
                1 | 2 => {
                    guest.rig.core.pause();
                    guest.rig.core.resume();
                    guest.rig.run(0);
                }
                _ => {
                    guest.vqs = guest.rig.start(None);
                    guest.rig.run(0);
                }
            }
            assert!(!guest.needs_reset());
        }
        assert_eq!(setup.peer().count(request::GET_VRING_BASE), 2 * 5);
        let counters = guest.handle.counters();
        let of = |name| counters.iter().find(|(other, _)| *other == name).unwrap().1;
        assert!(of("init_time_us") > 0 && of("activate_time_us") > 0);
        assert_eq!(of("activate_fails"), 0);
    }
}

#[test]
fn features_are_those_that_both_have() {
    // INDIRECT_DESC and EVENT_IDX are missing, and the acknowledgements of the protocol, and queues.
    let setup = Setup::new(PeerOptions {
        features: 1 << 5 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 30 | 1 << 32,
        protocol: 1 << 9,
        queues: 1,
    });
    let mut options = setup.options();
    let (device, _) = VhostUserBlock::new(&options).unwrap();
    assert_eq!(device.traits().features, 1 << 5 | 1 << 9);
    assert_eq!(device.traits().withheld, 3 << 28);
    drop(device);
    options.flush = false;
    let (device, _) = VhostUserBlock::new(&options).unwrap();
    assert_eq!(device.traits().features, 1 << 5);
    drop(device);
    options.queues = Some(2);
    let error = VhostUserBlock::new(&options).unwrap_err().to_string();
    assert!(
        error.contains("2 queues") && error.contains("has 1"),
        "{error}"
    );
    for transport in TRANSPORTS {
        let mut guest = Guest::new(transport, &setup);
        write(&mut guest, 0, 3, 7);
        assert_eq!(read(&mut guest, 3), 7);
    }
}

#[test]
fn the_driver_hears_of_another_size() {
    let setup = Setup::new(PeerOptions::default());
    let guest = Guest::new(Transport::Mmio, &setup);
    let capacity = |guest: &Guest| {
        let mut sectors = [0; 8];
        guest.rig.port.read_config(0, &mut sectors);
        u64::from_le_bytes(sectors)
    };
    assert_eq!(capacity(&guest), 64);
    let generation = guest.rig.port.get(Reg::ConfigGeneration);
    setup.peer().resize(128);
    assert_eq!(capacity(&guest), 64);
    assert_eq!(guest.handle.reread().unwrap(), 128);
    guest.rig.run(0);
    assert_eq!(capacity(&guest), 128);
    assert_ne!(guest.rig.port.get(Reg::ConfigGeneration), generation);
    assert_eq!(guest.rig.port.get(Reg::InterruptStatus) & 2, 2);
    // The number of queues is that of the device.
    let mut queues = [0; 2];
    guest.rig.port.read_config(34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 2);
    setup
        .peer()
        .set_fault(Some(Fault::Refuse(request::GET_CONFIG)));
    guest.handle.reread().unwrap_err();
    assert_eq!(capacity(&guest), 128);
    let counters = guest.handle.counters();
    assert!(counters.contains(&("cfg_fails", 1)), "{counters:?}");
    assert!(!guest.needs_reset());
}

#[test]
fn a_backend_that_goes_fails_the_device_until_there_is_another() {
    for transport in TRANSPORTS {
        let mut setup = Setup::new(PeerOptions::default());
        let mut guest = Guest::new(transport, &setup);
        write(&mut guest, 0, 1, 1);
        setup.peer = None;
        guest.fails();
        guest.vqs = guest.rig.start(None);
        guest.fails();
        guest.handle.reread().unwrap_err();
        let counters = guest.handle.counters();
        assert!(counters.contains(&("activate_fails", 1)), "{counters:?}");
        setup.listen(PeerOptions {
            features: 1 << 32 | 1 << 30,
            ..PeerOptions::default()
        });
        guest.vqs = guest.rig.start(None);
        guest.fails();
        setup.listen(PeerOptions::default());
        guest.vqs = guest.rig.start(None);
        guest.rig.run(0);
        write(&mut guest, 0, 1, 2);
        assert_eq!(setup.peer().read(512, 1), [2]);
        assert_eq!(guest.handle.reread().unwrap(), 64);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn a_backend_that_fails_at_the_start_or_the_end_fails_the_device() {
    use request::*;
    let setup = Setup::new(PeerOptions::default());
    for at in [
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ] {
        for fault in [Fault::Refuse(at), Fault::Close(at), Fault::Wrong(at)] {
            setup.peer().set_fault(None);
            let (device, handle) = setup.open().unwrap();
            let state = VirtioState::default();
            let rig = Rig::with(Transport::Mmio, Box::new(device), shared_ram(), state);
            setup.peer().set_fault(Some(fault));
            let vqs = rig.start(None);
            let guest = Guest { rig, vqs, handle };
            guest.fails();
        }
    }
    setup.peer().set_fault(None);
    let mut guest = Guest::new(Transport::Pci, &setup);
    write(&mut guest, 0, 1, 1);
    setup.peer().set_fault(Some(Fault::Close(GET_VRING_BASE)));
    guest.rig.core.pause();
    assert!(guest.needs_reset());
}

#[test]
fn backends_that_lie_are_refused() {
    use request::*;
    let setup = Setup::new(PeerOptions::default());
    for at in [
        GET_FEATURES,
        GET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
        GET_CONFIG,
    ] {
        for fault in [Fault::Close(at), Fault::Wrong(at)] {
            let error = setup.refused(fault);
            assert!(error.contains("vhost-user backend at"), "{error}");
        }
    }
    for size in [1, 59, 61, 256, 4000] {
        let error = setup.refused(Fault::Config(size));
        assert!(
            error.contains("tell the configuration space"),
            "{size}: {error}"
        );
    }
    for (features, protocol, lacks) in [
        (1 << 30, 1 << 9, "VIRTIO_F_VERSION_1"),
        (1 << 32, 1 << 9, "F_PROTOCOL_FEATURES"),
        (1 << 30 | 1 << 32, 1 << 3, "F_CONFIG"),
    ] {
        let setup = Setup::new(PeerOptions {
            features,
            protocol,
            queues: 1,
        });
        let error = setup.open().unwrap_err().to_string();
        assert!(error.contains(lacks), "{error}");
    }
}

#[test]
fn a_backend_without_answers_is_not_waited_for_for_ever() {
    let setup = Setup::new(PeerOptions::default());
    let begun = Instant::now();
    let error = setup.refused(Fault::Mute(request::GET_CONFIG));
    assert!(error.contains("in time"), "{error}");
    assert!((PATIENCE..PATIENCE + Duration::from_secs(60)).contains(&begun.elapsed()));
}

#[test]
fn nobody_there_and_memory_of_one_process_are_said() {
    let setup = Setup::new(PeerOptions::default());
    let mut options = setup.options();
    for name in ["missing", "file", &"long".repeat(30)] {
        options.socket = setup.dir.path().join(name);
        if name == "file" {
            std::fs::write(&options.socket, "").unwrap();
        }
        let error = VhostUserBlock::new(&options).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("start it first"),
            "{error}"
        );
    }
    let (device, handle) = setup.open().unwrap();
    let rig = Rig::new(Transport::Mmio, Box::new(device));
    let vqs = rig.start(None);
    let guest = Guest { rig, vqs, handle };
    guest.fails();
}
