//! `pci`: any accesses to configuration space, by ECAM and by ports, and to the window of BARs and
//! the MSI-X tables in it.

use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::ioapic::MsiSink;
use devices::pci::{ConfigPorts, Ecam, PciBus, PciWindow};
use devices::virtio::Memory;
use devices::virtio::core::{Parts, VirtioCore, VirtioState};
use devices::virtio::driver::{BAR, reused_ram};
use devices::virtio::notifier::{Vector, VirtioInterrupt};
use devices::virtio::registry::{DeviceConfig, build};
use devices::virtio::transport::pci::{BAR_LEN, PciInterrupt, PciState, VirtioPci};
use devices::virtio::worker::{IoLoop, LoopBackend};

use super::input::Input;

struct Messages;

impl MsiSink for Messages {
    fn send(&self, _: u64, _: u32) {}
}

/// A function with an entropy device, whose BAR is number `index`.
fn function(
    index: u64,
    state: &PciState,
    core: VirtioState,
) -> (Arc<VirtioPci>, Arc<PciInterrupt>) {
    let built = build(DeviceConfig::Entropy(None), &core.device);
    let (device, _) = built.expect("a saved state is valid");
    let traits = device.traits();
    let interrupt = PciInterrupt::new(Arc::new(Messages), None, &traits, state);
    let interrupt = Arc::new(interrupt);
    let host = Arc::new(Mutex::new(IoLoop::new().expect("an event loop")));
    let parts = Parts {
        config: device.config(),
        backend: Box::new(LoopBackend::inline(device, host)),
        interrupt: interrupt.clone(),
        memory: Memory::new(reused_ram()),
        traits,
    };
    let core = Arc::new(VirtioCore::new(parts, core).expect("a saved state is valid"));
    let bar = BAR + index * BAR_LEN;
    let function = VirtioPci::new(core, interrupt.clone(), bar, state, Box::new(|_| {}));
    (Arc::new(function), interrupt)
}

/// Two functions behind all ways to reach them.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let bus = PciBus::new();
    let functions = [0, 1].map(|n| function(n, &PciState::default(), VirtioState::default()));
    for (slot, (function, _)) in (1..).zip(&functions) {
        let inserted = bus.insert(slot, function.clone());
        inserted.expect("there is room");
    }
    let bus = Arc::new(bus);
    let ecam = Ecam(bus.clone());
    let window = PciWindow::new(bus.clone(), BAR);
    let ports = ConfigPorts::new(bus, 0);
    while !input.is_empty() {
        let [what, width] = input.array();
        let width = usize::from(width % 8) + 1;
        let place = u64::from(input.u16());
        let (device, at): (&dyn BusDevice, u64) = match what % 5 {
            // Of the functions' own pages, and of the rest.
            0 => (&ecam, (1 << 15) + (place & 0x1_ffff)),
            1 => (&ecam, place << 4),
            2 => (&window, place),
            3 => (&window, place << 8 | u64::from(what)),
            _ => (&ports, place % 8),
        };
        match what >> 5 {
            0..3 => device.read(at, &mut [0xff; 8][..width]),
            3..7 => {
                let _ = device.write(at, &input.array::<8>()[..width]);
            }
            _ => {
                let vector = match place {
                    0 => Vector::Config,
                    n => Vector::Queue(n as u16 % 3),
                };
                functions[usize::from(what) % 2].1.signal(vector);
            }
        }
    }
    for (n, (saved, _)) in functions.iter().enumerate() {
        let (state, core) = (saved.save(), saved.core().save());
        let (again, _) = function(n as u64, &state, core);
        assert_eq!(again.save(), state);
    }
}
