//! Kicks of virtio queues as ioeventfds, registered when a driver first starts its device.
//!
//! Not before: a single ioeventfd makes KVM take some 15 ms longer to close a VM on current
//! kernels, which a guest that never uses the device need not pay. Kicks that no ioeventfd takes
//! come through the transport, which is only slower.

use std::sync::{Arc, OnceLock};

use devices::virtio::core::QueueCfg;
use devices::virtio::device::DeviceState;
use devices::virtio::transport::Kick;
use devices::virtio::worker::{Backend, BackendError, LoopBackend, Start};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Where the queues of one device are kicked: address, and the value written if only that counts.
type Places = Vec<(IoEventAddress, Option<u32>)>;

/// The kicks of one device.
pub struct Doorbells {
    vm: Arc<VmFd>,
    places: OnceLock<Places>,
    armed: OnceLock<()>,
}

impl Doorbells {
    /// Of a device on `vm` that has no place yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            places: OnceLock::new(),
            armed: OnceLock::new(),
        }
    }

    /// Says where a transport at `base` takes its kicks, in the order of the queues.
    pub fn place<'a>(&self, base: u64, kicks: impl Iterator<Item = Kick<'a>>) {
        self.places.get_or_init(|| {
            kicks
                .map(|kick| (IoEventAddress::Mmio(base + kick.offset), kick.data))
                .collect()
        });
    }

    /// Registers the event descriptors of the queues, the first time.
    fn arm(&self, events: &[EventFd]) {
        self.armed.get_or_init(|| {
            let places = self.places.get().into_iter().flatten();
            for ((address, data), event) in places.zip(events) {
                let registered = match data {
                    Some(data) => self.vm.register_ioevent(event, address, *data),
                    None => self.vm.register_ioevent(event, address, NoDatamatch),
                };
                if let Err(error) = registered {
                    log::warn!("virtio queues are kicked the slow way: {error}");
                    return;
                }
            }
        });
    }
}

/// A backend that arms the doorbells before its device runs.
pub struct Armed {
    backend: LoopBackend,
    doorbells: Arc<Doorbells>,
}

impl Armed {
    /// Around `backend`.
    pub fn new(backend: LoopBackend, doorbells: Arc<Doorbells>) -> Self {
        Self { backend, doorbells }
    }
}

impl Backend for Armed {
    fn start(&mut self, start: Start) -> Result<(), BackendError> {
        self.doorbells.arm(&start.kicks);
        self.backend.start(start)
    }

    fn stop(&mut self) -> Vec<Option<QueueCfg>> {
        self.backend.stop()
    }

    fn reset(&mut self) {
        self.backend.reset();
    }

    fn save(&mut self) -> DeviceState {
        self.backend.save()
    }
}
