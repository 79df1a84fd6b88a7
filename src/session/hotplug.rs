//! Devices that come and go on request while the guest runs, on the vmm thread.
//!
//! A device that comes is in the configuration from then on, and one that goes is not any more. The
//! removal of one that the guest uses is answered when the guest has ejected it, or after
//! [`EJECT_PATIENCE`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::registry::DeviceHandle;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::timerfd::TimerFd;
use vm_memory::GuestMemoryBackend;

use super::timer::{arm, timer};
use crate::board::attach::{Attached, Devices};
use crate::board::plan::added::{self, Added};
use crate::config::{Config, Drive, NetMode, NetworkInterface, Pmem, RateLimiter};
use crate::control::{ActionError, Call, PluggedKind, Reply, State, Unplug, chain};
use crate::vm::Vm;

/// How long a guest may take to eject a device.
const EJECT_PATIENCE: Duration = Duration::from_secs(5);

/// What the epoll set says of both: ejected devices, and removals that take too long.
pub const HOTPLUG: u64 = 4;

/// Adds a disk to the machine of `config`.
pub fn add_drive(vm: &Vm, config: &mut Config, drive: &Drive) -> Result<Reply, ActionError> {
    may_add(vm, PluggedKind::Drive, &drive.drive_id)?;
    if drive.is_root_device {
        return Err(ActionError::SecondRoot { kind: "block" });
    }
    own_limits(&drive.drive_id, [drive.rate_limiter.as_ref()])?;
    let mut memory = vm.memory().iter();
    let is_private = memory.any(|piece| piece.flags() & libc::MAP_SHARED == 0);
    if drive.socket.is_some() && is_private {
        let id = drive.drive_id.clone();
        return Err(ActionError::PrivateMemory { id });
    }
    let mut with = config.clone();
    with.drives.push(drive.clone());
    add(vm, config, with, Added::Drive(drive))
}

/// Adds a network interface.
pub fn add_network(
    vm: &Vm,
    config: &mut Config,
    net: &NetworkInterface,
) -> Result<Reply, ActionError> {
    may_add(vm, PluggedKind::Net, &net.iface_id)?;
    let limits = [net.rx_rate_limiter.as_ref(), net.tx_rate_limiter.as_ref()];
    own_limits(&net.iface_id, limits)?;
    let mut with = config.clone();
    with.network_interfaces.push(net.clone());
    // Limits can come later, as for devices that there were at the start.
    let mut net = net.clone();
    net.allow_limits();
    add(vm, config, with, Added::Net(&net))
}

/// Adds persistent memory.
pub fn add_pmem(vm: &Vm, config: &mut Config, pmem: &Pmem) -> Result<Reply, ActionError> {
    may_add(vm, PluggedKind::Pmem, &pmem.id)?;
    if pmem.root_device {
        return Err(ActionError::SecondRoot { kind: "pmem" });
    }
    own_limits(&pmem.id, [pmem.rate_limiter.as_ref()])?;
    let mut with = config.clone();
    with.pmem.push(pmem.clone());
    let mut pmem = pmem.clone();
    pmem.rate_limiter.get_or_insert_default();
    add(vm, config, with, Added::Pmem(&pmem))
}

fn may_add(vm: &Vm, kind: PluggedKind, id: &str) -> Result<(), ActionError> {
    let devices = &vm.board().devices;
    if devices.ejected().is_none() {
        return Err(ActionError::NoPci);
    }
    match devices.find(kind.device(), id) {
        Some(_) => Err(ActionError::IdInUse { id: id.to_owned() }),
        None => Ok(()),
    }
}

/// Groups of devices that share limits are made at the start.
fn own_limits<const N: usize>(
    id: &str,
    limits: [Option<&RateLimiter>; N],
) -> Result<(), ActionError> {
    match limits.into_iter().flatten().any(|l| l.group.is_some()) {
        true => Err(ActionError::Limits {
            id: id.to_owned(),
            why: "a group is joined before the start",
        }),
        false => Ok(()),
    }
}

/// Adds what is the last of its kind in the configuration `with`, which counts from then on.
fn add(vm: &Vm, config: &mut Config, with: Config, added: Added<'_>) -> Result<Reply, ActionError> {
    let failed = |error: &dyn std::error::Error| ActionError::Failed { text: chain(error) };
    let spec = with.clone().validate()?;
    let present = vm.board().devices.list();
    let taken = present.iter().filter_map(|device| device.memory());
    let plan = added::plan(&spec, added, taken).map_err(|error| failed(&error))?;
    let attached = vm.plug(plan).map_err(|error| failed(&error))?;
    log::info!("'{}' was plugged", attached.id);
    *config = with;
    note_addresses(&vm.board().devices, config);
    Ok(Reply::Done)
}

/// Has the configuration say where persistent memory is: a machine that is made of it later does not
/// know what came and went.
fn note_addresses(devices: &Devices, config: &mut Config) {
    for pmem in &mut config.pmem {
        let device = devices.find(PluggedKind::Pmem.device(), &pmem.id);
        let memory = device.and_then(|device| device.memory());
        pmem.address = memory.map(|(address, _)| address).or(pmem.address);
    }
}

/// Removals that wait for the guest.
#[derive(Default)]
pub struct Unplugs {
    waiting: Vec<Waiting>,
    timer: Option<TimerFd>,
}

struct Waiting {
    call: Call,
    kind: PluggedKind,
    id: String,
    deadline: Instant,
}

impl Unplugs {
    /// Has `ready` announce devices that the guest of `vm` ejects.
    pub fn watch(vm: &Vm, ready: &Epoll) {
        let Some(event) = vm.board().devices.ejected() else {
            return;
        };
        // SAFETY: the descriptor is open as long as the machine, in which `event` is.
        let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        if let Err(error) = ready.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, HOTPLUG)) {
            log::warn!("devices that the guest ejects are taken away late: {error}");
        }
    }

    /// Begins to take a device of the machine of `config` away; it is answered in due course.
    pub fn begin(
        &mut self,
        (call, unplug): (Call, &Unplug),
        (vm, state): (&Vm, State),
        config: &Config,
        ready: &Epoll,
    ) {
        let device = match find(vm, config, unplug) {
            Ok(device) => device,
            Err(error) => return call.answer(Err(error)),
        };
        let force = unplug.force || !device.is_driven();
        if !force && state == State::Paused {
            let id = unplug.id.clone();
            return call.answer(Err(ActionError::UnplugPaused { id }));
        }
        vm.board().unplug(&device, force);
        self.waiting.push(Waiting {
            call,
            kind: unplug.kind,
            id: unplug.id.clone(),
            deadline: Instant::now() + EJECT_PATIENCE,
        });
        if !force && let Err(error) = self.arm(ready) {
            log::warn!("a removal is not given up in time: {error}");
        }
    }

    fn arm(&mut self, ready: &Epoll) -> io::Result<()> {
        if self.timer.is_none() {
            let timer = timer()?;
            ready.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, HOTPLUG))?;
            self.timer = Some(timer);
        }
        let next = self.waiting.iter().map(|waiting| waiting.deadline).min();
        if let (Some(next), Some(timer)) = (next, &self.timer) {
            let left = next.saturating_duration_since(Instant::now());
            arm(timer, left.max(Duration::from_nanos(1)))?;
        }
        Ok(())
    }

    /// Takes away what is off the bus, also from `config`, and answers; says what it was.
    pub fn settle(&mut self, vm: &Vm, config: &mut Config, ready: &Epoll) -> Vec<Arc<Attached>> {
        let gone = vm.take_ejected();
        for device in &gone {
            log::info!("'{}' was unplugged", device.id);
            forget(config, device);
        }
        if !gone.is_empty() {
            note_addresses(&vm.board().devices, config);
        }
        // Also when nothing waits any more, or the loop would be told for ever.
        if let Some(timer) = &self.timer {
            let _ = nix::unistd::read(timer, &mut [0; 8]);
        }
        if self.waiting.is_empty() {
            return gone;
        }
        let now = Instant::now();
        for waiting in std::mem::take(&mut self.waiting) {
            let is_it = |device: &Arc<Attached>| {
                (device.kind, &device.id) == (waiting.kind.device(), &waiting.id)
            };
            if gone.iter().any(is_it) {
                waiting.call.answer(Ok(Reply::Done));
            } else if waiting.deadline <= now {
                let (id, seconds) = (waiting.id, EJECT_PATIENCE.as_secs());
                waiting
                    .call
                    .answer(Err(ActionError::UnplugTimeout { id, seconds }));
            } else {
                self.waiting.push(waiting);
            }
        }
        if !self.waiting.is_empty()
            && let Err(error) = self.arm(ready)
        {
            log::warn!("a removal is not given up in time: {error}");
        }
        gone
    }
}

/// The device that is to be taken away.
fn find(vm: &Vm, config: &Config, unplug: &Unplug) -> Result<Arc<Attached>, ActionError> {
    let id = || unplug.id.clone();
    if vm.board().devices.ejected().is_none() {
        return Err(ActionError::NoPci);
    }
    let root = match unplug.kind {
        PluggedKind::Drive => {
            let mut drives = config.drives.iter();
            let drive = drives.find(|drive| drive.drive_id == unplug.id);
            drive.map(|drive| drive.is_root_device)
        }
        PluggedKind::Pmem => {
            let mut pmem = config.pmem.iter();
            pmem.find(|pmem| pmem.id == unplug.id)
                .map(|pmem| pmem.root_device)
        }
        PluggedKind::Net => {
            let mut nets = config.network_interfaces.iter();
            let found = nets.any(|net| net.iface_id == unplug.id);
            // The addresses of user-mode networks follow from their places.
            let later = nets.find(|net| found && net.mode == NetMode::User);
            if let Some(later) = later {
                let (id, later) = (id(), later.iface_id.clone());
                return Err(ActionError::UnplugOrder { id, later });
            }
            found.then_some(false)
        }
    };
    let device = vm.board().devices.find(unplug.kind.device(), &unplug.id);
    match (root, device) {
        (Some(false), Some(device)) => Ok(device),
        (Some(true), _) => Err(ActionError::UnplugRoot { id: id() }),
        _ => Err(ActionError::NoDevice {
            kind: unplug.kind.word(),
            id: Some(id()),
        }),
    }
}

/// The configuration without `device`.
fn forget(config: &mut Config, device: &Attached) {
    let id = device.id.as_str();
    match device.handle {
        DeviceHandle::Block(_) | DeviceHandle::VhostUserBlock(_) => {
            config.drives.retain(|drive| drive.drive_id != id)
        }
        DeviceHandle::Pmem(_) => config.pmem.retain(|pmem| pmem.id != id),
        DeviceHandle::Net(_) => forget_network(config, id),
        _ => {}
    }
}

fn forget_network(config: &mut Config, id: &str) {
    config.network_interfaces.retain(|net| net.iface_id != id);
    if let Some(mmds) = &mut config.mmds_config {
        mmds.network_interfaces.retain(|net| net != id);
        if mmds.network_interfaces.is_empty() {
            config.mmds_config = None;
        }
    }
}
