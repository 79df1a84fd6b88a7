//! The relocation lists that the kernel build appends to the unpacked kernel.
//!
//! Format, from arch/x86/tools/relocs.c and handle_relocations() in arch/x86/boot/compressed/misc.c:
//! little-endian 32-bit words, in file order `0, 64-bit…, 0, inverse 32-bit…, 0, 32-bit…`. Kernels
//! from 6.15 on have no inverse list (and its zero is gone), nor have those before 3.16. A word is
//! the sign-extended virtual address of the place to change.

use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::elf::{Elf, Segment};
use super::error::KernelFault;
use super::kaslr::START_KERNEL_MAP;
use crate::memory::GuestMemory;

/// The three lists, each of linked virtual addresses cut to 32 bits.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Relocations {
    /// 64-bit places the offset is added to.
    pub add_64: Vec<u32>,
    /// 32-bit places the offset is subtracted from.
    pub subtract_32: Vec<u32>,
    /// 32-bit places the offset is added to.
    pub add_32: Vec<u32>,
}

impl Relocations {
    /// Reads the lists from what follows the ELF file. `None` if there are none, or if they are
    /// not of the form above.
    pub(super) fn parse(tail: &[u8]) -> Option<Self> {
        let (words, rest) = tail.as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let (&0, lists) = words.split_first()? else {
            return None;
        };
        if !rest.is_empty() {
            return None;
        }
        let mut lists = lists.split(|word| *word == 0).map(<[u32]>::to_vec);
        let (first, second, third) = (lists.next()?, lists.next()?, lists.next());
        if lists.next().is_some() {
            return None;
        }
        let (subtract_32, add_32) = match third {
            Some(third) => (second, third),
            None => (Vec::new(), second),
        };
        Some(Relocations {
            add_64: first,
            subtract_32,
            add_32,
        })
    }

    /// True if every place lies within the file part of a segment.
    pub(super) fn all_inside(&self, elf: &Elf) -> bool {
        let mut places = Places::new(elf);
        let mut inside =
            |list: &[u32], size: u64| list.iter().all(|word| places.find(*word, size).is_some());
        inside(&self.add_64, 8) && inside(&self.subtract_32, 4) && inside(&self.add_32, 4)
    }

    /// Changes every place of a kernel that lies in guest memory, `delta` above its linked
    /// address, for a virtual offset. Places outside of its segments stay as they are.
    pub(super) fn apply(
        &self,
        memory: &GuestMemory,
        elf: &Elf,
        delta: u64,
        virt_offset: u64,
    ) -> Result<(), KernelFault> {
        // The offset is below 1 GiB: it fits a 32-bit place.
        let offset_32 = virt_offset as u32;
        let image = Image::new(memory, elf, delta)?;
        image.change(elf, &self.add_64, |value: u64| {
            value.wrapping_add(virt_offset)
        })?;
        image.change(elf, &self.subtract_32, |value: u32| {
            value.wrapping_sub(offset_32)
        })?;
        image.change(elf, &self.add_32, |value: u32| {
            value.wrapping_add(offset_32)
        })
    }
}

/// A kernel in guest memory.
struct Image<'a> {
    bytes: VolatileSlice<'a>,
    /// First byte.
    address: u64,
    /// Linked address of the first byte.
    start: u64,
}

impl<'a> Image<'a> {
    fn new(memory: &'a GuestMemory, elf: &Elf, delta: u64) -> Result<Self, KernelFault> {
        let start = elf.start();
        let address = start + delta;
        let size = (elf.end() - start) as usize;
        let bytes = memory
            .get_slice(GuestAddress(address), size)
            .map_err(|source| KernelFault::Write { address, source })?;
        Ok(Image {
            bytes,
            address,
            start,
        })
    }

    fn change<T: ByteValued>(
        &self,
        elf: &Elf,
        list: &[u32],
        new: impl Fn(T) -> T,
    ) -> Result<(), KernelFault> {
        let mut places = Places::new(elf);
        for word in list {
            let Some(phys) = places.find(*word, size_of::<T>() as u64) else {
                continue;
            };
            let offset = phys - self.start;
            let place =
                self.bytes
                    .get_ref::<T>(offset as usize)
                    .map_err(|source| KernelFault::Write {
                        address: self.address + offset,
                        source: source.into(),
                    })?;
            place.store(new(place.load()));
        }
        Ok(())
    }
}

/// Finds linked physical addresses; relocations come sorted, so the last segment is tried first.
struct Places<'a> {
    segments: &'a [Segment],
    last: Option<Segment>,
}

impl<'a> Places<'a> {
    fn new(elf: &'a Elf) -> Self {
        Places {
            segments: &elf.segments,
            last: None,
        }
    }

    fn find(&mut self, word: u32, size: u64) -> Option<u64> {
        // Sign-extended to 64 bits, then from the kernel's mapping to the linked physical address.
        let virt = i64::from(word as i32) as u64;
        let phys = virt.checked_sub(START_KERNEL_MAP)?;
        let inside = |s: &Segment| {
            phys.checked_sub(s.paddr)
                .and_then(|offset| offset.checked_add(size))
                .is_some_and(|end| end <= s.filesz)
        };
        if !self.last.as_ref().is_some_and(inside) {
            self.last = self
                .segments
                .iter()
                .find(|segment| inside(segment))
                .copied();
        }
        self.last.map(|_| phys)
    }
}
