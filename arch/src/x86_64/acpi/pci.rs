//! A PCI host bridge: its device in the DSDT, and the MCFG (PCI Firmware Specification 3.3,
//! section 4.1.2).
//!
//! There is one segment with one bus. Functions interrupt by messages; for guests that do without,
//! the routing table leads each INTA# to a link device. Links because only they can say that a line is
//! edge-triggered, as all lines of bulle are: without one PCI's are level-triggered.
//! Each slot is a device that can be ejected (ACPI 6.5, section 6.3.3); [`NOTIFY`] tells the slots of
//! functions that came or are to go.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Store, ZERO,
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
    /// First of the `layout::PCI_HOTPLUG_PORT_SIZE` ports by which functions come and go.
    pub hotplug: u16,
}

/// The method that the generic event device runs when functions came or are to go.
pub(super) const NOTIFY: &str = "\\_SB_.PCI0.PCNT";

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
            &Raw(slots(host.hotplug)),
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

/// The devices of all slots but the bridge's, which can be ejected, and the method that notifies them.
fn slots(port: u16) -> Vec<u8> {
    const DEVICE_CHECK: u8 = 1;
    const EJECT_REQUEST: u8 = 3;
    let name = |slot| Path::new(&format!("S{slot:03}"));
    let size = layout::PCI_HOTPLUG_PORT_SIZE;
    let mut aml = bytes(&OpRegion::new(
        Path::new("PHPR"),
        OpRegionSpace::SystemIO,
        &port,
        &size,
    ));
    aml.extend(bytes(&Field::new(
        Path::new("PHPR"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"PADD", *b"PLVG", *b"PEJT"]
            .map(|register| FieldEntry::Named(register, 32))
            .to_vec(),
    )));
    let mut told = Vec::new();
    for (register, local, value) in [("PADD", 0, DEVICE_CHECK), ("PLVG", 1, EJECT_REQUEST)] {
        told.extend(bytes(&Store::new(&Local(local), &Path::new(register))));
        for slot in 1..SLOTS {
            told.extend(bytes(&If::new(
                &And::new(&ZERO, &Local(local), &(1_u32 << slot)),
                vec![&Notify::new(&name(slot), &value)],
            )));
        }
    }
    for slot in 1..SLOTS {
        let (register, bit) = (Path::new("PEJT"), 1_u32 << slot);
        let eject = Store::new(&register, &bit);
        aml.extend(bytes(&Device::new(
            name(slot),
            vec![
                &Name::new(Path::new("_ADR"), &(slot << 16)),
                &Name::new(Path::new("_SUN"), &slot),
                &Method::new(Path::new("_EJ0"), 1, true, vec![&eject]),
            ],
        )));
    }
    let told = Raw(told);
    let method = Method::new(Path::new("PCNT"), 0, true, vec![&told]);
    aml.extend(bytes(&method));
    aml
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
