//! The machine's board: which device sits where, and what ACPI says of it.
//!
//! [`Board::new`] is the one place that knows both the address map (`arch::layout`) and the
//! device models. Both buses are frozen here, before any vCPU exists.

pub mod attach;
mod cmdline;
mod doorbell;
pub mod hotplug;
mod pci;
pub mod plan;
mod state;
mod watchdog;

use std::io::Write;
use std::sync::Arc;

use arch::acpi::{AcpiFacts, GenerationFacts, PortDevice, PowerFacts, Window};
use arch::memory::GuestMemory;
use arch::state::ClockShift;
use arch::topology::Topology;
use arch::vm::IrqchipMode;
use arch::vmgenid::VMGENID_SIZE;
use arch::{layout, vmclock, vmgenid};
use devices::bus::{Bus, BusDevice, BusError};
use devices::legacy::boot_timer::BootTimer;
use devices::legacy::debug_exit::DebugExit;
use devices::legacy::i8042::I8042;
use devices::legacy::power::Power;
use devices::legacy::pvpanic::PvPanic;
use devices::legacy::rtc::{Cmos, host_clock};
use devices::legacy::serial::{Serial, SerialError, SerialState};
use kvm_ioctls::VmFd;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use crate::vm::irq::Irqchip;

use crate::config::{self, Transport};
use crate::io::IoThread;
use crate::snapshot::MachineState;
use attach::{AttachError, Attached, Buses, Devices, Machine};
pub use cmdline::kernel_words;
use plan::Plan;
pub use state::{BoardState, PartsState, StateError, VirtioDeviceState};
pub use watchdog::BoardWatchdog;

/// The board could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// Two devices at one address: the address map is wrong.
    #[error("Cannot place {device}")]
    Place {
        /// The device.
        device: &'static str,
        /// What went wrong.
        #[source]
        source: BusError,
    },
    /// A virtio device.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// No timer for the watchdog.
    #[error("Cannot make a timer for the watchdog")]
    Timer(#[source] std::io::Error),
    /// A UART state that no UART can have.
    #[error("Cannot make a serial port")]
    Serial(#[from] SerialError),
}

/// Devices cannot go back to an earlier state in place.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] attach::RestoreError),
    /// A UART state that no UART can have.
    #[error("Cannot set a serial port")]
    Serial(#[from] SerialError),
}

/// The host's end of one UART.
pub struct SerialEnd {
    /// Takes what the guest sends; called on vCPU threads.
    pub out: Box<dyn Write + Send>,
    /// Written when the guest has made room for more input.
    pub drained: EventFd,
}

/// The host's ends of all that leaves the machine.
pub struct Wiring {
    /// COM1.
    pub console: SerialEnd,
    /// COM2.
    pub agent: SerialEnd,
    /// Watchdog.
    pub watchdog: Option<config::Watchdog>,
    /// Says how long the guest took to boot.
    pub boot_timer: Option<BootTimer>,
    /// Virtio devices.
    pub devices: Vec<Plan>,
    /// I/O threads for them that run already.
    pub io: Vec<IoThread>,
}

/// Devices and buses of one machine.
pub struct Board {
    /// I/O ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// COM1.
    pub console: Arc<Serial>,
    /// COM2.
    pub agent: Arc<Serial>,
    /// Keyboard controller, for Ctrl-Alt-Del.
    pub keyboard: Arc<I8042>,
    /// Power registers, for the power button.
    pub power: Arc<Power>,
    clock: Arc<Cmos>,
    irqchip: Irqchip,
    /// Watchdog.
    pub watchdog: Option<BoardWatchdog>,
    /// Virtio devices.
    pub devices: Devices,
}

impl Board {
    /// Logs how many accesses of the guest no device answered.
    pub fn log_unclaimed(&self) {
        let (ports, addresses) = (self.pio.unclaimed(), self.mmio.unclaimed());
        log::debug!("{ports} port and {addresses} memory accesses met no device");
    }

    /// Makes the devices from their state, which has [arranged](BoardState::arrange) `wiring`, and puts
    /// them on two buses. The I/O APIC has its already, and virtio devices that ran do not before
    /// [`Devices::resume`].
    ///
    /// # Errors
    /// A device that cannot be made, or not from this state.
    pub fn new(
        machine: &Machine<'_>,
        transport: Transport,
        wiring: Wiring,
        state: &BoardState,
    ) -> Result<Self, BoardError> {
        let irqchip = machine.irqchip;
        let (first, second) = (state.console.clone(), state.agent.clone());
        let console = serial(irqchip, layout::COM1_IRQ, wiring.console, first)?;
        let agent = serial(irqchip, layout::COM2_IRQ, wiring.agent, second)?;
        let line = |irq| irqchip.line(irq);
        let keyboard = Arc::new(I8042::new(line(layout::I8042_IRQ), state.keyboard.clone()));
        let power = Arc::new(Power::new(line(layout::GED_IRQ), state.power.clone()));
        let clock = Arc::new(Cmos::new(host_clock(), state.clock.clone()));
        let none = PartsState::default();
        let parts = state.parts.as_ref().unwrap_or(&none);

        let mut pio = Bus::new();
        let mut place = |device: &'static str, port: u16, len: u16, at: Arc<dyn BusDevice>| {
            pio.insert(port.into(), len.into(), at)
                .map_err(|source| BoardError::Place { device, source })
        };
        let size = layout::SERIAL_PORT_SIZE;
        place("COM1", layout::COM1_PORT, size, console.clone())?;
        place("COM2", layout::COM2_PORT, size, agent.clone())?;
        place(
            "i8042",
            layout::I8042_PORT,
            layout::I8042_PORT_SIZE,
            keyboard.clone(),
        )?;
        place(
            "the real-time clock",
            layout::RTC_PORT,
            layout::RTC_PORT_SIZE,
            clock.clone(),
        )?;
        place(
            "debug exit",
            layout::DEBUG_EXIT_PORT,
            1,
            Arc::new(DebugExit),
        )?;
        place("pvpanic", layout::PVPANIC_PORT, 1, Arc::new(PvPanic))?;
        place(
            "the power registers",
            layout::POWER_PORT,
            layout::POWER_PORT_SIZE,
            power.clone(),
        )?;

        let watchdog = wiring.watchdog.as_ref().map(|settings| {
            let messages = machine.irqchip.messages();
            let state = parts.watchdog.clone().unwrap_or_default();
            BoardWatchdog::place(settings, messages, &mut pio, state)
        });

        let mut mmio = Bus::new();
        place_ioapic(irqchip, &mut mmio)?;
        place_boot_timer(wiring.boot_timer, &mut mmio)?;
        let mut buses = Buses {
            pio: &mut pio,
            mmio: &mut mmio,
        };
        let plans = (wiring.devices, wiring.io);
        let devices = Devices::attach(plans, transport, machine, &mut buses, parts)?;
        Ok(Self {
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            console,
            agent,
            keyboard,
            power,
            clock,
            irqchip: irqchip.clone(),
            watchdog: watchdog.transpose()?,
            devices,
        })
    }

    /// Makes the device of `plan` while the guest runs, on `vm` with this RAM, and tells the guest.
    ///
    /// # Errors
    /// As [`Devices::plug`].
    pub fn plug(
        &self,
        plan: Plan,
        (vm, memory): (&Arc<VmFd>, &GuestMemory),
    ) -> Result<Arc<Attached>, AttachError> {
        let machine = Machine {
            vm,
            irqchip: &self.irqchip,
            memory,
        };
        let attached = self.devices.plug(plan, &machine)?;
        self.power.announce_pci();
        Ok(attached)
    }

    /// Has the guest eject `device`; with `force` it is off the bus at once.
    pub fn unplug(&self, device: &Attached, force: bool) {
        match force {
            true => self.devices.eject(device),
            false => self.devices.ask_for(device),
        }
        self.power.announce_pci();
    }

    /// The state of all devices, of which [`new`](Self::new) makes the same. vCPUs stand still, and
    /// virtio devices are paused, or each goes on at once.
    pub fn save(&self) -> BoardState {
        let (pci_address, hotplug) = self.devices.pci_registers().unzip();
        BoardState {
            console: self.console.save(),
            agent: self.agent.save(),
            keyboard: self.keyboard.save(),
            power: self.power.save(),
            clock: self.clock.save(),
            parts: Some(PartsState {
                watchdog: self.watchdog.as_ref().map(BoardWatchdog::save),
                virtio: self.devices.save(),
                // Last, with the interrupts of all others.
                ioapic: self.irqchip.ioapic().map(|ioapic| ioapic.save()),
                pci_address,
                hotplug,
            }),
        }
    }

    /// Has every device go back to `state`, a state of this machine: no device is made anew, and what
    /// the host's side holds stays there. vCPUs stand still, and virtio devices do until
    /// [`Devices::resume`].
    ///
    /// # Errors
    /// [`ResetError`]; some devices have gone back then.
    pub fn restore(&self, state: &BoardState) -> Result<(), ResetError> {
        let none = PartsState::default();
        let parts = state.parts.as_ref().unwrap_or(&none);
        self.console.restore(state.console.clone())?;
        self.agent.restore(state.agent.clone())?;
        self.keyboard.restore(state.keyboard.clone());
        self.power.restore(state.power.clone());
        self.clock.restore(state.clock.clone());
        if let (Some(watchdog), Some(state)) = (&self.watchdog, &parts.watchdog) {
            watchdog.restore(state);
        }
        self.devices.restore(parts)?;
        // Last: the others may have raised lines.
        if let (Some(ioapic), Some(state)) = (self.irqchip.ioapic(), &parts.ioapic) {
            ioapic.restore(state.clone());
        }
        Ok(())
    }

    /// Says how far the counter of the first vCPU of `saved` is from the host's, with its clocks so far
    /// from where they were saved.
    pub fn set_counter_offset(&self, saved: &MachineState, shift: &ClockShift) {
        if let Some(tsc) = saved.vcpus.first().map(|state| state.tsc)
            && let Some(offset) = tsc.offset
        {
            let offset = shift.tsc_offset(offset, tsc.khz);
            self.devices.set_counter_offset(offset);
        }
    }

    /// Tells the guest, whose vCPUs stand still, that it goes on from an old state as the machine
    /// with this generation id: it makes new secrets and mistrusts its clocks.
    ///
    /// # Errors
    /// When the id or the clock's page is outside of guest memory.
    pub fn announce_generation(
        &self,
        memory: &GuestMemory,
        id: [u8; VMGENID_SIZE],
    ) -> Result<(), GuestMemoryError> {
        vmgenid::write(memory, id)?;
        vmclock::disrupt(memory)?;
        self.power.announce_generation();
        Ok(())
    }

    /// What the ACPI tables say of this board.
    pub fn acpi_facts(&self, topology: &Topology, irqchip: IrqchipMode) -> AcpiFacts {
        let device = |port, irq| PortDevice {
            port,
            irq: Some(irq),
        };
        AcpiFacts {
            apic_ids: (0..topology.vcpus())
                .map(|index| topology.apic_id(index))
                .collect(),
            irqchip,
            serial: vec![
                device(layout::COM1_PORT, layout::COM1_IRQ),
                device(layout::COM2_PORT, layout::COM2_IRQ),
            ],
            keyboard: Some(device(layout::I8042_PORT, layout::I8042_IRQ)),
            // No interrupt: the clock raises none.
            rtc: Some(PortDevice {
                port: layout::RTC_PORT,
                irq: None,
            }),
            pvpanic: Some(layout::PVPANIC_PORT),
            power: PowerFacts {
                port: layout::POWER_PORT,
                irq: layout::GED_IRQ,
            },
            virtio: self.devices.windows().to_vec(),
            pci: self.devices.pci_host(),
            watchdog: self.watchdog.as_ref().map(BoardWatchdog::facts),
            generation: Some(GenerationFacts {
                id: layout::VMGENID_START,
                clock: Window {
                    base: layout::VMCLOCK_START,
                    size: layout::VMCLOCK_SIZE,
                },
            }),
        }
    }
}

/// The boot timer, where it was asked for.
fn place_boot_timer(timer: Option<BootTimer>, mmio: &mut Bus) -> Result<(), BoardError> {
    let Some(timer) = timer else { return Ok(()) };
    let (start, size) = (layout::BOOT_TIMER_START, layout::BOOT_TIMER_SIZE);
    let placed = mmio.insert(start, size, Arc::new(timer));
    placed.map_err(|source| BoardError::Place {
        device: "the boot timer",
        source,
    })
}

/// bulle's own I/O APIC, where the machine has one.
fn place_ioapic(irqchip: &Irqchip, mmio: &mut Bus) -> Result<(), BoardError> {
    let Some(ioapic) = irqchip.ioapic() else {
        return Ok(());
    };
    let placed = mmio.insert(layout::IOAPIC_START, layout::IOAPIC_SIZE, ioapic.clone());
    placed.map_err(|source| BoardError::Place {
        device: "the I/O APIC",
        source,
    })
}

fn serial(
    irqchip: &Irqchip,
    irq: u32,
    end: SerialEnd,
    state: SerialState,
) -> Result<Arc<Serial>, SerialError> {
    let drained = move || {
        if let Err(error) = end.drained.write(1) {
            log::error!("a serial port's room was not announced: {error}");
        }
    };
    let line = irqchip.line(irq);
    Serial::new(line, end.out, Box::new(drained), state).map(Arc::new)
}
