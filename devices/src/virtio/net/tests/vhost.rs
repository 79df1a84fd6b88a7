//! The host's kernel in place of the device, where it has vhost-net; the error where it has not.

use super::tap::{ether, next, ours, packet_socket, tap};
use super::*;

fn kernel() -> Option<Vhost> {
    match Vhost::new() {
        Ok(vhost) => Some(vhost),
        Err(error) => {
            assert!(matches!(error, VhostError::Open(_)), "{error}");
            assert!(error.to_string().contains("modprobe vhost_net"));
            None
        }
    }
}

#[test]
fn frames_pass_through_the_kernel() {
    for transport in TRANSPORTS {
        let (Some(vhost), Some(tap)) = (kernel(), tap(1)) else {
            return;
        };
        let mut socket = packet_socket(tap.name());
        let mut options = with_backend(NetBackend::Tap(tap));
        options.vhost = Some(vhost);
        let mut guest = Guest::on(transport, options, None);
        guest.offer(15, 0x1_0000);
        // Each driver finds the queues as the one before left them to it: pause, save, and go on.
        for (round, len) in (0..).zip([60, 1514, 300]) {
            guest.send(BLANK, &ether(len));
            assert!(next(&mut socket) == ether(len));
            let mut sent = 0;
            for _ in 0..6000 {
                guest.rig.run(5);
                sent += guest.vqs[1].used().len();
                if sent == 1 {
                    break;
                }
            }
            assert_eq!(sent, 1, "round {round}");
            socket.write_all(&ether(len)).unwrap();
            let mut got = Vec::new();
            for _ in 0..6000 {
                got.extend(ours(guest.used()));
                if !got.is_empty() {
                    break;
                }
            }
            assert!(got == [ether(len)], "round {round}");
            assert!(!guest.needs_reset());
            match round {
                0 => drop(guest.rig.core.save()),
                _ => {
                    guest.rig.core.pause();
                    guest.rig.core.resume();
                }
            }
        }
    }
}

#[test]
fn broken_rings_fail_the_device() {
    let (Some(vhost), Some(tap)) = (kernel(), tap(1)) else {
        return;
    };
    let mut options = with_backend(NetBackend::Tap(tap));
    options.vhost = Some(vhost);
    let mut guest = Guest::new(options, None);
    // No buffer is there.
    guest.vqs[1].add(&[(1 << 40, 1514, false)]);
    guest.rig.kick(&guest.vqs[1]);
    for _ in 0..6000 {
        guest.rig.run(5);
        if guest.needs_reset() {
            break;
        }
    }
    assert!(guest.needs_reset());
}
