//! Puts virtio devices on the board: one way for all of them, over either transport.
//!
//! [`Devices::attach`] makes device, backend, core and transport and places the transport; the
//! vmm thread owns the result. [`Devices::stop`] comes after the last vCPU: it brings every device
//! back from its I/O thread, its host I/O finished, and ends the threads. In between, devices come and
//! go over PCI (`board::hotplug`).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::acpi::{MmioDevice, PciHost};
use arch::layout;
use arch::memory::GuestMemory;
use devices::bus::{Bus, BusError};
use devices::irq::Interrupt;
use devices::pci::hotplug::HotplugState;
use devices::pci::{IntxLine, PciError};
use devices::virtio::Memory;
use devices::virtio::console::ConsoleHandle;
use devices::virtio::core::{self, NewError, Parts, VirtioCore};
use devices::virtio::device::VirtioDevice;
use devices::virtio::notifier::VirtioInterrupt;
use devices::virtio::registry::{self, DeviceConfig, DeviceHandle};
use devices::virtio::transport::mmio::{LEN, Mmio, MmioInterrupt};
use devices::virtio::transport::pci::VirtioPci;
use devices::virtio::worker::{LoopBackend, Worker};
use event_manager::RemoteEndpoint;
use kvm_ioctls::VmFd;

use super::doorbell::{Armed, Doorbells};
use super::pci::Pci;
use super::plan::Plan;
use super::{PartsState, VirtioDeviceState};
use crate::config::Transport;
use crate::io::{IoError, IoThread};
use crate::vm::irq::{IrqFd, Irqchip};

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
    /// No event descriptor.
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
    /// Only PCI devices come and go while the guest runs.
    #[error("PCI is not enabled: start the microVM with --pci (--enable-pci of bulle api)")]
    NoPci,
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
    /// The type of device, as `DeviceConfig::kind` calls it; with `id` it is a name for one device only.
    pub kind: &'static str,
    pub(super) doorbells: Arc<Doorbells>,
    /// Its PCI function and the slot where it is, with `--pci`.
    pub(super) function: Option<(usize, Arc<VirtioPci>)>,
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
pub struct Devices {
    parts: Mutex<Present>,
    windows: Vec<MmioDevice>,
    pub(super) pci: Option<Pci>,
    irqfds: Vec<IrqFd>,
    /// One for all, since a memory device changes it.
    pub(super) memory: Memory,
}

/// The devices that there are, and their threads.
#[derive(Default)]
pub(super) struct Present {
    pub(super) list: Vec<Arc<Attached>>,
    io: Vec<IoThread>,
    /// Of the thread that all devices share which do not wait.
    shared: Option<RemoteEndpoint<Worker>>,
}

impl Present {
    /// The way to the I/O thread of a device: the one that all share, or one of its own (see [`waits`]).
    /// Threads that run already are taken from `spare` first.
    pub(super) fn endpoint(
        &mut self,
        config: &DeviceConfig,
        spare: &mut Vec<IoThread>,
    ) -> Result<RemoteEndpoint<Worker>, IoError> {
        if let (Some(shared), false) = (&self.shared, waits(config)) {
            return Ok(shared.clone());
        }
        let io = match spare.pop() {
            Some(io) => io,
            None => IoThread::start(self.io.len() as u16)?,
        };
        let endpoint = io.endpoint();
        self.io.push(io);
        if !waits(config) {
            self.shared = Some(endpoint.clone());
        }
        Ok(endpoint)
    }
}

impl Devices {
    /// Makes the devices of `plans` and puts them on `buses`. All share an I/O thread, but for those
    /// that wait for the host (see [`waits`]), which have one each; without devices there is none.
    /// They are made from their states, of which there is one of the same id for each or none, and so
    /// is the PCI bus. I/O threads that run already are taken first.
    pub fn attach(
        (plans, mut spare): (Vec<Plan>, Vec<IoThread>),
        transport: Transport,
        machine: &Machine<'_>,
        buses: &mut Buses<'_>,
        saved: &PartsState,
    ) -> Result<Self, AttachError> {
        let mut devices = Self {
            parts: Mutex::default(),
            windows: Vec::new(),
            pci: None,
            irqfds: Vec::new(),
            memory: Memory::new(machine.memory.clone()),
        };
        let mut slots = Vec::with_capacity(plans.len());
        for plan in plans {
            let endpoint = devices.present().endpoint(&plan.config, &mut spare)?;
            let mut states = saved.virtio.iter();
            let state = states.find(|state| state.is_of(&plan)).cloned();
            slots.push(Slot::new(
                plan,
                machine,
                &devices.memory,
                (endpoint, state),
            )?);
        }
        if transport == Transport::Pci {
            let address = saved.pci_address.unwrap_or(0);
            let registers = (address, saved.hotplug.unwrap_or_default());
            devices.pci = Some(Pci::place(buses, registers)?);
        }
        // All of their memory is there by now, in which the queues of any may be.
        for slot in slots {
            let attached = match &devices.pci {
                None => devices.attach_mmio(slot, machine, buses.mmio)?,
                Some(pci) => slot.attach_pci(machine, pci.bus())?,
            };
            devices.present().list.push(Arc::new(attached));
        }
        Ok(devices)
    }

    pub(super) fn present(&self) -> MutexGuard<'_, Present> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach_mmio(
        &mut self,
        slot: Slot,
        machine: &Machine<'_>,
        mmio: &mut Bus,
    ) -> Result<Attached, AttachError> {
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
        Ok(attached)
    }

    /// Brings every device to rest, its host I/O finished. vCPUs stand still.
    pub fn pause(&self) {
        for device in &self.present().list {
            device.core.pause();
        }
    }

    /// Lets every device go on whose driver had started it, before vCPUs run.
    pub fn resume(&self) {
        for device in &self.present().list {
            device.core.resume();
        }
    }

    /// The states of all devices. One that is not paused goes on at once.
    pub fn save(&self) -> Vec<VirtioDeviceState> {
        let present = self.present();
        let states = present.list.iter().map(|device| VirtioDeviceState {
            id: device.id.clone(),
            kind: device.kind.to_owned(),
            virtio: device.core.save(),
            pci: device.function.as_ref().map(|(_, f)| f.save()),
            slot: device.function.as_ref().map(|(slot, _)| *slot as u8),
        });
        states.collect()
    }

    /// Has every device go back to its state in `parts`, which are those of this machine, and so the
    /// registers of the PCI bus. vCPUs stand still, and the devices do until [`resume`](Self::resume).
    ///
    /// # Errors
    /// A device that cannot go back in place, or that has come or gone since; it and those behind it have
    /// not.
    pub fn restore(&self, parts: &PartsState) -> Result<(), RestoreError> {
        let present = self.present();
        let failed = |id: &str, source| RestoreError {
            id: id.to_owned(),
            source,
        };
        for (index, state) in parts.virtio.iter().enumerate() {
            let device = present.list.get(index);
            let device = device.filter(|d| (d.kind, &d.id) == (state.kind.as_str(), &state.id));
            let Some(device) = device else {
                return Err(failed(&state.id, core::RestoreError::InPlace));
            };
            let restored = device.core.restore(&state.virtio);
            restored.map_err(|source| failed(&state.id, source))?;
            if let (Some((_, function)), Some(state)) = (&device.function, &state.pci) {
                function.restore(state);
            }
        }
        if let Some(later) = present.list.get(parts.virtio.len()) {
            return Err(failed(&later.id, core::RestoreError::InPlace));
        }
        if let (Some(pci), Some(address)) = (&self.pci, parts.pci_address) {
            pci.restore(address, parts.hotplug.unwrap_or_default());
        }
        Ok(())
    }

    /// The devices, in the order of the configuration; those that came later are the last.
    pub fn list(&self) -> Vec<Arc<Attached>> {
        self.present().list.clone()
    }

    /// The virtio console's handle, where there is one.
    pub fn console(&self) -> Option<ConsoleHandle> {
        let present = self.present();
        present.list.iter().find_map(|device| match &device.handle {
            DeviceHandle::Console(handle) => Some(handle.clone()),
            _ => None,
        })
    }

    /// Has the virtio console take all that the guest has given it, and go on. The guest has ended.
    pub fn settle_console(&self) {
        for device in &self.present().list {
            if matches!(device.handle, DeviceHandle::Console(_)) {
                device.core.pause();
                device.core.resume();
            }
        }
    }

    /// What ACPI says of devices over MMIO.
    pub fn windows(&self) -> &[MmioDevice] {
        &self.windows
    }

    /// What ACPI says of the PCI bus, where there is one.
    pub fn pci_host(&self) -> Option<PciHost> {
        self.pci.as_ref().map(|pci| pci.host)
    }

    /// The registers of the PCI bus, where there is one: address of the configuration ports, and what
    /// comes and goes.
    pub fn pci_registers(&self) -> Option<(u32, HotplugState)> {
        self.pci.as_ref().map(Pci::save)
    }

    /// Connects interrupts, once there are vCPUs.
    pub fn connect(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.irqfds.iter().try_for_each(|irqfd| irqfd.register(vm))
    }

    /// Says what is added to the host's counter to have the guest's, before vCPUs run.
    pub fn set_counter_offset(&self, offset: u64) {
        for device in &self.present().list {
            if let DeviceHandle::Rtc(clock) = &device.handle {
                clock.set_counter_offset(offset);
            }
        }
    }

    /// Logs what balloons and memory devices came to.
    pub fn log_memory(&self) {
        for device in &self.present().list {
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
        for device in &self.present().list {
            let sectors = match &device.handle {
                DeviceHandle::Block(disk) => disk.resize().map_err(|error| error.to_string()),
                DeviceHandle::VhostUserBlock(disk) => disk.reread().map_err(|e| e.to_string()),
                _ => continue,
            };
            match sectors {
                Ok(sectors) => log::info!("disk '{}' has {sectors} sectors", device.id),
                Err(error) => log::warn!("the size of disk '{}' is unknown: {error}", device.id),
            }
        }
    }

    /// Brings every device to rest, its host I/O finished, and ends the I/O threads. No vCPU runs
    /// any more.
    pub fn stop(&mut self) {
        self.pause();
        self.present().io.clear();
    }
}

/// INTA# of a PCI function, as an edge: a guest without MSI-X reads the ISR status for each, and what
/// came meanwhile is in there.
pub(super) struct Pin(pub(super) Arc<dyn Interrupt>);

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
pub(super) struct Slot {
    pub(super) id: String,
    kind: &'static str,
    pub(super) device: Box<dyn VirtioDevice>,
    handle: DeviceHandle,
    doorbells: Arc<Doorbells>,
    endpoint: RemoteEndpoint<Worker>,
    memory: Memory,
    pub(super) state: VirtioDeviceState,
}

impl Slot {
    pub(super) fn new(
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
    pub(super) fn finish(
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
                    doorbells: doorbells.clone(),
                    function: None,
                };
                Ok((doorbells, attached))
            }
            Err(source) => Err(AttachError::Core { id, source }),
        }
    }
}
