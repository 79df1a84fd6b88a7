//! Operations on open directories.

use fuse_abi::os::{
    FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, fuse_entry_out, fuse_open_out, fuse_read_in,
};
use rustix::fs::{RawDir, RawDirEntry, SeekFrom, seek};
use rustix::io::{Errno, Result};
use zerocopy::IntoBytes;

use super::CachePolicy;
use super::handles::Target;
use super::message::Body;
use super::server::Server;

/// Bytes of entries that the host is asked for at a time.
const BATCH: usize = 32 << 10;
/// Most bytes of an answer.
const MAX_REPLY: usize = 128 << 10;
/// Bytes of an entry in front of its name: inode number, offset, length of the name, type.
const DIRENT: usize = 24;

impl Server {
    pub fn open_dir(&mut self, node: u64) -> Result<()> {
        let found = self.nodes.get(node)?;
        self.nodes.make_room()?;
        let target = self.dir_target(&found)?;
        let fh = self.add_handle(node, 0, target);
        let open_flags = match self.policy.cache {
            CachePolicy::Always => FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR,
            CachePolicy::None | CachePolicy::Auto => 0,
        };
        self.reply(&fuse_open_out {
            fh,
            open_flags,
            ..Default::default()
        })
    }

    /// Lists a directory from an offset on that an earlier answer gave, as far as there is room.
    /// With `plus` every entry is looked up as well.
    pub fn read_dir(&mut self, mut body: Body<'_>, room: usize, plus: bool) -> Result<()> {
        let arg: fuse_read_in = body.take()?;
        let room = room.min(arg.size as usize).min(MAX_REPLY);
        let handle = self.handles.get_mut(&arg.fh).ok_or(Errno::BADF)?;
        let node = handle.node;
        let (fd, at) = match &mut handle.target {
            Target::Dir { fd, at } => (fd.clone(), at),
            Target::Sealed => return Ok(()),
            Target::Stale { .. } => return Err(Errno::STALE),
            Target::File(_) => return Err(Errno::NOTDIR),
        };
        if at.take() != Some(arg.offset) {
            if i64::try_from(arg.offset).is_err() {
                return Err(Errno::INVAL);
            }
            seek(&fd, SeekFrom::Start(arg.offset))?;
        }
        let dev = self
            .nodes
            .get(node)
            .map_or(self.root_dev, |dir| dir.key.dev);
        let mut batch = Vec::with_capacity(BATCH);
        let mut dir = RawDir::new(&*fd, batch.spare_capacity_mut());
        let mut end = arg.offset;
        while let Some(entry) = dir.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) if !self.out.is_empty() => return Ok(()),
                Err(errno) => return Err(errno),
            };
            if !self.add_entry(node, dev, &entry, room, plus) {
                // The file descriptor is behind what the guest has got.
                return match self.out.is_empty() {
                    true => Err(Errno::INVAL),
                    false => Ok(()),
                };
            }
            end = entry.next_entry_cookie();
            if dir.is_buffer_empty() {
                break;
            }
        }
        let handle = self.handles.get_mut(&arg.fh);
        if let Some(Target::Dir { at, .. }) = handle.map(|handle| &mut handle.target) {
            *at = Some(end);
        }
        Ok(())
    }

    /// Adds an entry to the answer, if there is room for it.
    fn add_entry(
        &mut self,
        node: u64,
        dev: u64,
        entry: &RawDirEntry<'_>,
        room: usize,
        plus: bool,
    ) -> bool {
        let name = entry.file_name().to_bytes();
        let prefix = if plus { size_of::<fuse_entry_out>() } else { 0 };
        let len = (prefix + DIRENT + name.len()).next_multiple_of(8);
        let start = self.out.len();
        if start + len > room {
            return false;
        }
        if plus {
            // No node: the guest looks it up itself when it needs it, and sees the error.
            let mut found = fuse_entry_out::default();
            if name != b"."
                && name != b".."
                && let Ok((id, stat)) = self.nodes.look_up(node, entry.file_name())
            {
                found = self.entry(id, &stat);
            }
            self.out.extend_from_slice(found.as_bytes());
        }
        let ino = self.inode_number(dev, entry.ino());
        let kind = entry.file_type().as_raw_mode() >> 12;
        self.out.extend_from_slice(&ino.to_le_bytes());
        self.out
            .extend_from_slice(&entry.next_entry_cookie().to_le_bytes());
        self.out
            .extend_from_slice(&(name.len() as u32).to_le_bytes());
        self.out.extend_from_slice(&kind.to_le_bytes());
        self.out.extend_from_slice(name);
        self.out.resize(start + len, 0);
        true
    }
}
