//! Hot-pluggable memory that a page fault handler brings: what devices touch of it comes as what vCPUs touch does.
//!
//! It is a file in memory that is mapped twice. The handler knows KVM's mapping alone, being told of one address for
//! each page. A fault of a device, in the other mapping, goes to a userfaultfd of bulle's own, and the thread that
//! reads that touches the page in KVM's mapping, where it waits for the handler; then both have it. What a balloon gives
//! back is told on in the same way. The thread ends with the [`Relay`]; one that stands in a fault that nobody answers
//! goes with the process ([`super::watch`]).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use devices::virtio::device::DeviceState;
use devices::virtio::mem::{Pager, Region};
use devices::virtio::registry::DeviceConfig;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::handler::HandlerError;
use super::watch::EndsWithPanic;
use super::{Event, Filled, Mode, Uffd, feature};
use crate::board::BoardState;
use crate::board::plan::Plan;
use crate::sandbox::thread::{Role, spawn};
use crate::snapshot::image;
use crate::snapshot::ram::MapError;

/// Memory of a device of which a handler has the content.
#[derive(Debug)]
pub struct Absent {
    /// Its memory, of which nothing is plugged yet.
    pub region: Arc<Region>,
    /// Bytes of it that were plugged.
    pub plugged: Vec<Range<u64>>,
    /// Where the region's content is in the memory file.
    pub offset: u64,
}

impl Absent {
    /// What was plugged of the memory of `devices`, as `saved` says, where `regions` are those of the memory file.
    ///
    /// # Errors
    /// [`MapError::Layout`] for what does not fit together.
    pub fn of(
        devices: &[Plan],
        saved: &BoardState,
        regions: &[image::Region],
    ) -> Result<Vec<Self>, MapError> {
        let mut all = Vec::new();
        for plan in devices {
            let DeviceConfig::Mem(options) = &plan.config else {
                continue;
            };
            let mut states = saved.parts.iter().flat_map(|parts| &parts.virtio);
            let state = states.find(|state| state.is_of(plan));
            let Some(DeviceState::Mem(state)) = state.map(|state| &state.virtio.device) else {
                continue;
            };
            let (region, len) = (options.region.clone(), options.region.len());
            let bytes = |blocks: u64| blocks.checked_mul(options.block).filter(|at| *at <= len);
            let plugged = state
                .plugged
                .iter()
                .map(|(first, count)| Some(bytes(*first)?..bytes(first.checked_add(*count)?)?));
            let plugged: Vec<_> = plugged.collect::<Option<_>>().ok_or(MapError::Layout)?;
            let mut regions = regions.iter();
            let here = regions.find(|here| (here.address, here.len) == (options.address, len));
            let offset = here.ok_or(MapError::Layout)?.offset;
            if !plugged.is_empty() {
                all.push(Self {
                    region,
                    plugged,
                    offset,
                });
            }
        }
        Ok(all)
    }
}

/// A mapping of devices.
#[derive(Clone, Copy, Debug)]
struct View {
    host: u64,
    len: u64,
    /// Where KVM has the same.
    kvm: u64,
}

/// What the thread shares with the memory.
#[derive(Debug)]
struct Shared {
    /// Faults of devices.
    ours: Uffd,
    /// Those of vCPUs, which the handler has.
    handler: Arc<Uffd>,
    views: Mutex<Vec<View>>,
}

impl Shared {
    fn change<T>(&self, change: impl FnOnce(&mut Vec<View>) -> T) -> T {
        change(&mut self.views.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn view(&self, host: u64) -> Option<View> {
        let is_it = |view: &&View| (view.host..view.host + view.len).contains(&host);
        self.change(|views| views.iter().find(is_it).copied())
    }
}

impl Pager for Shared {
    fn shown(&self, host: u64, len: u64, kvm: u64) -> io::Result<()> {
        self.change(|views| {
            // Those that were there are gone.
            views.retain(|view| view.host >= host + len || view.host + view.len <= host);
            views.push(View { host, len, kvm });
        });
        // SAFETY: all of a new mapping of guest RAM, which nobody uses yet.
        let registered = unsafe { self.ours.register((host, len), Mode::Missing) };
        registered.map_err(io::Error::other)
    }

    fn gone(&self, kvm: u64, len: u64) {
        if let Err(error) = self.handler.wake(kvm, len) {
            log::error!("who waits for memory that was unplugged is not told: {error}");
        }
    }
}

/// Relays faults until it is dropped.
#[derive(Debug)]
pub struct Relay {
    stop: Arc<EventFd>,
}

impl Relay {
    /// Has the content of `all` come by way of `handler`, with which what was plugged of it is registered.
    ///
    /// # Errors
    /// Where the host has no userfaultfd, no thread, or no such memory.
    pub fn new(all: &[Absent], handler: &Arc<Uffd>) -> Result<Self, HandlerError> {
        let shared = Arc::new(Shared {
            ours: Uffd::new(feature::EVENT_REMOVE)?,
            handler: Arc::clone(handler),
            views: Mutex::default(),
        });
        for Absent {
            region, plugged, ..
        } in all
        {
            let pager = Arc::clone(&shared) as Arc<dyn Pager>;
            let done = region.plug_absent(plugged.clone(), pager);
            done.map_err(HandlerError::Plug)?;
            for piece in plugged {
                let range = (region.address() + piece.start, piece.end - piece.start);
                // SAFETY: part of a mapping of guest RAM, which nobody uses yet.
                unsafe { handler.register(range, Mode::Missing)? };
            }
        }
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(HandlerError::Event)?;
        let stop = Arc::new(stop);
        let page = all.iter().map(|absent| absent.region.page()).max();
        let work = Work {
            shared,
            zeros: vec![0; page.unwrap_or_default() as usize],
            _regions: all.iter().map(|absent| absent.region.clone()).collect(),
            later: Vec::new(),
        };
        let stopped = Arc::clone(&stop);
        spawn(Role::Relay, move || {
            let panic = EndsWithPanic;
            work.until(&stopped);
            std::mem::forget(panic);
        })?;
        Ok(Self { stop })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("the relay of page faults is not told of its end: {error}");
        }
    }
}

/// What the thread has.
struct Work {
    shared: Arc<Shared>,
    /// A page.
    zeros: Vec<u8>,
    /// KVM's mappings are there as long as these.
    _regions: Vec<Arc<Region>>,
    /// Faults that met a removal, to be tried again.
    later: Vec<u64>,
}

impl Work {
    fn until(mut self, stop: &EventFd) {
        loop {
            // SAFETY: the descriptor is open as long as `stop`.
            let stop = unsafe { BorrowedFd::borrow_raw(AsRawFd::as_raw_fd(stop)) };
            let mut fds = [
                PollFd::new(stop, PollFlags::POLLIN),
                PollFd::new(self.shared.ours.as_fd(), PollFlags::POLLIN),
            ];
            let timeout = match self.later.is_empty() {
                true => PollTimeout::NONE,
                false => PollTimeout::ZERO,
            };
            if let Err(errno) = poll(&mut fds, timeout) {
                log::debug!("waiting for page faults of devices was interrupted: {errno}");
                continue;
            }
            if fds.first().and_then(PollFd::any) == Some(true) {
                return;
            }
            if let Err(error) = self.attend() {
                // Whoever stands in the fault would do so for ever.
                super::watch::end_process(format_args!(
                    "cannot bring hot-pluggable memory for a device: {error}"
                ));
            }
        }
    }

    fn attend(&mut self) -> io::Result<()> {
        let mut faults = std::mem::take(&mut self.later);
        while let Some(event) = self.shared.ours.next()? {
            match event {
                Event::Fault(host) => faults.push(host),
                Event::Removed(start, end) => self.remove(start, end),
            }
        }
        for host in faults {
            if !self.bring(host)? {
                self.later.push(host);
            }
        }
        Ok(())
    }

    /// Has the page that has the byte at `host` come; false where that is to be tried again.
    fn bring(&self, host: u64) -> io::Result<bool> {
        let Some(view) = self.shared.view(host) else {
            return Ok(true);
        };
        let page = self.zeros.len() as u64;
        let offset = (host - view.host) / page * page;
        let byte = (view.kvm + offset) as *const u8;
        // SAFETY: in KVM's mapping of a region that `self` keeps, all of which can be read. It waits there
        // for the handler.
        let _ = unsafe { byte.read_volatile() };
        // It is there, unless it was unplugged or given back meanwhile: then it is zeros.
        Ok(
            match self.shared.ours.copy(view.host + offset, &self.zeros)? {
                Filled::Bytes(_) | Filled::Nowhere => true,
                Filled::Present => self
                    .shared
                    .ours
                    .wake(view.host + offset, page)
                    .map(|()| true)?,
                Filled::Later => false,
            },
        )
    }

    /// Tells the handler that memory is given back, as the device does that waits for this.
    fn remove(&self, start: u64, end: u64) {
        let Some(view) = self.shared.view(start) else {
            return;
        };
        let at = (view.kvm + (start - view.host)) as *mut libc::c_void;
        let len = end.min(view.host + view.len).saturating_sub(start) as usize;
        // SAFETY: in KVM's mapping of a region that `self` keeps; it is guest RAM, of which nothing in this
        // process relies on the content.
        if unsafe { libc::madvise(at, len, libc::MADV_REMOVE) } != 0 {
            // Such as where it was unplugged.
            let error = io::Error::last_os_error();
            log::debug!("memory that was given back is not told of: {error}");
        }
    }
}
