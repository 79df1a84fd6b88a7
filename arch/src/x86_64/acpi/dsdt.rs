//! The differentiated system description table: the devices a guest cannot probe, in AML.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::tables::{bytes, table};
use super::{AcpiError, AcpiFacts, MmioDevice, PortDevice, PowerFacts, generation, pci};
use crate::layout;

/// One digit names a serial port.
pub(super) const MAX_SERIAL: usize = 9;

/// An event of the generic event device: bit of the event status register, and who is told.
type Event = (u8, &'static str);

const BUTTON: Event = (layout::POWER_EVENT_BUTTON, "\\_SB_.PWRB");

/// Objects that are AML already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The whole table.
pub(super) fn dsdt(facts: &AcpiFacts) -> Result<Vec<u8>, AcpiError> {
    let mut devices = processors(facts.apic_ids.len());
    for (number, port) in (1u8..).zip(&facts.serial) {
        devices.extend(serial(number, *port));
    }
    if let Some(keyboard) = facts.keyboard {
        let ports = [(keyboard.port, 1), (keyboard.port.saturating_add(4), 1)];
        devices.extend(device(
            "PS2K",
            &EISAName::new("PNP0303"),
            0,
            &io(&ports, keyboard.irq),
        ));
    }
    if let Some(rtc) = facts.rtc {
        let ports = [(rtc.port, layout::RTC_PORT_SIZE as u8)];
        devices.extend(device(
            "RTC_",
            &EISAName::new("PNP0B00"),
            0,
            &io(&ports, rtc.irq),
        ));
    }
    if let Some(port) = facts.pvpanic {
        devices.extend(device("PEVT", &"QEMU0001", 0, &io(&[(port, 1)], None)));
    }
    for (number, window) in (0u16..).zip(&facts.virtio) {
        devices.extend(virtio(number, *window)?);
    }
    if let Some(host) = &facts.pci {
        devices.extend(pci::devices(host)?);
    }
    devices.extend(bytes(&Device::new(
        Path::new("PWRB"),
        vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"))],
    )));
    let mut events = vec![BUTTON];
    if let Some(generation) = facts.generation {
        devices.extend(generation::devices(generation)?);
        events.extend(generation::TOLD.map(|who| (layout::POWER_EVENT_GENERATION, who)));
    }
    let hotplug = facts.pci.is_some();
    devices.extend(event_device(facts.power, &events, hotplug));

    let mut body = Scope::raw(Path::new("\\_SB_"), devices);
    let s5 = layout::POWER_SLEEP_TYPE_S5;
    let package = Package::new(vec![&s5, &s5, &ZERO, &ZERO]);
    body.extend(bytes(&Name::new(Path::new("_S5_"), &package)));
    // From revision 2 on integers have 64 bits.
    Ok(table(*b"DSDT", 2, &body))
}

/// A device with its identification, number and resources.
fn device(name: &str, hid: &dyn Aml, uid: u16, resources: &Raw) -> Vec<u8> {
    bytes(&Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), hid),
            &Name::new(Path::new("_UID"), &uid),
            &Name::new(Path::new("_CRS"), resources),
        ],
    ))
}

/// An interrupt line: edge-triggered, active high, not shared, as all lines of bulle are.
fn interrupt(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

/// Resources of a device with ports (first and count) and maybe an interrupt.
fn io(ports: &[(u16, u8)], irq: Option<u32>) -> Raw {
    let ports: Vec<_> = ports
        .iter()
        .map(|&(first, count)| IO::new(first, first, 1, count))
        .collect();
    let irq = irq.map(interrupt);
    let mut resources: Vec<&dyn Aml> = ports.iter().map(|port| port as &dyn Aml).collect();
    resources.extend(irq.as_ref().map(|irq| irq as &dyn Aml));
    Raw(bytes(&ResourceTemplate::new(resources)))
}

/// A processor container with a device for each processor; a device's `_UID` is its number in the MADT.
fn processors(count: usize) -> Vec<u8> {
    let mut children = bytes(&Name::new(Path::new("_HID"), &"ACPI0010"));
    children.extend(bytes(&Name::new(
        Path::new("_CID"),
        &EISAName::new("PNP0A05"),
    )));
    for uid in 0..count {
        children.extend(bytes(&Device::new(
            Path::new(&format!("C{uid:03X}")),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0007"),
                &Name::new(Path::new("_UID"), &uid),
            ],
        )));
    }
    bytes(&Device::new(Path::new("CPUS"), vec![&Raw(children)]))
}

fn serial(number: u8, port: PortDevice) -> Vec<u8> {
    let ports = [(port.port, layout::SERIAL_PORT_SIZE as u8)];
    let hid = EISAName::new("PNP0501");
    device(
        &format!("COM{number}"),
        &hid,
        number.into(),
        &io(&ports, port.irq),
    )
}

fn virtio(number: u16, window: MmioDevice) -> Result<Vec<u8>, AcpiError> {
    let MmioDevice { base, size, irq } = window;
    let (Ok(first), Ok(length), Some(_)) = (
        u32::try_from(base),
        u32::try_from(size),
        base.checked_add(size).filter(|end| *end <= 1 << 32),
    ) else {
        return Err(AcpiError::Window { base, size });
    };
    let (memory, irq) = (Memory32Fixed::new(true, first, length), interrupt(irq));
    let resources = Raw(bytes(&ResourceTemplate::new(vec![&memory, &irq])));
    Ok(device(
        &format!("V{number:03X}"),
        &"LNRO0005",
        number,
        &resources,
    ))
}

/// The generic event device: on its interrupt, `_EVT` reads the event status register once (which
/// clears it) and notifies the device of each event that is set; PCI has a method that does it, with
/// `hotplug`.
fn event_device(power: PowerFacts, events: &[Event], hotplug: bool) -> Vec<u8> {
    let port = power.port.saturating_add(layout::POWER_EVENTS);
    let status = Field::new(
        Path::new("EVRG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVST", 8)],
    );
    let mut body = bytes(&Store::new(&Local(0), &Path::new("EVST")));
    for (bit, told) in events {
        const STATUS_CHANGED: u8 = 0x80;
        body.extend(bytes(&If::new(
            &And::new(&ZERO, &Local(0), bit),
            vec![&Notify::new(&Path::new(told), &STATUS_CHANGED)],
        )));
    }
    if hotplug {
        body.extend(bytes(&If::new(
            &And::new(&ZERO, &Local(0), &layout::POWER_EVENT_PCI),
            vec![&MethodCall::new(Path::new(pci::NOTIFY), Vec::new())],
        )));
    }
    let resources = io(&[], Some(power.irq));
    bytes(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
            &OpRegion::new(Path::new("EVRG"), OpRegionSpace::SystemIO, &port, &1u8),
            &status,
            &Method::new(Path::new("_EVT"), 1, true, vec![&Raw(body)]),
        ],
    ))
}
