//! The machine that tests of the ACPI tables describe, for those inside of the crate as well.

use super::{AcpiFacts, IrqchipMode, MmioDevice, PciHost, PortDevice, PowerFacts, Window};

/// A PCI bus.
pub const PCI: PciHost = PciHost {
    ecam: Window {
        base: 0xe000_0000,
        size: 0x10_0000,
    },
    memory: Window {
        base: 0xe800_0000,
        size: 0x800_0000,
    },
    lines: [16, 17, 18, 19],
    hotplug: 0x620,
};

/// A machine with the usual devices and `virtio` windows, whose interrupts are from `irq` on.
pub fn facts(
    apic_ids: impl IntoIterator<Item = u32>,
    irqchip: IrqchipMode,
    (virtio, irq): (u32, u32),
) -> AcpiFacts {
    let port = |port, irq| PortDevice {
        port,
        irq: Some(irq),
    };
    AcpiFacts {
        apic_ids: apic_ids.into_iter().collect(),
        irqchip,
        serial: vec![port(0x3f8, 4), port(0x2f8, 3)],
        keyboard: Some(port(0x60, 1)),
        rtc: Some(port(0x70, 8)),
        pvpanic: Some(0x505),
        power: PowerFacts {
            port: 0x600,
            irq: 9,
        },
        virtio: (0..virtio)
            .map(|n| MmioDevice {
                base: 0xd000_0000 + u64::from(n) * 0x1000,
                size: 0x1000,
                irq: irq + n,
            })
            .collect(),
        pci: None,
        watchdog: None,
        generation: None,
    }
}
