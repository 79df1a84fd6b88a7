//! The container of a state file: a header that any version can read, then sections.
//!
//! Each section has a name, a version, a length and a checksum; an unknown one is skipped unless
//! it is marked mandatory. Input is untrusted: every length is checked against the bytes there are
//! before anything is taken. Byte by byte in docs/snapshot-format.md. All integers are
//! little-endian; checksums are CRC-32/ISO-HDLC.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// First bytes of every state file.
pub const MAGIC: [u8; 8] = *b"BULLESNP";
/// Version of the container and of what the sections mean.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 64;
/// Where in the header the snapshot's id is.
pub const ID_AT: usize = 32;
/// Bytes before a section's payload.
pub const SECTION_LEN: usize = 32;
/// Most bytes of a state file.
pub const MAX_FILE: u64 = 256 << 20;
/// Machine, as in ELF headers: EM_X86_64.
pub const MACHINE: u16 = 62;
/// log2 of the guest's page size.
pub const PAGE_SHIFT: u16 = 12;
/// A reader that does not know the section must refuse the file.
const MANDATORY: u16 = 1;
/// Bytes of a section's name.
const NAME_LEN: usize = 8;

/// A state file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Something else.
    #[error("this is no snapshot of bulle")]
    Magic,
    /// The header does not match its checksum.
    #[error("the header is damaged: its checksum does not match")]
    Header,
    /// Another version.
    #[error(
        "it has format version {found}, this bulle reads version {VERSION}: use the bulle that wrote it"
    )]
    Version {
        /// What it has.
        found: u16,
    },
    /// Another architecture.
    #[error("it is of a machine of ELF type {found}, this host runs type {MACHINE} (x86_64)")]
    Machine {
        /// What it has.
        found: u16,
    },
    /// Another page size.
    #[error("its guest has pages of 2^{found} bytes, this host gives pages of 2^{PAGE_SHIFT}")]
    Pages {
        /// log2 of its page size.
        found: u16,
    },
    /// Too short or too long.
    #[error(
        "it has {found} bytes where its header says {expected}: it is cut short or was appended to"
    )]
    Length {
        /// What the header says.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A section goes beyond the end.
    #[error("section {index} ends behind the end of the file")]
    Cut {
        /// Its number, from 0.
        index: usize,
    },
    /// A checksum does not match.
    #[error("section '{name}' is damaged: its checksum does not match")]
    Checksum {
        /// The section.
        name: String,
    },
    /// A section that must be understood.
    #[error(
        "it needs section '{name}' version {version}, which this bulle does not know: use a newer one"
    )]
    Unknown {
        /// The section.
        name: String,
        /// Its version.
        version: u16,
    },
    /// A section is there twice.
    #[error("section '{name}' is there twice")]
    Twice {
        /// The section.
        name: String,
    },
    /// A section is not there.
    #[error("it lacks section '{name}'")]
    Missing {
        /// The section.
        name: &'static str,
    },
    /// What a section says is not what it should be.
    #[error("section '{name}' cannot be read: {why}")]
    Content {
        /// The section.
        name: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A value that cannot be written.
    #[error("section '{name}' cannot be written")]
    Encode {
        /// The section.
        name: &'static str,
        /// What went wrong.
        #[source]
        source: ciborium::ser::Error<io::Error>,
    },
}

/// A kind of section, with the version that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// At most eight ASCII characters.
    pub name: &'static str,
    /// Readers refuse another one where the section is mandatory, and skip it otherwise.
    pub version: u16,
    /// Whether a reader must know it.
    pub mandatory: bool,
}

impl Kind {
    /// One that a reader must know.
    pub const fn mandatory(name: &'static str, version: u16) -> Self {
        Self {
            name,
            version,
            mandatory: true,
        }
    }

    /// One that a reader may skip.
    pub const fn optional(name: &'static str, version: u16) -> Self {
        Self {
            mandatory: false,
            ..Self::mandatory(name, version)
        }
    }
}

/// Puts a state file together.
pub struct Writer {
    id: [u8; 16],
    sections: u32,
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty file for the snapshot `id`.
    pub fn new(id: [u8; 16]) -> Self {
        Self {
            id,
            sections: 0,
            bytes: vec![0; HEADER_LEN],
        }
    }

    /// Appends a section with these bytes.
    pub fn section(&mut self, kind: Kind, payload: &[u8]) {
        let mut head = [0; SECTION_LEN];
        put(&mut head, 0, kind.name.as_bytes());
        put(&mut head, 8, &kind.version.to_le_bytes());
        let flags = if kind.mandatory { MANDATORY } else { 0 };
        put(&mut head, 10, &flags.to_le_bytes());
        put(&mut head, 12, &crc32fast::hash(payload).to_le_bytes());
        put(&mut head, 16, &(payload.len() as u64).to_le_bytes());
        seal(&mut head);
        self.bytes.extend_from_slice(&head);
        self.bytes.extend_from_slice(payload);
        self.sections += 1;
    }

    /// Appends a section with `value` as CBOR.
    ///
    /// # Errors
    /// [`FormatError::Encode`] for a value that CBOR has no form for.
    pub fn value(&mut self, kind: Kind, value: &impl Serialize) -> Result<(), FormatError> {
        let mut payload = Vec::new();
        ciborium::into_writer(value, &mut payload).map_err(|source| FormatError::Encode {
            name: kind.name,
            source,
        })?;
        self.section(kind, &payload);
        Ok(())
    }

    /// The whole file.
    pub fn finish(mut self) -> Vec<u8> {
        let mut head = [0; HEADER_LEN];
        put(&mut head, 0, &MAGIC);
        put(&mut head, 8, &VERSION.to_le_bytes());
        put(&mut head, 10, &MACHINE.to_le_bytes());
        put(&mut head, 12, &PAGE_SHIFT.to_le_bytes());
        put(&mut head, 16, &self.sections.to_le_bytes());
        put(&mut head, 24, &(self.bytes.len() as u64).to_le_bytes());
        put(&mut head, ID_AT, &self.id);
        seal(&mut head);
        put(&mut self.bytes, 0, &head);
        self.bytes
    }
}

/// One section of a file that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its version.
    pub version: u16,
    /// Whether it must be known.
    pub mandatory: bool,
    /// Its payload.
    pub payload: &'a [u8],
}

/// A state file, taken apart and checked.
#[derive(Debug)]
pub struct Reader<'a> {
    id: [u8; 16],
    sections: Vec<Section<'a>>,
}

impl<'a> Reader<'a> {
    /// Takes `bytes` apart: header, lengths, checksums.
    ///
    /// # Errors
    /// [`FormatError`] says what is wrong.
    pub fn new(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let (head, version) = header(bytes)?;
        if version != VERSION {
            return Err(FormatError::Version { found: version });
        }
        let (machine, pages) = (u16_at(head, 10), u16_at(head, 12));
        if machine != MACHINE {
            return Err(FormatError::Machine { found: machine });
        }
        if pages != PAGE_SHIFT {
            return Err(FormatError::Pages { found: pages });
        }
        let (expected, found) = (u64_at(head, 24), bytes.len() as u64);
        if expected != found {
            return Err(FormatError::Length { expected, found });
        }
        let mut id = [0; 16];
        id.copy_from_slice(slice(head, ID_AT, 16));
        let mut rest = bytes.get(HEADER_LEN..).unwrap_or_default();
        let mut sections: Vec<Section<'a>> = Vec::new();
        while !rest.is_empty() {
            let (section, behind) = take(rest, sections.len())?;
            if sections.iter().any(|known| known.name == section.name) {
                let name = section.name.to_owned();
                return Err(FormatError::Twice { name });
            }
            sections.push(section);
            rest = behind;
        }
        if sections.len() != u32_at(head, 16) as usize {
            let index = sections.len();
            return Err(FormatError::Cut { index });
        }
        Ok(Self { id, sections })
    }

    /// Which snapshot it is.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// All sections, in their order.
    pub fn sections(&self) -> &[Section<'a>] {
        &self.sections
    }

    /// Refuses a file with a mandatory section that is none of `known`, in a version that is not
    /// theirs.
    ///
    /// # Errors
    /// [`FormatError::Unknown`] names it.
    pub fn only_knows(&self, known: &[Kind]) -> Result<(), FormatError> {
        let is_known = |section: &Section<'_>| {
            let mut kinds = known.iter();
            kinds.any(|kind| kind.name == section.name && kind.version == section.version)
        };
        let unknown = |section: &&Section<'_>| section.mandatory && !is_known(section);
        match self.sections.iter().find(unknown) {
            None => Ok(()),
            Some(section) => Err(FormatError::Unknown {
                name: section.name.to_owned(),
                version: section.version,
            }),
        }
    }

    /// The payload of a section, where there is one of this version.
    pub fn find(&self, kind: Kind) -> Option<&'a [u8]> {
        let mut sections = self.sections.iter();
        let found = sections.find(|s| s.name == kind.name && s.version == kind.version);
        found.map(|section| section.payload)
    }

    /// The payload of a section that must be there.
    ///
    /// # Errors
    /// [`FormatError::Missing`].
    pub fn get(&self, kind: Kind) -> Result<&'a [u8], FormatError> {
        let name = kind.name;
        self.find(kind).ok_or(FormatError::Missing { name })
    }

    /// The value in a section that must be there.
    ///
    /// # Errors
    /// [`FormatError`] where it is not, or is something else.
    pub fn value<T: DeserializeOwned>(&self, kind: Kind) -> Result<T, FormatError> {
        let mut payload = self.get(kind)?;
        let name = kind.name;
        let content = |why| FormatError::Content { name, why };
        let value =
            ciborium::from_reader(&mut payload).map_err(|error| content(error.to_string()))?;
        match payload.len() {
            0 => Ok(value),
            left => Err(content(format!("{left} bytes are left over"))),
        }
    }
}

/// The header that `bytes` begin with, and the version of the rest: what any version keeps.
///
/// # Errors
/// [`FormatError::Magic`] and [`FormatError::Header`].
pub fn header(bytes: &[u8]) -> Result<(&[u8; HEADER_LEN], u16), FormatError> {
    let head: &[u8; HEADER_LEN] = match bytes.first_chunk() {
        Some(head) if head.starts_with(&MAGIC) => head,
        _ => return Err(FormatError::Magic),
    };
    match sealed(head) {
        true => Ok((head, u16_at(head, 8))),
        false => Err(FormatError::Header),
    }
}

/// Takes the section that `bytes` begin with; also gives what is behind it.
fn take(bytes: &[u8], index: usize) -> Result<(Section<'_>, &[u8]), FormatError> {
    let cut = || FormatError::Cut { index };
    let (head, rest) = bytes.split_first_chunk::<SECTION_LEN>().ok_or_else(cut)?;
    let name = slice(head, 0, NAME_LEN);
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_LEN);
    let name = std::str::from_utf8(name.get(..end).unwrap_or_default());
    let name = name.unwrap_or("(no text)");
    let damaged = || FormatError::Checksum {
        name: name.escape_debug().to_string(),
    };
    if !sealed(head) {
        return Err(damaged());
    }
    let len = usize::try_from(u64_at(head, 16)).map_err(|_| cut())?;
    let (payload, rest) = rest.split_at_checked(len).ok_or_else(cut)?;
    if crc32fast::hash(payload) != u32_at(head, 12) {
        return Err(damaged());
    }
    let section = Section {
        name,
        version: u16_at(head, 8),
        mandatory: u16_at(head, 10) & MANDATORY != 0,
        payload,
    };
    Ok((section, rest))
}

/// Writes `value` at `offset`, where it fits.
fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(offset).zip(value) {
        *to = *from;
    }
}

/// Puts the checksum of all before into the last four bytes.
fn seal(head: &mut [u8]) {
    let at = head.len().saturating_sub(4);
    let sum = crc32fast::hash(slice(head, 0, at));
    put(head, at, &sum.to_le_bytes());
}

fn sealed(head: &[u8]) -> bool {
    let at = head.len().saturating_sub(4);
    crc32fast::hash(slice(head, 0, at)) == u32_at(head, at)
}

fn slice(bytes: &[u8], offset: usize, len: usize) -> &[u8] {
    bytes.get(offset..offset + len).unwrap_or_default()
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    let bytes = slice(bytes, offset, 2).try_into();
    bytes.map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let bytes = slice(bytes, offset, 4).try_into();
    bytes.map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let bytes = slice(bytes, offset, 8).try_into();
    bytes.map_or(0, u64::from_le_bytes)
}
