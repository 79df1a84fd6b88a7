//! Files and directories that the guest has open.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::{Errno, Result};
use serde::{Deserialize, Serialize};

use super::nodes::Found;
use super::server::Server;

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    pub node: u64,
    /// As the guest opened it.
    pub flags: u32,
    pub target: Target,
}

/// What a handle leads to.
#[derive(Debug)]
pub(super) enum Target {
    File(Arc<OwnedFd>),
    Dir {
        fd: Arc<OwnedFd>,
        /// Where the file descriptor stands, if that is known.
        at: Option<u64>,
    },
    /// The top of a filesystem that is the kernel's.
    Sealed,
    /// It was open when a snapshot was made, and is no more to be found.
    Stale {
        dir: bool,
    },
}

/// A handle as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HandleState {
    id: u64,
    node: u64,
    flags: u32,
    dir: bool,
}

impl Server {
    /// Keeps a handle; there must be room for it.
    pub fn add_handle(&mut self, node: u64, flags: u32, target: Target) -> u64 {
        let id = self.next_handle;
        self.next_handle += 1;
        self.nodes.handles += 1;
        let handle = Handle {
            node,
            flags,
            target,
        };
        self.handles.insert(id, handle);
        id
    }

    /// The open file that `id` is.
    pub fn file(&self, id: u64) -> Result<&Arc<OwnedFd>> {
        match self.handles.get(&id).map(|handle| &handle.target) {
            Some(Target::File(fd)) => Ok(fd),
            Some(Target::Stale { dir: false }) => Err(Errno::STALE),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes a handle.
    pub fn close(&mut self, id: u64, dir: bool) -> Result<()> {
        match self.handles.get(&id) {
            Some(handle) if handle.is_dir() == dir => {
                self.handles.remove(&id);
                self.nodes.handles -= 1;
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    pub fn save_handles(&self) -> Vec<HandleState> {
        let handles = self.handles.iter().map(|(id, handle)| HandleState {
            id: *id,
            node: handle.node,
            flags: handle.flags,
            dir: handle.is_dir(),
        });
        let mut handles: Vec<_> = handles.collect();
        handles.sort_unstable_by_key(|handle| handle.id);
        handles
    }

    /// Opens saved handles again, after the nodes are there; says what is wrong otherwise.
    pub fn load_handles(&mut self, saved: &[HandleState]) -> std::result::Result<(), &'static str> {
        for state in saved {
            if state.id == 0 || state.id == u64::MAX || self.handles.contains_key(&state.id) {
                return Err("a file handle is not possible");
            }
            if self.nodes.make_room().is_err() {
                return Err("it has more files open than allowed");
            }
            self.next_handle = state.id;
            let target = self.open_again(state);
            let target = target.unwrap_or(Target::Stale { dir: state.dir });
            self.add_handle(state.node, state.flags, target);
        }
        let last = saved.iter().map(|state| state.id).max();
        self.next_handle = last.unwrap_or_default() + 1;
        Ok(())
    }

    fn open_again(&mut self, state: &HandleState) -> Result<Target> {
        let found = self.nodes.get(state.node)?;
        if state.dir {
            return self.dir_target(&found);
        }
        if found.sealed || found.kind != FileType::RegularFile {
            return Err(Errno::STALE);
        }
        let flags = self.host_flags(state.flags & !(libc::O_TRUNC as u32))?;
        Ok(Target::File(Arc::new(self.open_file(&found, flags)?)))
    }

    /// Opens a directory to be listed.
    pub fn dir_target(&self, found: &Found) -> Result<Target> {
        use rustix::fs::OFlags;
        if found.sealed {
            return Ok(Target::Sealed);
        }
        if found.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let fd = self
            .proc
            .reopen(&found.fd, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Target::Dir {
            fd: Arc::new(fd),
            at: Some(0),
        })
    }
}

impl Handle {
    fn is_dir(&self) -> bool {
        match self.target {
            Target::File(_) => false,
            Target::Dir { .. } | Target::Sealed => true,
            Target::Stale { dir } => dir,
        }
    }
}
