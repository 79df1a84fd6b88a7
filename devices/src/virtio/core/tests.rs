use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::driver::{RAM, RAM_LEN, Rig, TRANSPORTS, Transport, Vq};
use crate::virtio::entropy::{Entropy, EntropyState};

const BUF: u64 = 0x8_0000;

fn rig(transport: Transport) -> Rig {
    Rig::new(transport, Box::new(Entropy::new(EntropyState {})))
}

fn status(rig: &Rig) -> u8 {
    rig.port.get(Reg::Status) as u8
}

fn reads_zero(rig: &Rig, len: usize) -> bool {
    let mut data = vec![0xff; len];
    rig.ram.read_slice(&mut data, GuestAddress(BUF)).unwrap();
    data.iter().all(|b| *b == 0)
}

#[test]
fn a_driver_gets_random_bytes() {
    for transport in TRANSPORTS {
        let rig = rig(transport);
        let mut vqs = rig.start(None);
        let vq = &mut vqs[0];
        assert_eq!(status(&rig), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(reads_zero(&rig, 64));
        let head = vq.add(&[(BUF, 64, true)]);
        rig.kick(vq);
        rig.run(0);
        assert_eq!(vq.used(), [(head.into(), 64)].into());
        assert!(!reads_zero(&rig, 64));
        assert_eq!(rig.irq.take(), 1);
        assert_eq!(rig.core.notifier().isr(), 1);
        // Through an indirect table, over two buffers, and more than is given at once.
        let head = vq.add_indirect(0x9000, &[(BUF, 100, true), (BUF + 0x1000, 8000, true)]);
        vq.set_used_event(1);
        rig.kick(vq);
        rig.run(0);
        assert_eq!(vq.used(), [(head.into(), 4096)].into());
        assert_eq!(rig.irq.take(), 1);
    }
}

#[test]
fn version_1_and_known_features_are_required() {
    let rig = rig(Transport::Mmio);
    let offered = rig.negotiate(Some(0));
    assert_eq!(offered, CORE_FEATURES);
    assert_eq!(status(&rig), ACKNOWLEDGE | DRIVER);
    rig.driver_ok();
    assert_eq!(status(&rig) & DRIVER_OK, 0, "refused without FEATURES_OK");
    rig.negotiate(Some(offered | 1 << 63));
    assert_eq!(status(&rig) & FEATURES_OK, 0);
    rig.negotiate(Some(1 << VIRTIO_F_VERSION_1));
    assert_eq!(status(&rig), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    // Negotiated features are frozen, and status bits are not cleared one by one.
    rig.port.set(Reg::DriverFeatures, 0);
    assert_eq!(rig.core.save().driver_features, 1 << VIRTIO_F_VERSION_1);
    rig.port.set(Reg::Status, ACKNOWLEDGE.into());
    assert_eq!(status(&rig), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn queue_registers_freeze() {
    for transport in TRANSPORTS {
        let rig = rig(transport);
        let vqs = rig.start(None);
        let before = rig.core.save();
        rig.set_queue(0, 256, [0xdead_0000, 0xdead_1000, 0xdead_2000]);
        rig.port.set(Reg::QueueReady, 0);
        assert_eq!(rig.core.save(), before);
        assert_eq!(rig.port.get(Reg::QueueReady), 1);
        assert_eq!(before.queues[0].size, vqs[0].size);
    }
    // Also before DRIVER_OK, once the queue is ready; and before FEATURES_OK.
    let rig = self::rig(Transport::Mmio);
    rig.set_queue(0, 8, [0x1000, 0x2000, 0x3000]);
    assert_eq!(rig.port.get(Reg::QueueReady), 0);
    rig.negotiate(None);
    rig.set_queue(0, 8, [0x1000, 0x2000, 0x3000]);
    rig.set_queue(0, 16, [0x4000, 0x5000, 0x6000]);
    assert_eq!(rig.core.save().queues[0].desc, 0x1000);
    assert_eq!(rig.core.save().queues[0].size, 8);
    // A driver that gives up takes the queue out of use, until DRIVER_OK.
    rig.port.set(Reg::QueueReady, 0);
    assert_eq!(rig.port.get(Reg::QueueReady), 0);
}

#[test]
fn a_device_that_failed_does_not_run_again_by_itself() {
    let rig = rig(Transport::Mmio);
    let mut vqs = rig.start(None);
    vqs[0].raw_desc(0, 0, 1, 1, 0); // loops
    vqs[0].publish(0);
    rig.kick(&vqs[0]);
    rig.turn();
    assert_ne!(status(&rig) & NEEDS_RESET, 0);
    let failures = rig.core.notifier().failures();
    rig.core.save();
    rig.core.pause();
    rig.core.resume();
    rig.kick(&vqs[0]);
    rig.turn();
    assert_eq!(rig.core.notifier().failures(), failures);
    // Nor one whose driver said that it gave up, in the same breath in which it was ready.
    let rig = self::rig(Transport::Mmio);
    rig.negotiate(None);
    rig.set_queue(0, 8, [RAM[1] + RAM_LEN, 0, 0]);
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
    rig.port.set(Reg::Status, all.into());
    rig.core.resume();
    assert_eq!(rig.core.notifier().failures(), 0);
    assert!(!lock(&rig.core.inner).running);
}

#[test]
fn broken_queues_need_a_reset() {
    let end = RAM[1] + RAM_LEN;
    let good = [0x1000, 0x2000, 0x3000];
    let cases = [
        (0, good),
        (3, good),
        (512, good),
        (8, [0x1008, 0x2000, 0x3000]),
        (8, [0x1000, 0x2001, 0x3000]),
        (8, [0x1000, 0x2000, 0x3002]),
        (8, [end - 16, 0x2000, 0x3000]),
        (8, [0x1000, end - 20, 0x3000]),
        (8, [0x1000, 0x2000, end - 68]),
        (8, [RAM_LEN - 112, 0x2000, 0x3000]),
        (8, [!15, 0x2000, 0x3000]),
    ];
    for (size, rings) in cases {
        let rig = rig(Transport::Mmio);
        rig.negotiate(None);
        rig.set_queue(0, size, rings);
        rig.driver_ok();
        assert_ne!(status(&rig) & NEEDS_RESET, 0, "{size} {rings:x?}");
        assert_eq!(rig.port.get(Reg::InterruptStatus), 2);
        assert_eq!(rig.irq.take(), 1);
        // A reset makes it good again.
        rig.start(None);
        assert_eq!(status(&rig) & NEEDS_RESET, 0);
    }
    let rig = rig(Transport::Mmio);
    rig.negotiate(None);
    rig.set_queue(0, 8, [end - 128, RAM_LEN - 22, (end - 128 - 70 - 2) & !3]);
    rig.driver_ok();
    assert_eq!(status(&rig) & NEEDS_RESET, 0, "just fits");
}

#[test]
fn a_broken_chain_needs_a_reset() {
    type Break = fn(&mut Vq);
    let cases: [Break; 9] = [
        |vq| vq.publish(0xffff),
        |vq| vq.set_avail(0xffff),
        |vq| vq.set_avail(vq.size + 1),
        |vq| {
            // A loop.
            vq.raw_desc(0, BUF, 16, 3, 1);
            vq.raw_desc(1, BUF, 16, 3, 0);
            vq.publish(0);
        },
        |vq| {
            vq.raw_desc(0, BUF, 16, 3, 0xffff);
            vq.publish(0);
        },
        |vq| {
            // Readable behind writable.
            vq.add(&[(BUF, 16, true), (BUF, 16, false)]);
        },
        |vq| {
            vq.add(&[(RAM_LEN - 8, 16, true)]);
        },
        |vq| {
            // An indirect table in an indirect table.
            vq.raw_desc(0, 0x9000, 16, 4, 0);
            vq.raw_desc(1, 0x9000, 16, 4, 0);
            vq.publish(0);
        },
        |vq| {
            // Longer than 4 GiB.
            vq.add(&[(BUF, u32::MAX, false), (BUF, u32::MAX, true)]);
        },
    ];
    for (i, broken) in cases.into_iter().enumerate() {
        let rig = rig(Transport::Mmio);
        let mut vqs = rig.start(None);
        let mut nested = Vq::new(rig.ram.clone(), 0, 16);
        nested.base = 0x9000;
        nested.raw_desc(0, 0xa000, 16, 4, 0);
        broken(&mut vqs[0]);
        rig.kick(&vqs[0]);
        rig.run(0);
        assert_ne!(status(&rig) & NEEDS_RESET, 0, "case {i}");
        assert_eq!(rig.core.notifier().failures(), 1, "case {i}");
        // It stays quiet until it is reset.
        rig.kick(&vqs[0]);
        rig.run(0);
        assert_eq!(rig.core.notifier().failures(), 1);
        rig.start(None);
        assert_eq!(status(&rig) & NEEDS_RESET, 0);
    }
}

#[test]
fn interrupts_are_suppressed_as_asked() {
    for event_idx in [true, false] {
        let rig = rig(Transport::Mmio);
        let mut features = CORE_FEATURES;
        if !event_idx {
            features &= !(1 << VIRTIO_RING_F_EVENT_IDX);
        }
        let mut vqs = rig.start(Some(features));
        let vq = &mut vqs[0];
        vq.set_used_event(2);
        vq.set_avail_flags(VRING_AVAIL_F_NO_INTERRUPT as u16);
        for expected in [0, 0, usize::from(event_idx), 0] {
            vq.add(&[(BUF, 16, true)]);
            rig.kick(vq);
            rig.run(0);
            assert_eq!(rig.irq.take(), expected);
        }
        vq.set_used_event(4);
        vq.set_avail_flags(0);
        vq.add(&[(BUF, 16, true)]);
        rig.kick(vq);
        rig.run(0);
        assert_eq!(rig.irq.take(), 1);
        assert_eq!(vq.used().len(), 5);
        if event_idx {
            assert_eq!(vq.avail_event(), 5, "a kick is wanted for the next chain");
        }
    }
}

#[test]
fn a_batch_is_one_interrupt() {
    let rig = rig(Transport::Mmio);
    let mut vqs = rig.start(None);
    for _ in 0..16 {
        vqs[0].add(&[(BUF, 16, true)]);
    }
    rig.kick(&vqs[0]);
    rig.run(0);
    assert_eq!(vqs[0].used().len(), 16);
    assert_eq!(rig.irq.take(), 1);
}

#[test]
fn chains_made_available_before_the_start_are_found() {
    let rig = rig(Transport::Mmio);
    let mut vqs = rig.start(None);
    rig.core.pause();
    vqs[0].add(&[(BUF, 16, true)]);
    rig.run(0);
    assert_eq!(vqs[0].used_index(), 0);
    rig.core.resume();
    assert_eq!(vqs[0].used_index(), 1, "without a kick");
}

#[test]
fn garbage_states_are_refused() {
    let good = {
        let rig = rig(Transport::Mmio);
        rig.start(None);
        rig.core.save()
    };
    type Spoil = fn(&mut VirtioState);
    let cases: [Spoil; 6] = [
        |s| s.status |= 0x20,
        |s| s.status = DRIVER_OK,
        |s| s.driver_features |= 1 << 60,
        |s| s.queues.push(QueueCfg::default()),
        |s| s.queues[0].size = 7,
        |s| s.queues[0].used = RAM_LEN - 4,
    ];
    for (i, spoil) in cases.into_iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        let device = Box::new(Entropy::new(EntropyState {}));
        let host = Arc::new(Mutex::new(crate::virtio::worker::IoLoop::new().unwrap()));
        let parts = Parts {
            traits: crate::virtio::device::VirtioDevice::traits(&*device),
            config: Arc::new(crate::virtio::device::NoConfig),
            backend: Box::new(crate::virtio::worker::LoopBackend::inline(device, host)),
            interrupt: Arc::new(crate::virtio::transport::mmio::MmioInterrupt::new(
                Arc::new(crate::irq::mock::Counter::default()),
            )),
            memory: Memory::new(crate::virtio::driver::ram()),
        };
        assert!(VirtioCore::new(parts, state).is_err(), "case {i}");
    }
}
