//! Crates that drive Firecracker, unchanged (tests/clients), with a bare-metal guest: what breaks for them is seen here
//! within seconds, and what they do with Linux in tests/linux.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use crate::common::{Input, Running, payload, tree};

#[test]
fn crates_boot_pause_and_stop_a_guest() {
    let client = tree().join("target/clients/debug/bare");
    assert!(client.is_file(), "run tests/clients/build first");
    let dir = tempfile::tempdir().unwrap();
    let firecracker = dir.path().join("firecracker");
    symlink(env!("CARGO_BIN_EXE_bulle"), &firecracker).unwrap();
    let guest = payload("keyboard");
    let mut command = Command::new(client);
    // It has neither an initial RAM disk nor a root file system.
    command.arg(firecracker).args([&guest, &guest, &guest]);
    command.arg(dir.path());
    let outcome = Running::start(command, Input::Null, Duration::from_secs(120))
        .finish()
        .exits(0);
    assert_eq!(outcome.value("paused"), "Paused");
    assert_eq!(outcome.value("resumed"), "Running");
    assert_eq!(outcome.value("other"), "Paused");
    assert_eq!(outcome.value("ended"), "exit status: 0");
    outcome.prints("stopped\n");
}
