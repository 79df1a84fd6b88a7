//! Puts virtio devices on the board: one way for all of them.
//!
//! [`Devices::attach`] makes device, backend, core and transport and places the transport; the
//! vmm thread owns the result. [`Devices::stop`] comes after the last vCPU: it brings every device
//! back from the I/O thread, its host I/O finished, and ends the thread.

use std::io;
use std::sync::Arc;

use arch::acpi::MmioDevice;
use arch::layout;
use arch::memory::GuestMemory;
use devices::bus::{Bus, BusError};
use devices::virtio::Memory;
use devices::virtio::core::{NewError, Parts, VirtioCore, VirtioState};
use devices::virtio::registry::{self, DeviceHandle};
use devices::virtio::transport::mmio::{LEN, Mmio, MmioInterrupt};
use devices::virtio::worker::LoopBackend;
use kvm_ioctls::VmFd;

use super::doorbell::{Armed, Doorbells};
use super::plan::Plan;
use crate::io::{IoError, IoThread};
use crate::vm::irq::{IrqFd, Irqchip};

/// Interrupt lines that virtio-mmio devices may have: those that no other device has.
const LINES: [u32; 17] = [
    5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];

/// A device could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// More devices than the transport has room for.
    #[error("{asked} virtio devices are too many: virtio over MMIO has room for {}", LINES.len())]
    TooMany {
        /// Number there would be.
        asked: usize,
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
    /// Its registers have no place.
    #[error("Cannot place the virtio device '{id}'")]
    Place {
        /// Its name.
        id: String,
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

/// A virtio device on the board.
pub struct Attached {
    /// What people call it.
    pub id: String,
    /// Its registers and state.
    pub core: Arc<VirtioCore>,
    /// What it takes commands by.
    pub handle: DeviceHandle,
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

/// All virtio devices of a machine, with the I/O thread they run on.
#[derive(Default)]
pub struct Devices {
    list: Vec<Attached>,
    windows: Vec<MmioDevice>,
    irqfds: Vec<IrqFd>,
    io: Option<IoThread>,
}

impl Devices {
    /// Makes the devices of `plans` and puts them on `mmio`. Without any there is no I/O thread.
    pub fn attach(
        plans: Vec<Plan>,
        machine: &Machine<'_>,
        mmio: &mut Bus,
    ) -> Result<Self, AttachError> {
        let mut devices = Self::default();
        if plans.is_empty() {
            return Ok(devices);
        }
        if plans.len() > LINES.len() {
            return Err(AttachError::TooMany { asked: plans.len() });
        }
        let io = IoThread::start(0)?;
        let memory = Memory::new(machine.memory.clone());
        let bases = (layout::VIRTIO_MMIO_START..).step_by(layout::VIRTIO_MMIO_SIZE as usize);
        for ((plan, irq), base) in plans.into_iter().zip(LINES).zip(bases) {
            let window = MmioDevice {
                base,
                size: LEN,
                irq,
            };
            devices.attach_one(plan, window, machine, &memory, &io, mmio)?;
        }
        devices.io = Some(io);
        Ok(devices)
    }

    fn attach_one(
        &mut self,
        plan: Plan,
        window: MmioDevice,
        machine: &Machine<'_>,
        memory: &Memory,
        io: &IoThread,
        mmio: &mut Bus,
    ) -> Result<(), AttachError> {
        let Plan { id, config } = plan;
        let state = VirtioState::default();
        let (device, handle) =
            registry::build(config, &state.device).map_err(|source| AttachError::Build {
                id: id.clone(),
                source,
            })?;
        let (line, irqfd) =
            machine
                .irqchip
                .fast_line(window.irq)
                .map_err(|source| AttachError::Event {
                    id: id.clone(),
                    source,
                })?;
        let doorbells = Arc::new(Doorbells::new(machine.vm.clone()));
        let parts = Parts {
            traits: device.traits(),
            config: device.config(),
            backend: Box::new(Armed::new(
                LoopBackend::remote(device, io.endpoint()),
                doorbells.clone(),
            )),
            interrupt: Arc::new(MmioInterrupt::new(line)),
            memory: memory.clone(),
        };
        let core = VirtioCore::new(parts, state).map_err(|source| AttachError::Core {
            id: id.clone(),
            source,
        })?;
        let core = Arc::new(core);
        let transport = Arc::new(Mmio::new(core.clone()));
        doorbells.place(window.base, transport.kicks());
        if let Err(source) = mmio.insert(window.base, window.size, transport) {
            return Err(AttachError::Place { id, source });
        }
        self.windows.push(window);
        self.irqfds.extend(irqfd);
        self.list.push(Attached { id, core, handle });
        Ok(())
    }

    /// The devices, in the order of the configuration.
    pub fn list(&self) -> &[Attached] {
        &self.list
    }

    /// What ACPI says of the devices.
    pub fn windows(&self) -> &[MmioDevice] {
        &self.windows
    }

    /// Connects interrupts, once there are vCPUs.
    pub fn connect(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.irqfds.iter().try_for_each(|irqfd| irqfd.register(vm))
    }

    /// Brings every device to rest, its host I/O finished, and ends the I/O thread. No vCPU runs
    /// any more.
    pub fn stop(&mut self) {
        for device in &self.list {
            device.core.pause();
        }
        self.io = None;
    }
}
