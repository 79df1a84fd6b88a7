//! Guest-physical addresses above RAM, for memory that devices bring.

use arch::memory::{address_limit, ram_regions};

/// Where the memory of a device starts, at least: guests with 1 GiB pages can use them, and no two
/// devices share one of Linux's memory blocks.
const ALIGN: u64 = 1 << 30;

/// The processor cannot address so much.
#[derive(Debug, thiserror::Error)]
#[error(
    "{size_mib} MiB for the device '{id}' do not fit behind the guest's RAM: this processor has \
     guest-physical addresses up to {limit_mib} MiB"
)]
pub struct AddressError {
    id: String,
    size_mib: u64,
    limit_mib: u64,
}

/// Gives out addresses, in ascending order.
#[derive(Debug)]
pub struct Addresses {
    next: u64,
    limit: u64,
}

impl Addresses {
    /// All that is behind `ram` bytes of RAM.
    pub fn behind(ram: u64) -> Self {
        let ends = ram_regions(ram)
            .into_iter()
            .map(|(base, size)| base.0 + size as u64);
        Self {
            // Never in the hole below 4 GiB, where devices have their registers.
            next: ends.max().unwrap_or(0).max(arch::layout::MMIO_HOLE_END),
            limit: address_limit(),
        }
    }

    /// Room of `size` bytes for the device `id`.
    pub fn take(&mut self, id: &str, size: u64) -> Result<u64, AddressError> {
        let start = self.next.checked_next_multiple_of(ALIGN);
        let end = start.and_then(|start| start.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.limit => {
                self.next = end;
                Ok(start)
            }
            _ => Err(AddressError {
                id: id.to_string(),
                size_mib: size.div_ceil(1 << 20),
                limit_mib: self.limit >> 20,
            }),
        }
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
            next: 4 * GIB,
            limit: 6 * GIB,
        };
        let text = few.take("a", 2 * GIB + 1).unwrap_err().to_string();
        assert!(text.contains("2049 MiB") && text.contains("'a'"), "{text}");
        assert!(few.take("a", u64::MAX).is_err());
        few.take("a", 2 * GIB).unwrap();
    }
}
