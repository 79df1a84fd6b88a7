//! Configuration space of a block device (section 5.2.4), shared by vCPU threads, the device and
//! whoever resizes the disk.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::virtio::device::{ConfigSpace, read_config};

/// Most ranges of one discard request.
pub(super) const MAX_DISCARD_RANGES: u32 = 32;
/// Most sectors of one range to discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most sectors of one range to zero, which may have to be written out: 32 MiB.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 16;

const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
const PHYSICAL_EXP: usize = 24;
const WCE: usize = 32;
const NUM_QUEUES: usize = 34;
const MAX_DISCARD: usize = 36;
const DISCARD_SEG: usize = 40;
const DISCARD_ALIGN: usize = 44;
const MAX_ZEROES: usize = 48;
const ZEROES_SEG: usize = 52;
const MAY_UNMAP: usize = 56;
const LEN: usize = 60;

/// The part of `virtio_blk_config` that the features offered have.
#[derive(Debug)]
pub(super) struct Space {
    pub fixed: Fixed,
    pub capacity: AtomicU64,
    pub writeback: AtomicBool,
    pub generation: AtomicU32,
}

/// What does not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fixed {
    pub seg_max: u32,
    pub logical: u32,
    pub physical: u32,
    pub queues: u16,
    pub writable: bool,
}

impl Space {
    /// Sets the capacity; says whether it is another one.
    pub fn resize(&self, sectors: u64) -> bool {
        let changed = self.capacity.swap(sectors, Ordering::SeqCst) != sectors;
        if changed {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        changed
    }

    fn bytes(&self) -> [u8; LEN] {
        let fixed = &self.fixed;
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(to) = bytes.get_mut(at..at + value.len()) {
                to.copy_from_slice(value);
            }
        };
        let block_sectors = fixed.logical / 512;
        let exp = (fixed.physical / fixed.logical).trailing_zeros();
        put(
            CAPACITY,
            &self.capacity.load(Ordering::SeqCst).to_le_bytes(),
        );
        put(SEG_MAX, &fixed.seg_max.to_le_bytes());
        put(BLK_SIZE, &fixed.logical.to_le_bytes());
        put(PHYSICAL_EXP, &[exp as u8]);
        put(WCE, &[self.writeback.load(Ordering::SeqCst).into()]);
        put(NUM_QUEUES, &fixed.queues.to_le_bytes());
        if fixed.writable {
            put(MAX_DISCARD, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(DISCARD_SEG, &MAX_DISCARD_RANGES.to_le_bytes());
            put(DISCARD_ALIGN, &block_sectors.to_le_bytes());
            put(MAX_ZEROES, &MAX_ZERO_SECTORS.to_le_bytes());
            put(ZEROES_SEG, &1_u32.to_le_bytes());
            put(MAY_UNMAP, &[1]);
        }
        bytes
    }
}

impl ConfigSpace for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.bytes(), offset, data);
    }

    /// Only `writeback` can be written (section 5.2.5).
    fn write(&self, offset: u64, data: &[u8]) {
        if let (true, [value]) = (offset == WCE as u64, data) {
            self.writeback.store(*value != 0, Ordering::SeqCst);
        }
    }

    fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_blk::virtio_blk_config as Cfg;

    use super::*;

    #[test]
    fn offsets_are_those_of_the_header() {
        assert_eq!(CAPACITY, offset_of!(Cfg, capacity));
        assert_eq!(SEG_MAX, offset_of!(Cfg, seg_max));
        assert_eq!(BLK_SIZE, offset_of!(Cfg, blk_size));
        assert_eq!(PHYSICAL_EXP, offset_of!(Cfg, physical_block_exp));
        assert_eq!(WCE, offset_of!(Cfg, wce));
        assert_eq!(NUM_QUEUES, offset_of!(Cfg, num_queues));
        assert_eq!(MAX_DISCARD, offset_of!(Cfg, max_discard_sectors));
        assert_eq!(DISCARD_SEG, offset_of!(Cfg, max_discard_seg));
        assert_eq!(DISCARD_ALIGN, offset_of!(Cfg, discard_sector_alignment));
        assert_eq!(MAX_ZEROES, offset_of!(Cfg, max_write_zeroes_sectors));
        assert_eq!(ZEROES_SEG, offset_of!(Cfg, max_write_zeroes_seg));
        assert_eq!(MAY_UNMAP, offset_of!(Cfg, write_zeroes_may_unmap));
        assert_eq!(LEN, offset_of!(Cfg, max_secure_erase_sectors));
    }
}
