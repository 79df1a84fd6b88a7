//! Which 4 KiB pages of a larger host page are in the balloon: when all are, it can be released.
//!
//! Needs a driver that tells of each page that it takes back (MUST_TELL_HOST), or a page in use
//! could be taken for one in the balloon.

use std::collections::BTreeMap;
use std::ops::Range;

use super::PAGE;

/// Host pages with some of their 4 KiB pages in the balloon. Grows with guest RAM, to a bit for
/// each 4 KiB, and not further: the caller asks only for host pages that are RAM.
#[derive(Debug)]
pub(super) struct HugePages {
    /// Bytes of a host page.
    size: u64,
    pages: BTreeMap<u64, Bits>,
}

#[derive(Debug)]
struct Bits {
    words: Box<[u64]>,
    set: u64,
}

impl HugePages {
    pub fn new(size: u64) -> Self {
        let pages = BTreeMap::new();
        Self { size, pages }
    }

    pub fn clear(&mut self) {
        self.pages.clear();
    }

    /// The 4 KiB page at `addr` is in the balloon now. Returns its host page if that is complete.
    pub fn inflate(&mut self, addr: u64) -> Option<Range<u64>> {
        let count = self.size / PAGE;
        let (index, word, bit) = self.place(addr);
        let bits = self.pages.entry(index).or_insert_with(|| Bits {
            words: vec![0; count.div_ceil(64) as usize].into(),
            set: 0,
        });
        let word = bits.words.get_mut(word)?;
        bits.set += u64::from(*word & bit == 0);
        *word |= bit;
        let start = index * self.size;
        (bits.set == count).then(|| start..start + self.size)
    }

    /// The driver takes the 4 KiB page at `addr` back.
    pub fn deflate(&mut self, addr: u64) {
        let (index, word, bit) = self.place(addr);
        let Some(bits) = self.pages.get_mut(&index) else {
            return;
        };
        if let Some(word) = bits.words.get_mut(word) {
            bits.set -= u64::from(*word & bit != 0);
            *word &= !bit;
        }
        if bits.set == 0 {
            self.pages.remove(&index);
        }
    }

    /// Host page, word of its bitmap, and bit of that.
    fn place(&self, addr: u64) -> (u64, usize, u64) {
        let page = addr % self.size / PAGE;
        (addr / self.size, (page / 64) as usize, 1 << (page % 64))
    }
}
