//! Kernel images made by hand, and what loading them does to guest memory.

mod bzimage;
mod debian;
mod elf;
mod errors;
mod kaslr;
mod property;

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use std::io::Write as _;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::kaslr::START_KERNEL_MAP;
use super::*;

pub(crate) const MIB: u64 = 1 << 20;
/// Where the test kernel is linked to.
pub(crate) const TEXT: u64 = 16 * MIB;
pub(crate) const DATA: u64 = 18 * MIB;
/// End of the test kernel with its bss.
pub(crate) const END: u64 = DATA + 0x3000;
/// Offset of the entry point in the text.
pub(crate) const ENTRY: u64 = 0x100;

pub(crate) fn memory(size: u64) -> GuestMemory {
    GuestMemory::from_ranges(&memory::ram_regions(size)).unwrap()
}

pub(crate) fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

/// A segment to be: linked address, content, size in memory.
#[derive(Clone)]
pub(crate) struct TestSegment {
    pub paddr: u64,
    pub data: Vec<u8>,
    pub memsz: u64,
}

/// An ELF file to be.
#[derive(Clone)]
pub(crate) struct TestElf {
    pub is_64: bool,
    pub machine: u16,
    pub kind: u16,
    pub entry: u64,
    pub segments: Vec<TestSegment>,
    /// Note segments.
    pub notes: Vec<Vec<u8>>,
    /// With a section header table at the end.
    pub sections: bool,
}

/// Text with an entry, data with bss, and in both places for relocations.
pub(crate) fn linux_elf() -> TestElf {
    let mut text: Vec<u8> = (0..0x1000u32).map(|n| n as u8).collect();
    text[0x200..0x208].copy_from_slice(&(START_KERNEL_MAP + TEXT).to_le_bytes());
    text[0x300..0x304].copy_from_slice(&(0x8000_0000u32 + TEXT as u32).to_le_bytes());
    let mut data = b"Linux version %s\0Linux version 6.1.0-test-amd64 (gcc)\0".to_vec();
    data.resize(0x1000, 0x5a);
    data[0x400..0x404].copy_from_slice(&0x7000_0000u32.to_le_bytes());
    TestElf {
        is_64: true,
        machine: 62,
        kind: 2,
        entry: TEXT + ENTRY,
        segments: vec![
            TestSegment {
                paddr: TEXT,
                data: text,
                memsz: 0x1000,
            },
            TestSegment {
                paddr: DATA,
                data,
                memsz: END - DATA,
            },
        ],
        notes: Vec::new(),
        sections: true,
    }
}

/// An ELF note, padded.
pub(crate) fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend((name.len() as u32).to_le_bytes());
    note.extend((desc.len() as u32).to_le_bytes());
    note.extend(kind.to_le_bytes());
    for part in [name, desc] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

pub(crate) fn pvh_note(entry: u64) -> Vec<u8> {
    note(b"Xen\0", 18, &entry.to_le_bytes())
}

impl TestElf {
    pub(crate) fn with_pvh(mut self) -> Self {
        // As in vmlinux: other notes around it, and a note segment without it after it.
        let mut notes = note(b"GNU\0", 3, &[7; 20]);
        notes.extend(note(b"Xen\0", 5, b"x"));
        notes.extend(pvh_note(TEXT + 0x80));
        notes.extend(note(b"Linux\0", 257, &[0; 4]));
        self.notes = vec![notes, note(b"GNU\0", 1, &[0; 16])];
        self
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let (ehsize, phsize) = if self.is_64 {
            (64usize, 56usize)
        } else {
            (52, 32)
        };
        let count = self.segments.len() + self.notes.len();
        let mut file = vec![0; ehsize + count * phsize];
        let mut headers = Vec::new();
        for segment in &self.segments {
            let size = segment.data.len() as u64;
            headers.extend(self.phdr(1, file.len() as u64, segment.paddr, size, segment.memsz));
            file.extend(&segment.data);
        }
        for notes in &self.notes {
            let size = notes.len() as u64;
            headers.extend(self.phdr(4, file.len() as u64, 0, size, size));
            file.extend(notes);
        }
        file.resize(file.len().next_multiple_of(8), 0);
        let shoff = if self.sections { file.len() as u64 } else { 0 };
        if self.sections {
            file.resize(file.len() + 64, 0);
        }
        file[ehsize..ehsize + headers.len()].copy_from_slice(&headers);
        let mut ident = b"\x7fELF\x01\x01\x01".to_vec();
        ident[4] = 1 + u8::from(self.is_64);
        ident.resize(16, 0);
        ident.extend(self.kind.to_le_bytes());
        ident.extend(self.machine.to_le_bytes());
        ident.extend(1u32.to_le_bytes());
        for value in [self.entry, ehsize as u64, shoff] {
            ident.extend(self.word(value));
        }
        ident.extend(0u32.to_le_bytes());
        let sections = u16::from(self.sections);
        let shentsize = if self.is_64 { 64 } else { 40 };
        for value in [
            ehsize as u16,
            phsize as u16,
            count as u16,
            shentsize,
            sections,
            0,
        ] {
            ident.extend(value.to_le_bytes());
        }
        file[..ehsize].copy_from_slice(&ident);
        file
    }

    fn word(&self, value: u64) -> Vec<u8> {
        if self.is_64 {
            value.to_le_bytes().to_vec()
        } else {
            (value as u32).to_le_bytes().to_vec()
        }
    }

    fn phdr(&self, kind: u32, offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        let flags = 7u32.to_le_bytes();
        if self.is_64 {
            header.extend(flags);
        }
        let vaddr = paddr.wrapping_add(START_KERNEL_MAP);
        for value in [offset, vaddr, paddr, filesz, memsz] {
            header.extend(self.word(value));
        }
        if !self.is_64 {
            header.extend(flags);
        }
        header.extend(self.word(0x1000));
        header
    }
}

/// The relocations of [`linux_elf`], as the kernel build appends them.
pub(crate) fn relocations(with_inverse: bool) -> Vec<u8> {
    let word = |phys: u64| 0x8000_0000u32 + phys as u32;
    let mut words = vec![0, word(TEXT + 0x200), 0];
    if with_inverse {
        words.extend([word(DATA + 0x400), 0]);
    }
    words.push(word(TEXT + 0x300));
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Compresses as the kernel build does, the size appended.
pub(crate) fn pack(compression: Compression, data: &[u8]) -> Vec<u8> {
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
    let options = LzmaOptions::new_preset(6).unwrap();
    let lzma = |stream| {
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    };
    let mut packed = match compression {
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(data).unwrap();
            return encoder.finish().unwrap();
        }
        Compression::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Xz => {
            let mut filters = Filters::new();
            filters.x86().lzma2(&options);
            lzma(Stream::new_stream_encoder(&filters, Check::Crc32).unwrap())
        }
        Compression::Lzma => lzma(Stream::new_lzma_encoder(&options).unwrap()),
        Compression::Zstd => {
            // With a checksum, as the command line tool does.
            let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
            encoder.include_checksum(true).unwrap();
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Lz4 => {
            let mut packed = 0x184c_2102u32.to_le_bytes().to_vec();
            for block in data.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
            packed
        }
    };
    packed.extend((data.len() as u32).to_le_bytes());
    packed
}

/// Offset of the payload in the protected-mode code of [`bzimage`].
const PAYLOAD: u32 = 0x400;
/// Size of boot sector and real-mode code of [`bzimage`].
pub(crate) const SETUP: usize = 1024;

/// A bzImage with `payload`, its header changed by `edit`.
pub(crate) fn bzimage(payload: &[u8], edit: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        kernel_version: 0x100,
        loadflags: LOADED_HIGH,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        payload_offset: PAYLOAD,
        payload_length: payload.len() as u32,
        pref_address: TEXT,
        init_size: 0x40_0000,
        ..setup_header::default()
    };
    edit(&mut header);
    let mut file = vec![0; SETUP + PAYLOAD as usize];
    file[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    file[0x300..0x31c].copy_from_slice(b"6.1.0-test-amd64 (me@here) #");
    for (n, byte) in file[SETUP..].iter_mut().enumerate() {
        *byte = (n / 7) as u8;
    }
    file.extend(payload);
    file
}

/// A bzImage of [`linux_elf`] with relocations.
pub(crate) fn linux_bzimage(compression: Compression) -> Vec<u8> {
    let mut elf = linux_elf().build();
    elf.extend(relocations(true));
    bzimage(&pack(compression, &elf), |_| {})
}

pub(crate) fn load(image: &[u8], memory: &GuestMemory, options: &LoadOptions) -> LoadedKernel {
    KernelImage::from_bytes(image.to_vec())
        .unwrap()
        .load(memory, options)
        .unwrap()
}

/// Why `image` cannot be opened or loaded.
pub(crate) fn fault(image: &[u8], ram: u64, options: &LoadOptions) -> KernelFault {
    let error = KernelImage::from_bytes(image.to_vec())
        .and_then(|image| image.load(&memory(ram), options))
        .unwrap_err();
    assert_eq!(error.to_string(), "cannot boot the kernel <memory>");
    error.source
}

pub(crate) fn entry(entry: KernelEntry) -> LoadOptions {
    LoadOptions {
        entry,
        ..LoadOptions::default()
    }
}
