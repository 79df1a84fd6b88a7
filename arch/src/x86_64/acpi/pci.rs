//! A PCI host bridge: its device in the DSDT, and the MCFG (PCI Firmware Specification 3.3,
//! section 4.1.2).
//!
//! There is one segment with one bus, and no routing table: functions interrupt by messages.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Path,
    ResourceTemplate, ZERO,
};
use acpi_tables::mcfg::MCFG;

use super::dsdt::Raw;
use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use super::{AcpiError, Window};
use crate::layout;

/// Where a host bridge is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// Configuration space of bus 0 (ECAM), below 4 GiB.
    pub ecam: Window,
    /// Where the functions' memory is, below 4 GiB.
    pub memory: Window,
}

/// The host bridge, and a device that keeps its configuration space from other uses, without which
/// Linux does not trust the MCFG.
pub(super) fn devices(host: &PciHost) -> Result<Vec<u8>, AcpiError> {
    let (first, last) = host.memory.bounds()?;
    let ports = layout::PCI_CONFIG_PORT;
    let bridge = bytes(&ResourceTemplate::new(vec![
        &AddressSpace::<u16>::new_bus_number(0, 0),
        &IO::new(ports, ports, 1, layout::PCI_CONFIG_PORT_SIZE as u8),
        &AddressSpace::<u32>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            first,
            last,
            None,
        ),
    ]));
    let mut aml = bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            &Name::new(Path::new("_CRS"), &Raw(bridge)),
        ],
    ));
    let (first, last) = host.ecam.bounds()?;
    let ecam = Memory32Fixed::new(true, first, (last - first).saturating_add(1));
    aml.extend(bytes(&Device::new(
        Path::new("ECAM"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ecam])),
        ],
    )));
    Ok(aml)
}

/// Memory-mapped configuration space description table.
pub(super) fn mcfg(host: &PciHost) -> Vec<u8> {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(host.ecam.base, 0, 0, 0);
    bytes(&table)
}
