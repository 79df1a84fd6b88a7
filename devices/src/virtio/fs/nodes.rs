//! The files that the guest knows, by node ID.
//!
//! A node holds an O_PATH file descriptor of its file, or the directory and name where it was last
//! seen: file descriptors are bounded, so those used longest ago are closed and found again when
//! they are needed. A file found again must be the same (device and inode number), or else the node
//! is stale. A snapshot keeps nodes in this second form.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_abi::os::FUSE_ROOT_ID;
use rustix::fs::{FileType, Statx, makedev};
use rustix::io::{Errno, Result};
use serde::{Deserialize, Serialize};

use super::host;

/// Deepest directory that is found again.
const MAX_DEPTH: usize = 2048;

/// What makes a file itself, and where it is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Key {
    pub dev: u64,
    pub ino: u64,
    pub mount: u64,
}

impl Key {
    pub fn of(stat: &Statx) -> Self {
        Self {
            dev: makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }
}

/// A node as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeState {
    id: u64,
    pub(super) key: Key,
    parent: u64,
    name: Vec<u8>,
    lookups: u64,
}

#[derive(Debug)]
struct Node {
    fd: Option<Arc<OwnedFd>>,
    key: Key,
    /// Unknown until there was a file descriptor.
    kind: FileType,
    /// The top of a filesystem that is the kernel's: seen, but not entered.
    sealed: bool,
    parent: u64,
    name: CString,
    /// Times that the guest was told of it.
    lookups: u64,
    /// Used since the last search for a file descriptor to close.
    recent: bool,
}

/// A file descriptor of a node.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub fd: Arc<OwnedFd>,
    pub kind: FileType,
    pub sealed: bool,
    pub key: Key,
}

/// All nodes.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    /// Nodes with a file descriptor, and some that are no more, oldest first.
    open: VecDeque<u64>,
    /// How many nodes but the root have a file descriptor.
    node_fds: usize,
    /// File descriptors that open files take.
    pub handles: usize,
    next: u64,
    max_fds: usize,
    max_nodes: usize,
}

impl Nodes {
    /// Only the root is known.
    pub fn new(root: Arc<OwnedFd>, stat: &Statx, max_fds: usize, max_nodes: usize) -> Self {
        let node = Node {
            fd: Some(root),
            key: Key::of(stat),
            kind: FileType::Directory,
            sealed: false,
            parent: FUSE_ROOT_ID,
            name: CString::default(),
            lookups: 1,
            recent: false,
        };
        Self {
            by_key: HashMap::from([(node.key, FUSE_ROOT_ID)]),
            nodes: HashMap::from([(FUSE_ROOT_ID, node)]),
            open: VecDeque::new(),
            node_fds: 0,
            handles: 0,
            next: FUSE_ROOT_ID + 1,
            max_fds,
            max_nodes,
        }
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) {
        self.nodes.retain(|id, _| *id == FUSE_ROOT_ID);
        self.by_key.retain(|_, id| *id == FUSE_ROOT_ID);
        self.open.clear();
        self.node_fds = 0;
        self.next = FUSE_ROOT_ID + 1;
    }

    pub fn save(&self) -> Vec<NodeState> {
        let nodes = self.nodes.iter().filter(|(id, _)| **id != FUSE_ROOT_ID);
        let nodes = nodes.map(|(id, node)| NodeState {
            id: *id,
            key: node.key,
            parent: node.parent,
            name: node.name.to_bytes().to_vec(),
            lookups: node.lookups,
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_unstable_by_key(|node| node.id);
        nodes
    }

    /// The mount of the shared directory, which has another number in each mount namespace.
    pub fn mount(&self) -> u64 {
        let root = self.nodes.get(&FUSE_ROOT_ID);
        root.map_or(0, |root| root.key.mount)
    }

    /// Takes saved nodes over, of a share whose directory was on the mount `before`; says what is wrong
    /// with them otherwise.
    pub fn load(
        &mut self,
        saved: &[NodeState],
        before: u64,
    ) -> std::result::Result<(), &'static str> {
        let mount = self.mount();
        if saved.len() >= self.max_nodes {
            return Err("it has more files than allowed");
        }
        let mut seen = HashSet::from([FUSE_ROOT_ID]);
        for state in saved {
            let name = CString::new(state.name.as_slice()).map_err(|_| "a name has a zero byte")?;
            host::component(&name).map_err(|_| "a name is not one of a directory entry")?;
            if state.id == 0 || state.id == u64::MAX || !seen.insert(state.id) {
                return Err("a node number is not possible");
            }
            let mut key = state.key;
            if key.mount == before {
                key.mount = mount;
            }
            let node = Node {
                fd: None,
                key,
                kind: FileType::Unknown,
                sealed: false,
                parent: state.parent,
                name,
                lookups: state.lookups,
                recent: false,
            };
            self.next = self.next.max(state.id + 1);
            self.by_key.entry(key).or_insert(state.id);
            self.nodes.insert(state.id, node);
        }
        Ok(())
    }

    /// A file descriptor of any node.
    pub fn get(&mut self, id: u64) -> Result<Found> {
        let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        if node.fd.is_none() {
            self.find_again(id)?;
        }
        let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        node.recent = true;
        Ok(Found {
            fd: node.fd.clone().ok_or(Errno::STALE)?,
            kind: node.kind,
            sealed: node.sealed,
            key: node.key,
        })
    }

    /// A file descriptor of a node that the guest may do something with.
    pub fn enter(&mut self, id: u64) -> Result<Found> {
        match self.get(id)? {
            found if found.sealed => Err(Errno::ACCESS),
            found => Ok(found),
        }
    }

    /// Finds a node's file where it was last seen, from the closest directory that is open.
    fn find_again(&mut self, id: u64) -> Result<()> {
        let mut missing = Vec::new();
        let mut at = id;
        let (mut dir, mut dir_key) = loop {
            let node = self.nodes.get(&at).ok_or(Errno::STALE)?;
            match &node.fd {
                Some(_) if node.sealed => return Err(Errno::STALE),
                Some(fd) => break (Arc::clone(fd), node.key),
                None if missing.len() >= MAX_DEPTH => return Err(Errno::STALE),
                None => missing.push(at),
            }
            at = node.parent;
        };
        while let Some(at) = missing.pop() {
            self.make_room()?;
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            let fd = host::find(&dir, &node.name).map_err(gone)?;
            let stat = host::stat(&fd)?;
            let key = Key::of(&stat);
            if (key.dev, key.ino) != (node.key.dev, node.key.ino) {
                return Err(Errno::STALE);
            }
            let sealed = key.dev != dir_key.dev && host::is_kernels(&fd)?;
            if sealed && !missing.is_empty() {
                return Err(Errno::STALE);
            }
            dir = Arc::new(fd);
            dir_key = key;
            (node.sealed, node.kind) = (sealed, host::kind(&stat));
            node.fd = Some(Arc::clone(&dir));
            node.recent = true;
            self.opened(at);
        }
        Ok(())
    }

    /// Tells the guest of the file that `name` in `parent` is: its node, looked up once more.
    pub fn look_up(&mut self, parent: u64, name: &CStr) -> Result<(u64, Statx)> {
        let dir = self.get(parent)?;
        if dir.sealed {
            return Err(Errno::NOENT);
        }
        self.make_room()?;
        let fd = host::find(&dir.fd, name)?;
        let stat = host::stat(&fd)?;
        let id = self.insert(parent, &dir, name, fd, &stat)?;
        Ok((id, stat))
    }

    /// Tells the guest of a file that was just opened in `dir`, which is node `parent`.
    pub fn insert(
        &mut self,
        parent: u64,
        dir: &Found,
        name: &CStr,
        fd: OwnedFd,
        stat: &Statx,
    ) -> Result<u64> {
        let key = Key::of(stat);
        let known = self.by_key.get(&key).copied();
        if let Some((id, node)) = known.and_then(|id| Some((id, self.nodes.get_mut(&id)?))) {
            node.lookups = node.lookups.saturating_add(1);
            if id != FUSE_ROOT_ID {
                (node.parent, node.name) = (parent, name.to_owned());
                if node.fd.is_none() {
                    node.sealed = key.dev != dir.key.dev && host::is_kernels(&fd)?;
                    (node.kind, node.recent) = (host::kind(stat), true);
                    node.fd = Some(Arc::new(fd));
                    self.opened(id);
                }
            }
            return Ok(id);
        }
        if self.nodes.len() >= self.max_nodes {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        let node = Node {
            key,
            kind: host::kind(stat),
            sealed: key.dev != dir.key.dev && host::is_kernels(&fd)?,
            fd: Some(Arc::new(fd)),
            parent,
            name: name.to_owned(),
            lookups: 1,
            recent: true,
        };
        self.nodes.insert(id, node);
        self.by_key.insert(key, id);
        self.opened(id);
        Ok(id)
    }

    /// A known file has a new name.
    pub fn moved(&mut self, key: Key, parent: u64, name: &CStr) {
        let id = self.by_key.get(&key).copied();
        if let Some(node) = id.and_then(|id| self.nodes.get_mut(&id)) {
            (node.parent, node.name) = (parent, name.to_owned());
        }
    }

    /// The guest forgets `count` of its lookups of a node.
    pub fn forget(&mut self, id: u64, count: u64) {
        if id == FUSE_ROOT_ID {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        if node.fd.is_some() {
            self.node_fds -= 1;
        }
        if self.by_key.get(&node.key) == Some(&id) {
            self.by_key.remove(&node.key);
        }
        self.nodes.remove(&id);
    }

    /// Takes note of a node that has got a file descriptor.
    fn opened(&mut self, id: u64) {
        self.node_fds += 1;
        if self.open.len() > 2 * self.node_fds + 64 {
            let nodes = &self.nodes;
            self.open.retain(|id| has_fd(nodes, id));
        }
        self.open.push_back(id);
    }

    /// Sees to it that one more file descriptor may be opened.
    pub fn make_room(&mut self) -> Result<()> {
        while self.node_fds + self.handles >= self.max_fds {
            let id = self.open.pop_front().ok_or(Errno::NFILE)?;
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            if std::mem::take(&mut node.recent) {
                self.open.push_back(id);
            } else if node.fd.take().is_some() {
                self.node_fds -= 1;
            }
        }
        Ok(())
    }

    /// Closes what can be found again.
    #[cfg(test)]
    pub fn close_all(&mut self) {
        for id in std::mem::take(&mut self.open) {
            let node = self.nodes.get_mut(&id);
            if node.and_then(|node| node.fd.take()).is_some() {
                self.node_fds -= 1;
            }
        }
    }

    /// Nodes, and file descriptors of them, without the root.
    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize) {
        let open = self.nodes.values().filter(|node| node.fd.is_some());
        assert_eq!(open.count() - 1, self.node_fds);
        (self.nodes.len() - 1, self.node_fds)
    }
}

fn has_fd(nodes: &HashMap<u64, Node>, id: &u64) -> bool {
    nodes.get(id).is_some_and(|node| node.fd.is_some())
}

/// The error for a file that is no more where it was.
fn gone(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        error => error,
    }
}
