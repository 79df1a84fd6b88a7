//! The guest's memory statistics (section 5.5.6.3): what the driver puts on the statistics queue.

use serde::{Deserialize, Serialize};

/// Bytes of one entry: a tag of 16 bits and a value of 64, packed.
pub(super) const ENTRY: usize = 10;
/// Entries looked at; there are 16 tags.
pub(super) const MAX_ENTRIES: usize = 64;

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident = $tag:literal,)*) => {
        /// What the guest says of its memory; unknown where its driver does not say.
        ///
        /// Not checked, since nobody but the guest knows. Sizes are bytes, the rest are counts
        /// since the guest's boot.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Statistics {
            $($(#[$doc])* #[serde(default, skip_serializing_if = "Option::is_none")]
            pub $name: Option<u64>,)*
        }

        impl Statistics {
            fn set(&mut self, tag: u16, value: u64) {
                match tag {
                    $($tag => self.$name = Some(value),)*
                    // A later version of the specification.
                    _ => {}
                }
            }
        }
    };
}

statistics! {
    /// Bytes swapped in.
    swap_in = 0,
    /// Bytes swapped out.
    swap_out = 1,
    /// Page faults that needed the disk.
    major_faults = 2,
    /// Page faults that did not.
    minor_faults = 3,
    /// Bytes that nothing uses.
    free_memory = 4,
    /// Bytes there are.
    total_memory = 5,
    /// Bytes that programs can have without swapping.
    available_memory = 6,
    /// Bytes of caches that can be dropped.
    disk_caches = 7,
    /// Huge pages allocated.
    hugetlb_allocations = 8,
    /// Huge pages that could not be had.
    hugetlb_failures = 9,
    /// Processes killed for want of memory.
    oom_kill = 10,
    /// Allocations that had to wait for reclaim.
    alloc_stall = 11,
    /// Pages scanned in the background.
    async_scan = 12,
    /// Pages scanned by those who needed them.
    direct_scan = 13,
    /// Pages reclaimed in the background.
    async_reclaim = 14,
    /// Pages reclaimed by those who needed them.
    direct_reclaim = 15,
}

impl Statistics {
    /// Reads the driver's entries; what is left of an entry at the end is not one.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut all = Self::default();
        for entry in bytes.chunks_exact(ENTRY).take(MAX_ENTRIES) {
            if let [t0, t1, value @ ..] = entry
                && let Ok(value) = <[u8; 8]>::try_from(value)
            {
                all.set(u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(value));
            }
        }
        all
    }
}
