//! Kicks of virtio queues as ioeventfds, registered once a driver has kicked often.
//!
//! Not before: a single ioeventfd makes KVM take 10 to 15 ms longer to close a VM on current
//! kernels, for which many kicks can take the way through the transport, a few microseconds
//! longer each. Most guests that boot, run a command and end never come to the point.
//!
//! A PCI function that the guest moves loses them for good: at their place there may be another.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

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
    state: Mutex<State>,
}

/// What has become of the doorbells.
#[derive(Default)]
enum State {
    /// Not registered yet.
    #[default]
    Idle,
    /// Registered, the first so many.
    Armed(usize),
    /// Not to be registered any more.
    Gone,
}

impl Doorbells {
    /// Of a device on `vm` that has no place yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            places: OnceLock::new(),
            state: Mutex::default(),
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

    /// Registers the event descriptors of the queues.
    fn arm(&self, events: &[EventFd]) {
        let mut state = lock(&self.state);
        if !matches!(*state, State::Idle) {
            return;
        }
        let places = self.places.get().into_iter().flatten();
        let mut armed = 0;
        for ((address, data), event) in places.zip(events) {
            let registered = match data {
                Some(data) => self.vm.register_ioevent(event, address, *data),
                None => self.vm.register_ioevent(event, address, NoDatamatch),
            };
            if let Err(error) = registered {
                log::warn!("virtio queues go on being kicked the slow way: {error}");
                break;
            }
            armed += 1;
        }
        *state = State::Armed(armed);
    }

    /// Takes them out for good: the device is somewhere else.
    pub fn disarm(&self, events: &[EventFd]) {
        let State::Armed(armed) = std::mem::replace(&mut *lock(&self.state), State::Gone) else {
            return;
        };
        let places = self.places.get().into_iter().flatten();
        for ((address, data), event) in places.zip(events).take(armed) {
            let removed = match data {
                Some(data) => self.vm.unregister_ioevent(event, address, *data),
                None => self.vm.unregister_ioevent(event, address, NoDatamatch),
            };
            if let Err(error) = removed {
                log::warn!("a virtio queue is still kicked at its first place: {error}");
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A backend that arms the doorbells of its device when that pays.
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

    fn restore(&mut self, state: &DeviceState) -> bool {
        self.backend.restore(state)
    }

    fn many_kicks(&mut self, kicks: &[EventFd]) {
        self.doorbells.arm(kicks);
    }
}
