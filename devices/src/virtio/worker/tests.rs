use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::irq::mock::Counter;
use crate::virtio::device::{ConfigSpace, NoConfig, Traits};
use crate::virtio::driver::{Vq, ram};
use crate::virtio::notifier::{Vector, VirtioInterrupt};
use crate::virtio::transport::mmio::MmioInterrupt;

const BUF: u64 = 0x8_0000;

/// Uses every chain at once, and the driver gives it back at once.
struct Feeder {
    vq: Vq,
    served: Arc<AtomicU16>,
}

impl VirtioDevice for Feeder {
    fn traits(&self) -> Traits {
        Traits {
            id: 4,
            features: 0,
            queues: vec![16],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            io.complete(chain, 0)?;
            self.vq.add(&[(BUF, 1, true)]);
            self.served.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Reset
    }
}

fn start(ram: &GuestRam, vq: &Vq, interrupt: Arc<dyn VirtioInterrupt>) -> Start {
    let [desc, avail, used] = vq.rings();
    let queue = QueueCfg {
        size: vq.size,
        ready: true,
        desc,
        avail,
        used,
        ..QueueCfg::default()
    };
    Start {
        queues: vec![Some(queue)],
        features: 0,
        memory: Memory::new(ram.clone()),
        notifier: Arc::new(Notifier::new(interrupt, 0, false)),
        kicks: Arc::new([EventFd::new(EFD_NONBLOCK).unwrap()]),
    }
}

#[test]
fn a_guest_that_never_stops_does_not_keep_the_thread() {
    let ram = ram();
    let mut vq = Vq::new(ram.clone(), 0, 16);
    vq.add(&[(BUF, 1, true)]);
    let served = Arc::new(AtomicU16::new(0));
    let irq = Arc::new(MmioInterrupt::new(Arc::new(Counter::default())));
    let start = start(&ram, &vq, irq);
    let device = Box::new(Feeder {
        vq,
        served: Arc::clone(&served),
    });
    let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
    let mut backend = LoopBackend::inline(device, Arc::clone(&host));
    backend.start(start).unwrap();
    assert_eq!(served.load(Ordering::SeqCst), 16, "one turn");
    for turns in 2..5 {
        assert_eq!(host.lock().unwrap().run_with_timeout(0), Ok(1));
        assert_eq!(served.load(Ordering::SeqCst), 16 * turns);
    }
    let queues = backend.stop();
    assert_eq!(queues[0].unwrap().next_used, 64);
    assert!(backend.stop().is_empty(), "idempotent");
}

/// Takes chains and keeps them.
struct Hoarder(Vec<crate::virtio::io::Chain>);

impl VirtioDevice for Hoarder {
    fn traits(&self) -> Traits {
        Traits {
            id: 4,
            features: 0,
            queues: vec![16],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            self.0.push(chain);
        }
        Ok(())
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.0.drain(..).try_for_each(|chain| io.complete(chain, 0))
    }

    fn save(&self) -> DeviceState {
        DeviceState::Reset
    }
}

#[test]
fn chains_in_flight_are_bounded_by_the_queue() {
    let ram = ram();
    let mut vq = Vq::new(ram.clone(), 0, 16);
    let irq = Arc::new(MmioInterrupt::new(Arc::new(Counter::default())));
    let start = start(&ram, &vq, irq);
    let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
    let mut backend = LoopBackend::inline(Box::new(Hoarder(Vec::new())), Arc::clone(&host));
    for _ in 0..16 {
        vq.add(&[(BUF, 1, true)]);
    }
    backend.start(start.clone()).unwrap();
    host.lock().unwrap().run_with_timeout(0).unwrap();
    assert_eq!(start.notifier.failures(), 0);
    // All descriptors are with the device; a driver that makes one available again is broken.
    vq.add(&[(BUF, 1, true)]);
    start.kicks[0].write(1).unwrap();
    host.lock().unwrap().run_with_timeout(0).unwrap();
    assert_eq!(start.notifier.failures(), 1);
    assert_eq!(backend.stop()[0].unwrap().next_used, 16);
    assert_eq!(vq.used().len(), 16, "given back as the queues leave");
}

/// Keeps what comes on queue 0, and answers it for what comes on queue 1, which the driver fills as the
/// device has seen its end.
struct Echo {
    kept: Vec<crate::virtio::io::Chain>,
    requests: Vq,
    asked: bool,
}

impl VirtioDevice for Echo {
    fn traits(&self) -> Traits {
        Traits {
            id: 4,
            features: 0,
            queues: vec![16, 16],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            if queue == 0 {
                self.kept.push(chain);
                continue;
            }
            io.complete(chain, 0)?;
            for kept in self.kept.drain(..) {
                io.complete(kept, 0)?;
            }
        }
        if queue == 1 && !std::mem::replace(&mut self.asked, true) {
            self.requests.add(&[(BUF, 1, true)]);
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Reset
    }
}

/// Which vectors were signalled.
#[derive(Default)]
struct Signals(Mutex<Vec<Vector>>);

impl VirtioInterrupt for Signals {
    fn signal(&self, vector: Vector) {
        self.0.lock().unwrap().push(vector);
    }
}

#[test]
fn what_one_queue_does_to_another_is_told() {
    let ram = ram();
    let mut answers = Vq::new(ram.clone(), 0, 16);
    let requests = Vq::new(ram.clone(), 1, 16);
    let signals = Arc::new(Signals::default());
    let mut start = start(&ram, &answers, Arc::clone(&signals) as _);
    let [desc, avail, used] = requests.rings();
    let second = QueueCfg {
        desc,
        avail,
        used,
        ..start.queues[0].unwrap()
    };
    start.queues.push(Some(second));
    start.kicks = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap()).into();
    let device = Echo {
        kept: Vec::new(),
        requests,
        asked: false,
    };
    answers.add(&[(BUF, 1, true)]);
    let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
    let mut backend = LoopBackend::inline(Box::new(device), host);
    backend.start(start).unwrap();
    assert_eq!(answers.used().len(), 1);
    let signals = signals.0.lock().unwrap();
    assert!(signals.contains(&Vector::Queue(0)), "{signals:?}");
}

/// Leaves its queue to somebody else, who is the test.
struct Lender {
    calls: Arc<EventFd>,
    next: Arc<AtomicU16>,
    turns: Arc<AtomicU16>,
    lent: bool,
}

impl VirtioDevice for Lender {
    fn traits(&self) -> Traits {
        Traits {
            id: 4,
            features: 0,
            queues: vec![16],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.turns.fetch_add(1, Ordering::SeqCst);
        if !std::mem::replace(&mut self.lent, true) {
            let lent = io.lend(queue).unwrap();
            self.next.store(lent.next_avail, Ordering::SeqCst);
            use std::os::fd::AsRawFd;
            io.watch(Source::readable(0, self.calls.as_raw_fd()));
        }
        assert!(io.pop(queue)?.is_none(), "somebody else's");
        Ok(())
    }

    fn on_source(&mut self, _: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.calls.read().unwrap();
        io.interrupt(0);
        Ok(())
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.lent = false;
        io.take_back(0, self.next.load(Ordering::SeqCst))
    }

    fn save(&self) -> DeviceState {
        DeviceState::Reset
    }
}

#[test]
fn a_queue_may_be_left_to_somebody_else() {
    let ram = ram();
    let mut vq = Vq::new(ram.clone(), 0, 16);
    let signals = Arc::new(Signals::default());
    let start = start(&ram, &vq, Arc::clone(&signals) as _);
    let calls = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let (next, turns) = (Arc::new(AtomicU16::new(0)), Arc::new(AtomicU16::new(0)));
    let device = Lender {
        calls: Arc::clone(&calls),
        next: Arc::clone(&next),
        turns: Arc::clone(&turns),
        lent: false,
    };
    let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
    let mut backend = LoopBackend::inline(Box::new(device), Arc::clone(&host));
    let head = vq.add(&[(BUF, 1, true)]);
    backend.start(start.clone()).unwrap();
    let run = || host.lock().unwrap().run_with_timeout(0).unwrap();
    start.kicks[0].write(1).unwrap();
    run();
    assert_eq!(
        turns.load(Ordering::SeqCst),
        1,
        "a kick that was not its own"
    );
    // The other uses the chain, and has the driver told.
    let [_, _, used] = vq.rings();
    let write = |value: u32, at| ram.write_obj(value, GuestAddress(used + at)).unwrap();
    write(head.into(), 4);
    write(7, 8);
    write(1 << 16, 0);
    next.store(1, Ordering::SeqCst);
    assert!(signals.0.lock().unwrap().is_empty());
    calls.write(1).unwrap();
    run();
    assert_eq!(*signals.0.lock().unwrap(), [Vector::Queue(0)]);
    let queue = backend.stop()[0].unwrap();
    assert_eq!((queue.next_avail, queue.next_used), (1, 1));
    assert_eq!(vq.used().get(&head.into()), Some(&7));
}

struct Edge(EventFd);

impl VirtioInterrupt for Edge {
    fn signal(&self, _: Vector) {
        self.0.write(1).unwrap();
    }
}

#[test]
fn a_device_moves_to_an_io_thread_and_back() {
    let mut io_loop = IoLoop::new().unwrap();
    let endpoint = io_loop.remote_endpoint();
    let end = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&end);
    let thread = thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            io_loop.run().unwrap();
        }
    });
    let ram = ram();
    let mut vq = Vq::new(ram.clone(), 0, 16);
    let irq = Arc::new(Edge(EventFd::new(0).unwrap()));
    let start = start(&ram, &vq, Arc::clone(&irq) as _);
    let device = crate::virtio::entropy::Entropy::new(Default::default());
    let mut backend = LoopBackend::remote(Box::new(device), endpoint.clone());
    for round in 1..4 {
        let mut again = start.clone();
        again.queues[0].as_mut().unwrap().next_avail = round - 1;
        again.queues[0].as_mut().unwrap().next_used = round - 1;
        backend.start(again.clone()).unwrap();
        assert!(matches!(backend.start(again), Err(BackendError::NoDevice)));
        vq.add(&[(BUF, 32, true)]);
        start.kicks[0].write(1).unwrap();
        // Blocks until the interrupt.
        assert_eq!(irq.0.read().unwrap(), 1);
        let queue = backend.stop()[0].unwrap();
        assert_eq!((queue.next_avail, queue.next_used), (round, round));
        assert_eq!(vq.used().len(), 1);
    }
    let bytes: u64 = ram.read_obj(GuestAddress(BUF)).unwrap();
    assert_ne!(bytes, 0);
    end.store(true, Ordering::SeqCst);
    endpoint.kick().unwrap();
    thread.join().unwrap();
    // Without its thread a device is lost, not the VMM.
    assert!(backend.start(start.clone()).is_err());
    assert!(backend.start(start).is_err());
    assert!(backend.stop().is_empty());
    assert_eq!(backend.save(), DeviceState::Reset);
}

/// Takes and completes all chains; says it looks again, or not.
struct Attentive(Arc<AtomicBool>);

impl VirtioDevice for Attentive {
    fn traits(&self) -> Traits {
        Hoarder(Vec::new()).traits()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(NoConfig)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        io.looking(queue)?;
        while let Some(chain) = io.pop(queue)? {
            io.complete(chain, 0)?;
        }
        if self.0.load(Ordering::SeqCst) {
            io.looks_again(queue);
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Reset
    }
}

#[test]
fn a_device_that_looks_again_is_not_kicked() {
    let ram = ram();
    let mut vq = Vq::new(ram.clone(), 0, 16);
    let irq = Arc::new(MmioInterrupt::new(Arc::new(Counter::default())));
    let mut start = start(&ram, &vq, irq);
    start.features = 1 << VIRTIO_RING_F_EVENT_IDX;
    let kick = start.kicks[0].try_clone().unwrap();
    let again = Arc::new(AtomicBool::new(false));
    let host = Arc::new(Mutex::new(IoLoop::new().unwrap()));
    let device = Box::new(Attentive(Arc::clone(&again)));
    let mut backend = LoopBackend::inline(device, Arc::clone(&host));
    backend.start(start).unwrap();
    let mut added = 0_u16;
    for quiet in [false, true, true, false, true] {
        again.store(quiet, Ordering::SeqCst);
        vq.add(&[(BUF, 1, true)]);
        vq.add(&[(BUF, 1, true)]);
        added += 2;
        kick.write(1).unwrap();
        assert_eq!(host.lock().unwrap().run_with_timeout(0), Ok(1));
        assert_eq!(vq.used_index(), added);
        // Section 2.7.10: whether a driver kicks for one more, and for as many as there is room for.
        for more in [1, 16] {
            let kicks = (added + more)
                .wrapping_sub(vq.avail_event())
                .wrapping_sub(1)
                < more;
            assert_eq!(kicks, !quiet, "{added} and {more}");
        }
    }
}
