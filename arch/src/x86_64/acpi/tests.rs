use vm_memory::GuestMemoryMmap;

use super::*;
use crate::layout::LAPIC_START;

#[path = "../../../tests/facts/mod.rs"]
mod machine;

fn facts(apic_ids: impl IntoIterator<Item = u32>, irqchip: IrqchipMode) -> AcpiFacts {
    machine::facts(apic_ids, irqchip, (2, 5))
}

/// A guest with its tables.
struct Guest(GuestMemoryMmap<()>);

impl Guest {
    fn with(facts: &AcpiFacts) -> Result<Self, AcpiError> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        assert_eq!(write_tables(&memory, facts)?, GuestAddress(RSDP_START));
        Ok(Self(memory))
    }

    fn read(&self, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.0
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// A table whose signature, length, place and checksum are right.
    fn table(&self, address: u64, signature: &[u8]) -> Vec<u8> {
        let size = u32_at(&self.read(address, 8), 4);
        assert!(address >= ACPI_TABLES_START && address + u64::from(size) <= ACPI_TABLES_END);
        let table = self.read(address, size as usize);
        assert_eq!(&table[..4], signature);
        assert_eq!(
            sum(&table),
            0,
            "checksum of {}",
            String::from_utf8_lossy(signature)
        );
        assert_eq!(&table[10..16], b"BULLE ");
        table
    }

    /// FADT, MADT and DSDT, found as a guest finds them.
    fn tables(&self) -> [Vec<u8>; 3] {
        let rsdp = self.read(RSDP_START, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        assert_eq!((rsdp[15], u32_at(&rsdp, 16), u32_at(&rsdp, 20)), (2, 0, 36));
        let xsdt = self.table(u64_at(&rsdp, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = self.table(u64_at(&xsdt, 36), b"FACP");
        let madt = self.table(u64_at(&xsdt, 44), b"APIC");
        let dsdt = self.table(u64_at(&fadt, 140), b"DSDT");
        [fadt, madt, dsdt]
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The entries of a MADT.
fn entries(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, behind) = rest.split_at(rest[1].into());
        entries.push(entry);
        rest = behind;
    }
    entries
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    haystack
        .windows(needle.len())
        .filter(|window| *window == needle)
        .count()
}

#[test]
fn registers_that_sleep_and_reset() {
    let [fadt, ..] = Guest::with(&facts([0], IrqchipMode::Kernel))
        .unwrap()
        .tables();
    assert_eq!(fadt.len(), 276);
    assert_eq!((fadt[8], fadt[131]), (6, 5), "ACPI 6.5");
    let flags = u32_at(&fadt, 112);
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    // I/O space, 8 bits, byte access, then the port.
    let register = |port: u8| [1, 8, 0, 1, port, 6, 0, 0, 0, 0, 0, 0];
    assert_eq!(fadt[116..128], register(2), "reset");
    assert_eq!(fadt[128], 1, "reset value");
    assert_eq!(fadt[244..256], register(0), "sleep control");
    assert_eq!(fadt[256..268], register(1), "sleep status");
    assert_eq!(fadt[46..108], [0; 62], "no legacy power management");
    assert_eq!(fadt[108], 0x32, "century");
    assert_eq!(fadt[148..244], [0; 96], "nor its extended registers");
}

#[test]
fn boot_architecture_follows_the_devices() {
    let flags = |facts: &AcpiFacts| {
        let [fadt, ..] = Guest::with(facts).unwrap().tables();
        u16::from_le_bytes([fadt[109], fadt[110]])
    };
    let mut facts = facts([0], IrqchipMode::Kernel);
    assert_eq!(flags(&facts), 0b00_0111);
    facts.keyboard = None;
    assert_eq!(flags(&facts), 0b00_0101);
    facts.serial.clear();
    facts.rtc = None;
    assert_eq!(flags(&facts), 0b10_0100);
}

#[test]
fn processors_and_interrupt_controllers() {
    let [_, madt, _] = Guest::with(&facts([0, 1, 4, 5], IrqchipMode::Kernel))
        .unwrap()
        .tables();
    assert_eq!(u64::from(u32_at(&madt, 36)), LAPIC_START);
    assert_eq!(u32_at(&madt, 40), 1, "there is a PIC");
    let found = entries(&madt);
    for (uid, apic_id) in [0, 1, 4, 5].into_iter().enumerate() {
        assert_eq!(
            found[uid],
            [0, 8, u8::try_from(uid).unwrap(), apic_id, 1, 0, 0, 0]
        );
    }
    assert_eq!(found[4], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(found[5], [4, 6, 0xff, 0, 0, 1]);
    assert_eq!(found.len(), 6);

    let [_, madt, _] = Guest::with(&facts([0], IrqchipMode::Split))
        .unwrap()
        .tables();
    assert_eq!(u32_at(&madt, 40), 0, "there is no PIC");
}

#[test]
fn ids_beyond_the_xapic_have_x2apic_entries() {
    let facts = facts((0..254).chain([255, 0x1_0000]), IrqchipMode::Kernel);
    let [_, madt, _] = Guest::with(&facts).unwrap().tables();
    let found = entries(&madt);
    assert!(found[..254].iter().all(|entry| entry[0] == 0));
    assert_eq!(
        found[254],
        [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 254, 0, 0, 0]
    );
    assert_eq!(
        found[255],
        [9, 16, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 255, 0, 0, 0]
    );
    assert_eq!(
        found[258],
        [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]
    );
}

#[test]
fn devices_and_their_resources() {
    let [_, _, dsdt] = Guest::with(&facts([0, 1], IrqchipMode::Kernel))
        .unwrap()
        .tables();
    assert_eq!(dsdt[8], 2, "64-bit integers");
    let has = |what: &str, needle: &[u8]| assert_eq!(count(&dsdt, needle), 1, "{what}");
    has("COM1", b"COM1");
    has("COM2", b"COM2");
    assert_eq!(
        count(
            &dsdt,
            &[0x08, b'_', b'H', b'I', b'D', 0x0c, 0x41, 0xd0, 0x05, 0x01]
        ),
        2
    );
    has("COM1's ports", &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]);
    has("COM1's line", &[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]);
    has(
        "keyboard's ports",
        &[
            0x47, 1, 0x60, 0, 0x60, 0, 1, 1, 0x47, 1, 0x64, 0, 0x64, 0, 1, 1,
        ],
    );
    has("clock's ports", &[0x47, 1, 0x70, 0, 0x70, 0, 1, 2]);
    has("pvpanic", b"QEMU0001");
    has("pvpanic's port", &[0x47, 1, 5, 5, 5, 5, 1, 1]);
    assert_eq!(count(&dsdt, b"LNRO0005"), 2);
    let second = [
        0x86, 9, 0, 1, 0, 0x10, 0, 0xd0, 0, 0x10, 0, 0, 0x89, 6, 0, 3, 1, 6, 0, 0, 0,
    ];
    has("the second window and its line", &second);
    assert_eq!(count(&dsdt, b"ACPI0007"), 2, "processors");
    has("the last processor", b"C001\x08_HID");
    has("power off", b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00");
}

#[test]
fn events_reach_the_power_button() {
    let [_, _, dsdt] = Guest::with(&facts([0], IrqchipMode::Kernel))
        .unwrap()
        .tables();
    let has = |what: &str, needle: &[u8]| assert_eq!(count(&dsdt, needle), 1, "{what}");
    has("the register", b"\x5b\x80EVRG\x01\x0b\x03\x06\x01");
    has("its only field", b"EVST\x08");
    // Store(EVST, Local0), If (And(Local0, 1, Zero)) Notify(\_SB.PWRB, 0x80).
    has(
        "the method",
        b"_EVT\x09\x70EVST\x60\xa0\x12\x7b\x60\x01\x00\x86\\\x2e_SB_PWRB\x0a\x80",
    );
    has("the line", &[0x89, 6, 0, 0b0011, 1, 9, 0, 0, 0]);
    has("the button", b"PWRB\x08_HID\x0c\x41\xd0\x0c\x0c");
}

#[test]
fn a_new_generation_reaches_both_devices() {
    let mut facts = facts([0], IrqchipMode::Split);
    facts.generation = Some(GenerationFacts {
        id: 0x1_000d_e010,
        clock: Window {
            base: 0xd_f000,
            size: 0x1000,
        },
    });
    let [_, _, dsdt] = Guest::with(&facts).unwrap().tables();
    let has = |what: &str, needle: &[u8]| assert_eq!(count(&dsdt, needle), 1, "{what}");
    has("the id's driver", b"_CID\x0dVM_Gen_Counter\0");
    // Package of two: the low and the high half of the address.
    has("its place", b"ADDR\x12\x08\x02\x0c\x10\xe0\x0d\x00\x01");
    has("vmclock's driver", b"_CID\x0dVMCLOCK\0");
    let page = [
        0x8a, 43, 0, 0, 12, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xf0, 0x0d, 0, 0, 0, 0, 0, 0xff, 0xff,
        0x0d,
    ];
    has("the page", &page);
    for told in [b"VGEN", b"VCLK"] {
        let notify = [
            b"\xa0\x13\x7b\x60\x0a\x02\x00\x86\\\x2e_SB_",
            &told[..],
            b"\x0a\x80",
        ]
        .concat();
        has("the event", &notify);
    }
}

#[test]
fn absent_devices_are_not_described() {
    let mut facts = facts([0], IrqchipMode::Split);
    (facts.keyboard, facts.rtc, facts.pvpanic) = (None, None, None);
    facts.serial.clear();
    facts.virtio.clear();
    let [_, _, dsdt] = Guest::with(&facts).unwrap().tables();
    for absent in [
        &b"PS2K"[..],
        b"RTC_",
        b"PEVT",
        b"COM",
        b"LNRO",
        b"VGEN",
        b"VCLK",
    ] {
        assert_eq!(count(&dsdt, absent), 0);
    }
}

#[test]
fn a_watchdog_says_which_register_does_what() {
    let mut facts = facts([0], IrqchipMode::Split);
    facts.watchdog = Some(WatchdogFacts {
        port: 0x610,
        period_ms: 100,
        min_count: 7,
        max_count: 600,
    });
    let guest = Guest::with(&facts).unwrap();
    let xsdt = guest.table(u64_at(&guest.read(RSDP_START, 36), 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let wdat = guest.table(u64_at(&xsdt, 52), b"WDAT");
    // Linux takes a watchdog that is no PCI device: 0xff for segment, bus, device and function.
    assert_eq!(
        wdat[36..48],
        [32, 0, 0, 0, 0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0]
    );
    let words = [48, 52, 56, 60, 64].map(|at| u32_at(&wdat, at));
    assert_eq!(words, [100, 600, 7, 1, 10]);
    let entries: Vec<_> = wdat[68..].chunks(24).collect();
    assert_eq!(entries.len(), 10);
    for entry in &entries {
        // Ports of 32 bits, none of which lies across two registers.
        assert_eq!(entry[4..8], [1, 32, 0, 3]);
        assert!(
            (0x610..0x620)
                .step_by(4)
                .any(|port| u64_at(entry, 8) == port)
        );
    }
    let find = |action: u8| {
        let entry = entries.iter().find(|entry| entry[0] == action).unwrap();
        (
            entry[1],
            u64_at(entry, 8),
            u32_at(entry, 16),
            u32_at(entry, 20),
        )
    };
    assert_eq!(find(1), (2, 0x618, 1, u32::MAX));
    assert_eq!(find(4), (1, 0x618, 0, u32::MAX));
    assert_eq!(find(6), (3, 0x614, 0, u32::MAX));
    assert_eq!(find(8), (0, 0x610, 1, 1));
    assert_eq!((find(9).2, find(11).2), (1, 0));
}

#[test]
fn a_pci_host_bridge() {
    let mut facts = facts([0], IrqchipMode::Split);
    facts.pci = Some(machine::PCI);
    let guest = Guest::with(&facts).unwrap();
    let xsdt = guest.table(u64_at(&guest.read(RSDP_START, 36), 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let mcfg = guest.table(u64_at(&xsdt, 52), b"MCFG");
    let entry = [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(mcfg[44..], entry, "segment 0, bus 0");
    let fadt = guest.table(u64_at(&xsdt, 36), b"FACP");
    let dsdt = guest.table(u64_at(&fadt, 140), b"DSDT");
    let has = |what: &str, needle: &[u8]| assert_eq!(count(&dsdt, needle), 1, "{what}");
    has("the bridge", b"PCI0\x08_HID\x0c\x41\xd0\x0a\x08");
    has(
        "bus 0",
        &[0x88, 13, 0, 2, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    );
    has("its ports", &[0x47, 1, 0xf8, 0x0c, 0xf8, 0x0c, 1, 8]);
    for (link, line) in (b'0'..).zip([16, 17, 18, 19]) {
        has("a link", &[b'L', b'N', b'K', link, 8]);
        // Extended interrupt descriptor: consumer, edge, active high, shared; possible and current.
        let interrupt = [0x89, 6, 0, 0b1011, 1, line, 0, 0, 0];
        assert_eq!(count(&dsdt, &interrupt), 2, "line {line}");
    }
    has(
        "INTA# of slot 6",
        &[&[0x0c, 0xff, 0xff, 6, 0, 0][..], b"LNK2\0"].concat(),
    );
    let window = [
        0, 0, 0, 0xe8, 0xff, 0xff, 0xff, 0xef, 0, 0, 0, 0, 0, 0, 0, 8,
    ];
    has("the memory", &window);
    has("the ECAM", &[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0x10, 0]);
}

#[test]
fn the_largest_machine_fits() {
    let mut facts = facts(0..254, IrqchipMode::Split);
    facts.virtio = vec![facts.virtio[0]; 64];
    Guest::with(&facts).unwrap().tables();
}

#[test]
fn facts_that_cannot_be_said_are_refused() {
    let base = facts([0], IrqchipMode::Kernel);
    let error = |change: &dyn Fn(&mut AcpiFacts)| {
        let mut facts = base.clone();
        change(&mut facts);
        Guest::with(&facts)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    assert!(error(&|facts| facts.virtio[0].base = 0x1_0000_0000).contains("below 4 GiB"));
    assert!(error(&|facts| facts.virtio[0].base = 0xffff_ffff).contains("below 4 GiB"));
    assert!(error(&|facts| facts.virtio[0].base = u64::MAX).contains("below 4 GiB"));
    let bad = |base, size| {
        move |facts: &mut AcpiFacts| {
            let (good, bad) = (Window { base: 0, size: 1 }, Window { base, size });
            facts.pci = Some(PciHost {
                ecam: good,
                memory: bad,
                lines: [16, 17, 18, 19],
                hotplug: 0x620,
            });
        }
    };
    for (base, size) in [(0, 0), (u64::MAX, 2), (0xffff_ffff, 2), (1 << 32, 1)] {
        assert!(error(&bad(base, size)).contains("below 4 GiB"));
    }
    assert!(error(&|facts| facts.virtio = vec![facts.virtio[0]; 4096]).contains("room for 131008"));
    assert!(error(&|facts| facts.virtio = vec![facts.virtio[0]; 4097]).contains("4097 virtio"));
    assert!(error(&|facts| facts.apic_ids = vec![0; 4097]).contains("4097 vCPUs"));
    assert!(error(&|facts| facts.serial = vec![facts.serial[0]; 10]).contains("10 serial"));
}

#[test]
fn memory_that_is_too_small_is_an_error() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let error = write_tables(&memory, &facts([0], IrqchipMode::Kernel)).unwrap_err();
    assert!(matches!(
        error,
        AcpiError::Write {
            address: ACPI_TABLES_START,
            ..
        }
    ));
}
