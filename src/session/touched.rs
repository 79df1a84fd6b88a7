//! The working set of a machine that is loaded: brought early, or recorded at its end. On the vmm thread.

use std::path::PathBuf;

use crate::control::chain;
use crate::snapshot::working_set::{self, Prefetch, WorkingSet};
use crate::snapshot::{Paging, Snapshot};
use crate::telemetry::tell;
use crate::vm::Vm;

/// What is done about it.
#[derive(Debug, Default)]
pub enum Touched {
    /// Nothing.
    #[default]
    Ignored,
    /// It is being brought.
    Brought {
        /// The thread that does it, until this is dropped.
        _prefetch: Prefetch,
    },
    /// It is recorded when the machine ends.
    Recorded {
        /// Where to.
        path: PathBuf,
        /// Of which snapshot.
        id: [u8; 16],
    },
}

/// That of `snapshot`, if there is one that can be used.
pub fn set(snapshot: &Snapshot) -> Option<WorkingSet> {
    let top = snapshot.layers.first()?;
    let set = match WorkingSet::open(&working_set::path(&top.image.path), snapshot.id) {
        Ok(set) => set?,
        Err(error) => {
            log::warn!("the snapshot's working set is not used: {}", chain(&error));
            return None;
        }
    };
    log::debug!("a working set of {} KiB is brought", set.len() >> 10);
    Some(set)
}

impl Touched {
    /// For `vm`, made of `snapshot`, and not started. One that cannot be brought is no error: the guest gets its
    /// pages when it needs them.
    pub fn of(snapshot: &Snapshot, vm: &Vm, record: bool) -> Self {
        let Some(top) = snapshot.layers.first() else {
            return Self::Ignored;
        };
        // What is only in memory has nothing beside it.
        if snapshot.path.as_os_str().is_empty() {
            return Self::Ignored;
        }
        // All of a copy is there.
        let pages = snapshot.config.machine_config.huge_pages;
        let lazy = matches!(snapshot.paging, Paging::Lazy(_));
        if pages.reserved_mib().is_some() && !lazy {
            return Self::Ignored;
        }
        if record {
            let path = working_set::path(&top.image.path);
            let id = snapshot.id;
            return Self::Recorded { path, id };
        }
        if lazy {
            // Who brings the other pages brings these.
            return Self::Ignored;
        }
        let Some(set) = set(snapshot) else {
            return Self::Ignored;
        };
        match set.prefetch(vm.memory().clone()) {
            Ok(prefetch) => Self::Brought {
                _prefetch: prefetch,
            },
            Err(error) => {
                log::warn!(
                    "the snapshot's working set is not brought: {}",
                    chain(&error)
                );
                Self::Ignored
            }
        }
    }

    /// The machine `vm` has ended, and still has its memory.
    pub fn finish(self, vm: &Vm) {
        let Self::Recorded { path, id } = self else {
            return;
        };
        let set = match WorkingSet::of(vm.memory()) {
            Ok(set) => set,
            Err(error) => {
                return tell(format_args!("the working set cannot be told: {error}"));
            }
        };
        if let Err(error) = set.save(&path, id) {
            tell(chain(&error));
        }
    }
}
