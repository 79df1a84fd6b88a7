//! Which kernel module files a guest needs, in the order in which to load them.
//!
//! Reads what depmod writes (modules.dep, .builtin, .alias, .softdep) for one kernel release. Names
//! are compared with '-' and '_' equal, as modprobe does. Compressed modules are decompressed here,
//! because not every kernel can do it.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Directories that hold one directory of modules per kernel release.
const ROOTS: [&str; 2] = ["/lib/modules", "/usr/lib/modules"];
/// Largest module accepted after decompression. Debian's largest has 10 MB.
const MAX_MODULE: u64 = 128 << 20;
/// Largest index file accepted. Debian's modules.alias has 1.5 MB.
const MAX_INDEX: u64 = 64 << 20;

/// A module by name (`evdev`) or by alias (`acpi*:PNP0C0C:*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// Name or alias.
    pub name: &'a str,
    /// Its absence is an error.
    pub required: bool,
}

/// A module file, ready for finit_module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name with '_'.
    pub name: String,
    /// Contents, decompressed.
    pub data: Vec<u8>,
}

/// What a set of wanted modules comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// In loading order.
    pub modules: Vec<Module>,
    /// Wanted modules that the kernel has built in.
    pub builtin: Vec<String>,
    /// Wanted modules that are neither; none of them required.
    pub missing: Vec<String>,
}

/// Why modules cannot be resolved.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// There is no directory for the release.
    #[error(
        "the guest needs the kernel module {name}, but {directory} does not exist; install the \
         modules of this kernel (on Debian: apt-get install linux-image-{release}), name their \
         directory, or use a kernel with {name} built in"
    )]
    NoDirectory {
        /// The first required module.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
        /// The kernel's release.
        release: String,
    },
    /// The directory that the user named is none of modules.
    #[error(
        "{directory} has no modules.dep, so it is not a directory of kernel modules; name the one \
         of this kernel's release under /lib/modules, or run depmod for it"
    )]
    NoIndex {
        /// What was given.
        directory: PathBuf,
    },
    /// A required module is not there.
    #[error(
        "the guest needs the kernel module {name}, which {directory} does not have; use a kernel \
         that has it as a module or built in, and run depmod if it was added by hand"
    )]
    Missing {
        /// Its name.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}; it must be a readable file for the kernel's modules to be used")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A file is unreasonably large.
    #[error("{path} has more than {limit} bytes, which no kernel module or index has")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// In bytes.
        limit: u64,
    },
}

/// The directory of a release's modules: the first of /lib/modules and /usr/lib/modules that has it.
pub fn default_directory(release: &str) -> PathBuf {
    let [first, second] = ROOTS.map(|root| Path::new(root).join(release));
    if !first.is_dir() && second.is_dir() {
        second
    } else {
        first
    }
}

/// Finds the files for the wanted modules of kernel `release` in `directory`.
///
/// # Errors
/// When a required module is absent, or a file that must be read cannot be.
pub fn resolve(
    directory: &Path,
    release: &str,
    wanted: &[Wanted<'_>],
) -> Result<Resolved, ModulesError> {
    let mut resolved = Resolved::default();
    if wanted.is_empty() {
        return Ok(resolved);
    }
    let index = Index::read(directory)?;
    let mut order = Order {
        index: &index,
        files: Vec::new(),
        seen: HashSet::new(),
    };
    for want in wanted {
        let names = index.names_of(want.name)?;
        if names.is_empty() && index.is_builtin(want.name) {
            resolved.builtin.push(want.name.to_owned());
        } else if !names.is_empty() {
            for name in &names {
                order.add(name)?;
            }
        } else if !want.required {
            resolved.missing.push(want.name.to_owned());
        } else if directory.is_dir() {
            let (name, directory) = (want.name.to_owned(), directory.to_owned());
            return Err(ModulesError::Missing { name, directory });
        } else {
            let (name, directory) = (want.name.to_owned(), directory.to_owned());
            return Err(ModulesError::NoDirectory {
                name,
                directory,
                release: release.to_owned(),
            });
        }
    }
    for file in order.files {
        let data = load(&directory.join(file))?;
        resolved.modules.push(Module {
            name: name_of(file),
            data,
        });
    }
    Ok(resolved)
}

/// The index files of a directory, as text. A missing one is empty.
struct Index {
    directory: PathBuf,
    dep: String,
    builtin: String,
    softdep: String,
}

impl Index {
    fn read(directory: &Path) -> Result<Self, ModulesError> {
        Ok(Self {
            directory: directory.to_owned(),
            dep: read_index(directory, "modules.dep")?,
            builtin: read_index(directory, "modules.builtin")?,
            softdep: read_index(directory, "modules.softdep")?,
        })
    }

    /// File and dependencies of the module with this name.
    fn line_of(&self, name: &str) -> Option<(&str, &str)> {
        self.dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| is_named(file, name))
    }

    fn is_builtin(&self, name: &str) -> bool {
        self.builtin.lines().any(|file| is_named(file, name))
    }

    /// The modules that a name or alias stands for.
    fn names_of(&self, wanted: &str) -> Result<Vec<String>, ModulesError> {
        if self.line_of(wanted).is_some() {
            return Ok(vec![wanted.to_owned()]);
        }
        if self.is_builtin(wanted) {
            return Ok(Vec::new());
        }
        // By far the largest index, and rarely needed. Lines are: alias PATTERN MODULE.
        let aliases = read_index(&self.directory, "modules.alias")?;
        let matching = |line: &str| {
            let (pattern, module) = line.strip_prefix("alias ")?.rsplit_once(' ')?;
            glob_match::glob_match(pattern, wanted).then(|| module.to_owned())
        };
        let mut names: Vec<String> = aliases.lines().filter_map(matching).collect();
        names.dedup();
        Ok(names)
    }

    /// Modules to load before and after one, if they exist.
    fn soft(&self, name: &str) -> (Vec<&str>, Vec<&str>) {
        let (mut pre, mut post) = (Vec::new(), Vec::new());
        for line in self.softdep.lines() {
            let mut words = line.split_ascii_whitespace();
            if words.next() != Some("softdep") || !words.next().is_some_and(|n| same(n, name)) {
                continue;
            }
            let mut list = &mut pre;
            for word in words {
                match word {
                    "pre:" => list = &mut pre,
                    "post:" => list = &mut post,
                    name => list.push(name),
                }
            }
        }
        (pre, post)
    }
}

/// An index file; empty if there is none.
fn read_index(directory: &Path, name: &str) -> Result<String, ModulesError> {
    let path = directory.join(name);
    match read_bounded(&path, MAX_INDEX, fs::File::open(&path)) {
        Ok(bytes) => Ok(String::from_utf8(bytes)
            .unwrap_or_else(|bad| String::from_utf8_lossy(bad.as_bytes()).into_owned())),
        Err(ModulesError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(String::new())
        }
        Err(error) => Err(error),
    }
}

/// Collects files so that each comes after what it needs.
struct Order<'a> {
    index: &'a Index,
    files: Vec<&'a str>,
    seen: HashSet<&'a str>,
}

impl<'a> Order<'a> {
    fn add(&mut self, name: &str) -> Result<(), ModulesError> {
        let index = self.index;
        let Some((file, needs)) = index.line_of(name) else {
            return Ok(());
        };
        if !self.seen.insert(file) {
            return Ok(());
        }
        let (pre, post) = index.soft(name);
        self.add_soft(&pre)?;
        for file in needs.split_ascii_whitespace() {
            self.add(&name_of(file))?;
        }
        self.files.push(file);
        self.add_soft(&post)
    }

    /// Adds what soft dependencies name, which may be aliases: ext4 wants `crypto-crc32c`.
    fn add_soft(&mut self, names: &[&str]) -> Result<(), ModulesError> {
        for name in names {
            for name in self.index.names_of(name)? {
                self.add(&name)?;
            }
        }
        Ok(())
    }
}

/// `kernel/drivers/misc/pvpanic/pvpanic-mmio.ko.xz` is named pvpanic_mmio.
fn name_of(file: &str) -> String {
    stem(file).replace('-', "_")
}

fn stem(file: &str) -> &str {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split_once(".ko").map_or(base, |(stem, _)| stem)
}

fn is_named(file: &str, name: &str) -> bool {
    same(stem(file), name)
}

fn same(a: &str, b: &str) -> bool {
    let plain = |c: u8| if c == b'-' { b'_' } else { c };
    a.len() == b.len() && a.bytes().zip(b.bytes()).all(|(x, y)| plain(x) == plain(y))
}

/// Reads a module, decompressing it as its name says.
fn load(path: &Path) -> Result<Vec<u8>, ModulesError> {
    let file = fs::File::open(path);
    match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => read_bounded(path, MAX_MODULE, file.map(liblzma::read::XzDecoder::new)),
        Some("gz") => read_bounded(
            path,
            MAX_MODULE,
            file.map(flate2::read::MultiGzDecoder::new),
        ),
        Some("zst") => read_bounded(path, MAX_MODULE, file.and_then(zstd::Decoder::new)),
        _ => read_bounded(path, MAX_MODULE, file),
    }
}

fn read_bounded(
    path: &Path,
    limit: u64,
    reader: io::Result<impl Read>,
) -> Result<Vec<u8>, ModulesError> {
    let mut data = Vec::new();
    reader
        .and_then(|reader| reader.take(limit + 1).read_to_end(&mut data))
        .map_err(|source| ModulesError::Read {
            path: path.to_owned(),
            source,
        })?;
    if data.len() as u64 > limit {
        return Err(ModulesError::TooLarge {
            path: path.to_owned(),
            limit,
        });
    }
    Ok(data)
}

#[cfg(test)]
mod tests;
