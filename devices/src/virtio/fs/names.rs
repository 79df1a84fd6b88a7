//! Operations on names: looking up, creating, removing, renaming and linking.

use std::ffi::CStr;

use fuse_abi::os::{
    fuse_batch_forget_in, fuse_create_in, fuse_entry_out, fuse_forget_in, fuse_forget_one,
    fuse_in_header, fuse_link_in, fuse_mkdir_in, fuse_mknod_in, fuse_rename_in, fuse_rename2_in,
};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, Statx, mkdirat, mknodat, readlinkat_raw,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::{Errno, Result};

use super::CachePolicy;
use super::handles::Target;
use super::host::{self, component};
use super::message::Body;
use super::nodes::{Found, Key};
use super::server::Server;

/// Longest target of a symbolic link.
const PATH_MAX: usize = 4096;

impl Server {
    pub fn look_up(&mut self, parent: u64, mut body: Body<'_>) -> Result<()> {
        let name = component(body.string()?)?;
        let entry = match self.nodes.look_up(parent, name) {
            Ok((id, stat)) => self.entry(id, &stat),
            // That there is no such file may be remembered as well.
            Err(Errno::NOENT) if self.policy.cache == CachePolicy::Always => fuse_entry_out {
                entry_valid: self.policy.timeout.as_secs(),
                entry_valid_nsec: self.policy.timeout.subsec_nanos(),
                ..Default::default()
            },
            Err(errno) => return Err(errno),
        };
        self.reply(&entry)
    }

    pub fn forget(&mut self, node: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_forget_in = body.take()?;
        self.nodes.forget(node, arg.nlookup);
        Ok(())
    }

    pub fn batch_forget(&mut self, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_batch_forget_in = body.take()?;
        for _ in 0..arg.count {
            // Ends with the request, whatever the count is.
            let one: fuse_forget_one = body.take()?;
            self.nodes.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    pub fn read_link(&mut self, node: u64) -> Result<()> {
        let found = self.nodes.enter(node)?;
        if found.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        self.out.reserve(PATH_MAX);
        readlinkat_raw(
            &found.fd,
            c"",
            rustix::buffer::spare_capacity(&mut self.out),
        )?;
        Ok(())
    }

    /// Looks up what was just created, gives it the mode that the guest asked for, and answers.
    fn created(&mut self, parent: u64, name: &CStr, mode: Option<u32>) -> Result<()> {
        let (id, mut stat) = self.nodes.look_up(parent, name)?;
        let fd = self.nodes.get(id)?.fd;
        if let Some(mode) = mode.and_then(|mode| self.lost_mode(&stat, mode)) {
            self.proc.chmod(&fd, mode)?;
            stat = host::stat(&fd)?;
        }
        let entry = self.entry(id, &stat);
        self.reply(&entry)
    }

    /// The mode to be set where this process's mask took bits away that the guest wanted.
    fn lost_mode(&self, stat: &Statx, wanted: u32) -> Option<u32> {
        let mode = u32::from(stat.stx_mode) & 0o7777;
        let lost = wanted & self.policy.umask & 0o777 & !mode;
        (lost != 0).then_some(mode | lost)
    }

    pub fn symlink(&mut self, head: &fuse_in_header, mut body: Body<'_>) -> Result<()> {
        let more = body.supplementary_group(head.total_extlen)?;
        let name = component(body.string()?)?;
        let target = body.string()?;
        let dir = self.nodes.enter(head.nodeid)?;
        let acting = self.owners.act_as(head.uid, head.gid, more)?;
        symlinkat(target, &dir.fd, name)?;
        drop(acting);
        self.created(head.nodeid, name, None)
    }

    pub fn mkdir(&mut self, head: &fuse_in_header, mut body: Body<'_>) -> Result<()> {
        let more = body.supplementary_group(head.total_extlen)?;
        let arg: fuse_mkdir_in = body.take()?;
        let name = component(body.string()?)?;
        let dir = self.nodes.enter(head.nodeid)?;
        let acting = self.owners.act_as(head.uid, head.gid, more)?;
        mkdirat(&dir.fd, name, permissions(arg.mode))?;
        drop(acting);
        self.created(head.nodeid, name, Some(arg.mode))
    }

    pub fn mknod(&mut self, head: &fuse_in_header, mut body: Body<'_>) -> Result<()> {
        let more = body.supplementary_group(head.total_extlen)?;
        let arg: fuse_mknod_in = body.take()?;
        let name = component(body.string()?)?;
        let kind = FileType::from_raw_mode(arg.mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            // A whiteout of overlayfs leads to no device.
            FileType::CharacterDevice if arg.rdev == 0 => {}
            // The host's users could open devices that the guest made.
            _ => return Err(Errno::PERM),
        }
        let dir = self.nodes.enter(head.nodeid)?;
        let acting = self.owners.act_as(head.uid, head.gid, more)?;
        mknodat(&dir.fd, name, kind, permissions(arg.mode), 0)?;
        drop(acting);
        self.created(head.nodeid, name, Some(arg.mode))
    }

    pub fn create(&mut self, head: &fuse_in_header, mut body: Body<'_>) -> Result<()> {
        let more = body.supplementary_group(head.total_extlen)?;
        let arg: fuse_create_in = body.take()?;
        let name = component(body.string()?)?;
        let flags = self.host_flags(arg.flags)?;
        self.nodes.make_room()?;
        let dir = self.nodes.enter(head.nodeid)?;
        let acting = self.owners.act_as(head.uid, head.gid, more)?;
        let mode = permissions(arg.mode);
        let made = host::create(&dir.fd, name, flags, mode);
        drop(acting);
        let file = match made {
            Ok(file) => file,
            Err(Errno::EXIST) if arg.flags & libc::O_EXCL as u32 == 0 => {
                let (id, stat) = self.nodes.look_up(head.nodeid, name)?;
                let opened = self.open_node(id, arg.flags, arg.open_flags);
                // The guest learns of no lookup that failed.
                let opened = opened.inspect_err(|_| self.nodes.forget(id, 1))?;
                let stat = self
                    .nodes
                    .get(id)
                    .and_then(|f| host::stat(&f.fd))
                    .unwrap_or(stat);
                let entry = self.entry(id, &stat);
                self.reply(&entry)?;
                return self.reply(&opened);
            }
            Err(errno) => return Err(errno),
        };
        if let Some(mode) = self.lost_mode(&host::stat(&file)?, arg.mode) {
            self.proc.chmod(&file, mode)?;
        }
        let path = self.proc.reopen(&file, OFlags::PATH)?;
        let stat = host::stat(&path)?;
        self.nodes.make_room()?;
        let id = self.nodes.insert(head.nodeid, &dir, name, path, &stat)?;
        // Room for the handle as well; its file is open already.
        if let Err(errno) = self.nodes.make_room() {
            self.nodes.forget(id, 1);
            return Err(errno);
        }
        let handle = self.add_handle(id, arg.flags, Target::File(file.into()));
        let entry = self.entry(id, &stat);
        self.reply(&entry)?;
        let opened = self.opened(handle, arg.flags);
        self.reply(&opened)
    }

    pub fn unlink(&mut self, parent: u64, mut body: Body<'_>, dir: bool) -> Result<()> {
        let name = component(body.string()?)?;
        let parent = self.nodes.enter(parent)?;
        let flags = match dir {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        unlinkat(&parent.fd, name, flags)
    }

    pub fn rename(&mut self, parent: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_rename_in = body.take()?;
        self.rename_to(parent, arg.newdir, body, RenameFlags::empty())
    }

    pub fn rename2(&mut self, parent: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_rename2_in = body.take()?;
        let flags = RenameFlags::from_bits(arg.flags).ok_or(Errno::INVAL)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        self.rename_to(parent, arg.newdir, body, flags)
    }

    fn rename_to(
        &mut self,
        parent: u64,
        new_parent: u64,
        mut body: Body<'_>,
        flags: RenameFlags,
    ) -> Result<()> {
        let name = component(body.string()?)?;
        let new_name = component(body.string()?)?;
        let dir = self.nodes.enter(parent)?;
        let new_dir = self.nodes.enter(new_parent)?;
        renameat_with(&dir.fd, name, &new_dir.fd, new_name, flags)?;
        self.note_name(new_parent, &new_dir, new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_name(parent, &dir, name);
        }
        Ok(())
    }

    /// Remembers where a file is now, as far as that can be seen.
    fn note_name(&mut self, parent: u64, dir: &Found, name: &CStr) {
        let stat = host::find(&dir.fd, name).and_then(host::stat);
        if let Ok(stat) = stat {
            self.nodes.moved(Key::of(&stat), parent, name);
        }
    }

    pub fn link(&mut self, parent: u64, mut body: Body<'_>) -> Result<()> {
        let arg: fuse_link_in = body.take()?;
        let name = component(body.string()?)?;
        let file = self.nodes.enter(arg.oldnodeid)?;
        let dir = self.nodes.enter(parent)?;
        self.proc.link(&file.fd, &dir.fd, name)?;
        self.created(parent, name, None)
    }
}

/// The permission bits of a mode.
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
