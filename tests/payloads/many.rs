//! Many virtual machines of one user at once.

use std::fs;
use std::time::Duration;

use crate::common::{Bulle, payload};

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
