//! Kernel images: what they are, and how they get into guest memory.
//!
//! Called once per boot by the thread that builds the machine; an image is opened, asked for its
//! version if somebody wants to know, and loaded. The format is detected from content. An ELF file
//! is read piecewise, straight into guest memory, since that is the fast way to start; a bzImage's
//! payload is unpacked on the host, which saves the guest its decompressor, and gets KASLR here.
//! Nothing in an image is trusted. Guest memory has to be zeroed: bss is not written.

mod bzimage;
mod elf;
mod error;
mod kaslr;
mod relocs;
mod source;
#[cfg(test)]
pub(crate) mod tests;
mod unpack;
mod version;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

pub use linux_loader::loader::bootparam::setup_header;
use vm_memory::GuestAddress;

pub use self::error::{KernelError, KernelFault, Machine};
pub use self::kaslr::Kaslr;
pub use self::unpack::Compression;

use self::bzimage::Bzimage;
use self::elf::Elf;
use self::relocs::Relocations;
use self::source::Source;
use super::layout;
use super::memory::{self, GuestMemory};

/// `initrd_addr_max` of 64-bit Linux, taken where no setup header says it.
const INITRD_MAX_DEFAULT: u64 = 0x7fff_ffff;

/// Which of a kernel's entry points to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelEntry {
    /// The best one: PVH for an ELF file that has it, else the Linux 64-bit entry; a bzImage is
    /// unpacked first unless its compression is unknown.
    #[default]
    Auto,
    /// The PVH entry of an ELF file (32-bit mode).
    Pvh,
    /// The Linux 64-bit entry of an ELF file.
    Linux64,
    /// A bzImage's own 64-bit entry, which unpacks the kernel in the guest.
    Bzimage,
}

impl fmt::Display for KernelEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KernelEntry::Auto => "auto",
            KernelEntry::Pvh => "pvh",
            KernelEntry::Linux64 => "linux64",
            KernelEntry::Bzimage => "bzimage",
        })
    }
}

/// How to load a kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// The entry wanted.
    pub entry: KernelEntry,
    /// Randomness for KASLR; `None` loads the kernel where it is linked.
    pub kaslr_seed: Option<u64>,
    /// Bytes that KASLR leaves free for the initrd, at the end of the RAM it may use.
    pub initrd_size: u64,
}

/// How the boot processor enters a loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PVH: 32-bit protected mode without paging, `hvm_start_info` in EBX.
    Pvh,
    /// Linux boot protocol, 64-bit: long mode with identity paging, `boot_params` in RSI.
    Linux64,
}

/// A kernel that is in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct LoadedKernel {
    /// How to enter it.
    pub protocol: Protocol,
    /// Guest-physical address of the first instruction.
    pub entry: GuestAddress,
    /// First guest-physical byte.
    pub start: u64,
    /// First guest-physical byte after the kernel, its bss and what it needs to unpack itself.
    pub end: u64,
    /// The bzImage's setup header; `None` for an ELF file.
    pub setup_header: Option<setup_header>,
    /// Longest command line in bytes without the NUL that kernel and layout take.
    pub cmdline_max: usize,
    /// Highest guest-physical address that the initrd may use.
    pub initrd_max: u64,
    /// Where KASLR has put it; `None` if it is where it was linked.
    pub kaslr: Option<Kaslr>,
}

/// A kernel image, its headers checked.
pub struct KernelImage {
    path: PathBuf,
    source: Source<'static>,
    format: Format,
}

enum Format {
    Elf(Elf),
    Bzimage(Bzimage),
}

impl KernelImage {
    /// Opens the file at `path` and checks its headers. Of an ELF file, nothing else is read.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        Source::open(path)
            .and_then(|source| Ok((detect(&source)?, source)))
            .map(|(format, source)| KernelImage {
                path: path.to_owned(),
                source,
                format,
            })
            .map_err(|source| KernelError {
                path: path.to_owned(),
                source,
            })
    }

    /// Takes an image that is in memory; errors call it `<memory>`.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, KernelError> {
        let path = PathBuf::from("<memory>");
        let result = Source::memory(bytes).and_then(|source| Ok((detect(&source)?, source)));
        match result {
            Ok((format, source)) => Ok(KernelImage {
                path,
                source,
                format,
            }),
            Err(source) => Err(KernelError { path, source }),
        }
    }

    /// The image as given to [`KernelImage::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's release as `uname -r` has it, to find its modules. Costs nothing for a
    /// bzImage; an ELF file is searched for Linux's banner. `None` if there is none.
    pub fn version(&self) -> Option<String> {
        match &self.format {
            Format::Elf(elf) => version::banner(&self.source, elf),
            Format::Bzimage(image) => image.version(&self.source),
        }
    }

    /// The image file, opened; `None` for an image in memory.
    pub fn file(&self) -> Option<&File> {
        self.source.file()
    }

    /// True for a bzImage, whose kernel [`KernelImage::unpack`] unpacks.
    pub fn is_bzimage(&self) -> bool {
        matches!(self.format, Format::Bzimage(_))
    }

    /// Unpacks the kernel in a bzImage: an ELF file with its relocations, as the kernel build
    /// packed it. `ram` in bytes bounds it, since a kernel larger than RAM cannot start. `None` if
    /// `entry` takes the image as it is.
    pub fn unpack(&self, entry: KernelEntry, ram: u64) -> Result<Option<Vec<u8>>, KernelError> {
        let image = match &self.format {
            Format::Bzimage(image) if entry != KernelEntry::Bzimage => image,
            _ => return Ok(None),
        };
        let payload = image.payload(&self.source);
        match payload.and_then(|payload| unpack::unpack(&payload, ram)) {
            Ok(unpacked) => Ok(Some(unpacked)),
            Err(KernelFault::UnknownCompression { .. }) if entry == KernelEntry::Auto => Ok(None),
            Err(fault) => Err(self.error(fault)),
        }
    }

    /// Loads the kernel into zeroed guest memory.
    pub fn load(
        &self,
        memory: &GuestMemory,
        options: &LoadOptions,
    ) -> Result<LoadedKernel, KernelError> {
        let unpacked = self.unpack(options.entry, memory::total_size(memory))?;
        self.load_unpacked(unpacked.as_deref(), memory, options)
    }

    /// As [`KernelImage::load`], with what [`KernelImage::unpack`] has returned for this image and
    /// this entry, now or at an earlier time.
    pub fn load_unpacked(
        &self,
        unpacked: Option<&[u8]>,
        memory: &GuestMemory,
        options: &LoadOptions,
    ) -> Result<LoadedKernel, KernelError> {
        let entry = options.entry;
        let loaded = match (&self.format, unpacked) {
            (Format::Elf(elf), _) => load_elf(&self.source, elf, memory, entry),
            (Format::Bzimage(image), _) if entry == KernelEntry::Bzimage => {
                self.load_packed(image, memory)
            }
            (Format::Bzimage(image), Some(bytes)) => load_unpacked(bytes, image, memory, options),
            (Format::Bzimage(image), None) if entry == KernelEntry::Auto => {
                self.load_packed(image, memory)
            }
            (Format::Bzimage(_), None) => Err(KernelFault::NoEntry {
                wanted: entry,
                hint: " before it is unpacked",
            }),
        };
        loaded.map_err(|fault| self.error(fault))
    }

    fn error(&self, source: KernelFault) -> KernelError {
        KernelError {
            path: self.path.clone(),
            source,
        }
    }

    fn load_packed(
        &self,
        image: &Bzimage,
        memory: &GuestMemory,
    ) -> Result<LoadedKernel, KernelFault> {
        let (start, end) = image.load(&self.source, memory)?;
        let entry = start + bzimage::ENTRY_64;
        Ok(with_header(
            LoadedKernel::new(Protocol::Linux64, entry, start, end),
            image,
        ))
    }
}

impl LoadedKernel {
    fn new(protocol: Protocol, entry: u64, start: u64, end: u64) -> Self {
        LoadedKernel {
            protocol,
            entry: GuestAddress(entry),
            start,
            end,
            setup_header: None,
            cmdline_max: layout::ELF_CMDLINE_MAX_SIZE - 1,
            initrd_max: INITRD_MAX_DEFAULT,
            kaslr: None,
        }
    }
}

/// Fills in what the setup header says about command line and initrd.
fn with_header(kernel: LoadedKernel, image: &Bzimage) -> LoadedKernel {
    let header = image.header;
    LoadedKernel {
        setup_header: Some(header),
        cmdline_max: (header.cmdline_size as usize).min(layout::CMDLINE_MAX_SIZE - 1),
        initrd_max: header.initrd_addr_max.into(),
        ..kernel
    }
}

fn detect(source: &Source) -> Result<Format, KernelFault> {
    let head = source.head();
    if head.starts_with(&elf::MAGIC) {
        return Ok(Format::Elf(Elf::parse(source)?));
    }
    if Bzimage::detect(head) {
        return Ok(Format::Bzimage(Bzimage::parse(source)?));
    }
    const AARCH64: u16 = 183;
    if head.get(56..60) == Some(b"ARM\x64") {
        return Err(KernelFault::WrongMachine(Machine(AARCH64)));
    }
    let hint = match Compression::detect(head) {
        Some(_) => "a compressed file, unpack it first",
        None if head.starts_with(b"MZ") => "an EFI program without a Linux setup header",
        None if head.starts_with(b"070701") => "a cpio archive, perhaps the initrd",
        None if head.starts_with(b"#!") => "a script",
        None if head.iter().all(|byte| *byte == 0) => "zeros",
        None => "no known magic number",
    };
    Err(KernelFault::UnknownFormat {
        magic: head.iter().take(8).copied().collect(),
        hint,
    })
}

/// Chooses the protocol for an ELF file, and its entry point.
fn elf_entry(elf: &Elf, wanted: KernelEntry) -> Result<(Protocol, u64), KernelFault> {
    let missing = |wanted, hint| Err(KernelFault::NoEntry { wanted, hint });
    let (protocol, entry) = match (wanted, elf.pvh_entry) {
        (KernelEntry::Auto | KernelEntry::Pvh, Some(entry)) => (Protocol::Pvh, entry),
        (KernelEntry::Auto, None) if !elf.is_64 => {
            return missing(
                KernelEntry::Pvh,
                " note; a 32-bit ELF file cannot start without one",
            );
        }
        (KernelEntry::Auto | KernelEntry::Linux64, _) if elf.is_64 => {
            (Protocol::Linux64, elf.entry)
        }
        (KernelEntry::Pvh, None) => {
            return missing(wanted, "; Linux has one if it is built with CONFIG_PVH");
        }
        (KernelEntry::Bzimage, _) => {
            return missing(wanted, ": it is an ELF file; use pvh or linux64");
        }
        _ => return missing(wanted, ": it is a 32-bit ELF file"),
    };
    elf.check_entry(entry)?;
    Ok((protocol, entry))
}

fn load_elf(
    source: &Source,
    elf: &Elf,
    memory: &GuestMemory,
    wanted: KernelEntry,
) -> Result<LoadedKernel, KernelFault> {
    let (protocol, entry) = elf_entry(elf, wanted)?;
    elf.load(source, memory, 0)?;
    Ok(LoadedKernel::new(protocol, entry, elf.start(), elf.end()))
}

/// Loads the ELF file from a bzImage, at a random place if it can be moved.
fn load_unpacked(
    unpacked: &[u8],
    image: &Bzimage,
    memory: &GuestMemory,
    options: &LoadOptions,
) -> Result<LoadedKernel, KernelFault> {
    let (need, ram) = (unpacked.len() as u64, memory::total_size(memory));
    if need > ram {
        return Err(KernelFault::MemoryTooSmall { need, ram });
    }
    let source = Source::memory(unpacked)?;
    if !source.head().starts_with(&elf::MAGIC) {
        return Err(KernelFault::PayloadNotElf);
    }
    let elf = Elf::parse(&source)?;
    // Linux's own entry knows what the setup header says; PVH is for those who ask for it.
    let wanted = match options.entry {
        KernelEntry::Auto => KernelEntry::Linux64,
        wanted => wanted,
    };
    let (protocol, entry) = elf_entry(&elf, wanted)?;
    let tail = unpacked.get(elf.file_end as usize..).unwrap_or_default();
    let moved = match (protocol, options.kaslr_seed) {
        (Protocol::Linux64, Some(seed)) => {
            let end = kaslr_end(image, memory, options.initrd_size);
            randomise(tail, &elf, image, need, end, seed)?
        }
        _ => None,
    };
    let delta = moved
        .as_ref()
        .map_or(0, |(kaslr, _)| kaslr.phys_base - elf.start());
    elf.load(&source, memory, delta)?;
    if let Some((kaslr, relocations)) = &moved {
        relocations.apply(memory, &elf, delta, kaslr.virt_offset)?;
    }
    let kernel = LoadedKernel::new(
        protocol,
        entry + delta,
        elf.start() + delta,
        elf.end() + delta,
    );
    Ok(LoadedKernel {
        kaslr: moved.map(|(kaslr, _)| kaslr),
        ..with_header(kernel, image)
    })
}

/// First address that KASLR leaves free.
fn kaslr_end(image: &Bzimage, memory: &GuestMemory, initrd_size: u64) -> u64 {
    let initrd_end = u64::from(image.header.initrd_addr_max) + 1;
    memory::low_end(memory).min(initrd_end).saturating_sub(
        initrd_size
            .checked_next_multiple_of(4096)
            .unwrap_or(u64::MAX),
    )
}

/// Chooses a place below `end` for an unpacked kernel of `size` bytes, if what follows its ELF
/// file, `tail`, has the relocations to move it there.
fn randomise(
    tail: &[u8],
    elf: &Elf,
    image: &Bzimage,
    size: u64,
    end: u64,
    seed: u64,
) -> Result<Option<(Kaslr, Relocations)>, KernelFault> {
    let alignment = image.alignment()?;
    if image.header.relocatable_kernel == 0 {
        return Ok(None);
    }
    let relocations = Relocations::parse(tail).filter(|lists| lists.all_inside(elf));
    Ok(relocations.and_then(|lists| {
        let kaslr = kaslr::choose(elf, size, alignment, end, seed)?;
        Some((kaslr, lists))
    }))
}
