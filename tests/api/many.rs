//! Many microVMs, one after the other, at once, and in one process: nothing of them is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::client::Client;
use crate::common::{Input, Running, payload};
use crate::served::boot;

const SEQUENCE: usize = 1000;
const AT_ONCE: usize = 100;
/// KiB that a process may grow by over a thousand starts.
const GROWTH: u64 = 4 << 10;
const PATIENCE: Duration = Duration::from_secs(100);

/// Where all files of a test are: sockets, entries, what a process may leave in /tmp.
struct Ground(TempDir);

impl Ground {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `bulle api`, with its client.
    fn serve(&self, number: usize) -> (Running, Client) {
        let socket = self.path(&format!("api{number}"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.args(["api", "--api-sock"]).arg(&socket);
        command.env("BULLE_RUNTIME_DIR", self.path("entries"));
        command.env("TMPDIR", self.0.path());
        let running = Running::start(command, Input::Null, Duration::from_secs(250));
        (running, Client::connect(&socket))
    }

    /// Fails the test unless nothing is left but the directory of entries.
    fn assert_empty(&self) {
        let names = |path: &Path| -> Vec<_> {
            let entries = fs::read_dir(path).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!(names(self.0.path()), ["entries"]);
        let none: [&str; 0] = [];
        assert_eq!(names(&self.path("entries")), none);
    }
}

/// Starts a payload.
fn start(client: &mut Client, name: &str, arguments: &str) {
    let mut source = boot(&payload(name));
    source["boot_args"] = arguments.into();
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 32 });
    for (path, body) in [
        ("/boot-source", source),
        ("/machine-config", machine),
        ("/actions", json!({ "action_type": "InstanceStart" })),
    ] {
        client.ask("PUT", path, &body.to_string()).done();
    }
}

/// Descriptors, threads, and KiB of memory without what guests have.
fn footprint(running: &Running) -> [u64; 3] {
    let proc = PathBuf::from(format!("/proc/{}", running.pid()));
    let count = |name| fs::read_dir(proc.join(name)).unwrap().count() as u64;
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let mut sizes = status.lines().filter_map(|l| l.strip_prefix("RssAnon:"));
    let size = sizes.next().unwrap().trim().split(' ').next().unwrap();
    [count("fd"), count("task"), size.parse().unwrap()]
}

/// The same when what the next start takes is open, which comes behind an answer.
fn footprint_at_rest(running: &Running) -> [u64; 3] {
    let open = PathBuf::from(format!("/proc/{}/fd", running.pid()));
    let machine = |fd: fs::DirEntry| {
        fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("anon_inode:kvm-vm"))
    };
    let begin = Instant::now();
    while !fs::read_dir(&open).unwrap().flatten().any(machine) {
        assert!(begin.elapsed() < PATIENCE, "no virtual machine ahead");
        std::thread::sleep(Duration::from_millis(1));
    }
    footprint(running)
}

#[test]
fn a_thousand_in_sequence_leave_nothing() {
    let ground = Ground::new();
    for number in 0..SEQUENCE {
        let (running, mut client) = ground.serve(number);
        start(&mut client, "exit_code", "exit=37");
        let outcome = running.finish().exits(37);
        assert_eq!(outcome.stderr, "", "number {number}");
    }
    ground.assert_empty();
}

#[test]
fn a_hundred_at_once_have_the_same_each_and_leave_nothing() {
    let ground = Ground::new();
    let mut all: Vec<_> = (0..AT_ONCE).map(|number| ground.serve(number)).collect();
    for (_, client) in &mut all {
        start(client, "hlt_interruptible", "");
        // Who answers that it runs has opened all that it needs.
        let state = client.ask("GET", "/", "").value()["state"].clone();
        assert_eq!(state, "Running");
    }
    let first = footprint(&all[0].0);
    for (running, _) in &all {
        let [descriptors, threads, memory] = footprint(running);
        assert_eq!([descriptors, threads], first[..2], "of {}", running.pid());
        assert!(memory < 40 << 10, "{memory} KiB");
    }
    let signalled = all
        .into_iter()
        .map(|(running, _)| running.signal(Signal::SIGTERM));
    for running in signalled.collect::<Vec<_>>() {
        let pid = running.pid();
        running.finish();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
    ground.assert_empty();
}

#[test]
fn a_thousand_failed_starts_leave_nothing_in_the_process() {
    let ground = Ground::new();
    let (running, mut client) = ground.serve(0);
    let disk = ground.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let drive = json!({ "drive_id": "d", "path_on_host": disk });
    // The disk is opened by then.
    let net = json!({ "iface_id": "n", "host_dev_name": "bulle-gone0" });
    for (path, body) in [
        ("/boot-source", boot(&payload("hello"))),
        ("/drives/d", drive),
        ("/network-interfaces/n", net),
    ] {
        client.ask("PUT", path, &body.to_string()).done();
    }
    let begin = json!({ "action_type": "InstanceStart" }).to_string();
    let mut fail = || {
        client
            .ask("PUT", "/actions", &begin)
            .refused(&["bulle-gone0"])
    };
    fail();
    let before = footprint_at_rest(&running);
    (0..SEQUENCE).for_each(|_| drop(fail()));
    let after = footprint_at_rest(&running);
    assert_eq!(after[..2], before[..2]);
    assert!(after[2] <= before[2] + GROWTH, "{before:?} to {after:?}");
}
