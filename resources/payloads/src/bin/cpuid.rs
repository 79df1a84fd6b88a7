//! Prints the hypervisor's signature, leaf 1, and the topology that each processor sees.
#![no_std]
#![no_main]

use payloads::{acpi, println, smp, start::StartInfo};

payloads::start!(main);

fn text(words: [u32; 3]) -> [u8; 12] {
    let mut out = [0; 12];
    for (to, word) in out.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    out
}

fn main(info: &StartInfo) -> u8 {
    let leaf = |leaf| smp::boot_leaf(leaf, 0).unwrap_or_default();
    let [_, ebx, ecx, edx] = leaf(0);
    let vendor = text([ebx, edx, ecx]);
    println!("vendor {}", core::str::from_utf8(&vendor).unwrap_or("?"));
    let [eax, ebx, ecx, edx] = leaf(1);
    println!("leaf 1 {eax:#010x} ecx {ecx:#010x} edx {edx:#010x}");
    println!("hypervisor bit {}", ecx >> 31);
    println!("logical processors {}", ebx >> 16 & 0xff);
    let [_, ebx, ecx, edx] = leaf(0x4000_0000);
    let signature = text([ebx, ecx, edx]);
    let signature = core::str::from_utf8(&signature).unwrap_or("?");
    println!("hypervisor {}", signature.trim_end_matches('\0'));
    let (others, _) = smp::start(acpi::processors(info));
    for r in smp::boot_record().into_iter().chain(others.iter().copied()) {
        println!(
            "processor apic {} x2apic {} threads {} shift {} package {} shift {}",
            r.leaf1_ebx >> 24,
            r.x2apic_id,
            r.threads & 0xffff,
            r.thread_shift & 0x1f,
            r.logical & 0xffff,
            r.core_shift & 0x1f,
        );
    }
    0
}
