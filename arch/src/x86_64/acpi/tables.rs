//! The fixed tables: FADT, MADT and XSDT (ACPI 6.5, sections 5.2.8 to 5.2.12).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::AcpiFacts;
use crate::layout;
use crate::vm::IrqchipMode;

pub(super) const OEM_ID: [u8; 6] = *b"BULLE ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"BULLEVM ";
pub(super) const OEM_REVISION: u32 = 1;

/// IA-PC boot architecture flags of the FADT.
mod boot_arch {
    /// There are devices on an ISA bus, such as serial ports.
    pub const LEGACY_DEVICES: u16 = 1 << 0;
    /// There is an i8042.
    pub const I8042: u16 = 1 << 1;
    /// Probing for VGA is not safe.
    pub const NO_VGA: u16 = 1 << 2;
    /// There is no CMOS real-time clock.
    pub const NO_CMOS_RTC: u16 = 1 << 5;
}

/// Fixed ACPI description table: hardware-reduced, with the registers that reset and sleep.
pub(super) fn fadt(facts: &AcpiFacts, dsdt: u64) -> Vec<u8> {
    let register = |offset| {
        let port = u64::from(facts.power.port) + u64::from(offset);
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    let has = |present: bool, flag| if present { flag } else { 0 };
    let boot_arch = boot_arch::NO_VGA
        | has(
            !facts.serial.is_empty() || facts.keyboard.is_some(),
            boot_arch::LEGACY_DEVICES,
        )
        | has(facts.keyboard.is_some(), boot_arch::I8042)
        | has(facts.rtc.is_none(), boot_arch::NO_CMOS_RTC);
    // The power button flag says that there is none in the fixed hardware.
    let flags = [
        Flags::Wbinvd,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::ResetRegSup,
        Flags::HwReducedAcpi,
    ];
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    for flag in flags {
        table = table.flag(flag);
    }
    if facts.rtc.is_some() {
        table.century = layout::RTC_CENTURY;
    }
    table.iapc_boot_arch = boot_arch.into();
    table.reset_reg = register(layout::POWER_RESET);
    table.reset_value = layout::POWER_RESET_VALUE;
    table.sleep_control_reg = register(layout::POWER_SLEEP_CONTROL);
    table.sleep_status_reg = register(layout::POWER_SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"BULLE\0\0\0").into();
    bytes(&table.finalize())
}

/// Multiple APIC description table: processors and interrupt controllers.
///
/// There are no source overrides: every line is wired to the I/O APIC pin of its own number, edge and
/// active high as on an ISA bus, and there is no SCI.
pub(super) fn madt(facts: &AcpiFacts) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ALL: u8 = 0xff;
    const LINT1: u8 = 1;
    let flags = if facts.irqchip == IrqchipMode::Kernel {
        PCAT_COMPAT
    } else {
        0
    };
    let mut body = Vec::new();
    // The address of the local APICs is below 4 GiB.
    body.extend((layout::LAPIC_START as u32).to_le_bytes());
    body.extend(flags.to_le_bytes());
    let mut has_x2apic = false;
    for (uid, &apic_id) in (0u32..).zip(&facts.apic_ids) {
        match (u8::try_from(uid), u8::try_from(apic_id)) {
            // Type 0, local APIC: 255 means all processors and all APICs.
            (Ok(uid), Ok(apic_id)) if uid < ALL && apic_id < ALL => {
                body.extend([0, 8, uid, apic_id, 1, 0, 0, 0]);
            }
            // Type 9, local x2APIC.
            _ => {
                has_x2apic = true;
                body.extend([9, 16, 0, 0]);
                body.extend([apic_id, 1, uid].map(u32::to_le_bytes).as_flattened());
            }
        }
    }
    // Type 1, I/O APIC, with its first pin as GSI 0.
    body.extend([1, 12, 0, 0]);
    body.extend(
        [layout::IOAPIC_START as u32, 0]
            .map(u32::to_le_bytes)
            .as_flattened(),
    );
    // Type 4, local APIC NMI: pin LINT1 of all processors.
    body.extend([4, 6, ALL, 0, 0, LINT1]);
    if has_x2apic {
        // Type 10, local x2APIC NMI.
        body.extend([10, 12, 0, 0, ALL, ALL, ALL, ALL, LINT1, 0, 0, 0]);
    }
    table(*b"APIC", 6, &body)
}

/// Extended system description table: where the others are.
pub(super) fn xsdt(entries: &[u64]) -> Vec<u8> {
    let mut table = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        table.add_entry(*entry);
    }
    bytes(&table)
}

/// A table with the common header.
pub(super) fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER_SIZE: u32 = 36;
    let mut table = Sdt::new(
        signature,
        HEADER_SIZE,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// A table or an object as bytes.
pub(super) fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}
