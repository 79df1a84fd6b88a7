//! vhost-net: the host's kernel moves frames between a tap and guest RAM by itself.
//!
//! There is an instance for each pair of queues, made when the driver starts the device and closed when
//! the queues leave, so nothing of one driver is left to the next. The kernel reads rings and headers
//! itself and hears the driver's kicks. Its interrupts are messages that KVM sends where vectors are not
//! masked; otherwise they come by way of the I/O thread, which sets ISR status and pending bits. Rings
//! that the kernel cannot use fail the device.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as Kernel;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Tap;
use crate::virtio::GuestRam;
use crate::virtio::core::CORE_FEATURES;
use crate::virtio::device::{DeviceError, Source};
use crate::virtio::io::{Io, Lent};

/// Sources of interrupts, by queue, and of failures, by pair.
const CALLS: u32 = 1 << 17;
const ERRORS: u32 = 1 << 18;

/// The host's kernel cannot do the work.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// No driver, or no right to use it.
    #[error(
        "vhost=on needs /dev/vhost-net, which cannot be opened: load the host's module (modprobe \
         vhost_net), have root permit the device to you (on most hosts: group kvm), or leave vhost=on out"
    )]
    Open(#[source] io::Error),
    /// It lacks what every device of bulle has.
    #[error("the host's vhost-net lacks the virtio features {missing:#x}: leave vhost=on out")]
    Features {
        /// The bits.
        missing: u64,
    },
}

/// One instance: a pair of queues.
struct Pair {
    kernel: Kernel<Arc<GuestRam>>,
    /// Interrupts of both queues, and rings that the kernel cannot use.
    calls: [EventFd; 2],
    error: EventFd,
    /// The queues that it has.
    has: [bool; 2],
}

/// The kernel's side of a network device.
pub struct Vhost {
    features: u64,
    /// By pair; none where the driver set up neither queue. Empty while stopped.
    pairs: Vec<Option<Pair>>,
}

impl std::fmt::Debug for Vhost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let running = !self.pairs.is_empty();
        f.debug_struct("Vhost").field("running", &running).finish()
    }
}

fn to_io(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::VhostOpen(error)
        | vhost::Error::IoctlError(error)
        | vhost::Error::IOError(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

fn failed(what: &'static str) -> impl Fn(vhost::Error) -> DeviceError {
    move |error| super::host_error(what, to_io(error))
}

fn event() -> Result<EventFd, DeviceError> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
        .map_err(|error| super::host_error("create an eventfd", error))
}

impl Vhost {
    /// Asks the host's kernel what it can do.
    ///
    /// # Errors
    /// It has no vhost-net, or one that is too old.
    pub fn new() -> Result<Self, VhostError> {
        let kernel = Kernel::new(Arc::new(GuestRam::new()));
        let kernel = kernel.map_err(|error| VhostError::Open(to_io(error)))?;
        let features = kernel.get_features();
        let features = features.map_err(|error| VhostError::Open(to_io(error)))?;
        match CORE_FEATURES & !features {
            0 => Ok(Self {
                features,
                pairs: Vec::new(),
            }),
            missing => Err(VhostError::Features { missing }),
        }
    }

    /// Those of the device's features that the kernel can keep; others are the tap's.
    pub(super) fn features(&self, device: u64) -> u64 {
        device & (self.features | !(1 << VIRTIO_NET_F_MRG_RXBUF))
    }

    /// Hands the kernel all queues that the driver set up; once, until [`stop`](Self::stop).
    pub(super) fn start(&mut self, io: &mut Io<'_>, tap: &Tap) -> Result<(), DeviceError> {
        if !self.pairs.is_empty() {
            return Ok(());
        }
        for pair in 0..usize::from(tap.queues()) {
            let fd = tap.fd(pair);
            let ready = io.ready(2 * pair) || io.ready(2 * pair + 1);
            self.pairs.push(match fd.filter(|_| ready) {
                Some(fd) => Some(Pair::start(pair, fd, self.features, io)?),
                None => None,
            });
        }
        Ok(())
    }

    /// Has all queues back, with what the kernel was at finished.
    pub(super) fn stop(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut result = Ok(());
        for (index, pair) in self.pairs.drain(..).enumerate() {
            if let Some(pair) = pair {
                result = result.and(pair.stop(index, io));
            }
        }
        result
    }

    /// Whether `token` is a source of this, which is attended to.
    pub(super) fn on_source(&self, token: u32, io: &mut Io<'_>) -> Result<bool, DeviceError> {
        let pair = |index: u32| self.pairs.get(index as usize).and_then(Option::as_ref);
        if token >= ERRORS {
            let rings = io::Error::other("the driver's rings or buffers are broken");
            return Err(super::host_error("serve the queues by vhost-net", rings));
        }
        let Some(queue) = token.checked_sub(CALLS) else {
            return Ok(false);
        };
        if let Some(call) = pair(queue / 2).and_then(|pair| pair.calls.get(queue as usize % 2))
            && call.read().is_ok()
        {
            io.interrupt(queue as usize);
        }
        Ok(true)
    }
}

impl Pair {
    fn start(
        index: usize,
        tap: BorrowedFd<'_>,
        features: u64,
        io: &mut Io<'_>,
    ) -> Result<Self, DeviceError> {
        let ram = io.share_ram();
        let regions = ram.iter().map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            // Of shared memory with a process, which the kernel is not.
            mmap_offset: 0,
            mmap_handle: -1,
        });
        let regions: Vec<_> = regions.collect();
        let kernel = Kernel::new(ram).map_err(failed("open /dev/vhost-net"))?;
        let set_up = failed("set vhost-net up");
        kernel.set_owner().map_err(&set_up)?;
        let negotiated = (0..64).filter(|bit| io.has(*bit));
        let negotiated = negotiated.fold(0, |all, bit| all | 1 << bit);
        kernel
            .set_features(negotiated & features)
            .map_err(&set_up)?;
        kernel.set_mem_table(&regions).map_err(&set_up)?;
        let mut pair = Self {
            kernel,
            calls: [event()?, event()?],
            error: event()?,
            has: [false; 2],
        };
        for half in 0..2 {
            let queue = 2 * index + half;
            if let Some(lent) = io.lend(queue) {
                pair.take(half, &lent, tap).map_err(&set_up)?;
                let call = pair.calls.get(half).map_or(-1, AsRawFd::as_raw_fd);
                io.watch(Source::readable(CALLS + queue as u32, call));
                io.direct(queue, pair.calls.get(half));
                // Of what was kicked before it listened.
                let _ = lent.kick.write(1);
            }
        }
        let error = Source::readable(ERRORS + index as u32, pair.error.as_raw_fd());
        io.watch(error);
        Ok(pair)
    }

    /// Has the kernel serve a queue: 0 receives, 1 sends.
    fn take(
        &mut self,
        half: usize,
        queue: &Lent<'_>,
        tap: BorrowedFd<'_>,
    ) -> Result<(), vhost::Error> {
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = queue.rings;
        let rings = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        let kernel = &self.kernel;
        kernel.set_vring_num(half, queue.size)?;
        kernel.set_vring_addr(half, &rings)?;
        kernel.set_vring_base(half, queue.next_avail)?;
        if let Some(call) = self.calls.get(half) {
            kernel.set_vring_call(half, call)?;
        }
        kernel.set_vring_err(half, &self.error)?;
        kernel.set_vring_kick(half, queue.kick)?;
        let tap = tap.try_clone_to_owned().map_err(vhost::Error::IOError)?;
        kernel.set_backend(half, Some(&File::from(tap)))?;
        if let Some(has) = self.has.get_mut(half) {
            *has = true;
        }
        Ok(())
    }

    /// Has both queues back, the one whatever becomes of the other.
    fn stop(self, index: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut result = Ok(());
        for (half, (has, call)) in self.has.iter().zip(&self.calls).enumerate() {
            if *has {
                let queue = 2 * index + half;
                io.direct(queue, None);
                result = result.and(self.stop_half(half, queue, io));
                if call.read().is_ok() {
                    io.interrupt(queue);
                }
            }
        }
        result
    }

    fn stop_half(&self, half: usize, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let stop = failed("stop vhost-net");
        // Waits for what it is at.
        self.kernel.set_backend(half, None).map_err(&stop)?;
        let next = self.kernel.get_vring_base(half).map_err(&stop)?;
        io.take_back(queue, next as u16)
    }
}
