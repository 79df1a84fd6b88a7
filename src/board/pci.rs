//! The PCI bus on the board: where it is, and virtio devices in its slots.
//!
//! A device has the BAR and the interrupt line of its slot, so that those of others stay what they are
//! when it comes or goes.

use std::sync::Arc;

use arch::acpi::{PciHost, Window};
use arch::layout;
use devices::bus::{BusDevice, BusError};
use devices::pci::hotplug::{Hotplug, HotplugState};
use devices::pci::{ConfigPorts, Ecam, PciBus, PciFunction, PciWindow};
use devices::virtio::transport::pci::{BAR_LEN, PciInterrupt, VirtioPci};

use super::attach::{AttachError, Attached, Buses, Machine, Pin, Slot};

/// A bus, with what the guest reaches it by.
pub(super) struct Pci {
    /// What ACPI says of it.
    pub(super) host: PciHost,
    ports: Arc<ConfigPorts>,
    /// Tells the guest what comes and goes.
    pub(super) hotplug: Arc<Hotplug>,
}

impl Pci {
    /// Puts an empty bus where ACPI says it is, with its registers as saved.
    pub(super) fn place(
        buses: &mut Buses<'_>,
        (address, hotplug): (u32, HotplugState),
    ) -> Result<Self, AttachError> {
        let host = PciHost {
            ecam: Window {
                base: layout::PCI_ECAM_START,
                size: layout::PCI_ECAM_SIZE,
            },
            memory: Window {
                base: layout::PCI_MEMORY_START,
                size: layout::PCI_MEMORY_END - layout::PCI_MEMORY_START,
            },
            lines: layout::PCI_LINES,
            hotplug: layout::PCI_HOTPLUG_PORT,
        };
        let bus = Arc::new(PciBus::new());
        let hotplug = Hotplug::new(bus.clone(), hotplug);
        let hotplug = Arc::new(hotplug.map_err(|source| AttachError::Event {
            id: "PCI bus".to_owned(),
            source,
        })?);
        let ports = Arc::new(ConfigPorts::new(bus.clone(), address));
        let place = |result: Result<(), BusError>| {
            result.map_err(|source| AttachError::Place {
                what: "the PCI bus".to_string(),
                source,
            })
        };
        let Window { base, size } = host.ecam;
        place(buses.mmio.insert(base, size, Arc::new(Ecam(bus.clone()))))?;
        let Window { base, size } = host.memory;
        place(
            buses
                .mmio
                .insert(base, size, Arc::new(PciWindow::new(bus, base))),
        )?;
        let registers: [(u16, u16, Arc<dyn BusDevice>); 2] = [
            (
                layout::PCI_CONFIG_PORT,
                layout::PCI_CONFIG_PORT_SIZE,
                ports.clone(),
            ),
            (host.hotplug, layout::PCI_HOTPLUG_PORT_SIZE, hotplug.clone()),
        ];
        for (port, count, device) in registers {
            place(buses.pio.insert(port.into(), count.into(), device))?;
        }
        Ok(Self {
            host,
            ports,
            hotplug,
        })
    }

    /// The bus.
    pub(super) fn bus(&self) -> &PciBus {
        self.hotplug.bus()
    }

    /// Whether `device` is on the bus still, if it ever was.
    pub(super) fn has(&self, device: &Attached) -> bool {
        device.function.as_ref().is_none_or(|(slot, function)| {
            let function: Arc<dyn PciFunction> = function.clone();
            self.bus().holds(*slot, &function)
        })
    }

    /// Has the registers go back.
    pub(super) fn restore(&self, address: u32, hotplug: HotplugState) {
        self.ports.restore(address);
        self.hotplug.restore(hotplug);
    }

    /// The registers as they are: address, and what comes and goes.
    pub(super) fn save(&self) -> (u32, HotplugState) {
        (self.ports.save(), self.hotplug.save())
    }
}

impl Slot {
    /// Puts the device into its slot of `bus`, or into a free one.
    pub(super) fn attach_pci(
        self,
        machine: &Machine<'_>,
        bus: &PciBus,
    ) -> Result<Attached, AttachError> {
        let id = self.id.clone();
        let failed = |source| AttachError::Pci { id, source };
        let place = match self.state.slot {
            Some(slot) => Ok(usize::from(slot)),
            None => bus.free(),
        };
        let place = match place {
            Ok(place) => place,
            Err(source) => return Err(failed(source)),
        };
        let state = self.state.pci.clone().unwrap_or_default();
        let traits = self.device.traits();
        let pin = Arc::new(Pin(machine.irqchip.line(line(place))));
        let sink = machine.irqchip.messages();
        let interrupt = Arc::new(PciInterrupt::new(sink, Some(pin), &traits, &state));
        let (doorbells, mut attached) = self.finish(interrupt.clone())?;
        // The first slot is the bridge's. No slot is beyond the window, or it is refused below.
        let bar = layout::PCI_MEMORY_START + (place as u64).saturating_sub(1) * BAR_LEN;
        let moved = {
            let doorbells = doorbells.clone();
            Box::new(move |kicks: &_| doorbells.disarm(kicks))
        };
        let core = attached.core.clone();
        let function = Arc::new(VirtioPci::new(core, interrupt, bar, &state, moved));
        doorbells.place(bar, function.kicks());
        if let Err(source) = bus.insert(place, function.clone()) {
            return Err(failed(source));
        }
        attached.function = Some((place, function));
        Ok(attached)
    }
}

/// The line of INTA# of the function in `slot`, as ACPI's routing table says.
fn line(slot: usize) -> u32 {
    let [first, second, third, fourth] = layout::PCI_LINES;
    match slot % 4 {
        0 => first,
        1 => second,
        2 => third,
        _ => fourth,
    }
}
