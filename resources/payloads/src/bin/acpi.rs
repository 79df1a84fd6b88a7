//! Walks the ACPI tables and checks every checksum.
#![no_std]
#![no_main]

use payloads::{
    acpi::{self, Table},
    io, println,
    start::StartInfo,
};

payloads::start!(main);

fn show(table: Table) -> u8 {
    let signature = table.signature();
    let name = core::str::from_utf8(&signature).unwrap_or("????");
    let good = table.valid();
    println!(
        "{name} {} bytes {}",
        table.len(),
        if good { "ok" } else { "BAD" }
    );
    u8::from(!good)
}

fn main(info: &StartInfo) -> u8 {
    let Some(rsdp) = acpi::rsdp(info) else {
        println!("no RSDP");
        return 1;
    };
    let good = acpi::checksum(rsdp, 20) && acpi::checksum(rsdp, 36);
    println!(
        "RSDP revision {} {}",
        io::read::<u8>(rsdp + 15),
        if good { "ok" } else { "BAD" }
    );
    let mut bad = u8::from(!good);
    for table in acpi::tables(rsdp) {
        bad += show(table);
        if table.signature() == *b"FACP" {
            let (old, new): (u32, u64) = (io::read(table.addr + 40), io::read(table.addr + 140));
            bad += show(Table::at(if new != 0 { new } else { old.into() }));
        }
    }
    println!("{} processors", acpi::processors(info).count());
    bad
}
