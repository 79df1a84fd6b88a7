//! The one place where threads are made.
//!
//! Every thread has a [`Role`], which gives it its name and, with the sandbox, its rights.

use std::io;
use std::thread::{Builder, JoinHandle};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs the vCPU with this index.
    Vcpu(u16),
    /// Runs virtio devices: the loop with this index.
    Io(u16),
    /// Serves the API.
    Api,
    /// Closes what is over.
    Reaper,
    /// Watches the process that brings guest memory.
    Pager,
    /// Tells it what devices need of hot-pluggable memory.
    Relay,
    /// Brings guest memory that is going to be used.
    Prefetch,
    /// Ends a conversation with a vhost-user backend that takes too long.
    Backend,
    /// Starts a passt that ended again.
    Passt,
    /// Writes protected guest memory to a snapshot.
    Writer,
}

impl Role {
    fn name(self) -> String {
        match self {
            Self::Vcpu(index) => format!("vcpu{index}"),
            Self::Io(index) => format!("io{index}"),
            Self::Api => "api".to_string(),
            Self::Reaper => "reaper".to_string(),
            Self::Pager => "pager".to_string(),
            Self::Relay => "relay".to_string(),
            Self::Prefetch => "prefetch".to_string(),
            Self::Backend => "vhost-user".to_string(),
            Self::Passt => "passt".to_string(),
            Self::Writer => "writer".to_string(),
        }
    }
}

/// A thread could not be made.
#[derive(Debug, thiserror::Error)]
#[error(
    "Cannot start thread {name}: check the limits on processes (ulimit -u, pids cgroup) and on \
     memory (ulimit -v)"
)]
pub struct ThreadError {
    name: String,
    #[source]
    source: io::Error,
}

/// Keeps glibc from giving each thread an arena of its own: reserving one takes several changes of
/// the address space, each a TLB shootdown, at the start of a thread that hardly allocates.
fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            // SAFETY: mallopt only changes the allocator's settings, under the allocator's lock.
            unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        });
    }
}

/// Starts a thread of `role`.
pub fn spawn<T, F>(role: Role, body: F) -> Result<JoinHandle<T>, ThreadError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let name = role.name();
    share_one_arena();
    Builder::new()
        .name(name.clone())
        .spawn(body)
        .map_err(|source| ThreadError { name, source })
}
