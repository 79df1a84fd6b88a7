//! A guest that attacks every virtio device of its machine, on this machine's /dev/kvm: bulle ends
//! with the guest, in time; it grows neither in memory nor in descriptors; what is the host's and
//! what is another machine's stays as it was.
//!
//! Not part of a plain `cargo test`, since it needs KVM: `cargo test --test hostile`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Bulle, Input, Outcome, Running};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

/// The payload's word: it writes no sector behind these.
const ATTACKED: usize = 64 * 512;
/// Growth of bulle's own memory that is no leak: stacks, caches and buffers that are used once.
const GROWTH: u64 = 4096;
/// What connections that are not read may take while they last: 16 of 256 KiB at a time, and what
/// 4096 of them are described by.
const CONNECTIONS: u64 = 16 << 10;
/// File descriptors that bulle may have. A share takes up to a quarter, sockets up to half.
const DESCRIPTORS: u64 = 1024;
/// io_uring's rings: one for each queue of the disks that use it, while their driver runs.
const RINGS: usize = 3;
/// On a machine with much else to do, an attack on all devices took 217 seconds.
const DEADLINE: Duration = Duration::from_secs(500);

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
    /// Of these, io_uring's, which come and go with rings.
    workers: usize,
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
        let tasks = fs::read_dir(proc.join("task")).ok()?.flatten();
        let names = tasks.map(|task| fs::read_to_string(task.path().join("comm")));
        let workers = names.flatten().filter(|name| name.starts_with("iou-"));
        Some(Self {
            workers: workers.count(),
            rss,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// Threads that bulle made.
    fn own(&self) -> usize {
        self.threads.saturating_sub(self.workers)
    }
}

/// Looks at the process until it has ended; what it had at most besides.
fn watch(mut running: Running) -> (Outcome, Footprint) {
    let before = Footprint::of(&running).unwrap();
    let mut most = Footprint { ..before };
    let (mut samples, mut at_rest) = (0, 0);
    let mut seen = String::new();
    while running.is_running() {
        std::thread::sleep(Duration::from_millis(100));
        seen += &running.more_output();
        let rests = seen.contains("at rest");
        let Some(now) = Footprint::of(&running).filter(|now| now.own() >= before.own()) else {
            continue; // it is about to end
        };
        let (rss, descriptors) = match rests {
            true => (GROWTH, 0),
            false => (GROWTH + CONNECTIONS, DESCRIPTORS as usize / 2 + RINGS),
        };
        assert!(
            now.rss <= before.rss + rss,
            "grew from {before:?} to {now:?}, at rest: {rests}\n{seen}"
        );
        assert!(
            now.descriptors <= before.descriptors + descriptors,
            "{before:?} to {now:?}, at rest: {rests}\n{seen}"
        );
        // io_uring's workers are threads, and few.
        assert!(now.threads <= before.threads + 16, "{before:?} to {now:?}");
        most.rss = most.rss.max(now.rss);
        most.descriptors = most.descriptors.max(now.descriptors);
        samples += 1;
        at_rest += u32::from(rests);
        if at_rest == 5 {
            running = running.types("x");
        }
    }
    assert!(
        samples > 10 && at_rest > 0,
        "watched only {samples} times, {at_rest} at rest\n{seen}"
    );
    most.rss -= before.rss;
    most.descriptors -= before.descriptors;
    (running.finish(), most)
}

/// Runs the hostile guest with `devices`, disks first.
fn attack(devices: &[String], transport: &[&str], seed: u64) -> (Outcome, Footprint) {
    attack_by(Bulle::run(), devices, transport, seed)
}

fn attack_by(
    bulle: Bulle,
    devices: &[String],
    transport: &[&str],
    seed: u64,
) -> (Outcome, Footprint) {
    let append = format!("seed={seed}");
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).unwrap();
    let place = tempfile::tempdir().unwrap();
    let mut running = bulle
        .args(["--root", "none", "--kernel"])
        .arg(common::payload("hostile"))
        .args(["--memory", "128M", "--append", &append])
        .args(["--name", "hostile", "--runtime-dir"])
        .arg(place.path())
        .args(transport)
        .args(devices)
        .input(Input::Open)
        .timeout("490s")
        .patience(DEADLINE)
        .start()
        .wait_for("ready\n");
    // Commands find it some time after its start, for which it has files open from then on.
    while !place.path().join("hostile/api.sock").exists() {
        assert!(running.is_running(), "{:#?}", running.finish());
        std::thread::sleep(Duration::from_millis(10));
    }
    let (outcome, most) = watch(running);
    let outcome = outcome.exits(0).prints("survived\n").within(DEADLINE);
    assert!(!outcome.stderr.contains("panicked"), "{outcome:#?}");
    // Every device is allowed eight lines of what the driver did, and some of what the host did.
    let lines = outcome.stderr.lines().count();
    assert!(lines <= 200, "{lines} lines of log: {outcome:#?}");
    (outcome, most)
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
    devices.extend(shares(dir));
    for (option, to, file) in [
        ("--port", "file=file:", "log"),
        ("--port", "clients=socket:", "clients"),
    ] {
        devices.push(option.to_owned());
        devices.push(format!("{to}{}", dir.join(file).display()));
    }
    image(dir, "pmem", 2 << 20);
    devices.extend(path("--pmem", "pmem"));
    let others = ["--entropy", "--rtc", "--balloon", "--hotplug-memory"];
    devices.extend(others.map(str::to_owned));
    devices.push("total=256M,requested=128M".into());
    (devices, images)
}

/// Two shares, one of them read-only, beside what nobody shared.
fn shares(dir: &Path) -> Vec<String> {
    let mut options = Vec::new();
    fs::write(dir.join("secret"), "kept").unwrap();
    for (name, more) in [("written", ""), ("kept", ",ro")] {
        let share = dir.join(name);
        fs::create_dir(&share).unwrap();
        fs::write(share.join("file"), "contents").unwrap();
        fs::write(share.join("victim"), "more contents").unwrap();
        fs::write(share.join("large"), pattern(1 << 20)).unwrap();
        symlink("..", share.join("link")).unwrap();
        options.push("--share".to_owned());
        options.push(format!("path={},tag={name}{more}", share.display()));
    }
    options
}

/// All that is in a directory: mode, owner, links, time of the last change, contents.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (u32, u32, u64, i64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    for path in entries.chain([dir.to_owned()]) {
        let stat = fs::symlink_metadata(&path).unwrap();
        let contents = stat.is_file().then(|| fs::read(&path).unwrap());
        let time = stat.ctime() * 1_000_000_000 + stat.ctime_nsec();
        let entry = (
            stat.mode(),
            stat.uid(),
            stat.nlink(),
            time,
            contents.unwrap_or_default(),
        );
        all.insert(path, entry);
    }
    all
}

/// Accepts the guest's connections to port 1024, says something to each, and reads nothing.
fn listen(dir: &Path) {
    let listener = UnixListener::bind(dir.join("socket_1024")).unwrap();
    std::thread::spawn(move || {
        let mut last = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write(b"said to everybody who connects\n");
            last.push(stream);
            if last.len() > 64 {
                last.remove(0);
            }
        }
    });
}

/// A network that sends back what it gets, and frames of its own now and then. The guest's end, as
/// bulle inherits it.
fn network() -> UnixStream {
    let (guest, mut host) = UnixStream::pair().unwrap();
    fcntl(&guest, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut prefix = [0; 4];
        for count in 0_u32.. {
            host.read_exact(&mut prefix)?;
            let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
            host.read_exact(&mut frame)?;
            host.write_all(&[&prefix[..], &frame].concat())?;
            if count % 16 == 0 {
                let len = [60, 1514, 9000, 65553][count as usize / 16 % 4];
                let more = vec![0xff; len as usize];
                host.write_all(&[&u32::to_be_bytes(len)[..], &more].concat())?;
            }
        }
        Ok(())
    });
    guest
}

/// All devices on one transport, beside a machine that minds its own business.
fn attack_all(transport: &[&str], seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let quiet = image(dir.path(), "quiet", 1 << 20);
    let neighbour = Bulle::payload("disk_pattern")
        .args(disk(&quiet, ""))
        .args(transport)
        .input(Input::Open)
        .timeout("510s")
        .patience(DEADLINE * 2)
        .start()
        .wait_for("round 1\n");
    let (mut devices, images) = devices(dir.path());
    listen(dir.path());
    let network = network();
    devices.extend(["--net".to_owned(), format!("fd={}", network.as_raw_fd())]);
    let kept = tree(&dir.path().join("kept"));
    let (outcome, most) = attack(&devices, transport, seed);
    println!("at most {most:?} more than before");
    // Files and connections were opened until there were enough.
    assert!(most.descriptors > 200, "{most:?} is no attack");
    assert_eq!(
        outcome.stdout.matches("works true\n").count(),
        13,
        "{outcome:#?}"
    );
    assert!(
        tree(&dir.path().join("kept")) == kept,
        "a read-only share was changed"
    );
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"kept");
    assert!(!dir.path().join("new").exists());
    assert!(fs::read(dir.path().join("written/large")).unwrap() == pattern(1 << 20));

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

#[test]
fn a_tap_survives() {
    for (seed, transport) in [(5, &["--pci"][..]), (6, &[])] {
        let tap = ["--net", "tap=bulle%d,queues=2"].map(str::to_owned);
        let (outcome, _) = attack_by(Bulle::in_a_network(), &tap, transport, seed);
        outcome.prints("device 1 works true\n");
    }
}

/// With hvc0 nobody reads COM1, so the payload's exit code says how it went.
#[test]
fn hvc0_and_ports_survive() {
    for (seed, transport) in [(7, &[][..]), (8, &["--pci"])] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name).display().to_string();
        let mut running = Bulle::payload("hostile")
            .args([
                "--memory",
                "128M",
                "--append",
                &format!("seed={seed} steps=500"),
            ])
            .args(transport)
            .args(["--console", &format!("hvc0={}", path("hvc0"))])
            .args(["--port", &format!("clients=socket:{}", path("clients"))])
            .args(["--port", &format!("file=file:{}", path("log"))])
            .timeout("490s")
            .patience(DEADLINE)
            .start();
        let size = |name| fs::metadata(path(name)).map_or(0, |file| file.len());
        let (mut before, mut most) = (None, None);
        while running.is_running() {
            std::thread::sleep(Duration::from_millis(20));
            // The console's first output: bulle is as large as it gets.
            if size("hvc0") > 0 {
                most = Footprint::of(&running).or(most);
                before = before.or(most.as_ref().map(|now| (now.rss, now.threads)));
            }
        }
        let outcome = running.finish().exits(0).within(DEADLINE);
        assert!(!outcome.stderr.contains("panicked"), "{outcome:#?}");
        assert!(outcome.stderr.lines().count() <= 50, "{outcome:#?}");
        let (before, most) = (before.unwrap(), most.unwrap());
        assert!(most.rss <= before.0 + GROWTH, "{before:?} to {most:?}");
        assert!(most.threads <= before.1, "{before:?} to {most:?}");
        assert!(size("hvc0") >= 2 * 4096 && size("log") > 0);
    }
}
