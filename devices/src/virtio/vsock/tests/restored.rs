//! Drivers whose connections are gone.

use vm_memory::{Bytes, GuestAddress};

use super::super::super::driver::{Rig, Transport, Vq};
use super::super::packet::*;
use super::super::*;
use super::*;

#[test]
fn restored_guests_are_told() {
    let mut guest = Guest::new(options());
    let idle = guest.rig.core.save().device;
    let state = VsockState {
        cid: CID,
        connected: false,
    };
    assert_eq!(idle, DeviceState::Vsock(state));
    let _stream = guest.connect((1, 2));
    let state = VsockState {
        connected: true,
        ..state
    };
    assert_eq!(guest.rig.core.save().device, DeviceState::Vsock(state));
    // The saved one goes on as if nothing happened.
    guest.op(op::CREDIT_REQUEST, (1, 2));
    assert_eq!(guest.packet().0.op, op::CREDIT_UPDATE);

    for (state, told) in [
        (state, true),
        (
            VsockState {
                cid: 99,
                connected: false,
            },
            true,
        ),
        (
            VsockState {
                cid: CID,
                connected: false,
            },
            false,
        ),
    ] {
        let mut guest = Guest::restored(options(), state);
        guest.rig.start(None);
        // The driver's reset made it forget; a resumed driver is told.
        let vsock = made(options(), state).unwrap();
        assert_eq!(vsock.reset.is_pending(), told);
        assert_eq!(
            vsock.save(),
            DeviceState::Vsock(VsockState {
                cid: CID,
                connected: told
            })
        );
        guest.vqs = guest.rig.start(None);
    }
}

#[test]
fn nothing_comes_before_the_driver_has_seen_the_event() {
    let state = VsockState {
        cid: CID,
        connected: true,
    };
    // With buffers for events already there.
    let mut guest = Guest::new(options());
    let mut saved = guest.rig.core.save();
    saved.device = DeviceState::Vsock(state);
    // And with a packet on its way.
    let ram = guest.rig.ram.clone();
    let request = Guest::header(op::REQUEST, (9, 8)).bytes();
    ram.write_slice(&request, GuestAddress(TX_BASE)).unwrap();
    guest.vqs[TX].add(&[(TX_BASE, HEADER as u32, false)]);
    guest.rig.core.pause();
    let mut event = Vq::new(ram.clone(), 2, 16);
    for slot in 0..3 {
        event.add(&[(EVENTS + 8 * slot, 8, true)]);
    }
    ram.write_obj(7_u64, GuestAddress(EVENTS)).unwrap();
    let vsock = Box::new(made(options(), state).unwrap());
    let rig = Rig::with(Transport::Mmio, vsock, ram.clone(), saved);
    let pending = || match rig.core.save().device {
        DeviceState::Vsock(state) => state.connected,
        other => panic!("{other:?}"),
    };
    // Told again when it is stopped before the driver has looked.
    for told in 0..2 {
        rig.core.resume();
        rig.run(0);
        assert_eq!(event.used().into_values().collect::<Vec<_>>(), [4]);
        let first = ram.read_obj::<u64>(GuestAddress(EVENTS)).unwrap();
        assert_eq!(first, 0, "{told}");
        assert!(guest.vqs[RX].used().is_empty());
        rig.core.pause();
        assert_eq!(rig.core.save().queues[EVENT].next_avail, told + 1);
    }
    rig.core.resume();
    rig.run(0);
    assert_eq!(event.used().len(), 1);
    // The driver gives the buffer back, and gets the answer to what it sent.
    event.add(&[(EVENTS, 8, true)]);
    rig.kick(&event);
    rig.run(0);
    assert!(event.used().is_empty());
    let used: Vec<_> = guest.vqs[RX].used().into_keys().collect();
    let [head] = used[..] else {
        panic!("{used:?}");
    };
    let mut answer = [0; HEADER as usize];
    let at = GuestAddress(guest.slots[&head]);
    ram.read_slice(&mut answer, at).unwrap();
    let answer = Header::parse(answer);
    assert_eq!((answer.op, answer.dst_port), (op::RST, 8));
    assert!(!pending());
}
