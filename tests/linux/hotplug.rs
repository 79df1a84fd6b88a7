//! A disk and a network interface that come to a Linux guest and go, noticed by its own drivers.

use std::fs;

use crate::manage::Guest;
use crate::net::{in_a_network, md5, sh};

const BYTES: usize = 8 << 20;

impl Guest {
    /// What a shell in the guest says.
    #[track_caller]
    fn says(&self, script: &str) -> String {
        let said = self.bulle(&["exec", "web", "--", "sh", "-ec", script]);
        said.exits(0).stdout
    }
}

fn come_and_go() {
    sh(
        "ip tuntap add dev plugged mode tap; ip addr add 10.9.7.1/24 dev plugged
        ip link set plugged up",
    );
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let content: Vec<u8> = (0..BYTES).map(|n| (n >> 9) as u8).collect();
    fs::write(&image, &content).unwrap();
    let guest = Guest::start(&["--pci"]);
    let before = guest.says("ls /sys/block /sys/class/net");
    assert!(
        !before.contains("vda") && !before.contains("eth0"),
        "{before}"
    );
    let disk = format!("path={}", image.display());
    let devices = [
        "--disk",
        &disk,
        "--net",
        "tap=plugged,mac=02:00:00:00:be:ef",
    ];
    let attach: Vec<_> = ["attach", "web"].into_iter().chain(devices).collect();
    for round in 0..2 {
        let attached = guest.bulle(&attach).exits(0);
        assert_eq!(attached.stdout, "disk0\nnet0\n");
        let said = guest.says(
            "until [ -b /dev/vda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
             echo serial $(cat /sys/block/vda/serial)
             echo sum $(md5sum </dev/vda)
             echo round | dd of=/dev/vda bs=512 seek=1 conv=fsync 2>/dev/null
             for d in /sys/bus/pci/devices/*; do echo at $(head -n 1 $d/resource); done
             ip addr add 10.9.7.2/24 dev eth0; ip link set eth0 up
             echo mac $(cat /sys/class/net/eth0/address)
             ping -c 3 10.9.7.1 | grep -o '[0-9]*% packet loss'",
        );
        assert!(said.contains("serial disk0\n"), "{said}");
        assert!(said.contains("mac 02:00:00:00:be:ef\n"), "{said}");
        assert!(said.contains("\n0% packet loss"), "{said}");
        if round == 0 {
            assert!(said.contains(&format!("sum {}", md5(&content))), "{said}");
        }
        // Where each slot's ioeventfds are.
        for slot in 2..4_u64 {
            let bar = 0xe800_0000 + (slot - 1) * 0x1_0000;
            assert!(said.contains(&format!("at 0x{bar:016x} ")), "{said}");
        }
        guest.bulle(&["detach", "web", "disk0", "net0"]).exits(0);
        let after = guest.says("ls /sys/block /sys/class/net; ls /sys/bus/pci/devices | wc -l");
        assert_eq!(after, format!("{before}2\n"));
        assert_eq!(fs::read(&image).unwrap()[512..518], *b"round\n");
    }
    guest.bulle(&["stop", "--timeout", "120s", "web"]).exits(0);
    guest.running.finish().exits(128 + 15);
}

#[test]
fn a_disk_and_a_network_come_to_a_guest_and_go() {
    in_a_network(come_and_go);
}
