//! Every way in which an image can be wrong, and what the user is told.

use std::error::Error as _;
use std::path::Path;

use super::*;

fn open_fault(path: &Path) -> String {
    let error = KernelImage::open(path).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("cannot boot the kernel {}", path.display())
    );
    error.source().unwrap().to_string()
}

/// The fault of an ELF file in 64 MiB of RAM.
fn elf_fault(change: impl FnOnce(&mut TestElf)) -> KernelFault {
    let mut elf = linux_elf();
    change(&mut elf);
    fault(&elf.build(), 64 * MIB, &LoadOptions::default())
}

fn bzimage_fault(payload: &[u8], edit: impl FnOnce(&mut setup_header)) -> KernelFault {
    fault(&bzimage(payload, edit), 64 * MIB, &LoadOptions::default())
}

fn good_payload() -> Vec<u8> {
    pack(Compression::Lz4, &linux_elf().build())
}

#[track_caller]
fn says(fault: &KernelFault, parts: &[&str]) {
    let text = fault.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn files() {
    assert_eq!(
        open_fault(Path::new("/nonexistent/vmlinux")),
        "there is no such file"
    );
    assert!(open_fault(Path::new("/proc")).contains("directory"));
    assert!(open_fault(Path::new("/dev/zero")).contains("not a regular file"));
    let path = std::env::temp_dir().join(format!("bulle-empty-{}", std::process::id()));
    std::fs::write(&path, b"").unwrap();
    assert_eq!(open_fault(&path), "the file is empty");
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(
        KernelImage::from_bytes(vec![]).err().unwrap().source,
        KernelFault::Empty
    ));
}

#[test]
fn unknown_formats() {
    let fault = |bytes: &[u8]| fault(bytes, 64 * MIB, &LoadOptions::default());
    says(
        &fault(b"hello"),
        &["68 65 6c 6c 6f", "bzImage (vmlinuz)", "ELF vmlinux"],
    );
    says(&fault(&[0x1f, 0x8b, 8, 0, 0]), &["compressed file"]);
    says(&fault(b"MZ\0\0"), &["EFI"]);
    says(&fault(b"070701000000"), &["cpio"]);
    says(&fault(b"#!/bin/sh"), &["script"]);
    says(&fault(&[0; 4096]), &["zeros"]);
    let mut arm = vec![0; 64];
    arm[56..60].copy_from_slice(b"ARM\x64");
    says(&fault(&arm), &["aarch64", "x86_64"]);
}

#[test]
fn wrong_machines() {
    says(&elf_fault(|elf| elf.machine = 183), &["aarch64", "x86_64"]);
    says(&elf_fault(|elf| elf.machine = 3), &["i386"]);
    says(&elf_fault(|elf| elf.machine = 999), &["ELF machine 999"]);
    let mut big_endian = linux_elf().build();
    big_endian[5] = 2;
    big_endian[18..20].copy_from_slice(&22u16.to_be_bytes());
    says(
        &fault(&big_endian, 64 * MIB, &LoadOptions::default()),
        &["s390x"],
    );
    says(&elf_fault(|elf| elf.kind = 1), &["type 1", "executable"]);
}

#[test]
fn elf_headers() {
    let with = |at: usize, value: u8| {
        let mut image = linux_elf().build();
        image[at] = value;
        fault(&image, 64 * MIB, &LoadOptions::default())
    };
    says(&with(4, 9), &["EI_CLASS is 0x9"]);
    says(&with(54, 57), &["e_phentsize is 0x39"]);
    says(&with(38, 1), &["program headers", "truncated"]);
    says(
        &elf_fault(|elf| elf.segments.clear()),
        &["without a loadable segment"],
    );
    let image = linux_elf().build();
    for keep in [5, 63, 100] {
        says(
            &fault(&image[..keep], 64 * MIB, &LoadOptions::default()),
            &["truncated"],
        );
    }
    let cut = fault(&image[..0x1800], 64 * MIB, &LoadOptions::default());
    says(
        &cut,
        &["segment would end at byte", "the file has only 6144"],
    );
}

#[test]
fn segments() {
    says(
        &elf_fault(|elf| elf.segments[1].memsz = 8),
        &["segment 1 is damaged", "0x8 in memory"],
    );
    says(
        &elf_fault(|elf| elf.segments[1].memsz = 0),
        &["segment 1 is damaged"],
    );
    says(
        &elf_fault(|elf| elf.segments[1].memsz = u64::MAX),
        &["segment 1 is damaged"],
    );
    says(
        &elf_fault(|elf| elf.segments[1].paddr = 70 * MIB),
        &[
            "segment 1",
            "0x4600000-0x4603000",
            "64 MiB of RAM",
            "at least 71 MiB",
        ],
    );
    says(
        &elf_fault(|elf| elf.segments[1].paddr = 0xd000_0000),
        &["segment 1", "0xd0000000", "an address where RAM can be"],
    );
    says(
        &elf_fault(|elf| {
            elf.segments[0].paddr = 0x8000;
            elf.entry = 0x8000
        }),
        &["segment 0", "0x8000", "0x100000"],
    );
    says(
        &elf_fault(|elf| elf.segments[1].paddr = TEXT + 0x800),
        &["segments 0 and 1 overlap at 0x1000800"],
    );
    says(
        &elf_fault(|elf| elf.segments[0].memsz = 4 * MIB),
        &["overlap at 0x1200000"],
    );
}

#[test]
fn entries() {
    let want = |image: &TestElf, wanted| fault(&image.build(), 64 * MIB, &entry(wanted));
    says(
        &elf_fault(|elf| elf.entry = 0x1234),
        &["entry point 0x1234", "outside"],
    );
    says(&elf_fault(|elf| elf.entry = END - 1), &["outside"]);
    says(
        &elf_fault(|elf| elf.notes = vec![pvh_note(0)]),
        &["entry point 0x0"],
    );
    says(
        &want(&linux_elf(), KernelEntry::Pvh),
        &["no pvh entry", "CONFIG_PVH"],
    );
    says(
        &want(&linux_elf(), KernelEntry::Bzimage),
        &["no bzimage entry", "ELF file"],
    );
    let narrow = TestElf {
        is_64: false,
        machine: 3,
        ..linux_elf()
    };
    says(
        &want(&narrow, KernelEntry::Auto),
        &["no pvh entry note", "32-bit"],
    );
    says(
        &want(&narrow, KernelEntry::Linux64),
        &["no linux64 entry", "32-bit"],
    );
    // Notes that lie about their length are no notes.
    for bad in [
        &pvh_note(TEXT)[..13],
        &note(b"Xen\0", 18, &[1; 3]),
        &[0xff; 40],
    ] {
        let elf = TestElf {
            notes: vec![bad.to_vec()],
            ..linux_elf()
        };
        says(&want(&elf, KernelEntry::Pvh), &["no pvh entry"]);
    }
}

#[test]
fn setup_headers() {
    let payload = good_payload();
    let edited = |edit: fn(&mut setup_header)| bzimage_fault(&payload, edit);
    says(
        &edited(|header| header.version = 0x020b),
        &["boot protocol is 2.11", "2.12"],
    );
    says(&edited(|header| header.xloadflags = 0), &["64-bit entry"]);
    says(
        &edited(|header| header.loadflags = 0),
        &["loadflags is 0x0"],
    );
    says(
        &edited(|header| header.setup_sects = 200),
        &["real-mode code", "truncated"],
    );
    says(
        &edited(|header| header.payload_offset = 0x7fff_ffff),
        &["payload would end", "truncated"],
    );
    says(
        &edited(|header| header.payload_length = u32::MAX),
        &["payload would end"],
    );
    says(
        &edited(|header| header.payload_length = 0),
        &["payload_length is 0x0"],
    );
    let own = |edit: fn(&mut setup_header)| {
        fault(
            &bzimage(&payload, edit),
            64 * MIB,
            &entry(KernelEntry::Bzimage),
        )
    };
    says(
        &own(|header| header.pref_address = 0x9000),
        &["pref_address is 0x9000"],
    );
    says(
        &own(|header| header.kernel_alignment = 3),
        &["kernel_alignment is 0x3"],
    );
    says(
        &own(|header| header.init_size = u32::MAX),
        &["MiB of RAM to start", "has 64 MiB"],
    );
    let image = bzimage(&payload, |_| {});
    for keep in [0x206, 0x240] {
        says(
            &fault(&image[..keep], 64 * MIB, &LoadOptions::default()),
            &["truncated"],
        );
    }
}

#[test]
fn payloads() {
    for compression in [
        Compression::Gzip,
        Compression::Bzip2,
        Compression::Xz,
        Compression::Zstd,
    ] {
        let mut payload = pack(compression, &linux_elf().build());
        let middle = payload.len() / 2;
        payload[middle..middle + 16].fill(0xff);
        says(
            &bzimage_fault(&payload, |_| {}),
            &[&format!("{compression} payload is corrupt")],
        );
    }
    for compression in [Compression::Lzma, Compression::Lz4] {
        // No checksum: a length that is not what was announced tells.
        let mut payload = pack(compression, &linux_elf().build());
        let size = payload.len() - 4;
        payload[size..].copy_from_slice(&5000u32.to_le_bytes());
        says(
            &bzimage_fault(&payload, |_| {}),
            &[&format!("{compression} payload is corrupt")],
        );
        payload[size..].copy_from_slice(&50_000u32.to_le_bytes());
        says(&bzimage_fault(&payload, |_| {}), &["instead of 50000"]);
    }
    let mut bomb = good_payload();
    let size = bomb.len() - 4;
    bomb[size..].copy_from_slice(&0xf000_0000u32.to_le_bytes());
    says(
        &bzimage_fault(&bomb, |_| {}),
        &["4026531840", "the limit is 1073741824"],
    );
    bomb[size..].copy_from_slice(&(100u32 << 20).to_le_bytes());
    says(
        &bzimage_fault(&bomb, |_| {}),
        &["needs 100 MiB", "has 64 MiB"],
    );
    says(
        &bzimage_fault(&pack(Compression::Gzip, b"no kernel"), |_| {}),
        &["not an x86_64 ELF"],
    );
}

#[test]
fn too_little_memory() {
    let fault = fault(
        &linux_bzimage(Compression::Gzip),
        17 * MIB,
        &LoadOptions::default(),
    );
    says(&fault, &["segment 1", "17 MiB of RAM", "at least 19 MiB"]);
}
