//! ACPI tables of a hardware-reduced machine (ACPI 6.5), made from plain facts.
//!
//! [`write_tables`] puts RSDP, XSDT, FADT, MADT and DSDT into the room `layout` gives them. Guests
//! find here what cannot be probed: processors, interrupt controllers, serial ports, virtio-mmio
//! windows, the PCI host bridge, the registers that sleep and reset, the power button, and what
//! tells of a new generation. There is no FACS and no legacy power management, which hardware-reduced
//! ACPI does without.

mod dsdt;
mod generation;
mod pci;
mod tables;
mod watchdog;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use self::pci::PciHost;
pub use self::watchdog::WatchdogFacts;
use crate::layout::{ACPI_TABLES_END, ACPI_TABLES_START, RSDP_START};
use crate::vm::IrqchipMode;

/// Most processors and most virtio devices a DSDT can name: three hexadecimal digits.
pub const MAX_NAMED: usize = 0x1000;

/// Tables cannot be made or written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More devices than can be named.
    #[error("{count} {what} cannot be described to the guest: {MAX_NAMED} is the most")]
    TooMany {
        /// Kind of device.
        what: &'static str,
        /// Number there are.
        count: usize,
    },
    /// A device window that 32 bits cannot say.
    #[error("the device window of {size:#x} bytes at {base:#x} is not below 4 GiB")]
    Window {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The tables outgrow their room below 1 MiB.
    #[error(
        "the ACPI tables need {needed} bytes, and there is room for {room}: configure fewer devices \
         or vCPUs"
    )]
    Room {
        /// Bytes of all tables.
        needed: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Guest memory does not take a table.
    #[error("cannot write an ACPI table at guest address {address:#x}")]
    Write {
        /// Where the table was to go.
        address: u64,
        /// Cause.
        #[source]
        source: GuestMemoryError,
    },
}

/// A device with I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortDevice {
    /// First port.
    pub port: u16,
    /// Interrupt line (GSI), edge-triggered; none if the device never raises one.
    pub irq: Option<u32>,
}

/// A virtio device in a window of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of the window, below 4 GiB.
    pub base: u64,
    /// Bytes of the window.
    pub size: u64,
    /// Interrupt line (GSI), edge-triggered.
    pub irq: u32,
}

/// A range of guest-physical addresses below 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Bytes, at least one.
    pub size: u64,
}

impl Window {
    /// First and last address.
    fn bounds(self) -> Result<(u32, u32), AcpiError> {
        let Self { base, size } = self;
        let last = base.checked_add(size).and_then(|end| end.checked_sub(1));
        match (u32::try_from(base), last.map(u32::try_from)) {
            (Ok(first), Some(Ok(last))) if first <= last => Ok((first, last)),
            _ => Err(AcpiError::Window { base, size }),
        }
    }
}

/// Everything the tables say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiFacts {
    /// APIC id of each vCPU, by index.
    pub apic_ids: Vec<u32>,
    /// Where the interrupt controllers are; only [`IrqchipMode::Kernel`] has a PIC.
    pub irqchip: IrqchipMode,
    /// 16550 UARTs, COM1 first; at most nine.
    pub serial: Vec<PortDevice>,
    /// i8042 with a keyboard: data port given, command port four above.
    pub keyboard: Option<PortDevice>,
    /// CMOS real-time clock: index port given, data port behind it.
    pub rtc: Option<PortDevice>,
    /// Port of the pvpanic device.
    pub pvpanic: Option<u16>,
    /// Power registers (`layout::POWER_*` offsets) and the line of the generic event device.
    pub power: PowerFacts,
    /// virtio-mmio devices.
    pub virtio: Vec<MmioDevice>,
    /// PCI host bridge.
    pub pci: Option<PciHost>,
    /// Watchdog.
    pub watchdog: Option<WatchdogFacts>,
    /// How the guest learns that it goes on from an old state.
    pub generation: Option<GenerationFacts>,
}

/// Guest memory that changes when the guest goes on from an old state; the generic event device tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationFacts {
    /// Guest-physical address of the generation id (see [`crate::vmgenid`]).
    pub id: u64,
    /// The vmclock page (see [`crate::vmclock`]).
    pub clock: Window,
}

/// The registers by which a guest sleeps, resets and learns of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerFacts {
    /// First of the `layout::POWER_PORT_SIZE` ports.
    pub port: u16,
    /// Interrupt line (GSI) of the generic event device, edge-triggered.
    pub irq: u32,
}

impl AcpiFacts {
    fn check(&self) -> Result<(), AcpiError> {
        let few = |what, count, most| {
            if count > most {
                Err(AcpiError::TooMany { what, count })
            } else {
                Ok(())
            }
        };
        few("vCPUs", self.apic_ids.len(), MAX_NAMED)?;
        few("virtio devices", self.virtio.len(), MAX_NAMED)?;
        few("serial ports", self.serial.len(), dsdt::MAX_SERIAL)
    }
}

/// Write all tables; the result is where the RSDP is, for the boot protocol to pass on.
///
/// # Errors
/// [`AcpiError`] when the facts cannot be said, or the tables do not fit.
pub fn write_tables<M>(mem: &M, facts: &AcpiFacts) -> Result<GuestAddress, AcpiError>
where
    M: Bytes<GuestAddress, E = GuestMemoryError>,
{
    facts.check()?;
    let mut room = Room {
        next: ACPI_TABLES_START,
        tables: Vec::new(),
    };
    let dsdt = room.put(dsdt::dsdt(facts)?);
    let fadt = room.put(tables::fadt(facts, dsdt));
    let madt = room.put(tables::madt(facts));
    let mut entries = vec![fadt, madt];
    if let Some(host) = &facts.pci {
        entries.push(room.put(pci::mcfg(host)));
    }
    if let Some(watchdog) = &facts.watchdog {
        entries.push(room.put(watchdog::wdat(watchdog)));
    }
    let xsdt = room.put(tables::xsdt(&entries));
    if room.next > ACPI_TABLES_END {
        return Err(AcpiError::Room {
            needed: room.next - ACPI_TABLES_START,
            room: ACPI_TABLES_END - ACPI_TABLES_START,
        });
    }
    let mut rsdp = Vec::new();
    Rsdp::new(tables::OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    room.tables.push((RSDP_START, rsdp));
    for (address, table) in &room.tables {
        mem.write_slice(table, GuestAddress(*address))
            .map_err(|source| AcpiError::Write {
                address: *address,
                source,
            })?;
    }
    Ok(GuestAddress(RSDP_START))
}

/// Gives tables their addresses, one behind the other.
struct Room {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Room {
    /// Tables start at multiples of 16 bytes; the result is this table's address.
    fn put(&mut self, table: Vec<u8>) -> u64 {
        let address = self.next;
        self.next = (address + table.len() as u64).next_multiple_of(16);
        self.tables.push((address, table));
        address
    }
}

#[cfg(test)]
mod tests;
