//! The jail of Firecracker's jailer: namespaces, a root directory of its own, control groups, limits,
//! another user.
//!
//! [`Jail::enter`] is called by root while the process has one thread, and does to the process itself
//! what is to be done: bulle is jailer and monitor in one, so nothing has to be executed inside. Until
//! the root is changed, nothing below the jail is opened by a path, and no symbolic link there is
//! followed; afterwards all paths end inside.

mod cgroup;
mod root;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid, setsid};

pub use self::cgroup::{CgroupError, CgroupVersion, Setting};

/// A process to be jailed.
#[derive(Debug)]
pub struct Jail {
    /// The directory that becomes `/` is `base`/`name`/`id`/root.
    pub base: PathBuf,
    /// Name of the program in there, and of the control groups of all its jails.
    pub name: String,
    /// Name of the microVM.
    pub id: String,
    /// User that the process becomes.
    pub uid: u32,
    /// Group that it becomes.
    pub gid: u32,
    /// A network namespace to join.
    pub netns: Option<PathBuf>,
    /// Have a session of its own, and /dev/null as input and outputs.
    pub daemonize: bool,
    /// Be the first process of a PID namespace.
    pub new_pid_ns: bool,
    /// Hierarchy of `cgroups`.
    pub cgroup_version: CgroupVersion,
    /// Path below a hierarchy to make the control group in; absent: `name`.
    pub parent_cgroup: Option<PathBuf>,
    /// What is written into which file of a control group.
    pub cgroups: Vec<Setting>,
    /// One more than the largest file descriptor.
    pub no_file: u64,
    /// Largest file that can be written, in bytes.
    pub fsize: Option<u64>,
}

/// The process cannot be jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Not root.
    #[error(
        "a jail is made by root, who changes the root directory, the user and control groups: run it with sudo"
    )]
    NotRoot,
    /// A directory of the jail.
    #[error("cannot make the jail's directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why; ELOOP or ENOTDIR where it is a symbolic link.
        #[source]
        source: io::Error,
    },
    /// Something inside the jail.
    #[error("cannot make {path} in the jail")]
    Inside {
        /// As seen from inside.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A network namespace.
    #[error("cannot join network namespace {}", path.display())]
    Netns {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Control groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The host failed.
    #[error("cannot {what}")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Host {
        what,
        source: source.into(),
    }
}

impl Jail {
    /// Jails the process. Returns in the process that is in the jail; the one that was called has
    /// ended by then if a new PID namespace, or a session of its own, needed another.
    ///
    /// # Errors
    /// The first thing that cannot be done. What was made of the jail by then is left behind.
    pub fn enter(&self) -> Result<(), JailError> {
        if !Uid::effective().is_root() {
            return Err(JailError::NotRoot);
        }
        forget()?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(host("open /dev/null"))?;
        let of_this_host = root::of_this_host();
        let proc = root::proc();
        root::keep_mounts_apart()?;
        let root = root::make(&self.base, [&self.name, &self.id, "root"])?;
        if let Some(path) = &self.netns {
            join(path)?;
        }
        self.limit()?;
        let name = Path::new(&self.name);
        let parent = self.parent_cgroup.as_deref();
        cgroup::apply(
            &cgroup::Hierarchies::of_host()?,
            self.cgroup_version,
            (parent.unwrap_or(name), parent.is_some(), &self.id),
            &self.cgroups,
        )?;
        root::change(&root)?;
        root::furnish(
            (Uid::from_raw(self.uid), Gid::from_raw(self.gid)),
            of_this_host,
        )?;
        if self.daemonize {
            own_session(&null)?;
        }
        if self.new_pid_ns {
            unshare(CloneFlags::CLONE_NEWPID).map_err(host("make a PID namespace"))?;
            in_another(|child| self.note_pid(child))?;
        } else {
            self.note_pid(process::id())?;
        }
        root::keep_pagemap(proc);
        self.become_user()
    }

    fn limit(&self) -> Result<(), JailError> {
        let set = |resource, value| setrlimit(resource, value, value);
        set(Resource::RLIMIT_NOFILE, self.no_file).map_err(host("limit open files"))?;
        if let Some(fsize) = self.fsize {
            set(Resource::RLIMIT_FSIZE, fsize).map_err(host("limit the size of files"))?;
        }
        Ok(())
    }

    /// Writes who is in the jail to its root, where orchestrators look.
    fn note_pid(&self, pid: u32) -> Result<(), JailError> {
        let path = format!("/{}.pid", self.name);
        root::write_anew(&path, &pid.to_string())
            .map_err(|source| JailError::Inside { path, source })
    }

    fn become_user(&self) -> Result<(), JailError> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setgroups(&[]).map_err(host("leave the groups"))?;
        setresgid(gid, gid, gid).map_err(host("become the group"))?;
        setresuid(uid, uid, uid).map_err(host("become the user"))
    }
}

/// Closes what the process was given beside its input and outputs, and empties the environment.
fn forget() -> Result<(), JailError> {
    // SAFETY: nothing of this process owns a file descriptor above 2 yet.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) } {
        0 => {}
        _ => return Err(host("close inherited files")(Errno::last())),
    }
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: the process has one thread, which holds no reference into the environment; its variables
    // are strings in writable memory, and a null pointer is behind the last.
    unsafe {
        let mut variable = environ;
        // Their memory is what /proc/PID/environ shows, and what a monitor taken over could read.
        while !variable.is_null() && !(*variable).is_null() {
            (*variable).write_bytes(0, libc::strlen(*variable));
            variable = variable.add(1);
        }
        nix::env::clearenv()
    }
    .map_err(|_| JailError::Host {
        what: "empty the environment",
        source: io::ErrorKind::OutOfMemory.into(),
    })
}

fn join(path: &Path) -> Result<(), JailError> {
    let joined =
        File::open(path).and_then(|file| Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?));
    joined.map_err(|source| JailError::Netns {
        path: path.to_owned(),
        source,
    })
}

/// Goes on in a child; the parent ends after `last`, which is told the child's number and without which the child ends.
fn in_another(last: impl FnOnce(u32) -> Result<(), JailError>) -> Result<(), JailError> {
    let (mut done, mut say) = io::pipe().map_err(|source| JailError::Host {
        what: "make a pipe",
        source,
    })?;
    // SAFETY: the process has one thread, as this module's head demands.
    match unsafe { fork() }.map_err(host("start a process"))? {
        ForkResult::Child => {
            drop(say);
            match done.read_exact(&mut [0]) {
                Ok(()) => Ok(()),
                // The parent has said why.
                Err(_) => process::exit(1),
            }
        }
        ForkResult::Parent { child } => {
            last(child.as_raw().unsigned_abs())?;
            // One that is gone needs no word.
            let _ = say.write_all(&[0]);
            process::exit(0)
        }
    }
}

/// A session of its own. A leader of a process group cannot have one, so another process goes on then.
fn own_session(null: &File) -> Result<(), JailError> {
    if let Err(error) = setsid() {
        if error != Errno::EPERM {
            return Err(host("start a session")(error));
        }
        in_another(|_| Ok(()))?;
        setsid().map_err(host("start a session"))?;
    }
    let all = nix::unistd::dup2_stdin(null)
        .and_then(|()| nix::unistd::dup2_stdout(null))
        .and_then(|()| nix::unistd::dup2_stderr(null));
    all.map_err(host("redirect the outputs"))
}
