//! A guest that attacks every virtio device of its machine, on this machine's /dev/kvm: bulle ends
//! with the guest, in time; it grows neither in memory nor in descriptors; what is the host's and
//! what is another machine's stays as it was.
//!
//! Not part of a plain `cargo test`, since it needs KVM: `cargo test --test hostile`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Bulle, Input, Outcome, Running};
use nix::sys::signal::Signal;

/// The payload's word: it writes no sector behind these.
const ATTACKED: usize = 64 * 512;
/// Growth of bulle's own memory that is no leak: stacks, caches and buffers that are used once.
const GROWTH: u64 = 4096;
/// An attack takes five to ten seconds on an idle machine, and much longer on a busy one.
const DEADLINE: Duration = Duration::from_secs(300);

/// An image of `len` bytes, each its place's.
fn image(dir: &Path, name: &str, len: usize) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, pattern(len)).unwrap();
    path
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 + at) as u8 | 0x40).collect()
}

/// What a process has, besides guest RAM.
#[derive(Debug)]
struct Footprint {
    /// Resident KiB in mappings that are not guest RAM.
    rss: u64,
    descriptors: usize,
    threads: usize,
}

impl Footprint {
    /// `None` once the process is gone.
    fn of(running: &Running) -> Option<Self> {
        let proc = PathBuf::from(format!("/proc/{}", running.pid()));
        let count = |name| Some(fs::read_dir(proc.join(name)).ok()?.count());
        let smaps = fs::read_to_string(proc.join("smaps")).ok()?;
        let (mut rss, mut size) = (0, 0);
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (name, value) = (words.next(), words.next());
            let value = || value.and_then(|v| v.parse::<u64>().ok());
            match name {
                Some("Size:") => size = value()?,
                // Guest RAM is one mapping of 128 MiB, or what a legacy hole leaves of it.
                Some("Rss:") if !(100 << 10..=128 << 10).contains(&size) => rss += value()?,
                _ => {}
            }
        }
        Some(Self {
            rss,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }
}

/// Looks at the process until it has ended.
fn watch(mut running: Running) -> Outcome {
    let before = Footprint::of(&running).unwrap();
    let mut samples = 0;
    while running.is_running() {
        std::thread::sleep(Duration::from_millis(100));
        let Some(now) = Footprint::of(&running).filter(|now| now.threads >= before.threads) else {
            continue; // it is about to end
        };
        assert!(
            now.rss <= before.rss + GROWTH,
            "grew from {before:?} to {now:?}"
        );
        assert!(
            now.descriptors <= before.descriptors,
            "{before:?} to {now:?}"
        );
        // io_uring's workers are threads, and few.
        assert!(now.threads <= before.threads + 16, "{before:?} to {now:?}");
        samples += 1;
    }
    assert!(samples > 10, "watched only {samples} times");
    running.finish()
}

/// Runs the hostile guest with `devices`, disks first.
fn attack(devices: &[String], transport: &[&str], seed: u64) -> Outcome {
    let append = format!("seed={seed}");
    let running = Bulle::payload("hostile")
        .args(["--memory", "128M", "--append", &append])
        .args(transport)
        .args(devices)
        .timeout("290s")
        .patience(DEADLINE)
        .start()
        .wait_for("ready\n");
    let outcome = watch(running)
        .exits(0)
        .prints("survived\n")
        .within(DEADLINE);
    assert!(!outcome.stderr.contains("panicked"), "{outcome:#?}");
    // Every device is allowed eight lines of what the driver did, and some of what the host did.
    let lines = outcome.stderr.lines().count();
    assert!(lines <= 160, "{lines} lines of log: {outcome:#?}");
    outcome
}

fn disk(path: &Path, more: &str) -> [String; 2] {
    ["--disk".into(), format!("path={}{more}", path.display())]
}

/// Disks of every kind, and what else there is.
fn devices(dir: &Path) -> (Vec<String>, [PathBuf; 3]) {
    let images = ["uring", "sync", "readonly"].map(|name| image(dir, name, 1 << 20));
    let mut devices = Vec::new();
    for (path, more) in images
        .iter()
        .zip([",engine=io_uring,queues=2", ",engine=sync", ",ro"])
    {
        devices.extend(disk(path, more));
    }
    let path = |option: &str, name: &str| {
        let path = dir.join(name);
        [option.to_owned(), format!("path={}", path.display())]
    };
    devices.extend(path("--vsock", "socket"));
    image(dir, "pmem", 2 << 20);
    devices.extend(path("--pmem", "pmem"));
    let others = ["--entropy", "--rtc", "--balloon", "--hotplug-memory"];
    devices.extend(others.map(str::to_owned));
    devices.push("total=256M,requested=128M".into());
    (devices, images)
}

/// All devices on one transport, beside a machine that minds its own business.
fn attack_all(transport: &[&str], seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let quiet = image(dir.path(), "quiet", 1 << 20);
    let neighbour = Bulle::payload("disk_pattern")
        .args(disk(&quiet, ""))
        .args(transport)
        .input(Input::Open)
        .timeout("310s")
        .patience(DEADLINE * 2)
        .start()
        .wait_for("round 1\n");
    let (devices, images) = devices(dir.path());
    let outcome = attack(&devices, transport, seed);
    assert_eq!(
        outcome.stdout.matches("works true\n").count(),
        9,
        "{outcome:#?}"
    );

    // It still is where it was, checks what it reads, and has got on.
    let neighbour = neighbour.wait_for("round").signal(Signal::SIGINT).finish();
    let rounds = neighbour.stdout.matches("round").count();
    assert!(
        rounds > 4 && !neighbour.stdout.contains("WRONG"),
        "{neighbour:#?}"
    );
    neighbour.exits(130);

    let [uring, sync, read_only] = images.map(|path| fs::read(path).unwrap());
    let before = pattern(1 << 20);
    assert!(read_only == before, "a read-only disk was written");
    for written in [uring, sync] {
        assert!(written[..ATTACKED] != before[..ATTACKED]);
        assert!(
            written[ATTACKED..] == before[ATTACKED..],
            "more was written than asked for"
        );
    }
}

#[test]
fn every_device_over_mmio_survives() {
    attack_all(&[], 1);
}

#[test]
fn every_device_over_pci_survives() {
    attack_all(&["--pci"], 2);
}

#[test]
fn the_kernel_irqchip_survives_too() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, transport) in [(3, "--pci"), (4, "--entropy")] {
        let image = image(dir.path(), transport, 1 << 20);
        attack(&disk(&image, ""), &[transport, "--irqchip", "kernel"], seed);
    }
}
