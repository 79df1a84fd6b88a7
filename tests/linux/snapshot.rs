//! A stock Debian guest that is saved while it works and loaded in another process.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulle::snapshot::Snapshot;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{self, Input, Running, debian_kernel};
use crate::machine::initrd_with;
use crate::served::Served;
use crate::state_file;
use crate::vsock::{ECHO, dial};

/// Each round writes to the disk, reads that back past the cache, and says so with a number that only
/// its memory has, its time and random bytes. What it has of hot-pluggable memory takes a file, which it
/// looks at too.
const WORK: &str = r#"
    guest-tool serve >/dev/null &
    kept() { true; }
    if grep -q virtio_mem /proc/modules; then
        until [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 250000 ]; do sleep 0.2; done
        free() { awk '/^Node/ { zone = $4 } zone == "Movable" && $2 == "free" { print $3 }' /proc/zoneinfo; }
        before=$(free)
        mkdir /m; mount -t tmpfs none /m
        dd if=/dev/urandom of=/m/big bs=1M count=32 2>/dev/null
        [ $((before - $(free))) -gt 7000 ] || echo LOST into other memory: $before $(free)
        digest=$(md5sum </m/big)
        kept() { [ "$(md5sum </m/big)" = "$digest" ]; }
    fi
    random() { hexdump -n $1 -v -e '/1 "%02x"' /dev/urandom; }
    nonce=$(random 8)
    n=0
    while :; do
        at=$((n % 16 * 2))
        dd if=/dev/urandom of=/written bs=64k count=2 2>/dev/null
        dd if=/written of=/dev/vda bs=64k seek=$at conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda of=/read bs=64k skip=$at count=2 2>/dev/null
        cmp /written /read || echo LOST
        [ $((n % 4)) != 0 ] || kept || echo LOST memory
        echo round $n $nonce $(date +%s) $(random 32)
        n=$((n + 1))
    done"#;

/// What a round says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Round {
    number: u64,
    nonce: String,
    time: u64,
    random: String,
}

/// All that the guest said, over all processes that it lived in.
#[derive(Clone, Default)]
struct Story(String);

impl Story {
    fn rounds(&self) -> Vec<Round> {
        let whole = self.0.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let rounds = whole.lines().filter_map(|line| {
            let mut words = line.trim_end().strip_prefix("round ")?.split(' ');
            let mut word = || words.next().unwrap().to_owned();
            Some(Round {
                number: word().parse().unwrap(),
                nonce: word(),
                time: word().parse().unwrap(),
                random: word(),
            })
        });
        rounds.collect()
    }

    /// Listens for `more` rounds.
    #[track_caller]
    fn follow(&mut self, vm: &mut Served, more: usize) {
        let wanted = self.rounds().len() + more;
        let begin = Instant::now();
        while self.rounds().len() < wanted {
            self.0.push_str(&vm.running.more_output());
            let late = begin.elapsed() > Duration::from_secs(200) || !vm.running.is_running();
            assert!(!late, "no {wanted} rounds: {}", self.0);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The guest lost nothing, and its kernel has nothing to complain of.
    #[track_caller]
    fn sound(&self) {
        for word in ["LOST", "lockup", "BUG", "stall", "I/O error", "Call Trace"] {
            assert!(!self.0.contains(word), "{word}: {}", self.0);
        }
    }

    /// The guest lost nothing, said everything once, and its kernel has nothing to complain of.
    #[track_caller]
    fn check(&self) {
        self.sound();
        let rounds = self.rounds();
        for (number, round) in (0..).zip(&rounds) {
            assert_eq!(round.number, number, "{}", self.0);
            assert_eq!(round.nonce, rounds[0].nonce);
        }
    }
}

/// A guest at work, and the files of its disk and its snapshot.
struct Worker {
    dir: TempDir,
    vm: Served,
    story: Story,
}

impl Worker {
    fn start(flavour: &str, machine: Value, hotplug: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
        let bin = dir.path().join("tree/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy(common::guest_tool(), bin.join("guest-tool")).unwrap();
        let transport = match machine["virtio_transport"] == "pci" {
            true => "virtio_pci",
            false => "virtio_mmio",
        };
        let mut modules = vec![transport, "virtio_blk", "vmw_vsock_virtio_transport"];
        if hotplug {
            modules.push("virtio_mem");
        }
        let initrd = initrd_with(dir.path(), flavour, &modules, WORK);
        let mut vm = Served::new();
        let source = json!({
            "kernel_image_path": debian_kernel(flavour),
            "initrd_path": initrd,
            "boot_args": "console=ttyS0 quiet memhp_default_state=online_movable",
        });
        vm.put("/boot-source", source).done();
        let mut config = json!({ "vcpu_count": 2, "mem_size_mib": 192 });
        let fields = machine.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(fields);
        vm.put("/machine-config", config).done();
        vm.put(
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk }),
        )
        .done();
        let path = dir.path().join("v");
        vm.put("/vsock", json!({ "guest_cid": 9, "uds_path": path }))
            .done();
        if hotplug {
            let memory = json!({ "total_size_mib": 256 });
            vm.put("/hotplug/memory", memory).done();
        }
        let mut vm = vm.start();
        if hotplug {
            let more = json!({ "requested_size_mib": 128 });
            vm.patch("/hotplug/memory", more).done();
        }
        let mut story = Story::default();
        story.follow(&mut vm, 2);
        Self { dir, vm, story }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pause(&mut self) {
        self.vm.patch("/vm", json!({ "state": "Paused" })).done();
    }

    /// Saves the guest; nothing of it runs any more.
    fn save(&mut self, name: &str) {
        self.save_as("Full", name);
    }

    fn save_as(&mut self, kind: &str, name: &str) {
        self.pause();
        let files = json!({
            "snapshot_type": kind,
            "snapshot_path": self.path(&format!("{name}.state")),
            "mem_file_path": self.path(&format!("{name}.memory")),
        });
        self.vm.put("/snapshot/create", files).done();
        std::thread::sleep(Duration::from_millis(300));
        self.story.0.push_str(&self.vm.running.more_output());
    }

    /// Another process with the saved guest; `more` is added to what is asked.
    fn load(&self, name: &str, more: Value) -> Served {
        let mut body = json!({
            "snapshot_path": self.path(&format!("{name}.state")),
            "mem_backend": {
                "backend_type": "File",
                "backend_path": self.path(&format!("{name}.memory")),
            },
            "resume_vm": true,
        });
        let fields = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        let mut vm = Served::new();
        vm.put("/snapshot/load", body).done();
        vm
    }
}

/// Whether the guest sends back what is sent.
fn echoes(stream: &mut UnixStream, text: &str) -> bool {
    let mut back = vec![0; text.len()];
    let sent = stream.write_all(text.as_bytes());
    sent.and_then(|()| stream.read_exact(&mut back)).is_ok() && back == text.as_bytes()
}

/// Dials a guest that may have much else to do at first.
fn dial_soon(socket: &Path) -> UnixStream {
    let begin = Instant::now();
    loop {
        if let Some(stream) = dial(socket, ECHO) {
            return stream;
        }
        let late = begin.elapsed() > Duration::from_secs(100);
        assert!(!late, "the guest does not listen any more");
    }
}

/// Work goes on over pauses and several snapshots, and sockets are there again; with `hotplug` in memory
/// that the guest got while it ran.
fn goes_on(flavour: &str, machine: Value, hotplug: bool) {
    let mut worker = Worker::start(flavour, machine, hotplug);
    let socket = worker.path("v");
    let mut stream = dial(&socket, ECHO).expect("the guest listens");
    assert!(echoes(&mut stream, "before"));
    // A pause and no more: the connection is as it was.
    worker.pause();
    worker.vm.patch("/vm", json!({ "state": "Resumed" })).done();
    assert!(echoes(&mut stream, "after a pause"));
    for cycle in 0..3 {
        let name = format!("cycle{cycle}");
        // Those behind the first build on each other.
        worker.save_as(if cycle == 0 { "Full" } else { "Diff" }, &name);
        if cycle == 0 {
            // So does the machine that was saved, when it goes on.
            worker.vm.patch("/vm", json!({ "state": "Resumed" })).done();
            assert!(echoes(&mut stream, "after it was saved"));
            worker.pause();
            let mut later = worker.story.clone();
            later.0.push_str(&worker.vm.running.more_output());
            later.check();
            // What it did to the disk since is not what the snapshot knows.
            worker.story = later;
            worker.save(&name);
        }
        let file = |kind: &str| worker.dir.path().join(format!("{name}.{kind}"));
        let snapshot = Snapshot::open(&file("state"), &file("memory")).unwrap();
        assert_eq!(snapshot.layers.len(), cycle + 1);
        worker.vm = {
            // Kills the old process before there is a new one.
            let old = std::mem::replace(&mut worker.vm, Served::new());
            drop(old);
            worker.load(&name, json!({}))
        };
        assert!(!echoes(&mut stream, "from nobody"));
        // The listener is alive, and the guest has forgotten what was connected.
        stream = dial_soon(&socket);
        assert!(echoes(&mut stream, "again"));
        let (vm, story) = (&mut worker.vm, &mut worker.story);
        story.follow(vm, 4);
    }
    worker.story.check();
}

#[test]
fn a_guest_goes_on_in_another_process_on_mmio() {
    goes_on("amd64", json!({ "virtio_transport": "mmio" }), false);
}

#[test]
fn a_guest_goes_on_in_another_process_on_pci() {
    goes_on(
        "cloud-amd64",
        json!({ "virtio_transport": "pci", "irqchip": "kernel" }),
        true,
    );
}

/// In seconds.
const HOUR: u64 = 3600;

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs()
}

#[test]
fn clones_have_the_time_that_was_asked_for() {
    let mut worker = Worker::start("amd64", json!({}), false);
    worker.save("saved");
    let saved = now();
    worker.vm = Served::new();
    // As if it had been saved an hour ago.
    let path = worker.path("saved.state");
    let state = fs::read(&path).unwrap();
    let mut machine = state_file::section(&state, "machine");
    let time = state_file::field(&mut machine, &["vm", "realtime"]);
    let was: u64 = time.as_integer().unwrap().try_into().unwrap();
    *time = (was - HOUR * 1_000_000_000).into();
    fs::write(&path, state_file::with(&state, "machine", &machine)).unwrap();
    for realtime in [true, false] {
        let begin = now();
        let mut vm = worker.load("saved", json!({ "clock_realtime": realtime }));
        let mut story = worker.story.clone();
        story.follow(&mut vm, 3);
        story.check();
        let said = story.rounds().last().unwrap().time;
        let ran = now() - begin;
        let expected = if realtime { now() + HOUR } else { saved + ran };
        assert!(
            said.abs_diff(expected) <= 2 + ran / 2,
            "{realtime}: the guest has {said}, not {expected}; saved {saved}, ran {ran}"
        );
    }
}

#[test]
fn clones_do_not_share_their_randomness() {
    let mut worker = Worker::start("amd64", json!({ "vcpu_count": 1 }), false);
    worker.save("saved");
    worker.vm = Served::new();
    let before = worker.story.rounds().len();
    let clones: Vec<_> = (0..2)
        .map(|_| {
            let mut vm = worker.load("saved", json!({}));
            let mut story = worker.story.clone();
            story.follow(&mut vm, 3);
            story.check();
            story.rounds().split_off(before)
        })
        .collect();
    let [first, second] = &clones[..] else {
        panic!("two clones");
    };
    // One that was on its way to the console when the guest was saved may be the same.
    for (one, other) in first.iter().zip(second).skip(1) {
        assert_eq!((one.number, &one.nonce), (other.number, &other.nonce));
        assert_ne!(one.random, other.random, "{clones:#?}");
    }
    in_waiting_processes(&worker, &first[0].nonce);
}

/// Clones whose processes had the saved registers before they were told what to become.
fn in_waiting_processes(worker: &Worker, nonce: &str) {
    let place = tempfile::tempdir().unwrap();
    for (from, to) in [("saved.state", "state"), ("saved.memory", "memory")] {
        fs::hard_link(worker.path(from), worker.path(to)).unwrap();
    }
    let bulle = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.args(words).env("BULLE_RUNTIME_DIR", place.path());
        Running::start(command, Input::Null, Duration::from_secs(100)).finish()
    };
    for number in ["1", "2"] {
        fs::copy(worker.path("disk"), worker.path(&format!("disk{number}"))).unwrap();
    }
    let directory = worker.path("").display().to_string();
    let (disk, vsock) = (format!("d={directory}/disk%n"), format!("{directory}/v%n"));
    let words = ["clone", &directory, "--count", "2", "--name", "waited"];
    let rebind = ["--drive", &disk, "--vsock", &vsock];
    bulle(&[&words[..], &rebind].concat()).exits(0);
    let clones = ["waited-1", "waited-2"].map(|name| {
        let mut story = Story::default();
        let begin = Instant::now();
        while story.rounds().len() < 3 {
            assert!(begin.elapsed() < Duration::from_secs(200), "{}", story.0);
            std::thread::sleep(Duration::from_millis(200));
            story = Story(bulle(&["logs", name]).exits(0).stdout);
        }
        story.sound();
        bulle(&["kill", name]).exits(0);
        story.rounds()
    });
    for (one, other) in clones[0].iter().zip(&clones[1]).skip(1) {
        assert_eq!((&one.nonce[..], &other.nonce[..]), (nonce, nonce));
        assert_ne!(one.random, other.random, "{clones:#?}");
    }
}
