//! Real kernels, where the machine has them under /boot.

use std::path::PathBuf;

use super::super::bzimage::Bzimage;
use super::super::elf::Elf;
use super::super::relocs::Relocations;
use super::super::source::Source;
use super::super::unpack;
use super::*;

fn kernels() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/boot") else {
        return Vec::new();
    };
    let mut kernels: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-"))
        })
        .filter(|path| std::fs::File::open(path).is_ok())
        .collect();
    kernels.sort();
    kernels
}

#[test]
fn relocations_parse_fully_and_stay_inside() {
    for path in kernels() {
        let source = Source::open(&path).unwrap();
        let image = Bzimage::parse(&source).unwrap();
        let bytes = unpack::unpack(&image.payload(&source).unwrap(), 1 << 30).unwrap();
        let size = bytes.len();
        let source = Source::memory(&bytes[..]).unwrap();
        let elf = Elf::parse(&source).unwrap();
        assert!((elf.file_end as usize) < size, "{path:?} has relocations");
        let relocations = Relocations::parse(&bytes[elf.file_end as usize..]).unwrap();
        assert!(relocations.all_inside(&elf));
        println!(
            "{}: {} bytes, ELF end {:#x}, relocations 64-bit {}, inverse {}, 32-bit {}",
            path.display(),
            size,
            elf.file_end,
            relocations.add_64.len(),
            relocations.subtract_32.len(),
            relocations.add_32.len(),
        );
        assert!(relocations.add_64.len() > 1000 && relocations.add_32.len() > 1000);
    }
}

/// Compares a moved kernel with one that was not, walking the lists backwards from the end of the
/// image as handle_relocations() does.
#[test]
fn moved_kernels_differ_by_their_relocations_only() {
    for path in kernels() {
        let image = KernelImage::open(&path).unwrap();
        let plain_memory = memory(512 * MIB);
        let plain = image.load(&plain_memory, &LoadOptions::default()).unwrap();
        assert_eq!((plain.protocol, plain.kaslr), (Protocol::Linux64, None));
        let size = (plain.end - plain.start) as usize;
        let linked = read(&plain_memory, plain.start, size);
        let words = relocation_words(&path);

        for seed in [1, 0x1234_5678_9abc_def0] {
            let memory = memory(512 * MIB);
            let options = LoadOptions {
                kaslr_seed: Some(seed),
                ..LoadOptions::default()
            };
            let kernel = image.load(&memory, &options).unwrap();
            let Kaslr {
                virt_offset,
                phys_base,
            } = kernel.kaslr.unwrap();
            assert_eq!(kernel.start, phys_base);
            assert_eq!(kernel.entry.0 - kernel.start, plain.entry.0 - plain.start);
            let mut moved = read(&memory, kernel.start, size);
            undo(&words, &mut moved, plain.start, virt_offset);
            assert!(moved == linked, "{path:?} with seed {seed:#x}");
        }
    }
}

/// The last words of the unpacked image, from its end to the zero that starts the lists.
fn relocation_words(path: &Path) -> Vec<u32> {
    let source = Source::open(path).unwrap();
    let image = Bzimage::parse(&source).unwrap();
    let bytes = unpack::unpack(&image.payload(&source).unwrap(), 1 << 30).unwrap();
    bytes
        .rchunks_exact(4)
        .map(|w| u32::from_le_bytes(w.try_into().unwrap()))
        .collect()
}

fn undo(words: &[u32], kernel: &mut [u8], start: u64, virt_offset: u64) {
    let mut words = words.iter().copied();
    for list in 0..3 {
        for word in words.by_ref().take_while(|word| *word != 0) {
            let at = (word - 0x8000_0000 - start as u32) as usize;
            let width = if list == 2 { 8 } else { 4 };
            let mut value = [0; 8];
            value[..width].copy_from_slice(&kernel[at..at + width]);
            let value = u64::from_le_bytes(value);
            let old = if list == 1 {
                value + virt_offset
            } else {
                value.wrapping_sub(virt_offset)
            };
            kernel[at..at + width].copy_from_slice(&old.to_le_bytes()[..width]);
        }
    }
}

#[test]
fn version_is_the_name_of_the_file() {
    for path in kernels() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let version = KernelImage::open(&path).unwrap().version().unwrap();
        assert_eq!(name, format!("vmlinuz-{version}"));
    }
}

#[test]
fn own_entry_loads() {
    for path in kernels() {
        let image = KernelImage::open(&path).unwrap();
        let kernel = image
            .load(&memory(512 * MIB), &entry(KernelEntry::Bzimage))
            .unwrap();
        assert_eq!(kernel.entry.0, kernel.start + 0x200);
    }
}
