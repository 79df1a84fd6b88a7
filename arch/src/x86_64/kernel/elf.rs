//! ELF kernels: headers, segments, the PVH note.
//!
//! linux-loader's own ELF loader takes 64-bit files only, forgets a PVH note that is not in the
//! last note segment and checks neither machine nor overlaps, so headers are read here. Every
//! number comes from a file that may lie: sums are checked, reads are bounded by the file's size.

use super::error::{KernelFault, Machine};
use super::source::Source;
use crate::layout;
use crate::memory::{self, GuestMemory};

/// First bytes of every ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const EHDR64_SIZE: u64 = 64;
const EHDR32_SIZE: u64 = 52;
const PHDR64_SIZE: u64 = 56;
const PHDR32_SIZE: u64 = 32;
const SHDR64_SIZE: u64 = 64;
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Longest note segment that is searched; Linux has about 500 bytes.
const NOTES_MAX: u64 = 1 << 16;

/// A program header, 32-bit fields widened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    /// Program header number.
    pub index: usize,
    /// Offset in the file.
    pub offset: u64,
    /// Virtual address.
    pub vaddr: u64,
    /// Physical address that it is linked to.
    pub paddr: u64,
    /// Bytes in the file.
    pub filesz: u64,
    /// Bytes in memory.
    pub memsz: u64,
}

impl Segment {
    /// Physical end; no overflow, checked when the header was read.
    pub(super) fn end(&self) -> u64 {
        self.paddr + self.memsz
    }
}

/// The headers of an ELF kernel, checked.
#[derive(Debug)]
pub(super) struct Elf {
    /// 64-bit file.
    pub is_64: bool,
    /// `e_entry`.
    pub entry: u64,
    /// Non-empty `PT_LOAD` segments, sorted by physical address, without overlap.
    pub segments: Vec<Segment>,
    /// Physical address in the PVH note.
    pub pvh_entry: Option<u64>,
    /// End of headers, segments and section headers in the file.
    pub file_end: u64,
}

impl Elf {
    /// Reads and checks the headers and the notes.
    pub(super) fn parse(source: &Source) -> Result<Self, KernelFault> {
        let ident = source.read("ELF header", 0, 16)?;
        let is_64 = match byte(&ident, 4) {
            CLASS_32 => false,
            CLASS_64 => true,
            class => {
                return Err(KernelFault::ElfHeader {
                    field: "EI_CLASS",
                    value: class.into(),
                });
            }
        };
        let size = if is_64 { EHDR64_SIZE } else { EHDR32_SIZE };
        let header = source.read("ELF header", 0, size)?;
        if byte(&ident, 5) != LITTLE_ENDIAN {
            return Err(KernelFault::WrongMachine(Machine(be16(&header, 18))));
        }
        let machine = u16_at(&header, 18);
        if !(machine == EM_X86_64 || machine == EM_386 && !is_64) {
            return Err(KernelFault::WrongMachine(Machine(machine)));
        }
        let kind = u16_at(&header, 16);
        if kind != ET_EXEC && kind != ET_DYN {
            return Err(KernelFault::NotExecutable(kind));
        }
        let (entry, phoff, shoff, rest) = if is_64 {
            (
                u64_at(&header, 24),
                u64_at(&header, 32),
                u64_at(&header, 40),
                54,
            )
        } else {
            let field = |offset| u64::from(u32_at(&header, offset));
            (field(24), field(28), field(32), 42)
        };
        let field = |number: usize| u64::from(u16_at(&header, rest + 2 * number));
        let (phentsize, phnum, shentsize, shnum) = (field(0), field(1), field(2), field(3));
        let phdr_size = if is_64 { PHDR64_SIZE } else { PHDR32_SIZE };
        if phentsize != phdr_size {
            return Err(KernelFault::ElfHeader {
                field: "e_phentsize",
                value: phentsize,
            });
        }
        let table = source.read("program headers", phoff, phnum * phdr_size)?;
        let mut elf = Elf {
            is_64,
            entry,
            segments: Vec::new(),
            pvh_entry: None,
            file_end: phoff + phnum * phdr_size,
        };
        for (index, phdr) in table.chunks_exact(phdr_size as usize).enumerate() {
            elf.add(source, index, phdr)?;
        }
        elf.check_overlap()?;
        elf.file_end = elf
            .file_end
            .max(sections_end(source, is_64, shoff, shentsize * shnum));
        Ok(elf)
    }

    fn add(&mut self, source: &Source, index: usize, phdr: &[u8]) -> Result<(), KernelFault> {
        let field = |wide: usize, narrow: usize| {
            if self.is_64 {
                u64_at(phdr, wide)
            } else {
                u64::from(u32_at(phdr, narrow))
            }
        };
        let segment = Segment {
            index,
            offset: field(8, 4),
            vaddr: field(16, 8),
            paddr: field(24, 12),
            filesz: field(32, 16),
            memsz: field(40, 20),
        };
        match u32_at(phdr, 0) {
            PT_LOAD if segment.memsz > 0 => {
                let Segment {
                    paddr: start,
                    filesz,
                    memsz,
                    ..
                } = segment;
                if filesz > memsz || start.checked_add(memsz).is_none() {
                    return Err(KernelFault::SegmentSize {
                        index,
                        start,
                        filesz,
                        memsz,
                    });
                }
                if filesz > 0 {
                    source.check("segment", segment.offset, filesz)?;
                    self.file_end = self.file_end.max(segment.offset + filesz);
                }
                self.segments.push(segment);
            }
            PT_LOAD if segment.filesz > 0 => {
                let Segment {
                    paddr: start,
                    filesz,
                    memsz,
                    ..
                } = segment;
                return Err(KernelFault::SegmentSize {
                    index,
                    start,
                    filesz,
                    memsz,
                });
            }
            PT_NOTE if self.pvh_entry.is_none() => {
                let notes = source.read("notes", segment.offset, segment.filesz.min(NOTES_MAX))?;
                self.pvh_entry = pvh_entry(&notes);
            }
            _ => {}
        }
        Ok(())
    }

    fn check_overlap(&mut self) -> Result<(), KernelFault> {
        if self.segments.is_empty() {
            return Err(KernelFault::NoSegments);
        }
        self.segments.sort_by_key(|segment| segment.paddr);
        for pair in self.segments.windows(2) {
            if let [low, high] = pair
                && low.end() > high.paddr
            {
                return Err(KernelFault::Overlap {
                    first: low.index,
                    second: high.index,
                    address: high.paddr,
                });
            }
        }
        Ok(())
    }

    /// Lowest physical address.
    pub(super) fn start(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.paddr)
    }

    /// First physical address after the last segment.
    pub(super) fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }

    /// Checks that `entry`, a linked physical address, is in the file part of a segment.
    pub(super) fn check_entry(&self, entry: u64) -> Result<(), KernelFault> {
        let inside = |s: &Segment| entry >= s.paddr && entry - s.paddr < s.filesz;
        if self.segments.iter().any(inside) {
            Ok(())
        } else {
            Err(KernelFault::EntryOutside { entry })
        }
    }

    /// Checks that all segments, moved up by `delta`, lie above bulle's boot structures and in the
    /// RAM below the MMIO hole, which is what the boot page tables map.
    pub(super) fn check_ram(&self, memory: &GuestMemory, delta: u64) -> Result<(), KernelFault> {
        for segment in &self.segments {
            let (index, memsz) = (segment.index, segment.memsz);
            let start = segment.paddr.saturating_add(delta);
            if start < layout::HIMEM_START {
                let limit = layout::HIMEM_START;
                return Err(KernelFault::SegmentTooLow {
                    index,
                    start,
                    limit,
                });
            }
            let (end, ram) = (start.saturating_add(memsz), memory::low_end(memory));
            if end > ram {
                let need = self.end().saturating_add(delta);
                let need = (need <= layout::MMIO_HOLE_START).then_some(need);
                return Err(KernelFault::SegmentOutsideRam {
                    index,
                    start,
                    end,
                    ram,
                    need,
                });
            }
        }
        Ok(())
    }

    /// Copies every segment to guest memory, `delta` above its linked address. What the file
    /// does not hold (bss) stays as it is: guest memory starts zeroed.
    pub(super) fn load(
        &self,
        source: &Source,
        memory: &GuestMemory,
        delta: u64,
    ) -> Result<(), KernelFault> {
        self.check_ram(memory, delta)?;
        for segment in self.segments.iter().filter(|segment| segment.filesz > 0) {
            let address = segment.paddr + delta;
            source.copy_to_guest(memory, address, segment.offset, segment.filesz)?;
        }
        Ok(())
    }
}

/// End of the section headers and of what they describe; what points out of the file is ignored,
/// since nothing is loaded from sections.
fn sections_end(source: &Source, is_64: bool, offset: u64, size: u64) -> u64 {
    if !is_64 || size == 0 {
        return 0;
    }
    const SHT_NOBITS: u32 = 8;
    let Ok(table) = source.read("section headers", offset, size) else {
        return 0;
    };
    let ends = table
        .chunks_exact(SHDR64_SIZE as usize)
        .filter_map(|header| {
            let end = u64_at(header, 24).checked_add(u64_at(header, 32))?;
            (u32_at(header, 4) != SHT_NOBITS && end <= source.size()).then_some(end)
        });
    ends.max().unwrap_or(0).max(offset + size)
}

/// Finds the PVH entry in a note segment (ELF notes: name size, description size, type, then both
/// padded to 4 bytes).
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while notes.len() >= 12 {
        let (name_size, desc_size) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize);
        let kind = u32_at(notes, 8);
        let desc_start = name_size.checked_next_multiple_of(4)?.checked_add(12)?;
        let desc_end = desc_start.checked_add(desc_size)?;
        let (name, desc) = (
            notes.get(12..12 + name_size)?,
            notes.get(desc_start..desc_end)?,
        );
        if name == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            // PVH enters in 32-bit mode, whatever the width of the note.
            return match desc_size {
                4 => Some(u64::from(u32_at(desc, 0))),
                8 => Some(u64_at(desc, 0)),
                _ => None,
            };
        }
        notes = notes.get(desc_end.checked_next_multiple_of(4)?..)?;
    }
    None
}

fn byte(bytes: &[u8], offset: usize) -> u8 {
    bytes.get(offset).copied().unwrap_or(0)
}

fn be16(bytes: &[u8], offset: usize) -> u16 {
    u16_at(bytes, offset).swap_bytes()
}

/// Little-endian `u16` at `offset`; 0 behind the end.
pub(super) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    array(bytes, offset).map_or(0, u16::from_le_bytes)
}

/// Little-endian `u32` at `offset`; 0 behind the end.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    array(bytes, offset).map_or(0, u32::from_le_bytes)
}

/// Little-endian `u64` at `offset`; 0 behind the end.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    array(bytes, offset).map_or(0, u64::from_le_bytes)
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}
