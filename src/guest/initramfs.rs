//! Packs a guest's initramfs: the agent, kernel modules, and a root that is either made of given
//! nodes or copied from a directory of the host. Not compressed, since this is on the way to launch.
//!
//! The result is a complete newc archive. Extended attributes (file capabilities) have no place in the format and are lost.

mod archive;
mod walk;

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use archive::{Archive, Meta};

use super::modules::Module;
use super::{AGENT, AGENT_PATH};

/// Where the agent looks for the list of modules to load.
const MODULE_LIST: &str = ".bulle/modules";
/// Where the agent looks for the list of shares to mount.
const SHARE_LIST: &str = ".bulle/shares";
const MODULE_DIRECTORY: &str = ".bulle/modules.d";

/// Why an initramfs cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// Something in the root directory cannot be read.
    #[error(
        "cannot read {path} for the guest's root; make it readable, run bulle as a user who may \
         read it, or leave it out of the directory"
    )]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// There is no root.
    #[error("there is no directory {path} to be the guest's root")]
    NoRoot {
        /// What was given.
        path: PathBuf,
    },
    /// The root is not a directory.
    #[error("{path} is not a directory and cannot be the guest's root")]
    NotADirectory {
        /// What was given.
        path: PathBuf,
    },
    /// All of it together is too large.
    #[error(
        "the guest's initramfs would have {size} bytes, but at most {limit} fit; give the guest \
         more memory or a smaller root"
    )]
    TooLarge {
        /// What it would have.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A file is too large for the format.
    #[error("{path} has {size} bytes; a file in an initramfs has at most 4294967295")]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A path is too long for the kernel.
    #[error("{path} has a name that is too long for the guest: at most 4095 bytes")]
    NameTooLong {
        /// The file.
        path: PathBuf,
    },
}

/// What a [`Node`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A directory. It comes before what is in it.
    Directory,
    /// A file with these bytes.
    Bytes(Cow<'static, [u8]>),
    /// A file with the bytes of a file of the host, links followed.
    HostFile(PathBuf),
    /// A symbolic link to this target.
    Symlink(String),
}

/// A file to make in the guest, owned by root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Relative to the root, without leading slash.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Kind and contents.
    pub content: Content,
}

impl Node {
    /// A node.
    pub fn new(path: impl Into<String>, mode: u32, content: Content) -> Self {
        Self {
            path: path.into(),
            mode,
            content,
        }
    }
}

/// How far packing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Files, directories and links so far.
    pub entries: u64,
    /// Bytes of the archive so far.
    pub bytes: u64,
}

/// What is to be packed.
#[derive(Default)]
pub struct Initramfs<'a> {
    agent: bool,
    modules: &'a [Module],
    nodes: &'a [Node],
    directory: Option<&'a Path>,
    shares: &'a str,
    progress: Option<&'a dyn Fn(Progress)>,
}

impl<'a> Initramfs<'a> {
    /// Nothing yet.
    pub fn builder() -> Self {
        Self::default()
    }

    /// With the agent, as [`AGENT_PATH`].
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// With modules, which the agent loads in this order.
    pub fn modules(mut self, modules: &'a [Module]) -> Self {
        self.modules = modules;
        self
    }

    /// With this list of shares, which the agent mounts (see docs/agent-protocol.md).
    pub fn shares(mut self, list: &'a str) -> Self {
        self.shares = list;
        self
    }

    /// With these nodes in the root.
    pub fn nodes(mut self, nodes: &'a [Node]) -> Self {
        self.nodes = nodes;
        self
    }

    /// With a copy of this directory as the root: files, links, devices and FIFOs with their owners,
    /// modes and times. Other file systems mounted in it are empty in the copy; sockets and a
    /// `.bulle` at its top are left out.
    pub fn directory(mut self, directory: &'a Path) -> Self {
        self.directory = Some(directory);
        self
    }

    /// Calls `progress` after each entry.
    pub fn progress(mut self, progress: &'a dyn Fn(Progress)) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Packs everything into an archive of at most `limit` bytes.
    ///
    /// # Errors
    /// When something cannot be read, named or held; the error names the file, or both sizes.
    pub fn build(self, limit: u64) -> Result<Vec<u8>, InitramfsError> {
        let mut archive = Archive::new(limit, self.progress);
        if let Some(directory) = self.directory {
            walk::pack(&mut archive, directory)?;
        }
        for node in self.nodes {
            pack_node(&mut archive, node)?;
        }
        if self.agent || !self.modules.is_empty() {
            archive.bytes(&Meta::directory(0o755), b".bulle", b"")?;
        }
        if self.agent {
            let name = AGENT_PATH.trim_start_matches('/');
            archive.bytes(&Meta::file(0o755), name.as_bytes(), AGENT)?;
        }
        if !self.shares.is_empty() {
            let list = self.shares.as_bytes();
            archive.bytes(&Meta::file(0o644), SHARE_LIST.as_bytes(), list)?;
        }
        if !self.modules.is_empty() {
            pack_modules(&mut archive, self.modules)?;
        }
        archive.finish()
    }
}

fn pack_node(archive: &mut Archive<'_>, node: &Node) -> Result<(), InitramfsError> {
    let name = node.path.as_bytes();
    match &node.content {
        Content::Directory => archive.bytes(&Meta::directory(node.mode), name, b""),
        Content::Bytes(bytes) => archive.bytes(&Meta::file(node.mode), name, bytes),
        Content::HostFile(path) => archive.host_file(&Meta::file(node.mode), name, path, 0),
        Content::Symlink(target) => archive.bytes(&Meta::symlink(), name, target.as_bytes()),
    }
}

fn pack_modules(archive: &mut Archive<'_>, modules: &[Module]) -> Result<(), InitramfsError> {
    archive.bytes(&Meta::directory(0o755), MODULE_DIRECTORY.as_bytes(), b"")?;
    let mut list = String::new();
    for (n, module) in modules.iter().enumerate() {
        let name = format!("{MODULE_DIRECTORY}/{n:03}-{}.ko", module.name);
        archive.bytes(&Meta::file(0o644), name.as_bytes(), &module.data)?;
        list.push_str(&format!("/{name}\n"));
    }
    archive.bytes(&Meta::file(0o644), MODULE_LIST.as_bytes(), list.as_bytes())
}

#[cfg(test)]
mod tests;
