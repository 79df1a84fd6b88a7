//! Guest-physical addresses above RAM, for memory that devices bring.

use arch::memory::{address_limit, ram_regions};

/// Where the memory of a device starts, at least: guests with 1 GiB pages can use them, and no two
/// devices share one of Linux's memory blocks.
const ALIGN: u64 = 1 << 30;

/// There is no room for the memory of a device.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The processor cannot address so much.
    #[error(
        "{size_mib} MiB for the device '{id}' do not fit behind the guest's RAM: this processor has \
         guest-physical addresses up to {limit_mib} MiB"
    )]
    Room {
        /// The device.
        id: String,
        /// Its MiB.
        size_mib: u64,
        /// MiB that there may be of everything.
        limit_mib: u64,
    },
    /// It cannot be there.
    #[error(
        "the device '{id}' cannot be at {address:#x}: give a multiple of {ALIGN:#x} behind the guest's RAM and \
         beside other devices, or leave the address out"
    )]
    Place {
        /// The device.
        id: String,
        /// As asked for.
        address: u64,
    },
}

/// Gives out addresses, the lowest first.
#[derive(Debug)]
pub struct Addresses {
    base: u64,
    limit: u64,
    /// First and behind the last.
    taken: Vec<(u64, u64)>,
}

impl Addresses {
    /// All that is behind `ram` bytes of RAM.
    pub fn behind(ram: u64) -> Self {
        let ends = ram_regions(ram)
            .into_iter()
            .map(|(base, size)| base.0 + size as u64);
        Self {
            // Never in the hole below 4 GiB, where devices have their registers.
            base: ends.max().unwrap_or(0).max(arch::layout::MMIO_HOLE_END),
            limit: address_limit(),
            taken: Vec::new(),
        }
    }

    /// Room of `size` bytes for the device `id`.
    pub fn take(&mut self, id: &str, size: u64) -> Result<u64, AddressError> {
        let ends = self.taken.iter().map(|(_, end)| *end);
        let starts = ends.chain([self.base]);
        let starts = starts.filter_map(|start| start.checked_next_multiple_of(ALIGN));
        let start = starts.filter(|start| self.is_free(*start, size)).min();
        let start = start.ok_or_else(|| AddressError::Room {
            id: id.to_string(),
            size_mib: size.div_ceil(1 << 20),
            limit_mib: self.limit >> 20,
        })?;
        self.taken.push((start, start + size));
        Ok(start)
    }

    /// Has the device `id` at `address`, `size` bytes of it.
    pub fn reserve(&mut self, id: &str, address: u64, size: u64) -> Result<(), AddressError> {
        if !address.is_multiple_of(ALIGN) || !self.is_free(address, size) {
            let id = id.to_string();
            return Err(AddressError::Place { id, address });
        }
        self.taken.push((address, address + size));
        Ok(())
    }

    fn is_free(&self, start: u64, size: u64) -> bool {
        let Some(end) = start.checked_add(size) else {
            return false;
        };
        let beside = |(first, behind): &(u64, u64)| end <= *first || *behind <= start;
        start >= self.base && end <= self.limit && self.taken.iter().all(beside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn addresses_are_behind_ram_and_apart() {
        let mut small = Addresses::behind(512 << 20);
        assert_eq!(small.take("a", 5 << 20).unwrap(), 4 * GIB);
        assert_eq!(small.take("b", 2 * GIB).unwrap(), 5 * GIB);
        assert_eq!(small.take("c", 1).unwrap(), 7 * GIB);
        let mut large = Addresses::behind(5 * GIB + (2 << 20));
        assert_eq!(large.take("a", GIB).unwrap(), 7 * GIB);
    }

    #[test]
    fn what_the_processor_cannot_address_is_refused() {
        let mut few = Addresses {
            base: 4 * GIB,
            limit: 6 * GIB,
            taken: Vec::new(),
        };
        let text = few.take("a", 2 * GIB + 1).unwrap_err().to_string();
        assert!(text.contains("2049 MiB") && text.contains("'a'"), "{text}");
        assert!(few.take("a", u64::MAX).is_err());
        few.take("a", 2 * GIB).unwrap();
    }
    #[test]
    fn a_device_can_be_where_it_was_and_gaps_are_filled() {
        let mut some = Addresses {
            base: 4 * GIB,
            limit: 9 * GIB,
            taken: Vec::new(),
        };
        some.reserve("a", 5 * GIB, 1).unwrap();
        for (address, size) in [
            (5 * GIB, 1),
            (4 * GIB, GIB + 1),
            (6 * GIB + 4096, 1),
            (3 * GIB, 1),
            (8 * GIB, GIB + 1),
            (!(GIB - 1), GIB + 1),
        ] {
            let text = some.reserve("b", address, size).unwrap_err().to_string();
            assert!(text.contains(&format!("{address:#x}")), "{text}");
        }
        assert_eq!(some.take("c", GIB).unwrap(), 4 * GIB);
        assert_eq!(some.take("d", 2 * GIB).unwrap(), 6 * GIB);
        assert_eq!(some.take("e", 1).unwrap(), 8 * GIB);
        some.take("f", 1).unwrap_err();
    }
}
