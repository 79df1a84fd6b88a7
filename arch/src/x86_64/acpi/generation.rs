//! The devices of a new generation: the virtual machine generation id (Microsoft's specification), and
//! vmclock, whose resource is the page itself.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, Name, Package, Path, ResourceTemplate,
};

use super::tables::bytes;
use super::{AcpiError, GenerationFacts};

/// Who is told of a new generation.
pub(super) const TOLD: [&str; 2] = ["\\_SB_.VGEN", "\\_SB_.VCLK"];

/// Both devices.
pub(super) fn devices(facts: GenerationFacts) -> Result<Vec<u8>, AcpiError> {
    let (low, high) = (facts.id as u32, (facts.id >> 32) as u32);
    let address = Package::new(vec![&low, &high]);
    let mut devices = bytes(&Device::new(
        Path::new("VGEN"),
        vec![
            // Drivers of Linux and Windows know it by its compatible id.
            &Name::new(Path::new("_HID"), &"BULL0001"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &address),
        ],
    ));
    let (first, last) = facts.clock.bounds()?;
    let page = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        false,
        u64::from(first),
        u64::from(last),
        None,
    );
    let resources = ResourceTemplate::new(vec![&page]);
    devices.extend(bytes(&Device::new(
        Path::new("VCLK"),
        vec![
            &Name::new(Path::new("_HID"), &"AMZNC10C"),
            &Name::new(Path::new("_CID"), &"VMCLOCK"),
            &Name::new(Path::new("_DDN"), &"VMCLOCK"),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )));
    Ok(devices)
}
