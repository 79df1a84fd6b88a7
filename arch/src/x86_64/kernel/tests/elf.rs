//! ELF kernels: memory image, protocol, version.

use super::*;

/// Loads `elf` from a file, which is the way that `from_bytes` does not take.
fn load_file(elf: &TestElf, memory: &GuestMemory) -> LoadedKernel {
    // Tests run in threads of one process.
    let name = format!("bulle-elf-{:?}", std::thread::current().id());
    let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    std::fs::write(&path, elf.build()).unwrap();
    let loaded = KernelImage::open(&path)
        .unwrap()
        .load(memory, &LoadOptions::default());
    std::fs::remove_file(&path).unwrap();
    loaded.unwrap()
}

fn check_image(memory: &GuestMemory, elf: &TestElf) {
    for segment in &elf.segments {
        assert_eq!(
            read(memory, segment.paddr, segment.data.len()),
            segment.data
        );
        let bss = segment.memsz as usize - segment.data.len();
        let bss_start = segment.paddr + segment.data.len() as u64;
        assert_eq!(read(memory, bss_start, bss), vec![0; bss]);
    }
}

#[test]
fn pvh_is_preferred() {
    let memory = memory(64 * MIB);
    let elf = linux_elf().with_pvh();
    let kernel = load_file(&elf, &memory);
    assert_eq!(kernel.protocol, Protocol::Pvh);
    assert_eq!(kernel.entry.0, TEXT + 0x80);
    assert_eq!((kernel.start, kernel.end), (TEXT, END));
    assert_eq!(kernel.cmdline_max, 2047);
    assert_eq!(kernel.initrd_max, 0x7fff_ffff);
    assert!(kernel.setup_header.is_none() && kernel.kaslr.is_none());
    check_image(&memory, &elf);
}

#[test]
fn linux64_without_a_note_or_when_asked_for() {
    let ram = memory(64 * MIB);
    let kernel = load(&linux_elf().build(), &ram, &LoadOptions::default());
    assert_eq!(
        (kernel.protocol, kernel.entry.0),
        (Protocol::Linux64, TEXT + ENTRY)
    );
    check_image(&ram, &linux_elf());

    let image = linux_elf().with_pvh().build();
    let kernel = load(&image, &memory(64 * MIB), &entry(KernelEntry::Linux64));
    assert_eq!(
        (kernel.protocol, kernel.entry.0),
        (Protocol::Linux64, TEXT + ENTRY)
    );
}

#[test]
fn elf32_starts_by_pvh() {
    let memory = memory(64 * MIB);
    let mut elf = TestElf {
        is_64: false,
        machine: 3,
        ..linux_elf()
    };
    elf.notes = vec![note(b"Xen\0", 18, &(TEXT as u32 + 0x80).to_le_bytes())];
    let kernel = load_file(&elf, &memory);
    assert_eq!(
        (kernel.protocol, kernel.entry.0),
        (Protocol::Pvh, TEXT + 0x80)
    );
    assert_eq!((kernel.start, kernel.end), (TEXT, END));
    check_image(&memory, &elf);
}

#[test]
fn segments_in_any_order() {
    let memory = memory(64 * MIB);
    let mut elf = linux_elf();
    elf.segments.reverse();
    let kernel = load(&elf.build(), &memory, &LoadOptions::default());
    assert_eq!((kernel.start, kernel.end), (TEXT, END));
    check_image(&memory, &elf);
}

#[test]
fn version_from_the_banner() {
    let version = |elf: &TestElf| KernelImage::from_bytes(elf.build()).unwrap().version();
    assert_eq!(version(&linux_elf()).as_deref(), Some("6.1.0-test-amd64"));

    let mut silent = linux_elf();
    silent.segments.truncate(1);
    assert_eq!(version(&silent), None);

    // Across the border of two reads.
    let mut text = vec![0; (1 << 20) - 5];
    text.extend(b"Linux version 5.10.7 (x)");
    text.resize(3 << 20, 0);
    silent.segments[0] = TestSegment {
        paddr: TEXT,
        memsz: text.len() as u64,
        data: text,
    };
    assert_eq!(version(&silent).as_deref(), Some("5.10.7"));
}
