//! How a guest's vCPUs are arranged in threads, cores, dies and sockets, and the APIC ids of it.
//!
//! Plain data without a thread of its own. Invariants: the product of the four counts is the
//! number of vCPUs, index 0 has APIC id 0, ids rise with the index, and none is above
//! [`MAX_APIC_ID`]. A vCPU's id in KVM *is* its APIC id: create vCPUs with [`Topology::apic_id`].

use std::num::NonZeroU16;

/// Most vCPUs of one guest: xAPIC ids are 8 bits and 255 is broadcast.
pub const MAX_VCPUS: u16 = 254;
/// Highest APIC id that needs no interrupt remapping in the guest.
pub const MAX_APIC_ID: u32 = 254;

/// A topology that no guest can have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// None, or more than an xAPIC can address.
    #[error("{vcpus} vCPUs were asked for: a guest has 1 to {MAX_VCPUS}")]
    Count {
        /// Number asked for.
        vcpus: u16,
    },
    /// The counts do not multiply to the number of vCPUs.
    #[error(
        "{threads} threads per core × {cores} cores per die × {dies} dies per socket × {sockets} \
         sockets are {product} vCPUs, but {vcpus} were asked for: make both equal"
    )]
    Product {
        /// Number asked for.
        vcpus: u16,
        /// Threads per core.
        threads: u16,
        /// Cores per die.
        cores: u16,
        /// Dies per socket.
        dies: u16,
        /// Sockets.
        sockets: u16,
        /// What they multiply to.
        product: u64,
    },
    /// Counts that are not powers of two leave gaps in the APIC ids, and these are too large.
    #[error(
        "with {vcpus} vCPUs in this topology the highest APIC id is {highest}, above {MAX_APIC_ID}: \
         use counts that are powers of two, or fewer vCPUs"
    )]
    ApicId {
        /// Number asked for.
        vcpus: u16,
        /// Highest id that results.
        highest: u32,
    },
}

/// Threads, cores, dies and sockets of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    threads: NonZeroU16,
    cores: NonZeroU16,
    dies: NonZeroU16,
    sockets: NonZeroU16,
}

impl Topology {
    /// A validated topology of `vcpus` vCPUs.
    ///
    /// # Errors
    /// [`TopologyError`] when there are no or too many vCPUs, when the counts do not multiply to
    /// `vcpus` (a zero count never does), or when an APIC id would be above [`MAX_APIC_ID`].
    pub fn new(
        vcpus: u16,
        threads_per_core: u16,
        cores_per_die: u16,
        dies_per_socket: u16,
        sockets: u16,
    ) -> Result<Self, TopologyError> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(TopologyError::Count { vcpus });
        }
        let counts = [threads_per_core, cores_per_die, dies_per_socket, sockets];
        // Four 16-bit factors fit in 64 bits.
        let product: u64 = counts.iter().map(|&count| u64::from(count)).product();
        let mismatch = TopologyError::Product {
            vcpus,
            threads: threads_per_core,
            cores: cores_per_die,
            dies: dies_per_socket,
            sockets,
            product,
        };
        let [Some(threads), Some(cores), Some(dies), Some(sockets)] = counts.map(NonZeroU16::new)
        else {
            return Err(mismatch);
        };
        if product != u64::from(vcpus) {
            return Err(mismatch);
        }
        let topology = Self {
            threads,
            cores,
            dies,
            sockets,
        };
        let highest = topology.apic_id(vcpus - 1);
        if highest > MAX_APIC_ID {
            return Err(TopologyError::ApicId { vcpus, highest });
        }
        Ok(topology)
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> u16 {
        // The product is at most MAX_VCPUS.
        self.per_socket() * self.sockets.get()
    }

    /// Threads of a core.
    #[must_use]
    pub fn threads_per_core(&self) -> u16 {
        self.threads.get()
    }

    /// Threads of a die.
    #[must_use]
    pub fn per_die(&self) -> u16 {
        self.threads.get() * self.cores.get()
    }

    /// Threads of a socket.
    #[must_use]
    pub fn per_socket(&self) -> u16 {
        self.per_die() * self.dies.get()
    }

    /// Dies of a socket.
    #[must_use]
    pub fn dies_per_socket(&self) -> u16 {
        self.dies.get()
    }

    /// Low bits of an APIC id that number a thread in its core.
    #[must_use]
    pub fn core_shift(&self) -> u32 {
        width(self.threads)
    }

    /// Low bits of an APIC id that number a thread in its die.
    #[must_use]
    pub fn die_shift(&self) -> u32 {
        self.core_shift() + width(self.cores)
    }

    /// Low bits of an APIC id that number a thread in its socket.
    #[must_use]
    pub fn socket_shift(&self) -> u32 {
        self.die_shift() + width(self.dies)
    }

    /// APIC id of the vCPU with this index: thread, core, die and socket number, each in a field as
    /// wide as its highest value needs (Intel SDM volume 3, "Hierarchical Mapping of Shared
    /// Resources").
    #[must_use]
    pub fn apic_id(&self, index: u16) -> u32 {
        let thread = index % self.threads;
        let rest = index / self.threads;
        let core = rest % self.cores;
        let rest = rest / self.cores;
        let die = rest % self.dies;
        let socket = rest / self.dies;
        u32::from(thread)
            | u32::from(core) << self.core_shift()
            | u32::from(die) << self.die_shift()
            | u32::from(socket) << self.socket_shift()
    }
}

/// Bits that number `count` things.
fn width(count: NonZeroU16) -> u32 {
    u16::BITS - (count.get() - 1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cores of one thread in one die of one socket.
    fn flat(vcpus: u16) -> Result<Topology, TopologyError> {
        Topology::new(vcpus, 1, vcpus, 1, 1)
    }

    #[test]
    fn flat_ids_are_the_indices() {
        for vcpus in [1, 2, 3, 4, 64, 254] {
            let topology = flat(vcpus).unwrap();
            assert_eq!(topology.vcpus(), vcpus);
            for index in 0..vcpus {
                assert_eq!(topology.apic_id(index), u32::from(index));
            }
        }
    }

    #[test]
    fn fields_have_widths_of_powers_of_two() {
        let topology = Topology::new(24, 2, 3, 2, 2).unwrap();
        assert_eq!(
            (
                topology.core_shift(),
                topology.die_shift(),
                topology.socket_shift()
            ),
            (1, 3, 4)
        );
        let ids: Vec<_> = (0..24).map(|index| topology.apic_id(index)).collect();
        assert_eq!(&ids[..8], &[0, 1, 2, 3, 4, 5, 8, 9]);
        assert_eq!(ids[12], 16);
        assert!(ids.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn wrong_counts_are_refused() {
        assert_eq!(flat(0), Err(TopologyError::Count { vcpus: 0 }));
        assert_eq!(flat(255), Err(TopologyError::Count { vcpus: 255 }));
        let text = Topology::new(4, 2, 3, 1, 1).unwrap_err().to_string();
        assert!(
            text.contains("2 threads") && text.contains("are 6") && text.contains("but 4"),
            "{text}"
        );
        assert!(matches!(
            Topology::new(4, 0, 4, 1, 1),
            Err(TopologyError::Product { product: 0, .. })
        ));
        assert!(matches!(
            Topology::new(4, u16::MAX, u16::MAX, u16::MAX, u16::MAX),
            Err(TopologyError::Product { .. })
        ));
    }

    #[test]
    fn ids_above_the_xapic_are_refused() {
        // 5 threads take 3 bits: 50 cores end at 49 << 3 | 4.
        assert_eq!(
            Topology::new(250, 5, 50, 1, 1),
            Err(TopologyError::ApicId {
                vcpus: 250,
                highest: 396
            })
        );
    }
}
