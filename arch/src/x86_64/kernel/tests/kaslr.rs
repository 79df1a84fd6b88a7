//! KASLR: where kernels go, and which bytes change.

use std::collections::HashSet;

use super::*;

fn seeded(seed: u64) -> LoadOptions {
    LoadOptions {
        kaslr_seed: Some(seed),
        ..LoadOptions::default()
    }
}

#[test]
fn places_are_changed_and_nothing_else() {
    for with_inverse in [true, false] {
        let mut elf = linux_elf().build();
        elf.extend(relocations(with_inverse));
        let image = bzimage(&pack(Compression::Zstd, &elf), |_| {});
        let memory = memory(256 * MIB);
        let kernel = load(&image, &memory, &seeded(7));
        let Kaslr {
            virt_offset,
            phys_base,
        } = kernel.kaslr.unwrap();
        assert!(virt_offset > 0 && phys_base > TEXT, "the seed moves it");
        let delta = phys_base - TEXT;
        assert_eq!(kernel.entry.0, TEXT + ENTRY + delta);
        assert_eq!((kernel.start, kernel.end), (phys_base, END + delta));

        let mut expected = linux_elf().segments;
        let address = START_KERNEL_MAP + TEXT + virt_offset;
        expected[0].data[0x200..0x208].copy_from_slice(&address.to_le_bytes());
        let address = 0x8000_0000 + TEXT as u32 + virt_offset as u32;
        expected[0].data[0x300..0x304].copy_from_slice(&address.to_le_bytes());
        if with_inverse {
            let offset = 0x7000_0000 - virt_offset as u32;
            expected[1].data[0x400..0x404].copy_from_slice(&offset.to_le_bytes());
        }
        for segment in expected {
            let loaded = read(&memory, segment.paddr + delta, segment.data.len());
            assert!(loaded == segment.data);
        }
    }
}

#[test]
fn bases_stay_in_their_bounds() {
    let image = KernelImage::from_bytes(linux_bzimage(Compression::Lz4)).unwrap();
    let memory = memory(128 * MIB);
    let initrd_size = 40 * MIB + 1;
    let mut bases = HashSet::new();
    let mut offsets = HashSet::new();
    for seed in 0..300 {
        let options = LoadOptions {
            initrd_size,
            ..seeded(seed)
        };
        let kernel = image.load(&memory, &options).unwrap();
        let Kaslr {
            virt_offset,
            phys_base,
        } = kernel.kaslr.unwrap();
        assert_eq!((virt_offset % (2 * MIB), phys_base % (2 * MIB)), (0, 0));
        assert!(phys_base >= 16 * MIB && kernel.end <= 88 * MIB - 4096);
        assert!(TEXT + virt_offset + (END - TEXT) <= 1 << 30);
        bases.insert(phys_base);
        offsets.insert(virt_offset);
    }
    // 16 to 84 MiB in steps of 2 MiB; 503 virtual slots.
    assert_eq!(bases.len(), 35);
    assert!(offsets.len() > 200, "{}", offsets.len());
}

#[test]
fn little_ram_leaves_the_physical_base() {
    let memory = memory(32 * MIB);
    let options = LoadOptions {
        initrd_size: 14 * MIB,
        ..seeded(3)
    };
    let kernel = load(&linux_bzimage(Compression::Gzip), &memory, &options);
    assert_eq!(kernel.kaslr.unwrap().phys_base, TEXT);
}

#[test]
fn same_seed_same_place() {
    let image = linux_bzimage(Compression::Gzip);
    let at = |seed| load(&image, &memory(1 << 30), &seeded(seed)).kaslr.unwrap();
    assert_eq!(at(42), at(42));
    assert_ne!(at(42), at(43));
}

#[test]
fn kernels_that_cannot_move_stay() {
    let stays = |elf: Vec<u8>, edit: fn(&mut setup_header)| {
        let image = bzimage(&pack(Compression::Lz4, &elf), edit);
        let kernel = load(&image, &memory(256 * MIB), &seeded(7));
        assert_eq!(
            (kernel.kaslr, kernel.start, kernel.entry.0),
            (None, TEXT, TEXT + ENTRY)
        );
    };
    let elf = linux_elf().build();
    let with = |tail: &[u32]| {
        let mut elf = elf.clone();
        elf.extend(tail.iter().flat_map(|word| word.to_le_bytes()));
        elf
    };
    stays(elf.clone(), |_| {});
    stays([elf.clone(), relocations(true)].concat(), |header| {
        header.relocatable_kernel = 0
    });
    stays([elf.clone(), relocations(true), vec![0]].concat(), |_| {});
    stays(with(&[0]), |_| {});
    stays(with(&[1, 0, 0]), |_| {});
    stays(with(&[0, 0, 0, 0, 0]), |_| {});
    // Places outside of the kernel: below, in bss, at the last bytes, not in the kernel's mapping.
    for place in [
        0x8000_0000,
        0x8000_0000 + DATA as u32 + 0x1000,
        0x8100_0ffd,
        0x0100_0000,
    ] {
        stays(with(&[0, 0, place]), |_| {});
    }
    let mut identity = linux_elf();
    identity.segments[0].paddr = TEXT;
    let mut elf = identity.build();
    // The text's vaddr: linked 1:1, which is not how Linux is.
    elf[64 + 16..64 + 24].copy_from_slice(&TEXT.to_le_bytes());
    stays([elf, relocations(true)].concat(), |_| {});
}
