//! A driver that was saved and loaded tells the network where it is now (section 5.1.6.5.4).

use super::tap::tap;
use super::*;

const OTHER: Mac = [2, 0, 0, 0, 0, 10];

fn device(mac: Option<Mac>, state: NetState) -> Option<Net> {
    let backend = NetBackend::Tap(tap(1)?);
    let options = NetOptions {
        mac,
        ..with_backend(backend)
    };
    Some(Net::new(options, state).unwrap().0)
}

fn status(rig: &Rig) -> u16 {
    let mut status = [0; 2];
    rig.port.read_config(6, &mut status);
    u16::from_le_bytes(status)
}

fn acknowledge(rig: &Rig, vq: &mut Vq, len: u32) -> u8 {
    rig.ram
        .write_slice(&[3, 0, 0], GuestAddress(TX_AT))
        .unwrap();
    vq.add(&[(TX_AT, len, false), (TX_AT + 64, 1, true)]);
    rig.kick(vq);
    rig.run(0);
    assert_eq!(vq.used().len(), 1);
    rig.ram.read_obj(GuestAddress(TX_AT + 64)).unwrap()
}

#[test]
fn a_driver_that_was_loaded_announces_itself_once() {
    for transport in TRANSPORTS {
        let Some(net) = device(Some(MAC), NetState::default()) else {
            return;
        };
        let rig = Rig::new(transport, Box::new(net));
        let mut vqs = rig.start(None);
        vqs[0].add(&[(RX_AT, 0x8_0000, true)]);
        rig.kick(&vqs[0]);
        rig.run(0);
        assert_eq!(status(&rig), 1, "a new driver has nothing to announce");
        rig.core.pause();
        let saved = (rig.core.save(), rig.transport_state());
        let DeviceState::Net(state) = saved.0.device.clone() else {
            panic!("{saved:?}")
        };

        let net = device(Some(OTHER), state).unwrap();
        let rig = Rig::restored(transport, Box::new(net), rig.ram.clone(), saved);
        let generation = rig.core.save().generation;
        rig.irq.take();
        rig.core.resume();
        rig.run(0);
        assert_eq!(status(&rig), 3, "{transport:?}");
        assert!(rig.irq.take() > 0);
        assert_eq!(rig.core.save().isr & 2, 2, "the configuration changed");
        let mut mac = [0; 6];
        rig.port.read_config(0, &mut mac);
        assert_eq!(mac, OTHER, "the new one, for a driver that looks");
        // Standing still in between changes nothing.
        rig.core.pause();
        rig.core.resume();
        rig.run(0);
        assert_eq!(status(&rig), 3);
        assert_ne!(rig.core.save().generation, generation);

        assert_eq!(acknowledge(&rig, &mut vqs[2], 3), 1, "too long");
        assert_eq!(status(&rig), 3);
        assert_eq!(acknowledge(&rig, &mut vqs[2], 2), 0);
        assert_eq!(status(&rig), 1);
        rig.core.pause();
        rig.core.resume();
        rig.run(0);
        assert_eq!(status(&rig), 1);
        // Back in place it is where it was.
        let state = rig.core.save();
        rig.core.restore(&state).unwrap();
        rig.core.resume();
        rig.run(0);
        assert_eq!(status(&rig), 1);
    }
}

#[test]
fn a_driver_that_does_not_announce_itself_is_not_asked() {
    let Some(net) = device(Some(MAC), NetState::default()) else {
        return;
    };
    let plain = net.traits().features & !(1 << VIRTIO_NET_F_GUEST_ANNOUNCE) | CORE_FEATURES;
    let rig = Rig::new(Transport::Mmio, Box::new(net));
    let mut vqs = rig.start(Some(plain));
    assert_eq!(acknowledge(&rig, &mut vqs[2], 2), 1, "not negotiated");
    rig.core.pause();
    let state = rig.core.save();
    let DeviceState::Net(saved) = state.device.clone() else {
        panic!("{state:?}")
    };
    // The address is the saved one where none is asked for.
    let net = device(None, saved).unwrap();
    assert_eq!(net.space.mac, MAC);
    let rig = Rig::with(Transport::Mmio, Box::new(net), rig.ram.clone(), state);
    rig.core.resume();
    rig.run(0);
    assert_eq!(status(&rig), 1);
    assert_eq!(rig.core.save().isr & 2, 0);
    // A new driver is not asked for what the one before left.
    rig.start(None);
    rig.run(0);
    assert_eq!(status(&rig), 1);
}
