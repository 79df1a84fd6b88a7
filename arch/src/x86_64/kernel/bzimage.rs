//! bzImage: the setup header, the payload in it, and its own 64-bit entry.
//!
//! See Documentation/arch/x86/boot.rst. A file is a boot sector, real-mode code and, after it, the
//! protected-mode code that holds the compressed kernel.

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::elf;
use super::error::KernelFault;
use super::source::Source;
use crate::layout;
use crate::memory::{self, GuestMemory};

/// Where the setup header lies in the file.
const HEADER_START: usize = 0x1f1;
/// Byte that holds the header's length, counted from [`HEADER_LENGTH_BASE`].
const HEADER_LENGTH: usize = 0x201;
const HEADER_LENGTH_BASE: usize = 0x202;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: [u8; 4] = *b"HdrS";
/// First protocol with `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
const SECTOR: u64 = 512;
/// The 64-bit entry, counted from the protected-mode code.
pub(super) const ENTRY_64: u64 = 0x200;
/// Longest version string that is looked at.
const VERSION_LENGTH_MAX: u64 = 256;

/// A bzImage whose header has been checked.
#[derive(Clone, Copy)]
pub(super) struct Bzimage {
    /// The setup header; what is behind its own length is zero.
    pub header: setup_header,
    /// Size of boot sector and real-mode code: where the protected-mode code starts.
    setup_size: u64,
}

impl Bzimage {
    /// True if the first bytes of a file are those of a bzImage.
    pub(super) fn detect(head: &[u8]) -> bool {
        elf::u16_at(head, 0x1fe) == BOOT_FLAG && head.get(0x202..0x206) == Some(&HEADER_MAGIC)
    }

    /// Reads and checks the setup header.
    pub(super) fn parse(source: &Source) -> Result<Self, KernelFault> {
        let head = source.head();
        let length_byte = head.get(HEADER_LENGTH).copied().unwrap_or(0);
        let end = HEADER_LENGTH_BASE + usize::from(length_byte);
        let mut header = setup_header::default();
        let size = size_of::<setup_header>().min(end - HEADER_START);
        source.check("setup header", HEADER_START as u64, size as u64)?;
        let bytes = head
            .get(HEADER_START..HEADER_START + size)
            .unwrap_or_default();
        for (to, from) in header.as_mut_slice().iter_mut().zip(bytes) {
            *to = *from;
        }
        let version = header.version;
        if version < VERSION_MIN {
            return Err(KernelFault::OldProtocol { version });
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelFault::Not64Bit);
        }
        if header.loadflags & LOADED_HIGH == 0 {
            let value = header.loadflags.into();
            return Err(KernelFault::SetupHeader {
                field: "loadflags",
                value,
            });
        }
        let sectors = if header.setup_sects == 0 {
            4
        } else {
            u64::from(header.setup_sects)
        };
        let setup_size = (sectors + 1) * SECTOR;
        source.check("real-mode code", 0, setup_size)?;
        Ok(Bzimage { header, setup_size })
    }

    /// First word of the version string: what `uname -r` prints.
    pub(super) fn version(&self, source: &Source) -> Option<String> {
        let pointer = u64::from(self.header.kernel_version);
        if pointer == 0 {
            return None;
        }
        let start = pointer + SECTOR;
        let length = source.size().checked_sub(start)?.min(VERSION_LENGTH_MAX);
        first_word(&source.read("version string", start, length).ok()?)
    }

    /// The compressed kernel.
    pub(super) fn payload(&self, source: &Source) -> Result<Vec<u8>, KernelFault> {
        let length = u64::from(self.header.payload_length);
        if length < 8 {
            return Err(KernelFault::SetupHeader {
                field: "payload_length",
                value: length,
            });
        }
        let offset = self.setup_size + u64::from(self.header.payload_offset);
        source.read("payload", offset, length)
    }

    /// Smallest step of load addresses: 2 MiB (what 64-bit Linux needs at least) or more.
    pub(super) fn alignment(&self) -> Result<u64, KernelFault> {
        let value = u64::from(self.header.kernel_alignment);
        if value.is_power_of_two() {
            Ok(value.max(super::kaslr::MIN_ALIGNMENT))
        } else {
            Err(KernelFault::SetupHeader {
                field: "kernel_alignment",
                value,
            })
        }
    }

    /// Loads the protected-mode code for its own 64-bit entry, which unpacks the kernel in the
    /// guest. Returns its address and the end of the memory it needs.
    pub(super) fn load(
        &self,
        source: &Source,
        memory: &GuestMemory,
    ) -> Result<(u64, u64), KernelFault> {
        let size = source.size() - self.setup_size;
        let room = u64::from(self.header.init_size).max(size);
        let ram = memory::low_end(memory);
        let start = self.load_address(room, ram)?;
        let end = start.saturating_add(room);
        if end > ram {
            return Err(KernelFault::MemoryTooSmall { need: end, ram });
        }
        if size <= ENTRY_64 {
            let what = "protected-mode code";
            let end = self.setup_size + ENTRY_64 + 1;
            return Err(KernelFault::Truncated {
                what,
                end,
                size: source.size(),
            });
        }
        let mut file = std::io::Cursor::new(source.read("image", 0, source.size())?);
        let high = Some(GuestAddress(layout::HIMEM_START));
        BzImage::load(memory, Some(GuestAddress(start)), &mut file, high).map_err(|source| {
            KernelFault::Bzimage {
                address: start,
                source,
            }
        })?;
        Ok((start, end))
    }

    /// The preferred address; if RAM ends before it, the lowest possible one.
    fn load_address(&self, room: u64, ram: u64) -> Result<u64, KernelFault> {
        let preferred = self.header.pref_address;
        if preferred < layout::HIMEM_START {
            return Err(KernelFault::SetupHeader {
                field: "pref_address",
                value: preferred,
            });
        }
        if self.header.relocatable_kernel == 0 {
            return Ok(preferred);
        }
        let alignment = self.alignment()?;
        let address = match preferred.checked_next_multiple_of(alignment) {
            Some(address) if address.saturating_add(room) <= ram => address,
            _ => layout::HIMEM_START.next_multiple_of(alignment),
        };
        Ok(address)
    }
}

/// The printable text up to the first blank, if there is any.
pub(super) fn first_word(bytes: &[u8]) -> Option<String> {
    let word = bytes.split(|byte| !byte.is_ascii_graphic()).next()?;
    let text = std::str::from_utf8(word).ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}
