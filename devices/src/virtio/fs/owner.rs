//! Who owns what: the guest's users and those of the host.
//!
//! `unsafe` is for system calls that change the credentials of this thread and no other, which
//! the C library would do to all threads.

use std::marker::PhantomData;

use rustix::io::{Errno, Result};
use rustix::process::{getegid, geteuid, getgroups};
use serde::{Deserialize, Serialize};

/// Whose files the guest creates, and as whose it sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ownership {
    /// [`Guest`](Self::Guest) where this process may act as other users, else
    /// [`Squash`](Self::Squash).
    #[default]
    Auto,
    /// Users are the same on both sides: a file belongs to the guest's user who creates it. Needs
    /// CAP_SETUID, CAP_SETGID, CAP_CHOWN, CAP_FOWNER and CAP_DAC_OVERRIDE.
    Guest,
    /// This process's user and group are root in the guest, and root in the guest is them; all
    /// other owners are shown as they are.
    Squash,
    /// The guest sees owners as they are, and all that it creates belongs to this process's user.
    Host,
}

/// What became of the [`Ownership`].
#[derive(Debug)]
pub(super) struct Owners {
    switch: bool,
    /// User and group that are root in the guest.
    root: Option<(u32, u32)>,
    me: (u32, u32),
    groups: Vec<u32>,
}

impl Owners {
    /// Fails where this process may not act as other users and has to.
    pub fn new(ownership: Ownership) -> Result<Self> {
        let groups = getgroups()?;
        let mut owners = Self {
            switch: true,
            root: None,
            me: (geteuid().as_raw(), getegid().as_raw()),
            groups: groups.into_iter().map(|group| group.as_raw()).collect(),
        };
        let can = owners.act_as(1, 1, None).map(drop);
        owners.switch = match ownership {
            Ownership::Auto => can.is_ok(),
            Ownership::Guest => can.map(|()| true)?,
            Ownership::Squash | Ownership::Host => false,
        };
        if !owners.switch && ownership != Ownership::Host {
            owners.root = Some(owners.me);
        }
        Ok(owners)
    }

    /// User and group as the guest sees them.
    pub fn show(&self, uid: u32, gid: u32) -> (u32, u32) {
        let Some((user, group)) = self.root else {
            return (uid, gid);
        };
        let show = |id, root| if id == root { 0 } else { id };
        (show(uid, user), show(gid, group))
    }

    /// The host's user for the guest's.
    pub fn host_user(&self, uid: u32) -> u32 {
        match self.root {
            Some((user, _)) if uid == 0 => user,
            _ => uid,
        }
    }

    /// The host's group for the guest's.
    pub fn host_group(&self, gid: u32) -> u32 {
        match self.root {
            Some((_, group)) if gid == 0 => group,
            _ => gid,
        }
    }

    /// Makes this thread create files for a user and group of the guest, who is in group
    /// `more` as well, until the result is dropped.
    pub fn act_as(&self, uid: u32, gid: u32, more: Option<u32>) -> Result<Acting<'_>> {
        let mut acting = Acting {
            owners: self,
            user: false,
            group: false,
            groups: false,
            here: PhantomData,
        };
        if !self.switch || (uid, gid) == self.me {
            return Ok(acting);
        }
        if let Some(group) = more {
            acting.groups = true;
            set_groups(&[group])?;
        }
        acting.group = true;
        set(libc::SYS_setfsgid, gid)?;
        // This one last: it takes the capability to set the others away.
        acting.user = true;
        set(libc::SYS_setfsuid, uid)?;
        Ok(acting)
    }
}

/// This thread creates files for a user of the guest.
#[derive(Debug)]
pub(super) struct Acting<'a> {
    owners: &'a Owners,
    user: bool,
    group: bool,
    groups: bool,
    /// Stays on this thread.
    here: PhantomData<*const ()>,
}

impl Drop for Acting<'_> {
    fn drop(&mut self) {
        let (uid, gid) = self.owners.me;
        let mut back = Ok(());
        if self.user {
            back = back.and(set(libc::SYS_setfsuid, uid));
        }
        if self.group {
            back = back.and(set(libc::SYS_setfsgid, gid));
        }
        if self.groups {
            back = back.and(set_groups(&self.owners.groups));
        }
        if back.is_err() {
            // Going back to the own user needs no capability.
            log::error!("a thread could not take its own user back: {back:?}");
        }
    }
}

/// Sets one of the thread's filesystem IDs.
fn set(call: libc::c_long, id: u32) -> Result<()> {
    // SAFETY: these calls take a number and touch no memory.
    unsafe { libc::syscall(call, id) };
    // They say what it was before and never that they failed; -1 changes nothing.
    // SAFETY: as above.
    let now = unsafe { libc::syscall(call, u32::MAX) };
    match now as u32 == id {
        true => Ok(()),
        false => Err(Errno::PERM),
    }
}

/// Sets the thread's supplementary groups.
fn set_groups(groups: &[u32]) -> Result<()> {
    // SAFETY: the kernel reads as many group numbers as the slice has.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    match result {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::PERM)),
    }
}
