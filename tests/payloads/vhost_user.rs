//! Disks that another process serves, under a bare-metal guest.

use std::time::Duration;

use devices::virtio::vhost_user::peer::{Peer, PeerOptions};
use nix::sys::signal::Signal;

use crate::common::{Bulle, Input};

fn backend() -> (tempfile::TempDir, Peer, String) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let peer = Peer::start(&socket, 4096, PeerOptions::default());
    let list = format!("socket={},id=far", socket.display());
    (dir, peer, list)
}

#[test]
fn a_backend_serves_a_disk() {
    for irqchip in ["split", "kernel"] {
        let (_dir, peer, list) = backend();
        let outcome = Bulle::payload("virtio_disk")
            .args(["--irqchip", irqchip, "--append", "reads=100 log=50"])
            .args(["--disk", &list])
            .outcome()
            .exits(0);
        assert!(outcome.stdout.contains("flushed 50\n"), "{outcome:#?}");
        assert!(outcome.stderr.is_empty(), "{outcome:#?}");
        assert_eq!(peer.flushes(), 50);
        for number in 1..=50_usize {
            let expected = (number as u64).to_le_bytes().repeat(64);
            assert!(peer.read(512 * number, 512) == expected, "sector {number}");
        }
    }
}

#[test]
fn a_machine_outlives_its_backend() {
    let (_dir, peer, list) = backend();
    let running = Bulle::payload("virtio_disk")
        .args(["--append", "log=1000000", "--disk", &list])
        .input(Input::Open)
        .start()
        .wait_for("\nflushed 20\n");
    drop(peer);
    // Its thread sees that sometime.
    std::thread::sleep(Duration::from_secs(3));
    let outcome = running.signal(Signal::SIGINT).finish().exits(130);
    assert!(
        outcome.stderr.contains("it closed the connection"),
        "{outcome:#?}"
    );
}

#[test]
fn the_configuration_comes_back_as_it_was() {
    let (dir, peer, list) = backend();
    let outcome = Bulle::payload("hello")
        .args(["--disk", &list, "--print-config"])
        .outcome()
        .exits(0);
    assert!(outcome.stdout.contains("\"socket\""), "{outcome:#?}");
    let file = dir.path().join("config");
    std::fs::write(&file, &outcome.stdout).unwrap();
    let again = Bulle::run()
        .arg("--config")
        .arg(&file)
        .arg("--print-config")
        .outcome()
        .exits(0);
    assert_eq!(again.stdout, outcome.stdout);
    drop(peer);
}
