//! Which blocks of the region are plugged.

use std::ops::Range;

/// A bit for each block. Indices behind the end are neither plugged nor can be.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u64,
    plugged: u64,
}

impl Blocks {
    /// `len` blocks, all unplugged.
    pub fn new(len: u64) -> Self {
        Self {
            words: vec![0; len.div_ceil(64) as usize],
            len,
            plugged: 0,
        }
    }

    /// Number of blocks.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Number of plugged ones.
    pub fn plugged(&self) -> u64 {
        self.plugged
    }

    fn get(&self, block: u64) -> bool {
        let word = self.words.get((block / 64) as usize);
        block < self.len && word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// How many blocks of `range` are plugged.
    pub fn count(&self, range: Range<u64>) -> u64 {
        range.filter(|block| self.get(*block)).count() as u64
    }

    /// Plugs or unplugs all blocks of `range`.
    pub fn set(&mut self, range: Range<u64>, plugged: bool) {
        for block in range.start..range.end.min(self.len) {
            if self.get(block) == plugged {
                continue;
            }
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word ^= 1 << (block % 64);
                match plugged {
                    true => self.plugged += 1,
                    false => self.plugged -= 1,
                }
            }
        }
    }

    /// Plugged blocks as ranges, in order, apart from each other.
    pub fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (index, word) in (0..).zip(&self.words).filter(|(_, word)| **word != 0) {
            for block in (index * 64..index * 64 + 64).filter(|block| word >> (block % 64) & 1 != 0)
            {
                match runs.last_mut() {
                    Some(run) if run.end == block => run.end += 1,
                    _ => runs.push(block..block + 1),
                }
            }
        }
        runs
    }
}
