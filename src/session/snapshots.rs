//! Snapshots of the session's machine, on the vmm thread.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arch::kernel::KernelImage;
use arch::state::ClockPolicy;
use devices::virtio::registry::DeviceHandle;

use super::agent::AgentLink;
use super::touched;
use crate::config::{Config, Drive, HugePages, MemoryBacking, Spec};
use crate::control::{
    ActionError, LoadPages, MemoryBackendType, PAUSE_PATIENCE, Reply, SnapshotCreate, SnapshotLoad,
    SnapshotType, chain,
};
use crate::sandbox::reaper::Reaper;
use crate::snapshot::background::Background;
use crate::snapshot::fork::Ram;
use crate::snapshot::image::{Base, Watch};
use crate::snapshot::pages::Pagemap;
use crate::snapshot::protect::{self, Protected};
use crate::snapshot::ram::{Origin, Part};
use crate::snapshot::uffd::Uffd;
use crate::snapshot::working_set::{self, WorkingSet};
use crate::snapshot::{
    self, Files, GuestFacts, Layer, MachineState, NetworkRebind, Overrides, Paging, Plugged,
    Request, Snapshot, SnapshotError, Template, same_file, socket,
};
use crate::vm::Vm;

/// A snapshot that a machine is to be made of.
#[derive(Debug)]
pub struct Saved {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// What the guest's clocks do about the time since.
    pub policy: ClockPolicy,
    /// Whether the machine runs at once.
    pub resume: bool,
    /// Whether what it touches is recorded when it ends.
    pub record: bool,
}

impl Saved {
    /// Opens the snapshot that `load` names, and says what machine it makes; its log and figures
    /// are those of `present`.
    ///
    /// # Errors
    /// [`ActionError::Load`]; nothing is changed.
    pub fn open(load: &SnapshotLoad, present: &Config) -> Result<(Self, Config), ActionError> {
        Self::of(open(load)?, load, present)
    }

    /// As [`open`](Self::open), of a snapshot that is open.
    ///
    /// # Errors
    /// [`ActionError::Load`]; nothing is changed.
    pub fn of(
        mut snapshot: Snapshot,
        load: &SnapshotLoad,
        present: &Config,
    ) -> Result<(Self, Config), ActionError> {
        let mut config = snapshot.config.clone();
        overrides(load).apply(&mut config).map_err(|e| failed(&e))?;
        config.logger.clone_from(&present.logger);
        config.metrics.clone_from(&present.metrics);
        if present.serial.is_some() {
            config.serial.clone_from(&present.serial);
        }
        let agent = (&snapshot.guest.agent, &snapshot.guest.talk);
        if config.guest.is_some() && matches!(agent, (None, None)) {
            return Err(ActionError::Load {
                text: "the snapshot does not say what was going on with bulle's agent in its guest"
                    .to_owned(),
            });
        }
        let machine = &mut config.machine_config;
        machine.track_dirty_pages = load.track_dirty_pages || load.enable_diff_snapshots;
        // Private, whatever it was before.
        machine.memory_backing = MemoryBacking::Anonymous;
        machine.huge_pages = pages(load, &snapshot);
        snapshot.config.machine_config = machine.clone();
        let policy = match load.clock_realtime {
            true => ClockPolicy::Advance,
            false => ClockPolicy::Frozen,
        };
        let saved = Self {
            snapshot,
            policy,
            resume: load.resume_vm,
            record: load.record_working_set,
        };
        Ok((saved, config))
    }
}

/// Opens the state, and the memory where it is in files.
fn open(load: &SnapshotLoad) -> Result<Snapshot, ActionError> {
    let state = &load.snapshot_path;
    let file = match (&load.mem_backend, &load.mem_file_path) {
        (Some(backend), _) => match backend.backend_type {
            MemoryBackendType::File => &backend.backend_path,
            MemoryBackendType::Lazy => return open_lazy(load, &backend.backend_path),
            MemoryBackendType::Uffd => {
                if load.record_working_set {
                    return Err(ActionError::Load {
                        text: "a page fault handler knows the working set itself: leave out record_working_set"
                            .to_owned(),
                    });
                }
                let snapshot = Snapshot::open_state(state, &backend.backend_path);
                return snapshot.map_err(|e| failed(&e));
            }
        },
        (None, Some(path)) => path,
        (None, None) => return Err(ActionError::LoadMemory),
    };
    Snapshot::open(state, file).map_err(|e| failed(&e))
}

/// As [`open`], where the memory in the file is brought when it is touched.
fn open_lazy(load: &SnapshotLoad, memory: &Path) -> Result<Snapshot, ActionError> {
    let mut snapshot = Snapshot::open(&load.snapshot_path, memory).map_err(|e| failed(&e))?;
    let set = match load.record_working_set {
        true => None,
        false => touched::set(&snapshot),
    };
    snapshot.paging = Paging::Lazy(set);
    Ok(snapshot)
}

/// In which pages the memory of `snapshot` is to be.
fn pages(load: &SnapshotLoad, snapshot: &Snapshot) -> HugePages {
    match load.huge_pages.unwrap_or(LoadPages::Snapshot) {
        LoadPages::Snapshot => snapshot.config.machine_config.huge_pages,
        LoadPages::None => HugePages::None,
        LoadPages::Transparent => HugePages::Transparent,
        LoadPages::Huge2M => HugePages::Huge2M,
    }
}

/// What of the host is to be another, as `load` says.
pub fn overrides(load: &SnapshotLoad) -> Overrides {
    let networks = load.network_overrides.iter().map(|net| NetworkRebind {
        iface_id: net.iface_id.clone(),
        host_dev_name: net.host_dev_name.clone(),
        fd: net.fd,
        guest_mac: net.guest_mac.clone(),
        publish: net.publish.clone(),
    });
    let drives = load.drive_overrides.iter();
    let pmem = load.pmem_overrides.iter();
    let shares = load.share_overrides.iter();
    Overrides {
        drives: drives
            .map(|d| (d.drive_id.clone(), d.path_on_host.clone()))
            .collect(),
        pmem: pmem
            .map(|p| (p.id.clone(), p.path_on_host.clone()))
            .collect(),
        shares: shares
            .map(|s| (s.tag.clone(), s.path_on_host.clone()))
            .collect(),
        networks: networks.collect(),
        vsock: load
            .vsock_override
            .as_ref()
            .map(|vsock| vsock.uds_path.clone()),
    }
}

fn failed(error: &dyn std::error::Error) -> ActionError {
    ActionError::Load { text: chain(error) }
}

/// A snapshot in the background before it is begun.
#[derive(Debug)]
pub enum Prepared {
    /// Where it goes.
    Files(Files),
    /// Where it goes, and what protects memory meanwhile.
    Protected(Files, Uffd),
    /// It cannot be had: the machine stands still while it is written, for this reason.
    Waits(&'static str),
}

/// A snapshot in the background once it is begun.
#[derive(Debug)]
pub enum Begun {
    /// It is being written.
    Writing(Background),
    /// It is written, while the machine stood still for this reason.
    Written(&'static str),
}

/// Saves a machine, and remembers what its changes build on.
#[derive(Debug, Default)]
pub struct Saver {
    /// What RAM is.
    pub ram: Ram,
    /// The snapshot that RAM is mapped from.
    pub base: Option<Base>,
    /// What is known of the guest.
    pub guest: GuestFacts,
    reaper: Option<Reaper>,
}

impl Saver {
    /// For a machine of `spec` that is booted from `kernel`.
    pub fn booted(spec: &Spec, kernel: &KernelImage) -> Self {
        let origin = match spec.machine().memory_backing {
            MemoryBacking::Anonymous => Origin::Nothing,
            MemoryBacking::Memfd => Origin::Memfd,
        };
        let release = kernel.version().unwrap_or_default();
        Self {
            ram: Ram {
                origin,
                layers: Vec::new(),
            },
            base: None,
            guest: GuestFacts {
                release,
                agent: None,
                talk: None,
            },
            reaper: None,
        }
    }

    /// For a machine made of `snapshot`, whose RAM comes from `origin`.
    pub fn loaded(snapshot: &Snapshot, origin: Origin) -> Self {
        // Without a current directory no path is absolute; then all is written.
        let base = snapshot.as_base().unwrap_or_default();
        Self {
            ram: Ram {
                origin,
                layers: snapshot.layers.clone(),
            },
            base,
            // An agent that waits gets its command now.
            guest: GuestFacts {
                agent: None,
                talk: None,
                release: snapshot.guest.release.clone(),
            },
            reaper: None,
        }
    }

    fn request<'a>(
        &'a self,
        (vm, machine): (&'a Vm, &'a MachineState),
        config: &'a Config,
        create: &'a SnapshotCreate,
        (plugged, watch): (&'a [Plugged<'a>], Option<Watch<'a>>),
    ) -> Request<'a> {
        let changes = create.snapshot_type == SnapshotType::Diff;
        Request {
            state_path: &create.snapshot_path,
            memory_path: &create.mem_file_path,
            config,
            machine,
            guest: &self.guest,
            memory: vm.memory(),
            origin: &self.ram.origin,
            base: self.base.clone().filter(|base| {
                let targets = [&create.snapshot_path, &create.mem_file_path];
                changes && stays(base, &self.ram.layers, targets.map(|path| path.as_path()))
            }),
            plugged,
            watch,
        }
    }

    /// Writes beside the memory file that RAM comes from which pages were touched so far, while the machine
    /// `vm` runs or stands still.
    ///
    /// # Errors
    /// [`ActionError::WorkingSet`]; a list that was there before still is.
    pub fn record_working_set(&self, vm: &Vm) -> Result<Reply, ActionError> {
        let failed = |error: &dyn std::error::Error| ActionError::WorkingSet { text: chain(error) };
        let Some(base) = &self.base else {
            return Err(ActionError::WorkingSet {
                text: "the microVM was not made of a snapshot in files of its own: only then there is one whose \
                       pages could be brought early"
                    .to_owned(),
            });
        };
        let set = WorkingSet::of(vm.memory()).map_err(|e| failed(&e))?;
        let path = working_set::path(&base.memory);
        set.save(&path, base.id).map_err(|e| failed(&e))?;
        log::debug!("a working set of {} KiB is recorded", set.len() >> 10);
        Ok(Reply::Done)
    }

    /// What can be done for a snapshot in the background before the machine stands still.
    ///
    /// # Errors
    /// [`ActionError::Save`] where its files cannot be written.
    pub fn prepare(&self, vm: &Vm, create: &SnapshotCreate) -> Result<Prepared, ActionError> {
        savable(vm).map_err(|text| ActionError::Save { text })?;
        if let Some(why) = vm.not_copied() {
            return Ok(Prepared::Waits(why));
        }
        let uffd = match self.protection(vm) {
            Ok(uffd) => uffd,
            Err(why) => return Ok(Prepared::Waits(why)),
        };
        let files = Files::new((&create.snapshot_path, &create.mem_file_path));
        let failed = |error: SnapshotError| ActionError::Save {
            text: chain(&error),
        };
        let files = files.map_err(failed)?;
        Ok(match uffd {
            Some(uffd) => Prepared::Protected(files, uffd),
            None => Prepared::Files(files),
        })
    }

    /// What protects memory that another process would share; none where none would be.
    fn protection(&self, vm: &Vm) -> Result<Option<Uffd>, &'static str> {
        let shared = matches!(self.ram.origin, Origin::Memfd);
        if !shared && !vm.is_reserved() {
            return Ok(None);
        }
        let devices = vm.board().devices.list();
        let mut handles = devices.iter().map(|device| &device.handle);
        if handles.any(|handle| matches!(handle, DeviceHandle::Balloon(_))) {
            return Err(
                "a balloon may give back guest memory that is shared or in reserved huge pages",
            );
        }
        let failed = |error| {
            log::info!(
                "a snapshot is not written in the background: {}",
                chain(&error)
            );
            match shared {
                true => {
                    "guest memory is shared (memory_backing memfd), and this host's userfaultfd cannot protect it"
                }
                false => {
                    "guest memory is in reserved huge pages, and this host's userfaultfd cannot protect it"
                }
            }
        };
        protect::open().map(Some).map_err(failed)
    }

    /// Begins to save the machine `vm`, which stands still, and may go on after this. What later changes
    /// build on stays as it was.
    ///
    /// # Errors
    /// [`ActionError::Save`]; the machine can go on.
    pub fn begin(
        &mut self,
        vm: &Vm,
        config: &Config,
        create: &SnapshotCreate,
        prepared: Prepared,
        watch: Watch<'_>,
    ) -> Result<Begun, ActionError> {
        let failed = |error: &dyn std::error::Error| ActionError::Save { text: chain(error) };
        let (files, uffd) = match prepared {
            Prepared::Files(files) => (files, None),
            Prepared::Protected(files, uffd) => (files, Some(uffd)),
            Prepared::Waits(why) => {
                self.create(vm, config, create, watch)?;
                return Ok(Begun::Written(why));
            }
        };
        let machine = vm.save().map_err(|e| failed(&e))?;
        let request = self.request((vm, &machine), config, create, (&[], None));
        let begun = match uffd {
            None => Background::begin(files, &request),
            Some(uffd) => {
                let page = config.machine_config.huge_pages.reserved_mib();
                let memory = (vm.memory(), page.map_or(0, |mib| mib << 20));
                let protected = Protected::new(uffd, memory, &self.ram.origin);
                let protected = protected.map_err(|e| failed(&e))?;
                Background::begin_protected(files, &request, protected)
            }
        };
        Ok(Begun::Writing(begun.map_err(|e| failed(&e))?))
    }

    /// Saves the paused machine `vm`, made of `config`, as asked, unless `watch` ends it.
    ///
    /// # Errors
    /// [`ActionError::Save`]; the machine can go on.
    pub fn create(
        &mut self,
        vm: &Vm,
        config: &Config,
        create: &SnapshotCreate,
        watch: Watch<'_>,
    ) -> Result<(), ActionError> {
        let failed = |error: &dyn std::error::Error| ActionError::Save { text: chain(error) };
        savable(vm).map_err(|text| ActionError::Save { text })?;
        let machine = vm.save().map_err(|e| failed(&e))?;
        let changes = create.snapshot_type == SnapshotType::Diff;
        let plugged = vm.plugged();
        let parts = (plugged.as_slice(), Some(watch));
        let created = snapshot::create(&self.request((vm, &machine), config, create, parts));
        let created = created.map_err(|e| failed(&e))?;
        // Reserved huge pages are not given up for the file's.
        if (config.machine_config.track_dirty_pages || changes) && !vm.is_reserved() {
            // From here on what changes is told by what is no longer the file's.
            let part = match &created.map.base {
                Some(_) => Part::Changes,
                None => Part::All,
            };
            let base = created.base.clone();
            let layer = Arc::new(created.into());
            self.ram = self.ram.onto(vm.memory(), layer, part, &mut Vec::new());
            vm.rebased();
            self.base = (!self.ram.layers.is_empty()).then_some(base);
        }
        Ok(())
    }

    /// Keeps the conversation with `agent` for what is saved next. vCPUs of `vm` stand still.
    ///
    /// # Errors
    /// [`ActionError::Save`] where it is just over, or not begun.
    pub fn keep_talk(&mut self, vm: &Vm, agent: Option<&mut AgentLink>) -> Result<(), ActionError> {
        if agent.is_none() {
            return Ok(());
        }
        vm.board().devices.pause();
        self.guest = facts(&self.guest, agent).ok_or_else(|| ActionError::Save {
            text: "the guest's command has just ended, or waits to be given".to_owned(),
        })?;
        Ok(())
    }

    /// Sends what copies of the machine `vm`, made of `config`, are made of; says how long it stood
    /// still, if it runs.
    ///
    /// # Errors
    /// [`ActionError::Fork`]; the machine goes on.
    pub fn fork(
        &mut self,
        (vm, runs): (&Vm, bool),
        config: &Config,
        agent: Option<&mut AgentLink>,
        to: &Path,
    ) -> Result<Duration, ActionError> {
        let failed = |error: &dyn std::error::Error| ActionError::Fork { text: chain(error) };
        savable(vm).map_err(|text| ActionError::Fork { text })?;
        let socket = socket::connect(to).map_err(|error| ActionError::Fork {
            text: format!(
                "cannot connect to {}, where what clones are made of was to go: {error}",
                to.display()
            ),
        })?;
        let facts = || facts(&self.guest, agent);
        let fork = vm.fork((runs, PAUSE_PATIENCE), config, facts, &mut self.ram);
        let fork = fork.map_err(|e| failed(&e))?;
        // What changes is told from here on by other files than those of the last snapshot.
        self.base = None;
        log::info!("forked within {:?}", fork.pause);
        let reaper = match &self.reaper {
            Some(reaper) => reaper,
            None => self.reaper.insert(Reaper::new().map_err(|e| failed(&e))?),
        };
        reaper.reap(fork.retired);
        let template = Template::new(fork.snapshot).map_err(|e| failed(&e))?;
        template.send(&socket).map_err(|e| failed(&e))?;
        Ok(fork.pause)
    }
}

/// Whether all devices of `vm` can be saved: why not.
fn savable(vm: &Vm) -> Result<(), String> {
    let devices = vm.board().devices.list();
    let mut devices = devices.iter();
    let other = devices.find(|device| matches!(device.handle, DeviceHandle::VhostUserBlock(_)));
    other.map_or(Ok(()), |device| Err(unsavable(&device.id)))
}

/// Whether a machine of `config` can be saved once it runs.
///
/// # Errors
/// [`ActionError::Save`].
pub fn may_save(config: &Config) -> Result<(), ActionError> {
    let text = |drive: &Drive| unsavable(&drive.drive_id);
    let text = config.vhost_user_drives().next().map(text);
    text.map_or(Ok(()), |text| Err(ActionError::Save { text }))
}

/// Why a machine with this vhost-user drive is not saved.
fn unsavable(drive: &str) -> String {
    format!(
        "drive '{drive}' is served by another process (vhost-user), whose state bulle cannot save: a microVM with \
         such a drive has no snapshots and no clones, give the drive by path_on_host"
    )
}

/// Whether changes since `base` can be loaded: it is still where it was, neither it nor what it builds on, `layers`,
/// is about to be replaced, and the host tells what changed.
fn stays(base: &Base, layers: &[Arc<Layer>], targets: [&Path; 2]) -> bool {
    let below = layers.iter().filter_map(|layer| layer.map.base.as_ref());
    let files = [base].into_iter().chain(below);
    let files = files.flat_map(|base| [&base.state, &base.memory]);
    let mut files = files.chain(layers.iter().map(|layer| &layer.image.path));
    let replaced = files.any(|file| targets.iter().any(|target| same_file(file, target)));
    let stays = !replaced && base.is_there() && Pagemap::is_there();
    if !stays {
        log::info!(
            "all of memory is written, not changes: the snapshot they would build on would be missing"
        );
    }
    stays
}

/// `guest` with the conversation with `agent` as it is now; `None` where it is just over, or not begun.
fn facts(guest: &GuestFacts, agent: Option<&mut AgentLink>) -> Option<GuestFacts> {
    let mut guest = guest.clone();
    if let Some(agent) = agent {
        guest.talk = Some(Box::new(agent.save()?));
    }
    Some(guest)
}
