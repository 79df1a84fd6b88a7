//! The ACPI tables as Intel's compiler sees them: disassembled and compiled again without a word.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not marked as tests"
)]

mod facts;

use std::path::Path;
use std::process::Command;

use arch::acpi::{
    AcpiFacts, GenerationFacts, MmioDevice, PciHost, PortDevice, PowerFacts, WatchdogFacts, Window,
    write_tables,
};
use arch::vm::IrqchipMode;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

fn facts(vcpus: u32, irqchip: IrqchipMode) -> AcpiFacts {
    AcpiFacts {
        pci: Some(facts::PCI),
        watchdog: Some(WatchdogFacts {
            port: 0x610,
            period_ms: 100,
            min_count: 1,
            max_count: 6000,
        }),
        generation: Some(GenerationFacts {
            id: 0xd_e010,
            clock: Window {
                base: 0xd_f000,
                size: 0x1000,
            },
        }),
        ..facts::facts(0..vcpus, irqchip, (10, 10))
    }
}

/// Run iasl in `directory`; the result is all it says.
fn iasl(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("iasl")
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| {
            panic!("this test needs iasl (Debian: apt-get install acpica-tools): {error}")
        });
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    text
}

fn table(memory: &GuestMemoryMmap<()>, address: u64) -> Vec<u8> {
    let size: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
    let mut table = vec![0; size as usize];
    memory
        .read_slice(&mut table, GuestAddress(address))
        .unwrap();
    table
}

#[test]
fn iasl_accepts_all_tables() {
    for (vcpus, irqchip) in [(1, IrqchipMode::Kernel), (254, IrqchipMode::Split)] {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let rsdp = write_tables(&memory, &facts(vcpus, irqchip)).unwrap();
        let xsdt: u64 = memory.read_obj(GuestAddress(rsdp.0 + 24)).unwrap();
        let fadt: u64 = memory.read_obj(GuestAddress(xsdt + 36)).unwrap();
        let madt: u64 = memory.read_obj(GuestAddress(xsdt + 44)).unwrap();
        let mcfg: u64 = memory.read_obj(GuestAddress(xsdt + 52)).unwrap();
        let wdat: u64 = memory.read_obj(GuestAddress(xsdt + 60)).unwrap();
        let dsdt: u64 = memory.read_obj(GuestAddress(fadt + 140)).unwrap();

        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("acpi-{vcpus}"));
        std::fs::create_dir_all(&directory).unwrap();
        for (name, address) in [
            ("xsdt", xsdt),
            ("facp", fadt),
            ("apic", madt),
            ("mcfg", mcfg),
            ("wdat", wdat),
            ("dsdt", dsdt),
        ] {
            let binary = format!("{name}.aml");
            let original = table(&memory, address);
            std::fs::write(directory.join(&binary), &original).unwrap();
            let said = iasl(&directory, &["-d", &binary]);
            for bad in ["Warning", "Error", "rror:", "Invalid", "Incorrect"] {
                assert!(!said.contains(bad), "iasl -d {binary}: {said}");
            }
            let said = iasl(&directory, &["-oa", "-p", "again", &format!("{name}.dsl")]);
            assert!(
                said.contains("0 Errors, 0 Warnings, 0 Remarks"),
                "{binary}: {said}"
            );
            if name == "dsdt" {
                let again = std::fs::read(directory.join("again.aml")).unwrap();
                assert!(original[36..] == again[36..], "another code comes out");
            }
        }
    }
}
