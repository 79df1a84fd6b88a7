//! Configuration space of a block device (section 5.2.4), shared by vCPU threads, the device and
//! whoever resizes the disk.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::lock;
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
    size: Mutex<Size>,
    pub writeback: AtomicBool,
}

/// The capacity and how often it has changed, which are changed together: a driver reads the
/// capacity as two halves, and asks for the generation before and behind (section 2.5.1).
#[derive(Clone, Copy, Debug)]
struct Size {
    sectors: u64,
    generation: u32,
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
    /// A disk of `sectors`, with the write cache as said.
    pub fn new(fixed: Fixed, sectors: u64, writeback: bool) -> Self {
        let generation = 0;
        Self {
            fixed,
            size: Mutex::new(Size {
                sectors,
                generation,
            }),
            writeback: AtomicBool::new(writeback),
        }
    }

    /// The capacity in sectors.
    pub fn capacity(&self) -> u64 {
        lock(&self.size).sectors
    }

    /// Sets the capacity; says whether it is another one.
    pub fn resize(&self, sectors: u64) -> bool {
        let mut size = lock(&self.size);
        let changed = size.sectors != sectors;
        if changed {
            size.sectors = sectors;
            size.generation = size.generation.wrapping_add(1);
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
        put(CAPACITY, &self.capacity().to_le_bytes());
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
    fn write(&self, offset: u64, data: &[u8]) -> bool {
        let (true, [value]) = (offset == WCE as u64, data) else {
            return false;
        };
        self.writeback.store(*value != 0, Ordering::SeqCst);
        true
    }

    fn generation(&self) -> u32 {
        lock(&self.size).generation
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_blk::virtio_blk_config as Cfg;

    use super::*;

    const FIXED: Fixed = Fixed {
        seg_max: 1,
        logical: 512,
        physical: 512,
        queues: 1,
        writable: true,
    };
    /// On both sides of 2 TiB.
    const SMALL: u64 = u32::MAX as u64;
    const LARGE: u64 = 1 << 32;

    #[test]
    fn nothing_is_read_of_a_change_under_way() {
        let space = Space::new(FIXED, SMALL, true);
        let (sender, seen) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let mut size = lock(&space.size);
            size.sectors = LARGE;
            let (space, other) = (&space, sender.clone());
            scope.spawn(move || other.send(space.generation().into()));
            scope.spawn(move || {
                let mut half = [0; 4];
                space.read(4, &mut half);
                sender.send(u32::from_le_bytes(half).into())
            });
            let early = seen.recv_timeout(std::time::Duration::from_millis(50));
            size.generation = 7;
            drop(size);
            assert!(early.is_err(), "{early:?} was seen too early");
        });
        let mut both: Vec<u64> = seen.iter().collect();
        both.sort_unstable();
        assert_eq!(both, [LARGE >> 32, 7]);
    }

    #[test]
    fn halves_of_two_capacities_do_not_pass_for_one() {
        let space = Space::new(FIXED, SMALL, true);
        let end = std::time::Instant::now() + std::time::Duration::from_millis(300);
        let mut whole = 0;
        std::thread::scope(|scope| {
            let resizing = scope.spawn(|| {
                let sizes = [LARGE, SMALL].into_iter().cycle();
                let mut sizes = sizes.take_while(|_| std::time::Instant::now() < end);
                sizes.all(|sectors| space.resize(sectors))
            });
            // As a driver reads it, whose halves may be far apart.
            while !resizing.is_finished() || whole == 0 {
                let before = space.generation();
                let mut halves = [[0; 4]; 2];
                for (at, half) in (0..).zip(&mut halves) {
                    space.read(4 * at, half);
                }
                let after = space.generation();
                let [low, high] = halves.map(|half| u64::from(u32::from_le_bytes(half)));
                if before == after {
                    let capacity = high << 32 | low;
                    assert!(capacity == SMALL || capacity == LARGE, "{capacity:#x}");
                    whole += 1;
                }
            }
            assert!(resizing.join().unwrap());
        });
    }

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
