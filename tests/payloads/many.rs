//! Many virtual machines of one user at once.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::common::{Bulle, Input, Running, payload};

const COUNT: usize = 32;

/// They share a directory and use the same names, CIDs and kernel; nothing of one is in another's way,
/// and nobody needs a right for any of it.
#[test]
fn thirty_two_at_once_without_a_capability() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let running: Vec<_> = (0..COUNT)
        .map(|number| {
            let image = dir.path().join(format!("disk{number}"));
            fs::write(&image, [number as u8; 4096]).unwrap();
            let socket = dir.path().join(format!("socket{number}"));
            let bulle = Bulle::unprivileged()
                .args(["--root", "none", "--memory", "64M", "--kernel"])
                .arg(payload("virtio_disk"))
                .args(["--append", "reads=50", "--entropy", "--balloon", "--rtc"])
                .arg("--disk")
                .arg(format!("path={},id=same", image.display()))
                .arg("--vsock")
                .arg(format!("path={}", socket.display()))
                .arg("--share")
                .arg(format!("path={},tag=shared,ro", shared.display()))
                .patience(Duration::from_secs(120));
            (number, image, socket, bulle.start())
        })
        .collect();
    for (number, image, socket, running) in running {
        running.finish().exits(0).prints("reads true\n");
        // The payload writes sector 1 and nothing else.
        let (own, written) = (vec![number as u8; 512], vec![0x5a; 512]);
        let expected = [&own[..], &written, &own.repeat(6)].concat();
        assert!(fs::read(image).unwrap() == expected, "disk {number}");
        assert!(!socket.exists(), "socket {number} is left behind");
    }
}

/// Each has a network through passt and a port of its own of the host's, all of them open at once.
#[test]
fn thirty_two_networks_without_a_capability() {
    let script = "
        ip tuntap add dev uplink mode tap; ip addr add 192.0.2.2/24 dev uplink; ip link set uplink up
        ip link set lo up; ip route add default via 192.0.2.1
        cd \"$1\"; shift
        for n in $(seq 32); do
            setpriv --bounding-set=-all --inh-caps=-all \"$@\" --publish $((9000 + n)):80 >out$n 2>err$n &
        done
        for try in $(seq 600); do
            sleep 0.1
            [ $(cat out* | grep -c halted) = 32 ] && break
        done
        echo running $(cat out* | grep -c halted)
        # Listening on 127.0.0.1, ports 9001 (0x2329) to 9032 (0x2348).
        echo open $(grep -c ' 0100007F:23[234][0-9A-F] 00000000:0000 0A ' /proc/net/tcp)
        # All else ends with the first process of a PID namespace.
        cat err* >&2";
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount", "--pid"]);
    command.args(["--fork", "--mount-proc", "sh", "-ec", script, "sh"]);
    command.arg(dir.path()).env("BULLE_RUNTIME_DIR", dir.path());
    command.args([env!("CARGO_BIN_EXE_bulle"), "run", "--root", "none"]);
    command.args(["--memory", "32M", "--net", "user", "--kernel"]);
    command.arg(payload("hlt_forever"));
    let running = Running::start(command, Input::Null, Duration::from_secs(120));
    let outcome = running.finish().exits(0);
    assert_eq!(outcome.value("running"), "32", "{outcome:#?}");
    assert_eq!(outcome.value("open"), "32", "{outcome:#?}");
}
