//! What can be wrong with a kernel image.
//!
//! [`KernelError`] names the image, its source [`KernelFault`] says what is wrong with it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::KernelEntry;
use super::unpack::Compression;

/// A kernel image that cannot be used, and why.
#[derive(Debug, Error)]
#[error("cannot boot the kernel {}", path.display())]
pub struct KernelError {
    /// The image as given by the user.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub source: KernelFault,
}

/// What is wrong with a kernel image.
#[derive(Debug, Error)]
pub enum KernelFault {
    /// No file of that name.
    #[error("there is no such file")]
    Missing,
    /// A directory.
    #[error("it is a directory; name the kernel file in it")]
    Directory,
    /// A pipe, a device or a socket.
    #[error("it is not a regular file")]
    NotRegular,
    /// A file without a byte in it.
    #[error("the file is empty")]
    Empty,
    /// The host does not let this user read it.
    #[error("this user may not read it; name a readable copy")]
    Permission(#[source] io::Error),
    /// The host refused to open it.
    #[error("it cannot be opened")]
    Open(#[source] io::Error),
    /// The host failed to read it.
    #[error("its {what} cannot be read")]
    Read {
        /// Part of the file.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Something lies behind the end of the file.
    #[error(
        "its {what} would end at byte {end}, but the file has only {size}: \
         it is truncated or its headers are damaged"
    )]
    Truncated {
        /// Part of the file.
        what: &'static str,
        /// Where that part ends.
        end: u64,
        /// File size in bytes.
        size: u64,
    },
    /// Neither an ELF nor a bzImage.
    #[error(
        "its format is unknown: it starts with {} ({hint}); accepted are a bzImage (vmlinuz) and \
         an ELF vmlinux",
        Hex(magic)
    )]
    UnknownFormat {
        /// The first bytes.
        magic: Vec<u8>,
        /// What these bytes usually mean.
        hint: &'static str,
    },
    /// A kernel for another processor.
    #[error("it is built for {0}; this machine runs x86_64 kernels")]
    WrongMachine(Machine),
    /// An ELF file that is no program.
    #[error("it is an ELF file of type {0}, not an executable (2)")]
    NotExecutable(u16),
    /// An ELF header field that makes no sense.
    #[error("its ELF header is damaged: {field} is {value:#x}")]
    ElfHeader {
        /// Name of the field in the ELF specification.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// An ELF file without anything to load.
    #[error("it is an ELF file without a loadable segment")]
    NoSegments,
    /// More bytes in the file than in memory, or an end that overflows.
    #[error(
        "its segment {index} is damaged: {filesz:#x} bytes in the file, {memsz:#x} in memory at \
         {start:#x}"
    )]
    SegmentSize {
        /// Program header number.
        index: usize,
        /// Physical start.
        start: u64,
        /// `p_filesz`.
        filesz: u64,
        /// `p_memsz`.
        memsz: u64,
    },
    /// Memory is too small, or the address wrong.
    #[error(
        "its segment {index} ({start:#x}-{end:#x}) lies outside of the {} MiB of RAM from address 0 \
         on; it needs {}", mib(*ram), Need(*need)
    )]
    SegmentOutsideRam {
        /// Program header number.
        index: usize,
        /// Physical start.
        start: u64,
        /// First byte after it.
        end: u64,
        /// RAM in bytes below the MMIO hole.
        ram: u64,
        /// RAM size in bytes that would do; `None` if none does.
        need: Option<u64>,
    },
    /// In the room of bulle's own boot structures.
    #[error(
        "its segment {index} starts at {start:#x}; below {limit:#x} lie the boot structures, link \
         it to {limit:#x} or higher"
    )]
    SegmentTooLow {
        /// Program header number.
        index: usize,
        /// Physical start.
        start: u64,
        /// First address that may be used.
        limit: u64,
    },
    /// Two segments that want the same memory.
    #[error("its segments {first} and {second} overlap at {address:#x}")]
    Overlap {
        /// Program header number.
        first: usize,
        /// Program header number.
        second: usize,
        /// First address wanted by both.
        address: u64,
    },
    /// An entry point that is not part of the kernel.
    #[error("its entry point {entry:#x} lies outside of its segments")]
    EntryOutside {
        /// Physical address of the entry.
        entry: u64,
    },
    /// The entry that was asked for is not there.
    #[error("it has no {wanted} entry{hint}")]
    NoEntry {
        /// What was asked for.
        wanted: KernelEntry,
        /// What can be done.
        hint: &'static str,
    },
    /// A setup header from before Linux 3.8.
    #[error(
        "its boot protocol is {}.{:02}; 2.12 (Linux 3.8) or newer is needed", version >> 8,
        version & 0xff
    )]
    OldProtocol {
        /// Major in the high byte, minor in the low byte.
        version: u16,
    },
    /// A kernel for 32-bit processors.
    #[error("it is a bzImage without a 64-bit entry: a 32-bit kernel, which bulle does not boot")]
    Not64Bit,
    /// A bzImage header that cannot be true.
    #[error("its setup header is damaged: {field} is {value:#x}")]
    SetupHeader {
        /// Name of the field in the Linux boot protocol.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A compression that bulle does not know.
    #[error(
        "its payload starts with {}, which is no known compression; boot it by its own \
         decompressor (bzimage entry)",
        Hex(magic)
    )]
    UnknownCompression {
        /// The first bytes.
        magic: Vec<u8>,
    },
    /// The decompressor stopped.
    #[error("its {compression} payload is corrupt")]
    Corrupt {
        /// How the payload is compressed.
        compression: Compression,
        /// What the decompressor said.
        #[source]
        source: io::Error,
    },
    /// The decompressor got no memory.
    #[error(
        "the host has too little memory for unpacking its {compression} payload: raise the limit \
         (ulimit -v, the container's memory limit)"
    )]
    UnpackMemory {
        /// How the payload is compressed.
        compression: Compression,
        /// What the decompressor said.
        #[source]
        source: io::Error,
    },
    /// Fewer or more bytes than announced.
    #[error("its {compression} payload is corrupt: it holds {got} bytes instead of {announced}")]
    PayloadLength {
        /// How the payload is compressed.
        compression: Compression,
        /// Bytes unpacked (counting stops one byte after the announced length).
        got: u64,
        /// Bytes announced at the end of the payload.
        announced: u64,
    },
    /// More than any kernel has.
    #[error("its payload would unpack to {announced} bytes; the limit is {limit}")]
    PayloadTooLarge {
        /// Bytes announced at the end of the payload.
        announced: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// What was unpacked is no kernel.
    #[error("its payload is corrupt: what was unpacked is not an x86_64 ELF file")]
    PayloadNotElf,
    /// The kernel does not fit.
    #[error("it needs {} MiB of RAM to start, the machine has {} MiB", mib(*need), mib(*ram))]
    MemoryTooSmall {
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        ram: u64,
    },
    /// linux-loader refused the protected-mode code of a bzImage.
    #[error("its protected-mode code cannot be loaded at {address:#x}")]
    Bzimage {
        /// Guest-physical address.
        address: u64,
        /// What linux-loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// Guest memory refused a write.
    #[error("it cannot be written to guest memory at {address:#x}")]
    Write {
        /// Guest-physical address.
        address: u64,
        /// What guest memory said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// `e_machine` of an ELF file, shown by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine(pub u16);

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            2 => "sparc",
            3 => "i386",
            4 => "m68k",
            8 => "mips",
            20 => "powerpc",
            21 => "powerpc64",
            22 => "s390x",
            40 => "arm",
            43 => "sparc64",
            62 => "x86_64",
            183 => "aarch64",
            243 => "riscv",
            247 => "bpf",
            258 => "loongarch",
            other => return write!(f, "ELF machine {other}"),
        };
        f.write_str(name)
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for byte in self.0 {
            write!(f, "{separator}{byte:02x}")?;
            separator = " ";
        }
        Ok(())
    }
}

struct Need(Option<u64>);

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "at least {} MiB", mib(bytes)),
            None => f.write_str("an address where RAM can be"),
        }
    }
}

/// Rounds up to whole MiB.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
