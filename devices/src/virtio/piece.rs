//! A part of guest RAM that is looked up once for many accesses: a ring, or a table of descriptors.

use vm_memory::bitmap::BS;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestRam;

/// So many bytes at an address of the guest's choice. Each access is checked.
pub(super) struct Piece<'m> {
    ram: &'m GuestRam,
    addr: u64,
    /// All of it, where it lies in one region as nearly everything does.
    slice: Option<VolatileSlice<'m, BS<'m, ()>>>,
}

impl<'m> Piece<'m> {
    /// The `len` bytes at `addr`, which need not be in RAM.
    pub fn new(ram: &'m GuestRam, addr: u64, len: usize) -> Self {
        let slice = GuestMemoryBackend::get_slice(ram, GuestAddress(addr), len).ok();
        Self { ram, addr, slice }
    }

    /// Reads what is at `offset`.
    pub fn read<T: ByteValued>(&self, offset: usize) -> Result<T, virtio_queue::Error> {
        match self.slice.as_ref().map(|slice| slice.read_obj(offset)) {
            Some(Ok(value)) => Ok(value),
            _ => {
                let read = self.ram.read_obj(self.at(offset)?);
                read.map_err(virtio_queue::Error::GuestMemory)
            }
        }
    }

    /// Writes `value` to `offset`.
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) -> Result<(), virtio_queue::Error> {
        match self
            .slice
            .as_ref()
            .map(|slice| slice.write_obj(value, offset))
        {
            Some(Ok(())) => Ok(()),
            _ => {
                let written = self.ram.write_obj(value, self.at(offset)?);
                written.map_err(virtio_queue::Error::GuestMemory)
            }
        }
    }

    fn at(&self, offset: usize) -> Result<GuestAddress, virtio_queue::Error> {
        let at = self.addr.checked_add(offset as u64);
        at.map(GuestAddress)
            .ok_or(virtio_queue::Error::AddressOverflow)
    }
}
