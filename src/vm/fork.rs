//! Forks: what clones of a machine that goes on are made of. The vmm thread's.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::build::random;
use super::{PauseError, SaveError, Vm};
use crate::config::Config;
use crate::snapshot::fork::{ForkError, Frozen, Ram};
use crate::snapshot::ram::Retired;
use crate::snapshot::{GuestFacts, Paging, Snapshot};

/// A machine cannot be forked. It goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum VmForkError {
    /// A vCPU that does not leave the guest.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] ForkError),
    /// Reserved huge pages.
    #[error(
        "guest memory is in reserved huge pages, which clones cannot share: start the microVM without \
         huge_pages, or with transparent ones"
    )]
    HugePages,
    /// A guest that is ending.
    #[error("the guest's command has just ended, or waits to be given")]
    Ending,
    /// A guest that has ejected a device.
    #[error("a device is just being taken away: try again")]
    Ejecting,
    /// The paths of its devices.
    #[error("cannot tell where the files of its devices are")]
    Paths(#[source] io::Error),
    /// Random numbers.
    #[error("cannot get random numbers for the fork's id")]
    Random(#[source] io::Error),
}

/// What clones are made of.
#[derive(Debug)]
pub struct Fork {
    /// The machine as it was, with its memory in files in memory.
    pub snapshot: Snapshot,
    /// What was mapped before. Dropping it takes long, and may be done on any thread.
    pub retired: Vec<Retired>,
    /// How long the machine stood still.
    pub pause: Duration,
}

impl Vm {
    /// Forks the machine, which was made of `config` and whose RAM is `ram`, and has it go on, if it
    /// `runs`: it parks within `patience`. `facts` says what is known of the guest once all is at rest.
    /// Nothing is written to a disk, and nothing but new sockets and disks of their own keeps clones
    /// from running beside it.
    ///
    /// # Errors
    /// [`VmForkError`]; the machine goes on.
    pub fn fork(
        &self,
        (runs, patience): (bool, Duration),
        config: &Config,
        facts: impl FnOnce() -> Option<GuestFacts>,
        ram: &mut Ram,
    ) -> Result<Fork, VmForkError> {
        if config.machine_config.huge_pages.reserved_mib().is_some() {
            return Err(VmForkError::HugePages);
        }
        let id = random().map_err(VmForkError::Random)?;
        // Clones are made in other directories.
        let mut config = config.clone();
        config.make_paths_absolute().map_err(VmForkError::Paths)?;
        let begin = Instant::now();
        let stopped = match runs {
            true => self.pause(patience),
            false => Ok(()),
        };
        let frozen = stopped.map_err(VmForkError::from).and_then(|()| {
            if self.board.devices.has_ejected() {
                return Err(VmForkError::Ejecting);
            }
            let machine = self.save()?;
            let guest = facts().ok_or(VmForkError::Ending)?;
            self.rebased();
            let frozen = Frozen::new(self.memory(), &self.plugged(), ram)?;
            Ok((machine, guest, frozen))
        });
        if runs {
            self.start();
        }
        let pause = begin.elapsed();
        let (machine, guest, frozen) = frozen?;
        let (layers, own, retired) = frozen.finish();
        *ram = own;
        let snapshot = Snapshot {
            id,
            path: PathBuf::new(),
            config,
            machine: Arc::new(machine),
            guest,
            layers,
            paging: Paging::Mapped,
            reading: None,
            origin: None,
        };
        Ok(Fork {
            snapshot,
            retired,
            pause,
        })
    }
}
