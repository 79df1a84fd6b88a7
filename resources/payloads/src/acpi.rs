//! Finding and checking ACPI tables (ACPI 6.5, chapter 5).

use crate::{io, memory, start::StartInfo};

/// Whether `len` bytes at `addr` add up to zero.
pub fn checksum(addr: u64, len: u64) -> bool {
    let sum = (addr..addr + len).fold(0u8, |sum, at| sum.wrapping_add(io::read(at)));
    sum == 0
}

/// The address of the RSDP: the one in the start information, or the one found by its signature.
pub fn rsdp(info: &StartInfo) -> Option<u64> {
    let found = (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|at| io::read::<[u8; 8]>(*at) == *b"RSD PTR ");
    found.or((info.rsdp != 0).then_some(info.rsdp))
}

/// A system description table.
#[derive(Clone, Copy)]
pub struct Table {
    /// Its address.
    pub addr: u64,
}

impl Table {
    /// The table at `addr`.
    pub fn at(addr: u64) -> Self {
        memory::map(addr);
        Table { addr }
    }
    /// Four characters.
    pub fn signature(&self) -> [u8; 4] {
        io::read(self.addr)
    }
    /// Bytes, the header included.
    pub fn len(&self) -> u64 {
        io::read::<u32>(self.addr + 4).into()
    }
    /// Whether it has no body.
    pub fn is_empty(&self) -> bool {
        self.len() <= 36
    }
    /// Whether its checksum is right.
    pub fn valid(&self) -> bool {
        checksum(self.addr, self.len())
    }
}

/// The tables that the XSDT lists, itself first.
pub fn tables(rsdp: u64) -> impl Iterator<Item = Table> {
    let xsdt = Table::at(io::read(rsdp + 24));
    let listed = (xsdt.addr + 36..xsdt.addr + xsdt.len()).step_by(8);
    core::iter::once(xsdt).chain(listed.map(|at| Table::at(io::read(at))))
}

/// The local APIC ids of the usable processors that the MADT lists.
pub fn processors(info: &StartInfo) -> impl Iterator<Item = u32> + Clone {
    let madt = rsdp(info).and_then(|rsdp| tables(rsdp).find(|t| t.signature() == *b"APIC"));
    let (mut at, end) = madt.map_or((0, 0), |t| (t.addr + 44, t.addr + t.len()));
    core::iter::from_fn(move || {
        while at + 2 <= end {
            let (kind, len): (u8, u8) = (io::read(at), io::read(at + 1));
            let entry = at;
            at += u64::from(len.max(2));
            let (id, flags) = match kind {
                0 => (io::read::<u8>(entry + 3).into(), io::read(entry + 4)),
                9 => (io::read::<u32>(entry + 4), io::read::<u32>(entry + 8)),
                _ => continue,
            };
            if flags & 1 != 0 {
                return Some(id);
            }
        }
        None
    })
}
