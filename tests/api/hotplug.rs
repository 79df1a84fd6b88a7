//! Devices that come and go while a guest runs: by requests, by commands, with and without its help.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::stat::fstat;
use serde_json::{Value, json};

use crate::client::{Client, request};
use crate::common::{Input, Running};
use crate::events::Listener;
use crate::served::{Served, boot};

/// The guest that says what comes and goes, not started.
fn configured() -> Served {
    let mut vm = Served::with(&["--enable-pci"]);
    let kernel = crate::common::payload("hotplug");
    vm.put("/boot-source", boot(&kernel)).done();
    vm
}

/// A disk of this many sectors whose first byte is `first`.
fn disk(vm: &Served, id: &str, sectors: usize, first: u8) -> Value {
    let mut content = vec![0; sectors * 512];
    content[0] = first;
    json!({ "drive_id": id, "path_on_host": vm.file(id, &content), "is_root_device": false })
}

fn delete(vm: &mut Served, path: &str) -> crate::client::Answer {
    vm.client.ask("DELETE", path, "")
}

/// Deletes what the guest gives up, however late it does.
#[track_caller]
fn given_up(vm: &mut Served, path: &str) {
    let begin = Instant::now();
    loop {
        let answer = delete(vm, path);
        let late = begin.elapsed() >= Duration::from_secs(5);
        if answer.status == 204 || late && answer.body.contains("\"no-device\"") {
            return;
        }
        assert!(answer.body.contains("\"guest-busy\""), "{answer:?}");
        assert!(begin.elapsed() < Duration::from_secs(60), "{answer:?}");
    }
}

impl Served {
    /// Whether its process has this socket open.
    fn has_open(&self, socket: &UnixStream) -> bool {
        let number = fstat(socket).unwrap().st_ino;
        let wanted = format!("socket:[{number}]");
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.running.pid())).unwrap();
        let mut links = open.flatten().flat_map(|fd| std::fs::read_link(fd.path()));
        links.any(|link| link.to_str() == Some(&wanted))
    }
}

fn ids(vm: &mut Served, section: &str, key: &str) -> Vec<String> {
    let config = vm.get("/vm/config").value();
    let list = config[section].as_array().cloned().unwrap_or_default();
    let id = |device: &Value| device[key].as_str().unwrap().to_owned();
    list.iter().map(id).collect()
}

/// What a disk counted that is gone stays in the sum, and one of its name begins anew.
fn sums_are_kept(metrics: &str) {
    let lines: Vec<Value> = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let reads = |at: usize, group: &str| lines[at][group]["read_count"].as_u64().unwrap_or(0);
    // The first is that of the start.
    let [there, gone, end] = [1, 2, 3];
    assert!(reads(there, "block_a") > 0, "{}", lines[there]);
    assert_eq!((reads(gone, "block"), reads(gone, "block_a")), (0, 0));
    assert!((1..100).contains(&reads(end, "block_a")), "{}", lines[end]);
    let both = reads(end, "block_a") + reads(end, "block_b");
    assert_eq!(reads(end, "block"), both + reads(end, "block_root"));
}

#[test]
fn devices_of_different_kinds_may_have_the_same_name() {
    let mut vm = configured();
    let mut root = disk(&vm, "x", 1, 0x11);
    root["is_root_device"] = true.into();
    vm.put("/drives/x", root).done();
    let mut vm = vm.start().wait_for("ready");
    let memory = vm.file("memory", &vec![0; 2 << 20]);
    let pmem = json!({ "id": "x", "path_on_host": memory });
    vm.put("/pmem/x", pmem).done();
    let mut vm = vm.wait_for("slot 2: driven true");
    let more = json!({ "ops": { "size": 10, "refill_time": 100 } });
    vm.patch("/pmem/x", json!({ "id": "x", "rate_limiter": more }))
        .done();
    delete(&mut vm, "/drives/x?force=true").refused(&["'x'", "root"]);
    delete(&mut vm, "/pmem/x?force=true").done();
    assert_eq!(ids(&mut vm, "pmem", "id"), [""; 0]);
    assert_eq!(ids(&mut vm, "drives", "drive_id"), ["x"]);
}

/// Of what another program is started with, such as passt, nothing is bulle's.
#[test]
fn what_is_open_closes_where_another_program_is_executed() {
    let mut vm = configured();
    let drive = disk(&vm, "d", 1, 0x11);
    vm.put("/drives/d", drive).done();
    let socket = vm.dir.path().join("v");
    vm.put("/vsock", json!({ "guest_cid": 3, "uds_path": socket }))
        .done();
    vm.put("/entropy", json!({})).done();
    vm.put(
        "/balloon",
        json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }),
    )
    .done();
    vm.put("/hotplug/memory", json!({ "total_size_mib": 128 }))
        .done();
    let mut vm = vm.start().wait_for("ready");
    let late = disk(&vm, "late", 1, 0x11);
    vm.put("/drives/late", late).done();
    let vm = vm.wait_for("first 0x11");
    let link = |path: &str| std::fs::read_link(path).ok();
    let own = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let handed: Vec<_> = own.map(|fd| link(fd.path().to_str().unwrap())).collect();
    let directory = format!("/proc/{}/fdinfo", vm.running.pid());
    let (mut seen, mut events) = (0, 0);
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let Ok(text) = std::fs::read_to_string(entry.path()) else {
            continue;
        };
        let flags = text
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        let link = link(&format!("/proc/{}/fd/{number}", vm.running.pid()));
        let closes = flags & nix::libc::O_CLOEXEC != 0;
        let event = link.as_deref() == Some(Path::new("anon_inode:[eventfd]"));
        events += usize::from(event && !closes);
        // What a test beside this one hands down to its own process comes here as well.
        let known = number <= 2 || closes || event || handed.contains(&link);
        assert!(known, "{number} is {link:?}");
        seen += 1;
    }
    assert!(seen > 30, "{seen}");
    // Each loop of event-manager has an event that does not close: the main thread's, and those of I/O.
    let threads = std::fs::read_dir(format!("/proc/{}/task", vm.running.pid())).unwrap();
    let names = threads.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
    let loops = names.filter(|name| name.as_ref().is_ok_and(|name| name.starts_with("io")));
    assert!(events <= 1 + loops.count(), "{events}");
}

#[test]
fn a_disk_comes_and_goes_and_another_takes_its_place() {
    let mut vm = configured();
    let root = disk(&vm, "root", 1, 0x11);
    vm.put("/drives/root", root).done();
    let metrics = vm.dir.path().join("metrics");
    vm.put("/metrics", json!({ "metrics_path": metrics }))
        .done();
    let mut vm = vm.start().wait_for("ready");
    let a = disk(&vm, "a", 8, 0xa1);
    vm.put("/drives/a", a.clone()).done();
    let mut vm =
        vm.wait_for("slot 2: device 2\nsectors 8 read Some(0) first 0xa1\nwritten Some(0)");
    vm.put("/drives/a", a).refused(&["Device ID in use"]);
    assert_eq!(ids(&mut vm, "drives", "drive_id"), ["root", "a"]);
    let written = std::fs::read(vm.dir.path().join("a")).unwrap();
    assert_eq!(written[512], 0x77);

    // The guest gives it up, and the file with it.
    vm.action("FlushMetrics").done();
    given_up(&mut vm, "/drives/a");
    vm.action("FlushMetrics").done();
    let mut vm = vm.wait_for("slot 2 is to go\nslot 2 is there: false");
    assert_eq!(ids(&mut vm, "drives", "drive_id"), ["root"]);
    delete(&mut vm, "/drives/a").refused(&["Device not found", "'a'"]);
    let b = disk(&vm, "b", 16, 0xb1);
    vm.put("/drives/b", b).done();
    let vm = vm.wait_for("sectors 16 read Some(0) first 0xb1");
    let mut vm = vm;
    let again = disk(&vm, "a", 8, 0xa2);
    vm.put("/drives/a", again).done();
    let mut vm = vm.wait_for("slot 3: device 2\nsectors 8 read Some(0) first 0xa2");
    // Limits and images of a disk that came later.
    let limits = json!({ "ops": { "size": 1000, "refill_time": 100 } });
    vm.patch(
        "/drives/b",
        json!({ "drive_id": "b", "rate_limiter": limits }),
    )
    .done();
    let statistics = vm.get("/vm/statistics").value();
    let devices = statistics["devices"].as_array().unwrap();
    assert!(
        devices
            .iter()
            .any(|d| d["id"] == "b" && d["kind"] == "block")
    );
    vm.action("FlushMetrics").done();
    sums_are_kept(&std::fs::read_to_string(&metrics).unwrap());
    vm.types("q");
    vm.finish().exits(0);
}

#[test]
fn what_cannot_come_or_go_is_refused_and_nothing_changed() {
    let mut vm = configured();
    let mut root = disk(&vm, "root", 1, 0);
    root["is_root_device"] = true.into();
    vm.put("/drives/root", root.clone()).done();
    let mut vm = vm.start().wait_for("ready");
    delete(&mut vm, "/drives/root").refused(&["Cannot unplug root device"]);
    root["drive_id"] = "second".into();
    vm.put("/drives/second", root)
        .refused(&["A root block device already exists!"]);
    let a = disk(&vm, "a", 8, 0);
    let mut held = a.clone();
    held["path_on_host"] = vm.dir.path().join("root").to_str().into();
    vm.put("/drives/a", held).refused(&["the same disk"]);
    let mut gone = a.clone();
    gone["path_on_host"] = "/nothing".into();
    vm.put("/drives/a", gone).refused(&["/nothing"]);
    let mut group = a.clone();
    group["rate_limiter"] = json!({ "group": "g", "ops": { "size": 1, "refill_time": 1 } });
    vm.put("/drives/a", group).refused(&["a group is joined"]);
    vm.put("/pmem/a", json!({ "id": "a", "path_on_host": "/dev/null" }))
        .refused(&["not a regular file"]);
    let tap = json!({ "iface_id": "n", "host_dev_name": "bulle-gone0" });
    vm.put("/network-interfaces/n", tap)
        .refused(&["bulle-gone0"]);
    for path in ["/pmem/root", "/network-interfaces/root", "/drives/x"] {
        delete(&mut vm, path).refused(&["Device not found"]);
    }
    delete(&mut vm, "/drives/root?force=perhaps").refused(&["force", "'perhaps'"]);
    assert_eq!(ids(&mut vm, "drives", "drive_id"), ["root"]);
    // All that is refused leaves no slot and no descriptor behind: the bus can be filled.
    for n in 0..30 {
        let id = format!("d{n}");
        let body = disk(&vm, &id, 1, 0);
        vm.put(&format!("/drives/{id}"), body).done();
    }
    vm.put("/drives/a", a.clone()).refused(&["no free slot"]);
    delete(&mut vm, "/drives/d7?force=true").done();
    vm.put("/drives/a", a).done();
    assert_eq!(vm.state(), "Running");
}

#[test]
fn a_guest_that_holds_on_is_waited_for_or_forced() {
    let mut vm = configured().start().wait_for("ready");
    let a = disk(&vm, "a", 8, 0xa1);
    let b = disk(&vm, "b", 8, 0xb1);
    vm.put("/drives/a", a).done();
    vm.put("/drives/b", b).done();
    let mut vm = vm.wait_for("first 0xb1\nwritten Some(0)");
    vm.types("s");
    let mut vm = vm.wait_for("holds on");
    let begin = Instant::now();
    // Others are answered meanwhile.
    vm.client
        .send(request("DELETE", "/drives/a", "").as_bytes());
    let mut other = Client::connect(&vm.socket());
    assert_eq!(other.ask("GET", "/", "").value()["state"], "Running");
    vm.client
        .answer()
        .refused_with("guest-busy", &["has not given 'a' up within 5 s"]);
    assert!(begin.elapsed() >= Duration::from_secs(5));
    assert_eq!(ids(&mut vm, "drives", "drive_id"), ["a", "b"]);
    // It is taken away when the guest does; nothing else is.
    vm.types("e");
    while ids(&mut vm, "drives", "drive_id") != ["b"] {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
    // While it is paused it cannot.
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    delete(&mut vm, "/drives/b").refused_with("paused", &["paused"]);
    delete(&mut vm, "/drives/b?force=true").done();
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    let mut vm = vm.wait_for("slot 1 is to go\nslot 2 is to go\n");
    vm.types("l");
    let mut vm = vm.wait_for("listed 0\n");
    assert!(ids(&mut vm, "drives", "drive_id").is_empty());

    // A device that no driver has goes at once.
    let c = disk(&vm, "c", 8, 0xc1);
    vm.put("/drives/c", c).done();
    let mut vm = vm.wait_for("first 0xc1\nwritten Some(0)");
    vm.types("r");
    let mut vm = vm.wait_for("slot 1 is reset: true");
    given_up(&mut vm, "/drives/c");
    vm.types("q");
    vm.finish().exits(0);
}

#[test]
fn networks_and_persistent_memory_come_and_go() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut vm = configured();
    let file = |vm: &Served, id: &str| {
        let path = vm.file(id, &[0x5a; 4096]);
        json!({ "id": id, "path_on_host": path })
    };
    let p0 = file(&vm, "p0");
    vm.put("/pmem/p0", p0).done();
    let mut vm = vm.start().wait_for("ready");
    let mac = "AA:FC:00:00:00:01";
    let net = json!({ "iface_id": "n", "mode": "fd", "fd": theirs.as_raw_fd(), "guest_mac": mac });
    vm.put("/network-interfaces/n", net).done();
    let mut vm = vm.wait_for("slot 2: device 1");
    assert!(vm.has_open(&theirs));
    let same = json!({ "iface_id": "m", "host_dev_name": "tap0", "guest_mac": mac });
    vm.put("/network-interfaces/m", same).refused(&[mac]);
    let limits = json!({ "ops": { "size": 1000, "refill_time": 100 } });
    let patch = json!({ "iface_id": "n", "rx_rate_limiter": limits });
    vm.patch("/network-interfaces/n", patch).done();

    let p1 = file(&vm, "p1");
    vm.put("/pmem/p1", p1).done();
    let mut vm = vm.wait_for("start 0x140000000 holds 0x5a\nslot 3: driven true");
    given_up(&mut vm, "/pmem/p0");
    given_up(&mut vm, "/network-interfaces/n");
    // What it had of the host is closed with it.
    assert!(!vm.has_open(&theirs));
    let p2 = file(&vm, "p2");
    vm.put("/pmem/p2", p2).done();
    let mut vm = vm.wait_for("start 0x100000000 holds 0x5a\nslot 1: driven true");
    let config = vm.get("/vm/config").value();
    let places = ["p1", "p2"].map(|id| {
        let all = config["pmem"].as_array().unwrap();
        let one = all.iter().find(|pmem| pmem["id"] == id).unwrap();
        one["address"].as_u64().unwrap()
    });
    assert_eq!(places, [0x1_4000_0000, 0x1_0000_0000]);

    // All of it is in a snapshot, each in its slot and at its address.
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let (state, memory) = (vm.dir.path().join("state"), vm.dir.path().join("memory"));
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    vm.put("/snapshot/create", create).done();
    let dir = tempfile::tempdir().unwrap();
    for name in ["state", "memory", "p1", "p2"] {
        std::fs::copy(vm.dir.path().join(name), dir.path().join(name)).unwrap();
    }
    drop(vm);
    let mut vm = Served::with(&["--enable-pci"]);
    let pmem = |id: &str| json!({ "id": id, "path_on_host": dir.path().join(id) });
    vm.put(
        "/snapshot/load",
        json!({
            "snapshot_path": dir.path().join("state"),
            "mem_backend": { "backend_type": "File", "backend_path": dir.path().join("memory") },
            "resume_vm": true, "pmem_overrides": [pmem("p1"), pmem("p2")],
        }),
    )
    .done();
    vm.types("l");
    let mut vm = vm.wait_for(
        "slot 1 has device 27 in status 11\nslot 3 has device 27 in status 11\nlisted 2\n",
    );
    given_up(&mut vm, "/pmem/p1");
    let mut vm = vm.wait_for("slot 3 is to go\nslot 3 is there: false");
    vm.types("q");
    vm.finish().exits(0);
}

#[test]
fn listeners_and_commands_see_devices_come_and_go() {
    let place = tempfile::tempdir().unwrap();
    let base = place.path().to_str().unwrap();
    let mut vm = Served::with(&["--enable-pci", "--id", "plugged", "--runtime-dir", base]);
    let kernel = crate::common::payload("hotplug");
    vm.put("/boot-source", boot(&kernel)).done();
    let vm = vm.start().wait_for("ready");
    let mut listener = Listener::new(&vm.socket());
    assert_eq!(listener.next()["event"], "state");
    let file = vm.file("image", &[0xe1; 512]);
    let bulle = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.args(arguments).env("BULLE_RUNTIME_DIR", base);
        Running::start(command, Input::Null, Duration::from_secs(60)).finish()
    };
    let path = format!("path={}", file.display());
    let attached = bulle(&["attach", "plugged", "--disk", &path]).exits(0);
    assert_eq!(attached.stdout, "disk0\n");
    let vm = vm.wait_for("first 0xe1");
    bulle(&["attach", "plugged", "--disk", &path])
        .exits(125)
        .complains("the same disk");
    bulle(&["detach", "plugged", "disk1"])
        .exits(125)
        .complains("no device 'disk1'");
    bulle(&["detach", "plugged", "disk0"]).exits(0);
    for event in ["device_added", "device_removed"] {
        let heard = listener.next();
        assert_eq!(
            (&heard["event"], &heard["device"]),
            (&json!(event), &json!("disk0"))
        );
    }
    drop(vm);
}

/// Processor time of the thread that answers requests, in hundredths of a second.
fn vmm_ticks(vm: &Served) -> u64 {
    let pid = vm.running.pid();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat")).unwrap();
    let (_, behind) = stat.rsplit_once(')').unwrap();
    let ticks = behind.split_ascii_whitespace().skip(11).take(2);
    ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_removal_that_was_answered_leaves_nothing_to_do() {
    let vm = configured();
    let mut vm = vm.start().wait_for("ready");
    let a = disk(&vm, "a", 8, 0xa1);
    vm.put("/drives/a", a).done();
    let mut vm = vm.wait_for("written Some(0)");
    given_up(&mut vm, "/drives/a");
    // Until it would have been given up, and a while.
    std::thread::sleep(Duration::from_millis(5500));
    let before = vmm_ticks(&vm);
    std::thread::sleep(Duration::from_secs(1));
    let ticks = vmm_ticks(&vm) - before;
    assert!(ticks < 20, "{ticks} hundredths of a second");
}
