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
use crate::vsock::{ECHO, TIME, dial};

/// Each round writes to the disk, reads that back past the cache, and says so with a number that only
/// its memory has, and random bytes. Every fourth one looks at a file in memory; where there is
/// hot-pluggable memory the file is in that.
const WORK: &str = r#"
    guest-tool serve >/dev/null &
    if grep -q virtio_mem /proc/modules; then
        until [ $(awk '/MemTotal/ { print $2 }' /proc/meminfo) -gt 250000 ]; do sleep 0.2; done
        free() { awk '/^Node/ { zone = $4 } zone == "Movable" && $2 == "free" { print $3 }' /proc/zoneinfo; }
        before=$(free)
        mkdir /m; mount -t tmpfs none /m
        dd if=/dev/urandom of=/m/big bs=1M count=32 2>/dev/null
        [ $((before - $(free))) -gt 7000 ] || echo LOST into other memory: $before $(free)
    else
        dd if=/dev/urandom of=/big bs=1M count=4 2>/dev/null
        ln -s . /m
    fi
    digest=$(md5sum </m/big)
    kept() { [ "$(md5sum </m/big)" = "$digest" ]; }
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
        echo round $n $nonce $(random 32)
        n=$((n + 1))
    done"#;

/// Most snapshots that build on each other before there is a full one again.
const CHAIN: usize = 40;
/// How long a guest goes on in one process after the other, unless SNAPSHOT_CYCLES says how often: a slow
/// machine is content with fewer.
const MOVING: Duration = Duration::from_secs(200);
/// How often at least.
const FEW: usize = 5;

/// A number from the environment, for longer rounds by hand.
fn from_env(name: &str) -> Option<usize> {
    let given = std::env::var(name).ok();
    given.map(|text| text.parse().unwrap())
}

/// What a round says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Round {
    number: u64,
    nonce: String,
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
    /// With so many processes beside that take all the time that there is.
    fn start(flavour: &str, machine: Value, hotplug: bool, stress: usize) -> Self {
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
        let spin = "(while :; do :; done) &\n".repeat(stress);
        let script = format!("{spin}{WORK}");
        let initrd = initrd_with(dir.path(), flavour, &modules, &script);
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

    /// The guest goes on in another process; this one is killed before.
    fn move_to(&mut self, name: &str) {
        drop(std::mem::replace(&mut self.vm, Served::new()));
        self.vm = self.load(name, json!({}));
    }

    /// How many snapshots that one is made of.
    fn layers(&self, name: &str) -> usize {
        let file = |kind: &str| self.path(&format!("{name}.{kind}"));
        let snapshot = Snapshot::open(&file("state"), &file("memory")).unwrap();
        snapshot.layers.len()
    }

    fn follow(&mut self, more: usize) {
        self.story.follow(&mut self.vm, more);
    }
}

/// Whether the guest sends back what is sent.
fn echoes(stream: &mut UnixStream, text: &str) -> bool {
    let mut back = vec![0; text.len()];
    let sent = stream.write_all(text.as_bytes());
    sent.and_then(|()| stream.read_exact(&mut back)).is_ok() && back == text.as_bytes()
}

/// Dials a port of a guest that may have much else to do at first.
fn dial_soon(socket: &Path, port: u32) -> UnixStream {
    let begin = Instant::now();
    loop {
        if let Some(stream) = dial(socket, port) {
            return stream;
        }
        let late = begin.elapsed() > Duration::from_secs(100);
        assert!(!late, "the guest does not listen any more");
    }
}

/// Work goes on over pauses and `cycles` snapshots, and sockets are there again; with `hotplug` in memory
/// that the guest got while it ran.
fn goes_on(flavour: &str, machine: Value, hotplug: bool, cycles: usize) {
    let stress = from_env("SNAPSHOT_STRESS").unwrap_or(1);
    let mut worker = Worker::start(flavour, machine, hotplug, stress);
    let socket = worker.path("v");
    let mut stream = dial(&socket, ECHO).expect("the guest listens");
    assert!(echoes(&mut stream, "before"));
    // A pause and no more: the connection is as it was.
    worker.pause();
    worker.vm.patch("/vm", json!({ "state": "Resumed" })).done();
    assert!(echoes(&mut stream, "after a pause"));
    let given = from_env("SNAPSHOT_CYCLES");
    let (begin, mut layers) = (Instant::now(), 0);
    let more = |cycle: &usize| given.is_some() || *cycle < FEW || begin.elapsed() < MOVING;
    for cycle in (0..given.unwrap_or(cycles)).take_while(more) {
        layers = cycle % CHAIN + 1;
        let name = format!("cycle{cycle}");
        // Those behind the first build on each other, until the chain is long.
        let kind = if layers == 1 { "Full" } else { "Diff" };
        worker.save_as(kind, &name);
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
        assert_eq!(worker.layers(&name), layers);
        println!("cycle {cycle}");
        worker.move_to(&name);
        assert!(!echoes(&mut stream, "from nobody"));
        // The listener is alive, and the guest has forgotten what was connected.
        stream = dial_soon(&socket, ECHO);
        assert!(echoes(&mut stream, "again"));
        worker.follow(if cycle < FEW { 4 } else { 2 });
    }
    if !hotplug {
        chained(&mut worker, layers);
    }
    worker.story.check();
}

/// Snapshots of what changed, one on the other and on `layers` before them, while the guest goes on in one
/// process; the last one is loaded.
fn chained(worker: &mut Worker, layers: usize) {
    let diffs = from_env("SNAPSHOT_DIFFS").unwrap_or(20);
    for number in 0..diffs {
        if number > 0 {
            worker.vm.patch("/vm", json!({ "state": "Resumed" })).done();
            std::thread::sleep(Duration::from_millis(200));
        }
        worker.save_as("Diff", &format!("diff{number}"));
    }
    let last = format!("diff{}", diffs - 1);
    assert_eq!(worker.layers(&last), layers + diffs);
    worker.move_to(&last);
    worker.follow(4);
}

#[test]
fn a_guest_goes_on_in_another_process_on_mmio() {
    goes_on("amd64", json!({ "virtio_transport": "mmio" }), false, 60);
}

#[test]
fn a_guest_goes_on_in_another_process_on_pci() {
    goes_on(
        "cloud-amd64",
        json!({ "virtio_transport": "pci", "irqchip": "kernel" }),
        true,
        40,
    );
}

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;
/// Linux before 6.10 gets longer jumps wrong (docs/snapshots.md).
const LONG: u64 = 30 * MINUTE;

/// This machine's time in milliseconds.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_millis() as u64
}

/// How far the guest's clock is ahead of this machine's, and how far that may be from the truth, in
/// milliseconds: the best of several answers.
fn ahead(stream: &mut UnixStream) -> (i64, u64) {
    let answers = (0..5).map(|_| {
        let (begin, mut nanos) = (now(), [0; 8]);
        stream.write_all(b"?").unwrap();
        stream.read_exact(&mut nanos).unwrap();
        let (end, said) = (now(), u64::from_le_bytes(nanos) / 1_000_000);
        let doubt = (end - begin).div_ceil(2);
        (said as i64 - (begin + doubt) as i64, doubt)
    });
    answers.min_by_key(|(_, doubt)| *doubt).unwrap()
}

#[test]
fn clones_have_the_time_that_was_asked_for() {
    let mut worker = Worker::start("amd64", json!({}), false, 0);
    let socket = worker.path("v");
    let (before, _) = ahead(&mut dial(&socket, TIME).expect("the guest listens"));
    let stands = now();
    worker.save("saved");
    worker.vm = Served::new();
    let path = worker.path("saved.state");
    let state = fs::read(&path).unwrap();
    let disk = fs::read(worker.path("disk")).unwrap();
    for (ago, realtime) in [(LONG, true), (MINUTE, true), (HOUR, false)] {
        // As if it had been saved some time ago.
        let mut machine = state_file::section(&state, "machine");
        let time = state_file::field(&mut machine, &["vm", "realtime"]);
        let was: u64 = time.as_integer().unwrap().try_into().unwrap();
        *time = (was - ago * 1_000_000).into();
        fs::write(&path, state_file::with(&state, "machine", &machine)).unwrap();
        // The one before may have written all over what this one is about to read.
        fs::write(worker.path("disk"), &disk).unwrap();
        let begin = Instant::now();
        let mut vm = worker.load("saved", json!({ "clock_realtime": realtime }));
        let stood = now() - stands;
        let (after, doubt) = ahead(&mut dial_soon(&socket, TIME));
        // The time that was not slept as well.
        let (expected, allowed) = match realtime {
            true => (ago as i64, 500),
            false => (-(stood as i64), 3000),
        };
        let off = (after - before - expected).unsigned_abs();
        assert!(
            off <= allowed + doubt,
            "{ago} ms ago, {realtime}: {off} ms off, {doubt} ms in doubt; {after} after {before}"
        );
        let mut story = worker.story.clone();
        story.follow(&mut vm, 3);
        // Watchdogs of the guest's kernel look every 4 s.
        while ago >= LONG && begin.elapsed() < Duration::from_secs(10) {
            story.follow(&mut vm, 1);
        }
        story.check();
    }
}

#[test]
fn clones_do_not_share_their_randomness() {
    let mut worker = Worker::start("amd64", json!({ "vcpu_count": 1 }), false, 0);
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
