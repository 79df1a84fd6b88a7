//! What the guest finds in memory and in its registers, field by field.

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::cmdline;
use crate::kernel::tests::{END, ENTRY, MIB, TEXT, linux_bzimage, linux_elf, load, memory, read};
use crate::kernel::{Compression, LoadOptions};

const RAM: u64 = 5 << 30;
const LOW: u64 = 64 * MIB;

fn u8_at(memory: &GuestMemory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn u16_at(memory: &GuestMemory, address: u64) -> u16 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn u32_at(memory: &GuestMemory, address: u64) -> u32 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn u64_at(memory: &GuestMemory, address: u64) -> u64 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn boot(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    initrd: Option<(GuestAddress, u64)>,
) -> EntryState {
    let cmdline = cmdline::build("console=ttyS0", "quiet", kernel.cmdline_max).unwrap();
    let parameters = BootParameters {
        kernel,
        cmdline: &cmdline,
        initrd,
        rsdp: GuestAddress(layout::RSDP_START),
        ram_size: RAM,
        rng_seed: [0xab; 32],
    };
    configure(memory, &parameters).unwrap()
}

/// e820 as it must be for [`RAM`]: start, size, type.
const MAP: [(u64, u64, u32); 5] = [
    (0, 0x9_fc00, 1),
    (0x9_fc00, 0x4_0400, 2),
    (0xe_0000, 0x2_0000, 3),
    (0x10_0000, 0xbff0_0000, 1),
    (1 << 32, 2 << 30, 1),
];

#[test]
fn zero_page_of_a_bzimage() {
    let memory = memory(LOW);
    let options = LoadOptions {
        kaslr_seed: Some(1),
        ..LoadOptions::default()
    };
    let kernel = load(&linux_bzimage(Compression::Lz4), &memory, &options);
    let entry = boot(
        &memory,
        &kernel,
        Some((GuestAddress(0x1_2345_6000), 0x2_0000_0007)),
    );
    assert_eq!(
        entry,
        EntryState {
            protocol: Protocol::Linux64,
            rip: kernel.entry.0,
            rsp: 0x8ff0,
            rsi: 0x7000,
            rbx: 0
        }
    );
    // Offsets from Documentation/arch/x86/{zero-page,boot}.rst.
    let page = layout::ZERO_PAGE_START;
    assert_eq!(u64_at(&memory, page + 0x70), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(u32_at(&memory, page + 0xc0), 1, "ext_ramdisk_image");
    assert_eq!(u32_at(&memory, page + 0xc4), 2, "ext_ramdisk_size");
    assert_eq!(u8_at(&memory, page + 0x1e8), 5, "e820_entries");
    assert_eq!(u8_at(&memory, page + 0x1ef), 0, "sentinel");
    assert_eq!(u16_at(&memory, page + 0x1fe), 0xaa55, "boot_flag");
    assert_eq!(read(&memory, page + 0x202, 4), b"HdrS");
    assert_eq!(u16_at(&memory, page + 0x206), 0x20f, "version");
    assert_eq!(u8_at(&memory, page + 0x210), 0xff, "type_of_loader");
    assert_eq!(
        u8_at(&memory, page + 0x211),
        3,
        "loadflags: LOADED_HIGH, KASLR_FLAG"
    );
    assert_eq!(u32_at(&memory, page + 0x218), 0x2345_6000, "ramdisk_image");
    assert_eq!(u32_at(&memory, page + 0x21c), 7, "ramdisk_size");
    assert_eq!(u32_at(&memory, page + 0x228), 0x2_0000, "cmd_line_ptr");
    assert_eq!(
        u32_at(&memory, page + 0x22c),
        0x7fff_ffff,
        "initrd_addr_max"
    );
    assert_eq!(u32_at(&memory, page + 0x230), 0x20_0000, "kernel_alignment");
    assert_eq!(u16_at(&memory, page + 0x236), 1, "xloadflags");
    assert_eq!(u64_at(&memory, page + 0x250), 0x1_0000, "setup_data");
    assert_eq!(u64_at(&memory, page + 0x258), TEXT, "pref_address");
    for (n, (start, size, kind)) in MAP.into_iter().enumerate() {
        let entry = page + 0x2d0 + 20 * n as u64;
        let got = (
            u64_at(&memory, entry),
            u64_at(&memory, entry + 8),
            u32_at(&memory, entry + 16),
        );
        assert_eq!(got, (start, size, kind), "e820 entry {n}");
    }
    let seed = layout::SETUP_DATA_START;
    assert_eq!(u64_at(&memory, seed), 0, "next");
    assert_eq!(
        (u32_at(&memory, seed + 8), u32_at(&memory, seed + 12)),
        (9, 32),
        "type, length"
    );
    assert_eq!(
        read(&memory, seed + 16, 33),
        [vec![0xab; 32], vec![0]].concat()
    );
    assert_eq!(
        read(&memory, layout::CMDLINE_START, 20),
        b"console=ttyS0 quiet\0"
    );
}

#[test]
fn zero_page_of_an_elf_has_a_header() {
    let memory = memory(LOW);
    let kernel = load(&linux_elf().build(), &memory, &LoadOptions::default());
    let entry = boot(&memory, &kernel, None);
    assert_eq!((entry.rip, entry.rsi), (TEXT + ENTRY, 0x7000));
    let page = layout::ZERO_PAGE_START;
    assert_eq!(u16_at(&memory, page + 0x1fe), 0xaa55);
    assert_eq!(read(&memory, page + 0x202, 4), b"HdrS");
    assert_eq!(
        u16_at(&memory, page + 0x206),
        0x20f,
        "new enough for setup data"
    );
    assert_eq!(u8_at(&memory, page + 0x211), 1, "no KASLR");
    assert_eq!(u32_at(&memory, page + 0x218), 0, "no initrd");
    assert_eq!(u32_at(&memory, page + 0x238), 2047, "cmdline_size");
}

#[test]
fn identity_map_covers_4_gib() {
    let memory = memory(LOW);
    let kernel = load(&linux_elf().build(), &memory, &LoadOptions::default());
    boot(&memory, &kernel, None);
    let walk = |address: u64| {
        let table = |base: u64, shift: u32| {
            let entry = u64_at(&memory, base + 8 * (address >> shift & 511));
            assert_eq!(entry & 3, 3, "present and writable");
            entry
        };
        let pdpt = table(layout::PML4_START, 39) & !0xfff;
        let directory = table(pdpt, 30) & !0xfff;
        let page = table(directory, 21);
        assert_eq!(page & 0x80, 0x80, "2 MiB page");
        (page & !0x1f_ffff) | (address & 0x1f_ffff)
    };
    for address in [
        0,
        0x7000,
        TEXT + ENTRY,
        0x3fff_ffff,
        0x8000_1234,
        0xfee0_0000,
        0xffff_ffff,
    ] {
        assert_eq!(walk(address), address);
    }
    assert_eq!(u64_at(&memory, layout::PML4_START + 8), 0);
    assert_eq!(u64_at(&memory, layout::PDPT_START + 32), 0);
}

#[test]
fn pvh_start_info() {
    let memory = memory(LOW);
    let kernel = load(
        &linux_elf().with_pvh().build(),
        &memory,
        &LoadOptions::default(),
    );
    let entry = boot(&memory, &kernel, Some((GuestAddress(0x300_0000), 4321)));
    assert_eq!(
        entry,
        EntryState {
            protocol: Protocol::Pvh,
            rip: TEXT + 0x80,
            rsp: 0x8ff0,
            rsi: 0,
            rbx: 0x6000
        }
    );
    // Offsets from xen/include/public/arch-x86/hvm/start_info.h.
    let info = layout::PVH_INFO_START;
    assert_eq!(u32_at(&memory, info), 0x336e_c578, "magic");
    assert_eq!(u32_at(&memory, info + 4), 1, "version");
    assert_eq!(u32_at(&memory, info + 12), 1, "nr_modules");
    assert_eq!(u64_at(&memory, info + 16), layout::PVH_MODLIST_START);
    assert_eq!(u64_at(&memory, info + 24), layout::CMDLINE_START);
    assert_eq!(u64_at(&memory, info + 32), layout::RSDP_START);
    assert_eq!(u64_at(&memory, info + 40), layout::PVH_MEMMAP_START);
    assert_eq!(u32_at(&memory, info + 48), 5, "memmap_entries");
    let module = layout::PVH_MODLIST_START;
    assert_eq!(
        (u64_at(&memory, module), u64_at(&memory, module + 8)),
        (0x300_0000, 4321)
    );
    for (n, (start, size, kind)) in MAP.into_iter().enumerate() {
        let entry = layout::PVH_MEMMAP_START + 24 * n as u64;
        let got = (
            u64_at(&memory, entry),
            u64_at(&memory, entry + 8),
            u32_at(&memory, entry + 16),
        );
        assert_eq!(got, (start, size, kind), "memory map entry {n}");
    }
    assert_eq!(
        read(&memory, layout::CMDLINE_START, 20),
        b"console=ttyS0 quiet\0"
    );
}

#[test]
fn pvh_without_initrd_has_no_modules() {
    let memory = memory(LOW);
    let kernel = load(
        &linux_elf().with_pvh().build(),
        &memory,
        &LoadOptions::default(),
    );
    boot(&memory, &kernel, None);
    let info = layout::PVH_INFO_START;
    assert_eq!(
        (u32_at(&memory, info + 12), u64_at(&memory, info + 16)),
        (0, 0)
    );
}

/// Registers as KVM has them after reset, in what matters here.
fn reset_sregs() -> kvm_sregs {
    kvm_sregs {
        cr0: 0x6000_0010,
        cr4: 0x40,
        efer: 0x800,
        apic_base: 0xfee0_0900,
        ..kvm_sregs::default()
    }
}

#[test]
fn registers_of_linux64() {
    let mut sregs = reset_sregs();
    let regs = apply(&EntryState::new(Protocol::Linux64, 0x100_0000), &mut sregs);
    assert_eq!(
        (regs.rip, regs.rsi, regs.rsp, regs.rbx),
        (0x100_0000, 0x7000, 0x8ff0, 0)
    );
    assert_eq!(regs.rflags, 2, "interrupts off");
    assert_eq!(sregs.cr0, 0x8000_0011, "PG, ET, PE; caching on");
    assert_eq!((sregs.cr3, sregs.cr4, sregs.efer), (0x9000, 0x20, 0x500));
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    assert_eq!(
        (sregs.cs.base, sregs.cs.limit, sregs.cs.type_),
        (0, u32::MAX, 0xb)
    );
    for register in [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] {
        assert_eq!(
            (register.selector, register.type_, register.present),
            (0x18, 3, 1)
        );
    }
    assert_eq!((sregs.tr.type_, sregs.tr.present, sregs.tr.s), (0xb, 1, 0));
    assert_eq!((sregs.gdt.base, sregs.gdt.limit), (0x500, 31));
    assert_eq!((sregs.idt.base, sregs.idt.limit), (0x520, 0));
    assert_eq!(sregs.apic_base, 0xfee0_0900, "not ours");
}

#[test]
fn registers_of_pvh() {
    let mut sregs = reset_sregs();
    let regs = apply(&EntryState::new(Protocol::Pvh, 0x100_0080), &mut sregs);
    assert_eq!(
        (regs.rip, regs.rbx, regs.rsi, regs.rflags),
        (0x100_0080, 0x6000, 0, 2)
    );
    assert_eq!(
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer),
        (0x11, 0, 0, 0)
    );
    assert_eq!(
        (sregs.cs.l, sregs.cs.db, sregs.cs.limit, sregs.cs.g),
        (0, 1, u32::MAX, 1)
    );
    assert_eq!((sregs.ss.db, sregs.ss.type_, sregs.ss.s), (1, 3, 1));
    assert_eq!(
        (sregs.tr.base, sregs.tr.limit, sregs.tr.type_),
        (0, 0x67, 0xb)
    );
}

#[test]
fn descriptors_match_the_registers() {
    let memory = memory(LOW);
    let kernel = load(&linux_elf().build(), &memory, &LoadOptions::default());
    boot(&memory, &kernel, None);
    let gdt = |memory: &GuestMemory| [0, 8, 16, 24].map(|n| u64_at(memory, layout::GDT_START + n));
    assert_eq!(
        gdt(&memory),
        [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
    );
    let kernel = load(
        &linux_elf().with_pvh().build(),
        &memory,
        &LoadOptions::default(),
    );
    boot(&memory, &kernel, None);
    assert_eq!(
        gdt(&memory),
        [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
    );
}

#[test]
fn structures_do_not_meet() {
    let mut areas = [
        (layout::GDT_START, 32),
        (layout::IDT_START, 8),
        (layout::PVH_INFO_START, 56),
        (layout::PVH_MODLIST_START, 32),
        (layout::PVH_MEMMAP_START, 24 * 5),
        (layout::ZERO_PAGE_START, 4096),
        (layout::PML4_START, 4096),
        (layout::PDPT_START, 4096),
        (layout::PD_START, 4 * 4096),
        (layout::SETUP_DATA_START, 48),
        (layout::CMDLINE_START, layout::CMDLINE_MAX_SIZE as u64),
        (layout::EBDA_START, 0),
    ];
    areas.sort();
    assert!(
        areas
            .windows(2)
            .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
    );
}

fn kernel_at(start: u64, end: u64) -> LoadedKernel {
    let memory = memory(LOW);
    let kernel = load(&linux_elf().build(), &memory, &LoadOptions::default());
    assert_eq!((kernel.start, kernel.end), (TEXT, END));
    LoadedKernel {
        start,
        end,
        ..kernel
    }
}

#[test]
fn initrd_goes_as_high_as_it_may() {
    let kernel = kernel_at(16 * MIB, 40 * MIB);
    let at = |ram, size| initrd_address(&kernel, ram, size).unwrap().0;
    assert_eq!(at(128 * MIB, 4096), 128 * MIB - 4096);
    assert_eq!(at(128 * MIB, 4097), 128 * MIB - 8192);
    assert_eq!(at(128 * MIB + 5, 4096), 128 * MIB - 4096);
    assert_eq!(at(128 * MIB, 88 * MIB), 40 * MIB);
    // Below initrd_addr_max; and below the hole.
    assert_eq!(at(8 << 30, 4096), (2 << 30) - 4096);
    let high = LoadedKernel {
        initrd_max: u64::MAX,
        ..kernel
    };
    assert_eq!(
        initrd_address(&high, 8 << 30, 4096).unwrap().0,
        (3 << 30) - 4096
    );
    // Under the kernel if there is no room above.
    assert_eq!(at(48 * MIB, 12 * MIB), 4 * MIB);
}

#[test]
fn initrd_without_room_is_refused_with_sizes() {
    let kernel = kernel_at(16 * MIB, 40 * MIB);
    let error = |ram, size| initrd_address(&kernel, ram, size).unwrap_err().to_string();
    assert_eq!(
        error(128 * MIB, 89 * MIB),
        "the initrd (89 MiB) does not fit into 128 MiB of RAM beside the kernel (24 MiB); give \
         the machine at least 130 MiB"
    );
    assert!(error(64 * MIB, 200 * MIB).contains("200 MiB"));
    assert!(error(8 << 30, 3 << 30).contains("only below 2048 MiB"));
    assert!(error(64 * MIB, u64::MAX).contains("too large"));
}
