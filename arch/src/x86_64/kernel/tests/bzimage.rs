//! bzImages: every compression, the own entry, the version.

use super::*;

const ALL: [Compression; 6] = [
    Compression::Gzip,
    Compression::Bzip2,
    Compression::Lzma,
    Compression::Xz,
    Compression::Lz4,
    Compression::Zstd,
];

#[test]
fn every_compression_is_unpacked_and_started_directly() {
    for compression in ALL {
        let memory = memory(64 * MIB);
        let kernel = load(
            &linux_bzimage(compression),
            &memory,
            &LoadOptions::default(),
        );
        assert_eq!(kernel.protocol, Protocol::Linux64, "{compression}");
        assert_eq!(kernel.entry.0, TEXT + ENTRY);
        assert_eq!((kernel.start, kernel.end), (TEXT, END));
        assert_eq!(kernel.cmdline_max, 2047);
        assert_eq!(kernel.initrd_max, 0x7fff_ffff);
        assert!(kernel.kaslr.is_none());
        let init_size = kernel.setup_header.unwrap().init_size;
        assert_eq!(init_size, 0x40_0000);
        for segment in linux_elf().segments {
            assert_eq!(
                read(&memory, segment.paddr, segment.data.len()),
                segment.data
            );
        }
    }
}

#[test]
fn lz4_of_several_blocks() {
    let mut elf = linux_elf();
    let text: Vec<u8> = (0..5u32 << 20)
        .flat_map(|n| (n / 3).to_le_bytes())
        .collect();
    let memsz = text.len() as u64;
    elf.segments = vec![TestSegment {
        paddr: TEXT,
        data: text.clone(),
        memsz,
    }];
    let memory = memory(64 * MIB);
    let image = bzimage(&pack(Compression::Lz4, &elf.build()), |_| {});
    load(&image, &memory, &LoadOptions::default());
    assert!(read(&memory, TEXT, text.len()) == text);
}

#[test]
fn own_entry_loads_the_protected_mode_code() {
    let image = linux_bzimage(Compression::Zstd);
    let memory = memory(64 * MIB);
    let options = LoadOptions {
        kaslr_seed: Some(1),
        ..entry(KernelEntry::Bzimage)
    };
    let kernel = load(&image, &memory, &options);
    assert_eq!(kernel.protocol, Protocol::Linux64);
    assert_eq!(kernel.entry.0, TEXT + 0x200);
    assert_eq!(
        (kernel.start, kernel.end),
        (TEXT, TEXT + 0x40_0000),
        "init_size is kept free"
    );
    assert!(kernel.kaslr.is_none(), "the guest's decompressor does it");
    assert_eq!(read(&memory, TEXT, image.len() - SETUP), &image[SETUP..]);
}

#[test]
fn unknown_compression_falls_back_to_the_own_entry() {
    let image = bzimage(b"\x89LZO\0\r\n\x1a\n.....", |_| {});
    let kernel = load(&image, &memory(64 * MIB), &LoadOptions::default());
    assert_eq!(kernel.entry.0, TEXT + 0x200);
    let fault = fault(&image, 64 * MIB, &entry(KernelEntry::Linux64));
    assert!(matches!(fault, KernelFault::UnknownCompression { .. }));
    assert!(fault.to_string().contains("89 4c 5a 4f 00 0d"), "{fault}");
}

#[test]
fn own_entry_goes_lower_if_ram_is_short() {
    let packed = pack(Compression::Gzip, &linux_elf().build());
    let large = bzimage(&packed, |header| header.init_size = 0x180_0000);
    let options = entry(KernelEntry::Bzimage);
    assert_eq!(load(&large, &memory(64 * MIB), &options).start, TEXT);
    assert_eq!(load(&large, &memory(32 * MIB), &options).start, 2 * MIB);

    let fixed = bzimage(&packed, |header| {
        header.init_size = 0x180_0000;
        header.relocatable_kernel = 0;
    });
    let fault = fault(&fixed, 32 * MIB, &options);
    assert_eq!(
        fault.to_string(),
        "it needs 40 MiB of RAM to start, the machine has 32 MiB"
    );
}

#[test]
fn pvh_of_the_inner_kernel_when_asked_for() {
    let image = bzimage(
        &pack(Compression::Lz4, &linux_elf().with_pvh().build()),
        |_| {},
    );
    let pvh = load(&image, &memory(64 * MIB), &entry(KernelEntry::Pvh));
    assert_eq!((pvh.protocol, pvh.entry.0), (Protocol::Pvh, TEXT + 0x80));
    let auto = load(&image, &memory(64 * MIB), &LoadOptions::default());
    assert_eq!(
        (auto.protocol, auto.entry.0),
        (Protocol::Linux64, TEXT + ENTRY)
    );
}

#[test]
fn version_from_the_header() {
    let version = |image: Vec<u8>| KernelImage::from_bytes(image).unwrap().version();
    assert_eq!(
        version(linux_bzimage(Compression::Lz4)).as_deref(),
        Some("6.1.0-test-amd64")
    );
    let payload = pack(Compression::Gzip, b"x");
    assert_eq!(
        version(bzimage(&payload, |header| header.kernel_version = 0)),
        None
    );
    assert_eq!(
        version(bzimage(&payload, |header| header.kernel_version = 0xffff)),
        None
    );
}

#[test]
fn header_behind_its_own_length_is_ignored() {
    // 0x202 + 0x62: ends after init_size.
    let packed = pack(Compression::Gzip, &linux_elf().build());
    let image = bzimage(&packed, |header| {
        header.jump = 0x62eb;
        header.handover_offset = 0x1234;
    });
    let header = load(&image, &memory(64 * MIB), &LoadOptions::default())
        .setup_header
        .unwrap();
    let (handover, init_size) = (header.handover_offset, header.init_size);
    assert_eq!((handover, init_size), (0, 0x40_0000));
}

#[test]
fn unpacked_once_loads_any_time() {
    let packed = linux_bzimage(Compression::Zstd);
    let image = KernelImage::from_bytes(packed.clone()).unwrap();
    let ram = 64 * MIB;
    let unpacked = image.unpack(KernelEntry::Auto, ram).unwrap().unwrap();
    let options = LoadOptions {
        kaslr_seed: Some(11),
        ..LoadOptions::default()
    };
    let (expected, got) = (memory(ram), memory(ram));
    let kernel = load(&packed, &expected, &options);
    for _ in 0..2 {
        let again = image
            .load_unpacked(Some(&unpacked), &memory(ram), &options)
            .unwrap();
        assert_eq!((again.kaslr, again.entry), (kernel.kaslr, kernel.entry));
    }
    image
        .load_unpacked(Some(&unpacked), &got, &options)
        .unwrap();
    assert!(read(&got, 0, ram as usize) == read(&expected, 0, ram as usize));

    let own = image.unpack(KernelEntry::Bzimage, ram).unwrap();
    assert!(image.is_bzimage() && own.is_none());
    let wanted = entry(KernelEntry::Bzimage);
    let kernel = image.load_unpacked(Some(&unpacked), &got, &wanted).unwrap();
    assert_eq!(kernel.entry.0, kernel.start + 0x200);
}

#[test]
fn unpacked_kernels_are_checked_as_packed_ones() {
    let image = KernelImage::from_bytes(linux_bzimage(Compression::Zstd)).unwrap();
    let fault = |unpacked: Option<&[u8]>, ram, wanted| {
        let result = image.load_unpacked(unpacked, &memory(ram), &entry(wanted));
        result.unwrap_err().source
    };
    let (auto, ram) = (KernelEntry::Auto, 64 * MIB);
    let large = vec![0x7f; ram as usize + 1];
    assert!(matches!(
        fault(Some(&large), ram, auto),
        KernelFault::MemoryTooSmall { need, ram: 0x400_0000 } if need == ram + 1
    ));
    assert!(matches!(
        fault(Some(b"cpio"), ram, auto),
        KernelFault::PayloadNotElf
    ));
    assert!(matches!(fault(Some(&[]), ram, auto), KernelFault::Empty));
    let wanted = KernelEntry::Linux64;
    assert!(matches!(
        fault(None, ram, wanted),
        KernelFault::NoEntry { .. }
    ));

    let elf = KernelImage::from_bytes(linux_elf().build()).unwrap();
    assert!(!elf.is_bzimage() && elf.file().is_none());
    assert!(elf.unpack(auto, ram).unwrap().is_none());
}
