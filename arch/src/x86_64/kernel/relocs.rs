//! The relocation lists that the kernel build appends to the unpacked kernel.
//!
//! Format, from arch/x86/tools/relocs.c and handle_relocations() in arch/x86/boot/compressed/misc.c:
//! little-endian 32-bit words, in file order `0, 64-bit…, 0, inverse 32-bit…, 0, 32-bit…`. Kernels
//! from 6.15 on have no inverse list (and its zero is gone), nor have those before 3.16. A word is
//! the sign-extended virtual address of the place to change.

use super::elf::{Elf, Segment, u32_at, u64_at};
use super::kaslr::START_KERNEL_MAP;

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
    pub(super) fn all_inside(&self, image: &[u8], elf: &Elf) -> bool {
        let mut places = Places::new(elf);
        let mut inside = |list: &[u32], size: usize| {
            list.iter().all(|word| {
                places
                    .find(*word, size)
                    .is_some_and(|offset| offset + size <= image.len())
            })
        };
        inside(&self.add_64, 8) && inside(&self.subtract_32, 4) && inside(&self.add_32, 4)
    }

    /// Changes every place in `image`, the unpacked ELF file; false if one is out of bounds.
    pub(super) fn apply(&self, image: &mut [u8], elf: &Elf, delta: u64) -> bool {
        let mut places = Places::new(elf);
        // The offset is below 1 GiB: it fits a 32-bit place.
        let delta_32 = delta as u32;
        let mut change = |list: &[u32], size: usize, new: &dyn Fn(&[u8]) -> u64| {
            list.iter().all(|word| {
                let Some(offset) = places.find(*word, size) else {
                    return false;
                };
                let Some(place) = image.get_mut(offset..offset + size) else {
                    return false;
                };
                let value = new(place).to_le_bytes();
                place
                    .iter_mut()
                    .zip(value)
                    .for_each(|(to, from)| *to = from);
                true
            })
        };
        change(&self.add_64, 8, &|place| {
            u64_at(place, 0).wrapping_add(delta)
        }) && change(&self.subtract_32, 4, &|place| {
            u32_at(place, 0).wrapping_sub(delta_32).into()
        }) && change(&self.add_32, 4, &|place| {
            u32_at(place, 0).wrapping_add(delta_32).into()
        })
    }
}

/// Finds file offsets of linked addresses; relocations come sorted, so the last segment is tried
/// first.
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

    fn find(&mut self, word: u32, size: usize) -> Option<usize> {
        // Sign-extended to 64 bits, then from the kernel's mapping to the linked physical address.
        let virt = i64::from(word as i32) as u64;
        let phys = virt.checked_sub(START_KERNEL_MAP)?;
        let inside = |s: &Segment| {
            phys.checked_sub(s.paddr)
                .and_then(|offset| offset.checked_add(size as u64))
                .is_some_and(|end| end <= s.filesz)
        };
        if !self.last.as_ref().is_some_and(inside) {
            self.last = self
                .segments
                .iter()
                .find(|segment| inside(segment))
                .copied();
        }
        let segment = self.last?;
        usize::try_from(segment.offset + (phys - segment.paddr)).ok()
    }
}
