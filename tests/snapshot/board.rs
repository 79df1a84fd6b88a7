//! All devices of a machine at once: saved, made again from that and saved again.

use std::io;
use std::path::Path;
use std::sync::Arc;

use arch::layout;
use arch::memory::GuestMemory;
use arch::vm::IrqchipMode;
use bulle::board::attach::Machine;
use bulle::board::plan::plan;
use bulle::board::{Board, BoardState, SerialEnd, Wiring};
use bulle::config::{Config, Irqchip as Mode, Spec, Transport};
use bulle::vm::{irq::Irqchip, memory};
use devices::bus::Effect;
use devices::mmds::Mmds;
use kvm_ioctls::{Kvm, VmFd};
use serde_json::json;
use vmm_sys_util::eventfd::EventFd;

/// One of each device that needs nothing but files.
fn spec(dir: &Path, transport: &str, irqchip: &str) -> Spec {
    for name in ["disk", "other", "pmem"] {
        std::fs::write(dir.join(name), vec![1; 3 << 20]).unwrap();
    }
    let _ = std::fs::remove_file(dir.join("vsock"));
    let _ = std::fs::remove_file(dir.join("vsock.seqpacket"));
    let config = json!({
        "boot-source": { "kernel_image_path": "/dev/null" },
        "machine-config": {
            "mem_size_mib": 64,
            "virtio_transport": transport,
            "irqchip": irqchip,
            "vcpu_count": 2,
        },
        "drives": [
            { "drive_id": "first", "path_on_host": dir.join("disk") },
            { "drive_id": "second", "path_on_host": dir.join("other"), "is_read_only": true },
        ],
        "shares": [{ "tag": "tree", "path_on_host": dir }],
        "entropy": {},
        "vsock": { "guest_cid": 7, "uds_path": dir.join("vsock") },
        "rtc": {},
        "watchdog": {},
        "pmem": [{ "id": "pmem", "path_on_host": dir.join("pmem") }],
        "memory-hotplug": { "total_size_mib": 256 },
        "balloon": { "amount_mib": 8, "deflate_on_oom": true },
        "ports": [{ "name": "port", "to": { "file": dir.join("port") } }],
    });
    let config: Config = serde_json::from_value(config).unwrap();
    config.validate().unwrap()
}

/// A machine without processors.
struct Bench {
    board: Board,
    _memory: GuestMemory,
    _vm: Arc<VmFd>,
}

impl Bench {
    fn new(spec: &Spec, state: BoardState, backwards: bool) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = Arc::new(kvm.create_vm().unwrap());
        let machine = spec.machine();
        let mode = match machine.irqchip {
            Mode::Split => IrqchipMode::Split,
            Mode::Kernel => IrqchipMode::Kernel,
        };
        let capabilities = arch::capabilities::check(&kvm).unwrap();
        arch::vm::before_memory(&vm).unwrap();
        let memory = memory::map(machine).unwrap();
        memory::register(&vm, &memory).unwrap();
        arch::vm::create_irqchip(&vm, mode, &capabilities).unwrap();
        let end = || SerialEnd {
            out: Box::new(io::sink()),
            drained: EventFd::new(0).unwrap(),
        };
        let (mut devices, _) = plan(spec, &Arc::new(Mmds::new(0))).unwrap();
        if backwards {
            devices.reverse();
        }
        let mut wiring = Wiring {
            console: end(),
            agent: end(),
            watchdog: spec.config().watchdog,
            devices,
            io: Vec::new(),
            boot_timer: None,
        };
        let irqchip = Irqchip::new(machine.irqchip, &vm, state.ioapic());
        let on = Machine {
            vm: &vm,
            irqchip: &irqchip,
            memory: &memory,
        };
        let transport = machine.virtio_transport;
        state
            .arrange(&mut wiring, transport, machine.irqchip)
            .unwrap();
        let board = Board::new(&on, transport, wiring, &state).unwrap();
        Self {
            board,
            _memory: memory,
            _vm: vm,
        }
    }

    fn out(&self, port: u16, bytes: &[u8]) {
        assert_eq!(self.board.pio.write(port.into(), bytes), Some(Effect::None));
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        assert_eq!(self.board.mmio.write(address, bytes), Some(Effect::None));
    }

    /// Gives every device something to keep.
    fn scribble(&self, transport: Transport) {
        self.out(layout::COM1_PORT + 3, &[0x1b]);
        self.out(layout::COM2_PORT + 7, &[0x77]);
        self.out(layout::I8042_PORT + 4, &[0x20]);
        self.out(layout::RTC_PORT, &[0x40]);
        self.out(layout::RTC_PORT + 1, &[0x99]);
        self.board.power.press_power_button();
        let run = layout::WATCHDOG_PORT + layout::WATCHDOG_CONTROL;
        self.out(run, &1_u32.to_le_bytes());
        let devices = self.board.devices.list().len() as u64;
        for index in 0..devices {
            match transport {
                Transport::Mmio => self.start(layout::VIRTIO_MMIO_START + index * 0x1000),
                Transport::Pci => self.start_function(index),
            }
        }
        if transport == Transport::Pci {
            self.out(layout::PCI_CONFIG_PORT, &0x8000_0810_u32.to_le_bytes());
        }
        if self
            .board
            .devices
            .list()
            .iter()
            .any(|d| d.core.save().status != 11)
        {
            panic!("a device is not where its driver left it");
        }
    }

    /// A driver on its way: features agreed on, and the first queue ready.
    fn start(&self, window: u64) {
        let registers: [(u64, u32); 13] = [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, 4),
            (0x80, 0x10_0000),
            (0x90, 0x10_1000),
            (0xa0, 0x10_2000),
            (0x44, 1),
            (0x14, 1),
            (0xac, 5),
        ];
        for (offset, value) in registers {
            self.write(window + offset, &value.to_le_bytes());
        }
    }

    fn start_function(&self, index: u64) {
        let space = layout::PCI_ECAM_START + ((index + 1) << 15);
        self.write(space + 4, &6_u16.to_le_bytes());
        let bar = layout::PCI_MEMORY_START + index * 0x1_0000;
        self.write(bar + 0x14, &[1]);
        self.write(bar + 0x14, &[3]);
        self.write(bar + 8, &1_u32.to_le_bytes());
        self.write(bar + 0xc, &1_u32.to_le_bytes());
        self.write(bar + 0x14, &[11]);
        self.write(bar + 0x18, &4_u16.to_le_bytes());
        self.write(bar + 0x1a, &1_u16.to_le_bytes());
        self.write(bar + 0x20, &0x10_0000_u32.to_le_bytes());
        // A message of its second vector, which stays masked.
        self.write(bar + 0x8018, &(index as u32).to_le_bytes());
    }
}

#[test]
fn what_is_saved_is_what_is_made_of_it() {
    for transport in ["mmio", "pci"] {
        for irqchip in ["split", "kernel"] {
            let dir = tempfile::tempdir().unwrap();
            let spec = spec(dir.path(), transport, irqchip);
            let bench = Bench::new(&spec, BoardState::default(), false);
            let fresh = bench.board.save();
            assert_eq!(fresh.keyboard, BoardState::default().keyboard);
            bench.scribble(spec.machine().virtio_transport);
            bench.board.devices.pause();
            let state = bench.board.save();
            assert_ne!(state, fresh);
            let places = bench.board.devices.windows().to_vec();
            // Locks of disks and sockets are free again.
            drop(bench);
            let json = serde_json::to_string(&state).unwrap();
            let loaded: BoardState = serde_json::from_str(&json).unwrap();
            assert_eq!(loaded, state, "{transport} {irqchip}");
            // Whatever the order of the configuration, devices come to their old places.
            let again = Bench::new(&spec, loaded, true);
            assert_eq!(again.board.save(), state, "{transport} {irqchip}");
            assert_eq!(again.board.devices.windows(), places);
            again.board.devices.resume();
            again.board.devices.pause();
            assert_eq!(again.board.save(), state, "{transport} {irqchip}");
        }
    }
}
