//! Unpacks the payload of a bzImage: the ELF kernel in whatever compression it was built with.
//!
//! The kernel build puts the unpacked size into the last four bytes of every payload (gzip has it
//! there by itself). It bounds the output and is checked afterwards, since lz4 and lzma carry no
//! checksum. Memory grows as data comes, never by a number from the file alone.

use std::fmt;
use std::io::{self, Read};

use liblzma::stream::Stream;

use super::elf;
use super::error::KernelFault;

/// Most bytes that a payload may unpack to.
pub(super) const UNPACKED_MAX: u64 = 1 << 30;
/// Most memory for an xz or lzma dictionary; kernels are built with up to 128 MiB.
const LZMA_MEMORY_MAX: u64 = 256 << 20;
/// Uncompressed size of an lz4 legacy block, except the last (lz4 frame format, legacy frame).
const LZ4_BLOCK_MAX: usize = 8 << 20;
const LZ4_MAGIC: u32 = 0x184c_2102;
/// Where growing starts if the payload announces more.
const FIRST_CAPACITY: u64 = 64 << 20;

/// How a bzImage payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// `CONFIG_KERNEL_GZIP`
    Gzip,
    /// `CONFIG_KERNEL_BZIP2`
    Bzip2,
    /// `CONFIG_KERNEL_LZMA`
    Lzma,
    /// `CONFIG_KERNEL_XZ`
    Xz,
    /// `CONFIG_KERNEL_LZ4`
    Lz4,
    /// `CONFIG_KERNEL_ZSTD`
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Xz => "xz",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

impl Compression {
    /// Recognises a compression by the first bytes.
    pub(super) fn detect(payload: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 6] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (&[0x5d, 0, 0], Compression::Lzma),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&LZ4_MAGIC.to_le_bytes(), Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| payload.starts_with(magic))
            .map(|(_, kind)| *kind)
    }
}

/// Unpacks `payload`; `ram` bounds the output, since a kernel larger than RAM cannot start.
pub(super) fn unpack(payload: &[u8], ram: u64) -> Result<Vec<u8>, KernelFault> {
    let Some(compression) = Compression::detect(payload) else {
        let magic = payload.get(..6).unwrap_or(payload).to_vec();
        return Err(KernelFault::UnknownCompression { magic });
    };
    let announced = u64::from(elf::u32_at(payload, payload.len().saturating_sub(4)));
    if announced > UNPACKED_MAX {
        return Err(KernelFault::PayloadTooLarge {
            announced,
            limit: UNPACKED_MAX,
        });
    }
    if announced > ram {
        return Err(KernelFault::MemoryTooSmall {
            need: announced,
            ram,
        });
    }
    let output = decode(compression, payload, announced).map_err(|source| {
        if lacks_memory(&source) {
            KernelFault::UnpackMemory {
                compression,
                source,
            }
        } else {
            KernelFault::Corrupt {
                compression,
                source,
            }
        }
    })?;
    let got = output.len() as u64;
    if got != announced {
        return Err(KernelFault::PayloadLength {
            compression,
            got,
            announced,
        });
    }
    Ok(output)
}

/// Whether a decompressor failed for want of memory, not for its input.
fn lacks_memory(error: &io::Error) -> bool {
    let inner = error.get_ref();
    let lzma = inner.and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
    error.kind() == io::ErrorKind::OutOfMemory
        || lzma == Some(&liblzma::stream::Error::Mem)
        // ZSTD_error_memory_allocation, of which the crate passes on the name only.
        || inner.is_some_and(|inner| inner.to_string().contains("not enough memory"))
}

fn decode(compression: Compression, payload: &[u8], announced: u64) -> io::Result<Vec<u8>> {
    let lzma = |stream: Result<Stream, liblzma::stream::Error>| {
        Ok::<_, io::Error>(liblzma::bufread::XzDecoder::new_stream(payload, stream?))
    };
    match compression {
        Compression::Gzip => collect(flate2::bufread::GzDecoder::new(payload), announced),
        Compression::Bzip2 => collect(bzip2::bufread::BzDecoder::new(payload), announced),
        Compression::Xz => collect(
            lzma(Stream::new_stream_decoder(LZMA_MEMORY_MAX, 0))?,
            announced,
        ),
        Compression::Lzma => collect(lzma(Stream::new_lzma_decoder(LZMA_MEMORY_MAX))?, announced),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(payload)?;
            collect(decoder.single_frame(), announced)
        }
        Compression::Lz4 => lz4_legacy(payload, announced as usize),
    }
}

/// Reads to the end, but at most one byte more than announced.
fn collect(reader: impl Read, announced: u64) -> io::Result<Vec<u8>> {
    let mut output = Vec::with_capacity(announced.min(FIRST_CAPACITY) as usize);
    reader.take(announced + 1).read_to_end(&mut output)?;
    Ok(output)
}

/// lz4's legacy frame: the magic, then blocks of compressed size and data. The kernel's trailing
/// size makes an end mark unnecessary: what is left then has four bytes.
fn lz4_legacy(payload: &[u8], announced: usize) -> io::Result<Vec<u8>> {
    let invalid = |text: &'static str| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut output = Vec::with_capacity(announced.min(FIRST_CAPACITY as usize));
    let mut rest = payload;
    while rest.len() > 4 {
        let size = elf::u32_at(rest, 0);
        rest = rest.get(4..).unwrap_or_default();
        if size == LZ4_MAGIC {
            continue;
        }
        let (block, tail) = rest
            .split_at_checked(size as usize)
            .ok_or_else(|| invalid("block behind the end"))?;
        rest = tail;
        let start = output.len();
        output.resize(
            start + LZ4_BLOCK_MAX.min(announced.saturating_sub(start)),
            0,
        );
        let room = output.get_mut(start..).unwrap_or_default();
        let length = lz4_flex::block::decompress_into(block, room)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        output.truncate(start + length);
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_memory_is_told_from_corruption() {
        let lzma = |error| io::Error::from(error);
        assert!(lacks_memory(&lzma(liblzma::stream::Error::Mem)));
        assert!(!lacks_memory(&lzma(liblzma::stream::Error::Data)));
        assert!(!lacks_memory(&lzma(liblzma::stream::Error::MemLimit)));
        let zstd = io::Error::other("Allocation error : not enough memory");
        assert!(lacks_memory(&zstd));
        assert!(!lacks_memory(&io::Error::other("Data corruption detected")));
    }
}
