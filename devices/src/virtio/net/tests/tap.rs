//! Tap interfaces, where this process may make them; errors where it may not.

use std::fs;
use std::process::Command;

use super::*;

/// A new tap, or why there is none here.
pub fn tap(queues: u16) -> Option<Tap> {
    match Tap::open("bulletest%d", queues) {
        Ok(tap) => Some(tap),
        // No tun driver or no CAP_NET_ADMIN: then the error says so, which is all there is to see.
        Err(error @ (TapError::Driver(_) | TapError::Permission { .. })) => {
            let text = error.to_string();
            assert!(text.contains("CAP_NET_ADMIN") || text.contains("modprobe tun"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A raw socket on the host's side of an interface.
pub fn packet_socket(name: &str) -> UnixStream {
    use std::os::fd::FromRawFd;
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: plain system calls with structures that live as long as the calls; the descriptor is
    // owned by nobody else.
    unsafe {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            all.into(),
        );
        assert!(fd >= 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of_val(&address) as u32;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
        // Reading and writing is all that is wanted of it.
        let socket = UnixStream::from_raw_fd(fd);
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket
    }
}

/// An Ethernet frame of no protocol that the host would answer.
pub fn ether(len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend(MAC);
    bytes.extend([0x88, 0xb5]);
    bytes.extend(frame(len - 14));
    bytes
}

/// The next frame of ours.
pub fn next(socket: &mut UnixStream) -> Vec<u8> {
    loop {
        let mut bytes = vec![0; 65600];
        let len = socket.read(&mut bytes).unwrap();
        bytes.truncate(len);
        if bytes[12..14] == [0x88, 0xb5] {
            return bytes;
        }
    }
}

pub fn ours(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let bodies = frames.into_iter().map(|mut all| all.split_off(12));
    bodies.filter(|body| body[12..14] == [0x88, 0xb5]).collect()
}

#[test]
fn frames_pass_a_tap_both_ways() {
    for features in [None, Some(0)] {
        let Some(tap) = tap(1) else { return };
        let mut socket = packet_socket(tap.name());
        let mut guest = Guest::new(with_backend(NetBackend::Tap(tap)), features);
        guest.offer(15, 0x1_0000);
        for len in [60, 1514] {
            guest.send(BLANK, &ether(len));
            assert!(next(&mut socket) == ether(len));
            assert_eq!(guest.vqs[1].used().len(), 1);
            socket.write_all(&ether(len)).unwrap();
            // What the host says of itself may come as well.
            let mut got = Vec::new();
            for _ in 0..6000 {
                got.extend(ours(guest.used()));
                if !got.is_empty() {
                    break;
                }
            }
            assert!(got == [ether(len)]);
        }
    }
}

#[test]
fn a_tap_has_offloads_and_several_queues() {
    let Some(tap) = tap(4) else { return };
    let name = tap.name().to_string();
    assert!(name.starts_with("bulletest") && tap.queues() == 4);
    let (net, _) = Net::new(with_backend(NetBackend::Tap(tap)), NetState::default()).unwrap();
    let traits = net.traits();
    for bit in [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_UFO,
        VIRTIO_NET_F_MQ,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    ] {
        assert!(traits.features >> bit & 1 != 0, "feature {bit}");
    }
    assert_eq!(traits.queues.len(), 9);
    let rig = Rig::new(Transport::Pci, Box::new(net));
    let mut vqs = rig.start(None);
    rig.run(0);
    let mut command = |queue: usize, bytes: &[u8]| {
        rig.ram.write_slice(bytes, GuestAddress(TX_AT)).unwrap();
        let data = (TX_AT, bytes.len() as u32, false);
        vqs[queue].add(&[data, (TX_AT + 64, 1, true)]);
        rig.kick(&vqs[queue]);
        rig.run(0);
        assert_eq!(vqs[queue].used().len(), 1);
        rig.ram.read_obj::<u8>(GuestAddress(TX_AT + 64)).unwrap()
    };
    assert_eq!(command(8, &[4, 0, 3, 0]), 0);
    assert_eq!(command(8, &[4, 0, 5, 0]), 1, "more than there are");
    assert_eq!(command(8, &[4, 0, 0, 0]), 1);
    assert_eq!(command(8, &[4, 0, 1]), 1, "cut short");
    assert_eq!(command(8, &[0, 0, 1, 0]), 1, "another command");
    assert_eq!(
        rig.core.save().device,
        DeviceState::Net(NetState {
            pairs: 3,
            offloads: None,
            mac: Some(MAC),
        })
    );
    // A driver that leaves MQ alone has its control queue behind the first pair.
    let plain = traits.features & !(1 << VIRTIO_NET_F_MQ) | CORE_FEATURES;
    let mut vqs = rig.start(Some(plain));
    rig.run(0);
    let (data, ack) = ((TX_AT, 4, false), (TX_AT + 64, 1, true));
    vqs[2].add(&[data, ack]);
    rig.kick(&vqs[2]);
    rig.run(0);
    assert_eq!(vqs[2].used().len(), 1);
    assert_eq!(
        rig.core.save().device,
        DeviceState::Net(NetState {
            mac: Some(MAC),
            ..NetState::default()
        })
    );
    // Gone under its driver: the link goes down, and nothing spins.
    let status = Command::new("ip").args(["link", "del", &name]).status();
    if status.is_ok_and(|status| status.success()) {
        for vq in &mut vqs[..1] {
            vq.add(&[(RX_AT, 0x8_0000, true)]);
            rig.kick(vq);
        }
        rig.run(5);
        let mut link = [0xff; 2];
        rig.port.read_config(6, &mut link);
        assert_eq!(link, [0, 0]);
    }
}

/// Whether the host hands over TCP segments that are not cut, as the driver takes them.
fn gives_segments(name: &str) -> bool {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const ETHTOOL_GTSO: u32 = 0x1e;
    let mut value = [ETHTOOL_GTSO, 0];
    let socket = UnixStream::pair().unwrap().0;
    // SAFETY: all of `ifreq` may be zero; the call writes one word behind the other of `value`.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        assert_eq!(libc::ioctl(fd, SIOCETHTOOL, &raw mut request), 0);
    }
    value[1] != 0
}

#[test]
fn a_driver_switches_what_it_takes() {
    let Some(tap) = tap(1) else { return };
    let name = tap.name().to_string();
    let (net, _) = Net::new(with_backend(NetBackend::Tap(tap)), NetState::default()).unwrap();
    let all = net.traits().features;
    assert_eq!(net.traits().queues, [256, 256, 64]);
    let rig = Rig::new(Transport::Mmio, Box::new(net));
    let mut vqs = rig.start(Some(all & !(1 << VIRTIO_NET_F_GUEST_UFO) | CORE_FEATURES));
    vqs[0].add(&[(RX_AT, 0x8_0000, true)]);
    rig.kick(&vqs[0]);
    rig.run(0);
    assert!(gives_segments(&name));
    let mut switch = |offloads: u64, len: usize| {
        let mut bytes = vec![5, 0];
        bytes.extend(offloads.to_le_bytes());
        rig.ram.write_slice(&bytes, GuestAddress(TX_AT)).unwrap();
        let data = (TX_AT, 2 + len as u32, false);
        vqs[2].add(&[data, (TX_AT + 64, 1, true)]);
        rig.kick(&vqs[2]);
        rig.run(0);
        assert_eq!(vqs[2].used().len(), 1);
        rig.ram.read_obj::<u8>(GuestAddress(TX_AT + 64)).unwrap()
    };
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(switch(csum, 8), 0);
    assert!(!gives_segments(&name));
    let saved = |offloads| {
        DeviceState::Net(NetState {
            pairs: 1,
            offloads,
            mac: Some(MAC),
        })
    };
    assert_eq!(rig.core.save().device, saved(Some(csum)));
    // Cut short, too long, not negotiated, and no work on received frames.
    assert_eq!(switch(0, 7), 1);
    assert_eq!(switch(0, 9), 1);
    assert_eq!(switch(csum | 1 << VIRTIO_NET_F_GUEST_UFO, 8), 1);
    assert_eq!(switch(1 << VIRTIO_NET_F_CSUM, 8), 1);
    assert_eq!(rig.core.save().device, saved(Some(csum)));
    // A stop and start keeps it, and so does a device made of what is saved; a reset does not.
    rig.core.pause();
    rig.core.resume();
    rig.run(0);
    assert!(!gives_segments(&name));
    assert_eq!(switch(csum | 1 << VIRTIO_NET_F_GUEST_TSO4, 8), 0);
    assert!(gives_segments(&name));
    let vqs = rig.start(None);
    rig.kick(&vqs[0]);
    rig.run(0);
    assert_eq!(rig.core.save().device, saved(None));
}

/// A UDP datagram over IPv4 with `payload` bytes, whose checksum is left to the host.
fn datagram(payload: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend(MAC);
    bytes.extend([8, 0]);
    let (ip, udp) = ((28 + payload) as u16, (8 + payload) as u16);
    bytes.extend([0x45, 0]);
    bytes.extend(ip.to_be_bytes());
    bytes.extend([0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    bytes.extend([0x12, 0x34, 0x56, 0x78]);
    bytes.extend(udp.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(frame(payload));
    bytes
}

#[test]
fn udp_segments_pass_a_tap_that_takes_them() {
    let Some(tap) = tap(1) else { return };
    let uso = [
        VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6,
        VIRTIO_NET_F_HOST_USO,
    ];
    let offered = uso.map(|bit| tap.features() >> bit & 1 != 0);
    assert!(offered == [true; 3] || offered == [false; 3]);
    if !offered[0] {
        return;
    }
    let mut socket = packet_socket(tap.name());
    let csum = 1 << VIRTIO_NET_F_CSUM;
    let both = csum | 1 << VIRTIO_NET_F_HOST_USO;
    let mut guest = Guest::new(with_backend(NetBackend::Tap(tap)), Some(both));
    // GSO_UDP_L4 in pieces of 1000 bytes, the checksum 6 bytes into what begins at 34.
    let header = [1, 5, 42, 0, 0xe8, 3, 34, 0, 6, 0, 0, 0];
    let sent = datagram(3500);
    guest.send(header, &sent);
    assert_eq!(guest.vqs[1].used().len(), 1);
    let mut bytes = vec![0; 65600];
    let len = loop {
        let len = socket.read(&mut bytes).unwrap();
        if bytes[12..14] == [8, 0] && bytes[26..30] == [192, 0, 2, 1] {
            break len;
        }
    };
    assert!(len == sent.len() && bytes[42..len] == sent[42..], "{len}");
    assert!(!guest.needs_reset());
}

#[test]
fn taps_that_cannot_be_had() {
    let error = |name: &str, queues| Tap::open(name, queues).unwrap_err();
    for name in ["", "a/b", "sixteen-bytes-xy", "..", "a%s", "%d%d"] {
        assert!(matches!(error(name, 1), TapError::Name { .. }), "{name}");
    }
    let missing = error("bulle-none", 1);
    assert!(matches!(missing, TapError::Missing { .. }));
    assert!(
        missing
            .to_string()
            .contains("ip tuntap add dev bulle-none mode tap user")
    );
    let Some(one) = tap(1) else { return };
    assert!(matches!(error(one.name(), 1), TapError::Busy { .. }));
    let kind = error(one.name(), 2);
    assert!(kind.to_string().contains("multi_queue"), "{kind}");
    assert!(matches!(error("lo", 1), TapError::Kind { .. }));
    let null = fs::File::open("/dev/null").unwrap();
    let fd = Tap::from_fd(null.into()).unwrap_err();
    assert!(matches!(fd, TapError::Descriptor { .. }), "{fd}");
}
