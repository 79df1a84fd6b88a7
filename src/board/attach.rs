//! Puts virtio devices on the board: one way for all of them, over either transport.
//!
//! [`Devices::attach`] makes device, backend, core and transport and places the transport; the
//! vmm thread owns the result. [`Devices::stop`] comes after the last vCPU: it brings every device
//! back from its I/O thread, its host I/O finished, and ends the threads.

use std::io;
use std::sync::Arc;

use arch::acpi::{MmioDevice, PciHost, Window};
use arch::layout;
use arch::memory::GuestMemory;
use devices::bus::{Bus, BusError};
use devices::irq::Interrupt;
use devices::pci::{ConfigPorts, Ecam, IntxLine, PciBus, PciError, PciWindow};
use devices::virtio::Memory;
use devices::virtio::console::ConsoleHandle;
use devices::virtio::core::{self, NewError, Parts, VirtioCore};
use devices::virtio::device::VirtioDevice;
use devices::virtio::notifier::VirtioInterrupt;
use devices::virtio::registry::{self, DeviceConfig, DeviceHandle};
use devices::virtio::transport::mmio::{LEN, Mmio, MmioInterrupt};
use devices::virtio::transport::pci::{BAR_LEN, PciInterrupt, VirtioPci};
use devices::virtio::worker::{LoopBackend, Worker};
use event_manager::RemoteEndpoint;
use kvm_ioctls::VmFd;

use super::VirtioDeviceState;
use super::doorbell::{Armed, Doorbells};
use super::plan::Plan;
use crate::config::Transport;
use crate::io::{IoError, IoThread};
use crate::vm::irq::{self, IrqFd, Irqchip};

/// Interrupt lines that virtio-mmio devices may have: those that no other device has.
const LINES: [u32; 17] = [
    5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];

/// Most virtio devices of a machine.
pub fn most(transport: Transport) -> usize {
    match transport {
        Transport::Mmio => LINES.len(),
        // Slot 0 is the host bridge's.
        Transport::Pci => 31,
    }
}

/// A device could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// More devices than there are interrupt lines.
    #[error(
        "There are more virtio devices than the {} that fit over MMIO: '{id}' has no place; use \
         --pci, which has room for 31", LINES.len()
    )]
    NoLine {
        /// The first without a place.
        id: String,
    },
    /// More devices than there are slots on the PCI bus.
    #[error("Cannot put the virtio device '{id}' on the PCI bus")]
    Pci {
        /// Its name.
        id: String,
        /// What went wrong.
        #[source]
        source: PciError,
    },
    /// The device cannot be made.
    #[error("Cannot make the virtio device '{id}'")]
    Build {
        /// Its name.
        id: String,
        /// What went wrong.
        #[source]
        source: registry::BuildError,
    },
    /// Its registers cannot be made.
    #[error("Cannot make the registers of the virtio device '{id}'")]
    Core {
        /// Its name.
        id: String,
        /// What went wrong.
        #[source]
        source: NewError,
    },
    /// Registers have no place.
    #[error("Cannot place {what}")]
    Place {
        /// Whose registers.
        what: String,
        /// What went wrong.
        #[source]
        source: BusError,
    },
    /// No event descriptor for its interrupt.
    #[error("Cannot create an event descriptor for the virtio device '{id}'")]
    Event {
        /// Its name.
        id: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// No I/O thread.
    #[error(transparent)]
    Io(#[from] IoError),
}

/// A device cannot go back to an earlier state in place.
#[derive(Debug, thiserror::Error)]
#[error("The virtio device '{id}' cannot go back in place: make a new clone")]
pub struct RestoreError {
    id: String,
    #[source]
    source: core::RestoreError,
}

/// A virtio device on the board.
pub struct Attached {
    /// What people call it.
    pub id: String,
    /// Its registers and state.
    pub core: Arc<VirtioCore>,
    /// What it takes commands by.
    pub handle: DeviceHandle,
    kind: &'static str,
    /// Its PCI function, with `--pci`.
    function: Option<Arc<VirtioPci>>,
}

/// What devices are connected to.
pub struct Machine<'a> {
    /// The virtual machine.
    pub vm: &'a Arc<VmFd>,
    /// Its interrupt lines.
    pub irqchip: &'a Irqchip,
    /// Its RAM.
    pub memory: &'a GuestMemory,
}

/// The buses that registers are placed on.
pub struct Buses<'a> {
    /// I/O ports.
    pub pio: &'a mut Bus,
    /// Memory.
    pub mmio: &'a mut Bus,
}

/// All virtio devices of a machine, with the I/O threads they run on.
#[derive(Default)]
pub struct Devices {
    list: Vec<Attached>,
    windows: Vec<MmioDevice>,
    pci: Option<PciHost>,
    ports: Option<Arc<ConfigPorts>>,
    irqfds: Vec<IrqFd>,
    io: Vec<IoThread>,
}

impl Devices {
    /// Makes the devices of `plans` and puts them on `buses`. All share an I/O thread, but for those
    /// that wait for the host (see [`waits`]), which have one each; without devices there is none.
    /// They are made from their states, of which there is one of the same id for each or none, and so
    /// is the address register of the PCI bus. I/O threads that run already are taken first.
    pub fn attach(
        (plans, mut spare): (Vec<Plan>, Vec<IoThread>),
        transport: Transport,
        machine: &Machine<'_>,
        buses: &mut Buses<'_>,
        (mut states, pci_address): (Vec<VirtioDeviceState>, u32),
    ) -> Result<Self, AttachError> {
        let mut devices = Self::default();
        let mut pci = PciBus::new();
        let mut shared = None;
        // One for all, since a memory device changes it.
        let memory = Memory::new(machine.memory.clone());
        let mut slots = Vec::with_capacity(plans.len());
        for plan in plans {
            let endpoint = match &shared {
                Some(endpoint) if !waits(&plan.config) => RemoteEndpoint::clone(endpoint),
                _ => {
                    let io = match spare.pop() {
                        Some(io) => io,
                        None => IoThread::start(devices.io.len() as u16)?,
                    };
                    let endpoint = io.endpoint();
                    devices.io.push(io);
                    if !waits(&plan.config) {
                        shared = Some(endpoint.clone());
                    }
                    endpoint
                }
            };
            let state = states.iter().position(|state| state.id == plan.id);
            let state = state.map(|at| states.swap_remove(at));
            slots.push(Slot::new(plan, machine, &memory, (endpoint, state))?);
        }
        // All of their memory is there by now, in which the queues of any may be.
        for slot in slots {
            match transport {
                Transport::Mmio => devices.attach_mmio(slot, machine, buses.mmio)?,
                Transport::Pci => devices.attach_pci(slot, machine, &mut pci)?,
            }
        }
        if transport == Transport::Pci {
            let (host, ports) = place_pci(pci, buses, pci_address)?;
            (devices.pci, devices.ports) = (Some(host), Some(ports));
        }
        Ok(devices)
    }

    fn attach_mmio(
        &mut self,
        slot: Slot,
        machine: &Machine<'_>,
        mmio: &mut Bus,
    ) -> Result<(), AttachError> {
        let index = self.windows.len();
        let Some(irq) = LINES.get(index).copied() else {
            return Err(AttachError::NoLine { id: slot.id });
        };
        let window = MmioDevice {
            base: layout::VIRTIO_MMIO_START + index as u64 * layout::VIRTIO_MMIO_SIZE,
            size: LEN,
            irq,
        };
        let (line, irqfd) = match machine.irqchip.fast_line(irq) {
            Ok(line) => line,
            Err(source) => {
                let id = slot.id;
                return Err(AttachError::Event { id, source });
            }
        };
        let (doorbells, attached) = slot.finish(Arc::new(MmioInterrupt::new(line)))?;
        let transport = Arc::new(Mmio::new(attached.core.clone()));
        doorbells.place(window.base, transport.kicks());
        let what = || format!("the virtio device '{}'", attached.id);
        mmio.insert(window.base, window.size, transport)
            .map_err(|source| AttachError::Place {
                what: what(),
                source,
            })?;
        self.windows.push(window);
        self.irqfds.extend(irqfd);
        self.list.push(attached);
        Ok(())
    }

    fn attach_pci(
        &mut self,
        slot: Slot,
        machine: &Machine<'_>,
        bus: &mut PciBus,
    ) -> Result<(), AttachError> {
        let state = slot.state.pci.clone().unwrap_or_default();
        let sink = irq::messages(machine.vm);
        let traits = slot.device.traits();
        let pin = Arc::new(Pin(machine.irqchip.line(self.next_pci_line())));
        let interrupt = Arc::new(PciInterrupt::new(sink, Some(pin), &traits, &state));
        let (doorbells, mut attached) = slot.finish(interrupt.clone())?;
        // At most 31 functions fit the bus, and their BARs the window.
        let bar = layout::PCI_MEMORY_START + self.list.len() as u64 * BAR_LEN;
        let function = Arc::new(VirtioPci::new(
            attached.core.clone(),
            interrupt,
            bar,
            &state,
            {
                let doorbells = doorbells.clone();
                Box::new(move |kicks| doorbells.disarm(kicks))
            },
        ));
        doorbells.place(bar, function.kicks());
        if let Err(source) = bus.add(function.clone()) {
            let id = attached.id;
            return Err(AttachError::Pci { id, source });
        }
        attached.function = Some(function);
        self.list.push(attached);
        Ok(())
    }

    /// The line of the next function's INTA#, as ACPI's routing table says. The bus gives slots in
    /// order, the first to its bridge.
    fn next_pci_line(&self) -> u32 {
        let slot = self.list.len() + 1;
        let [first, second, third, fourth] = layout::PCI_LINES;
        match slot % 4 {
            0 => first,
            1 => second,
            2 => third,
            _ => fourth,
        }
    }

    /// Brings every device to rest, its host I/O finished. vCPUs stand still.
    pub fn pause(&self) {
        for device in &self.list {
            device.core.pause();
        }
    }

    /// Lets every device go on whose driver had started it, before vCPUs run.
    pub fn resume(&self) {
        for device in &self.list {
            device.core.resume();
        }
    }

    /// The states of all devices. One that is not paused goes on at once.
    pub fn save(&self) -> Vec<VirtioDeviceState> {
        let states = self.list.iter().map(|device| VirtioDeviceState {
            id: device.id.clone(),
            kind: device.kind.to_owned(),
            virtio: device.core.save(),
            pci: device.function.as_ref().map(|function| function.save()),
        });
        states.collect()
    }

    /// Has every device go back to its state among `states`, which are those of this machine, and so
    /// the address register of the PCI configuration ports. vCPUs stand still, and the devices do until
    /// [`resume`](Self::resume).
    ///
    /// # Errors
    /// A device that cannot go back in place; it and those behind it have not.
    pub fn restore(
        &self,
        states: &[VirtioDeviceState],
        pci_address: Option<u32>,
    ) -> Result<(), RestoreError> {
        for (device, state) in self.list.iter().zip(states) {
            let failed = |source| RestoreError {
                id: device.id.clone(),
                source,
            };
            device.core.restore(&state.virtio).map_err(failed)?;
            if let (Some(function), Some(state)) = (&device.function, &state.pci) {
                function.restore(state);
            }
        }
        if let (Some(ports), Some(address)) = (&self.ports, pci_address) {
            ports.restore(address);
        }
        Ok(())
    }

    /// The address register of the PCI configuration ports, where there are such.
    pub fn pci_address(&self) -> Option<u32> {
        self.ports.as_ref().map(|ports| ports.save())
    }

    /// The devices, in the order of the configuration.
    pub fn list(&self) -> &[Attached] {
        &self.list
    }

    /// The virtio console's handle, where there is one.
    pub fn console(&self) -> Option<&ConsoleHandle> {
        self.list.iter().find_map(|device| match &device.handle {
            DeviceHandle::Console(handle) => Some(handle),
            _ => None,
        })
    }

    /// Has the virtio console take all that the guest has given it, and go on. The guest has ended.
    pub fn settle_console(&self) {
        let consoles = self.list.iter();
        for device in consoles.filter(|d| matches!(d.handle, DeviceHandle::Console(_))) {
            device.core.pause();
            device.core.resume();
        }
    }

    /// What ACPI says of devices over MMIO.
    pub fn windows(&self) -> &[MmioDevice] {
        &self.windows
    }

    /// What ACPI says of the PCI bus, where there is one.
    pub fn pci_host(&self) -> Option<PciHost> {
        self.pci
    }

    /// Connects interrupts, once there are vCPUs.
    pub fn connect(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.irqfds.iter().try_for_each(|irqfd| irqfd.register(vm))
    }

    /// Says what is added to the host's counter to have the guest's, before vCPUs run.
    pub fn set_counter_offset(&self, offset: u64) {
        for device in &self.list {
            if let DeviceHandle::Rtc(clock) = &device.handle {
                clock.set_counter_offset(offset);
            }
        }
    }

    /// Logs what balloons and memory devices came to.
    pub fn log_memory(&self) {
        for device in &self.list {
            if let DeviceHandle::Mem(mem) = &device.handle {
                log::debug!("{}: {:?}", device.id, mem.status());
            }
            if let DeviceHandle::Balloon(balloon) = &device.handle {
                let statistics = balloon.statistics().ok().flatten();
                let statistics = statistics.unwrap_or_default();
                log::debug!("{}: {:?}", device.id, balloon.status());
                log::debug!("{}: {statistics:?}", device.id);
            }
        }
    }

    /// Looks at the sizes of all disks again; guests are told of those that changed.
    pub fn look_at_disks(&self) {
        for device in &self.list {
            let DeviceHandle::Block(disk) = &device.handle else {
                continue;
            };
            match disk.resize() {
                Ok(sectors) => log::info!("disk '{}' has {sectors} sectors", device.id),
                Err(error) => log::warn!("the size of disk '{}' is unknown: {error}", device.id),
            }
        }
    }

    /// Brings every device to rest, its host I/O finished, and ends the I/O threads. No vCPU runs
    /// any more.
    pub fn stop(&mut self) {
        self.pause();
        self.io.clear();
    }
}

/// INTA# of a PCI function, as an edge: a guest without MSI-X reads the ISR status for each, and what
/// came meanwhile is in there.
struct Pin(Arc<dyn Interrupt>);

impl IntxLine for Pin {
    fn set(&self, asserted: bool) {
        if asserted {
            self.0.signal();
        }
    }
}

/// Whether a device's requests are system calls that wait, for as long as a filesystem of the host
/// takes: they must not hold other devices up.
fn waits(config: &DeviceConfig) -> bool {
    matches!(config, DeviceConfig::Fs(_))
}

/// A device on its way to a transport.
struct Slot {
    id: String,
    kind: &'static str,
    device: Box<dyn VirtioDevice>,
    handle: DeviceHandle,
    doorbells: Arc<Doorbells>,
    endpoint: RemoteEndpoint<Worker>,
    memory: Memory,
    state: VirtioDeviceState,
}

impl Slot {
    fn new(
        plan: Plan,
        machine: &Machine<'_>,
        memory: &Memory,
        (endpoint, state): (RemoteEndpoint<Worker>, Option<VirtioDeviceState>),
    ) -> Result<Self, AttachError> {
        let Plan { id, mut config } = plan;
        if let DeviceConfig::Mem(options) = &mut config {
            options.memory = Some(memory.clone());
        }
        let state = state.unwrap_or_else(|| VirtioDeviceState::reset(&id, config.kind()));
        let kind = config.kind();
        let (device, handle) = match registry::build(config, &state.virtio.device) {
            Ok(made) => made,
            Err(source) => return Err(AttachError::Build { id, source }),
        };
        Ok(Self {
            id,
            kind,
            state,
            device,
            handle,
            doorbells: Arc::new(Doorbells::new(machine.vm.clone())),
            endpoint,
            memory: memory.clone(),
        })
    }

    /// Makes the core, with the interrupts of its transport.
    fn finish(
        self,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Result<(Arc<Doorbells>, Attached), AttachError> {
        let Self {
            id,
            kind,
            device,
            handle,
            doorbells,
            endpoint,
            memory,
            state,
        } = self;
        let parts = Parts {
            traits: device.traits(),
            config: device.config(),
            backend: Box::new(Armed::new(
                LoopBackend::remote(device, endpoint),
                doorbells.clone(),
            )),
            interrupt,
            memory,
        };
        match VirtioCore::new(parts, state.virtio) {
            Ok(core) => {
                let attached = Attached {
                    id,
                    core: Arc::new(core),
                    handle,
                    kind,
                    function: None,
                };
                Ok((doorbells, attached))
            }
            Err(source) => Err(AttachError::Core { id, source }),
        }
    }
}

/// Puts a filled PCI bus where ACPI says it is, with the address register of its ports as given.
fn place_pci(
    bus: PciBus,
    buses: &mut Buses<'_>,
    address: u32,
) -> Result<(PciHost, Arc<ConfigPorts>), AttachError> {
    let bus = Arc::new(bus);
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
    };
    let place = |result: Result<(), BusError>| {
        result.map_err(|source| AttachError::Place {
            what: "the PCI bus".to_string(),
            source,
        })
    };
    let Window { base, size } = host.ecam;
    place(buses.mmio.insert(base, size, Arc::new(Ecam(bus.clone()))))?;
    let Window { base, size } = host.memory;
    let window = Arc::new(PciWindow::new(bus.clone(), base));
    place(buses.mmio.insert(base, size, window))?;
    let (port, ports) = (layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT_SIZE);
    let config = Arc::new(ConfigPorts::new(bus, address));
    place(buses.pio.insert(port.into(), ports.into(), config.clone()))?;
    Ok((host, config))
}
