//! Starts every other processor that ACPI lists and prints how many came.
#![no_std]
#![no_main]

use payloads::{acpi, println, smp, start::StartInfo};

payloads::start!(main);

fn main(info: &StartInfo) -> u8 {
    let listed = acpi::processors(info).count();
    let (records, again) = smp::start(acpi::processors(info));
    let own = smp::apic_id();
    let mut seen = [false; 256];
    seen[own as usize & 255] = true;
    let mut distinct = 1;
    for record in records {
        let id = (record.leaf1_ebx >> 24) as usize;
        distinct += usize::from(!core::mem::replace(&mut seen[id], true));
    }
    println!(
        "{listed} listed, {} running, {distinct} distinct",
        records.len() + 1
    );
    println!("started again {again} times");
    u8::from(listed != records.len() + 1 || distinct != listed)
}
