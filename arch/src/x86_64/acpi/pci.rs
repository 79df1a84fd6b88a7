//! A PCI host bridge: its device in the DSDT, and the MCFG (PCI Firmware Specification 3.3,
//! section 4.1.2).
//!
//! There is one segment with one bus. Functions interrupt by messages; for guests that do without,
//! the routing table leads each INTA# to a link device. Links because only they can say that a line is
//! edge-triggered, as all lines of bulle are: without one PCI's are level-triggered.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method,
    Name, Package, Path, ResourceTemplate, ZERO,
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
    /// Interrupt lines that the functions share: INTA# of slot `n` is number `n % 4`.
    pub lines: [u32; 4],
}

/// Slots of a bus, one function each.
const SLOTS: u32 = 32;

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
    let routes = routes();
    let mut aml = links(&host.lines);
    aml.extend(bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            &Name::new(Path::new("_CRS"), &Raw(bridge)),
            &Name::new(Path::new("_PRT"), &Raw(routes)),
        ],
    )));
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

/// The routing table (ACPI 6.5, section 6.2.13): INTA# of each slot to its link.
fn routes() -> Vec<u8> {
    const ANY_FUNCTION: u32 = 0xffff;
    let rows: Vec<Raw> = (0..SLOTS)
        .map(|slot| {
            let address = slot << 16 | ANY_FUNCTION;
            let link = Path::new(&link_name(slot % 4));
            Raw(bytes(&Package::new(vec![&address, &ZERO, &link, &ZERO])))
        })
        .collect();
    bytes(&Package::new(
        rows.iter()
            .map(|row| row as &dyn acpi_tables::Aml)
            .collect(),
    ))
}

fn link_name(number: u32) -> String {
    format!("LNK{number}")
}

/// A link device (PNP0C0F) for each line, which is the only one that it can be set to.
fn links(lines: &[u32; 4]) -> Vec<u8> {
    /// Present, enabled and working.
    const STATUS: u8 = 0x0b;
    let link = |(number, line): (u32, &u32)| {
        let interrupt = Interrupt::new(true, true, false, true, *line);
        let resources = Raw(bytes(&ResourceTemplate::new(vec![&interrupt])));
        bytes(&Device::new(
            Path::new(&link_name(number)),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0F")),
                &Name::new(Path::new("_UID"), &number),
                &Name::new(Path::new("_STA"), &STATUS),
                &Name::new(Path::new("_PRS"), &resources),
                &Name::new(Path::new("_CRS"), &resources),
                &Method::new(Path::new("_SRS"), 1, false, Vec::new()),
                &Method::new(Path::new("_DIS"), 0, false, Vec::new()),
            ],
        ))
    };
    (0..).zip(lines).flat_map(link).collect()
}

/// Memory-mapped configuration space description table.
pub(super) fn mcfg(host: &PciHost) -> Vec<u8> {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(host.ecam.base, 0, 0, 0);
    bytes(&table)
}
