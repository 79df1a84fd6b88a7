//! Memory devices under a bare-metal guest.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::common::{Bulle, Input, Running, payload};

const TRANSPORTS: [&[&str]; 2] = [&[], &["--pci"]];

fn file(dir: &Path, len: usize) -> PathBuf {
    let path = dir.join("pmem");
    fs::write(&path, vec![0x11; len]).unwrap();
    path
}

fn pmem(path: &Path, options: &str) -> Bulle {
    let list = format!("path={}{options}", path.display());
    Bulle::payload("pmem").arg("--pmem").arg(list)
}

#[test]
fn what_the_guest_writes_is_in_the_file() {
    for transport in TRANSPORTS {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), 4 << 20);
        let outcome = pmem(&path, "").args(transport).outcome().exits(0);
        assert_eq!(outcome.value("start"), "0x100000000");
        assert_eq!(outcome.value("size"), "4194304");
        assert_eq!(outcome.value("first"), "0x1111111111111111");
        assert_eq!(outcome.value("written"), "0x55");
        assert_eq!(outcome.value("flushed"), "Some(0)");
        assert_eq!(outcome.stderr, "");
        assert_eq!(fs::read(&path).unwrap()[..2], [0x55, 0x11]);
    }
}

/// The slot is read-only: writes go nowhere, and the guest goes on.
#[test]
fn a_read_only_file_cannot_be_written() {
    for transport in TRANSPORTS {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), 4 << 20);
        let bulle = pmem(&path, ",ro").args(["--append", "flips=500"]);
        let outcome = bulle.args(transport).outcome().exits(0);
        assert_eq!(outcome.value("first"), "0x1111111111111111");
        assert_eq!(outcome.value("written"), "0x11");
        assert_eq!(outcome.value("flushed"), "Some(0)");
        assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0x11));
    }
}

#[test]
fn the_end_of_an_odd_file_is_memory_that_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), 5000);
    let outcome = pmem(&path, "").args(["--append", "flips=512"]).outcome();
    let outcome = outcome.exits(0).complains("is lost; extend it");
    assert_eq!(outcome.value("size"), "2097152");
    let content = fs::read(&path).unwrap();
    assert_eq!(
        (content.len(), content[0], content[4096]),
        (5000, 0x55, 0x55)
    );
}

#[test]
fn a_file_made_shorter_ends_neither_guest_nor_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), 4 << 20);
    let mut bulle = std::process::Command::new(env!("CARGO_BIN_EXE_bulle"));
    bulle.args([
        "run",
        "--timeout",
        "60s",
        "--root",
        "none",
        "--append",
        "wait=1",
    ]);
    bulle.arg("--kernel").arg(payload("pmem"));
    bulle.arg("--pmem").arg(format!("path={}", path.display()));
    bulle
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    bulle.stderr(std::process::Stdio::piped());
    let mut child = bulle.spawn().unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("waiting") {
        let read = std::io::BufRead::read_line(&mut stdout, &mut text).unwrap();
        assert_ne!(read, 0, "{text}");
    }
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    child.stdin.take().unwrap().write_all(b"x").unwrap();
    std::io::Read::read_to_string(&mut stdout, &mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(
        text.contains("last 0x0\n") && text.contains("flushed then Some(1)"),
        "{text}"
    );
    assert!(errors.contains("made shorter"), "{errors}");
}

fn plug(transport: &[&str], more: &str) -> Bulle {
    let list = "total=128M,requested=4M";
    let bulle = Bulle::payload("plug").args(["--hotplug-memory", list]);
    bulle.args(transport).args(["--append", more])
}

#[test]
fn memory_is_there_while_it_is_plugged() {
    for transport in TRANSPORTS {
        let outcome = plug(transport, "dma=1").outcome().exits(0);
        for (key, value) in [
            ("block", "2097152"),
            ("start", "0x100000000"),
            ("requested", "4194304"),
            ("before", "0x0"),
            ("plug", "Some((0, 0))"),
            ("plugged", "2097152"),
            ("used", "0x12345678"),
            ("state", "Some((0, 0))"),
            ("unplug", "Some((0, 0))"),
            ("plugged then", "0"),
            ("after", "0x0"),
            // A device reaches nothing of it, and stops.
            ("from nowhere", "None"),
            ("runs", "false"),
        ] {
            assert_eq!(outcome.value(key), value, "{key}: {outcome:#?}");
        }
    }
}

#[test]
fn a_guest_that_writes_to_unplugged_memory_ends_with_the_reason() {
    let outcome = plug(&[], "write=1").outcome().exits(122);
    assert!(!outcome.stdout.contains("written"), "{outcome:#?}");
    assert!(outcome.stderr.contains("guest memory"), "{outcome:#?}");
}

/// Balloons are left out: a guest that attacks one gives its own memory away, code and all.
#[test]
fn a_guest_that_attacks_memory_devices_is_survived() {
    for transport in TRANSPORTS {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), 4 << 20);
        let list = format!("path={}", path.display());
        let bulle = Bulle::payload("hostile").args(["--memory", "128M", "--pmem", &list]);
        let bulle = bulle.args(["--hotplug-memory", "total=128M,requested=2M"]);
        let outcome = bulle.args(transport).timeout("100s").outcome().exits(0);
        let outcome = outcome.prints("device 24 works true\n");
        let outcome = outcome.prints("device 27 works true\n");
        let outcome = outcome.prints("survived\n");
        assert!(!outcome.stderr.contains("panicked"), "{outcome:#?}");
        assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0x11));
    }
}

/// What a line of /proc/PID/status says, in MiB.
fn status(running: &Running, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib >> 10
}

#[test]
fn a_balloon_gives_pages_back_and_no_others() {
    for backing in ["anonymous", "memfd"] {
        for transport in TRANSPORTS {
            let bulle = Bulle::payload("balloon").args(["--memory-backing", backing]);
            let bulle = bulle.args(["--memory", "128M", "--balloon", "size=48M"]);
            let running = bulle.args(transport).input(Input::Open).start();
            let running = running.wait_for("waiting");
            let (peak, now) = (status(&running, "VmHWM:"), status(&running, "VmRSS:"));
            let outcome = running.signal(Signal::SIGINT).finish();
            assert_eq!(outcome.value("target"), "12288");
            assert_eq!(outcome.value("given"), "true");
            // The pages before and behind.
            assert_eq!(outcome.value("kept"), "2", "{outcome:#?}");
            assert_eq!(outcome.value("taken"), "true");
            assert_eq!(outcome.value("kept then"), "3");
            // A page of a memory file that is read is one that is there.
            let least = if backing == "memfd" { 0 } else { 44 };
            assert!(peak >= now + least, "{backing}: {peak} MiB, then {now} MiB");
        }
    }
}
