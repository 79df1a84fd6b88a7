//! The log, figures, and the command line.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use crate::client::Client;
use crate::common::{self, Input, Running};
use crate::served::Served;

const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The options of Firecracker 1.17 and of its jailer.
const FIRECRACKER: &[&str] = &[
    "api-sock",
    "boot-timer",
    "config-file",
    "describe-snapshot",
    "enable-pci",
    "help",
    "http-api-max-payload-size",
    "id",
    "level",
    "log-path",
    "metadata",
    "metrics-path",
    "mmds-size-limit",
    "module",
    "no-api",
    "no-seccomp",
    "parent-cpu-time-us",
    "seccomp-filter",
    "show-level",
    "show-log-origin",
    "snapshot-version",
    "start-time-cpu-us",
    "start-time-us",
    "version",
];
const JAILER: &[&str] = &[
    "cgroup",
    "cgroup-version",
    "chroot-base-dir",
    "daemonize",
    "exec-file",
    "gid",
    "help",
    "id",
    "netns",
    "new-pid-ns",
    "parent-cgroup",
    "resource-limit",
    "uid",
    "version",
];

fn sorted(lists: &[&[&str]]) -> Vec<String> {
    let mut all: Vec<_> = lists.concat().iter().map(|name| name.to_string()).collect();
    all.sort();
    all
}

/// The options that `--help` under this name lists.
fn options(name: &str) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    let help = command.arg0(name).arg("--help").output().unwrap();
    assert!(help.status.success());
    let text = String::from_utf8(help.stdout).unwrap();
    let begins = text.lines().map(|line| line.trim_start());
    let begins = begins.map(|line| line.strip_prefix("-h, ").unwrap_or(line));
    let names = begins.filter_map(|line| line.strip_prefix("--"));
    let words = names.map(|name| name.split(' ').next().unwrap().to_owned());
    let mut all: Vec<_> = words.collect();
    all.sort();
    all
}

/// bulle under another name.
fn firecracker(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command
        .arg0("/usr/bin/firecracker")
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn the_log_goes_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let mut vm = Served::with(&[
        "--id",
        "log-1",
        "--log-path",
        first.to_str().unwrap(),
        "--level",
        "debug",
    ]);
    vm.put("/logger", json!({ "log_path": "/nowhere/log" }))
        .refused(&["/nowhere/log", "log"]);
    vm.put("/logger", json!({ "level": "Loud" }))
        .refused(&["'Loud' is no level"]);
    vm.put("/logger", json!({ "colour": true }))
        .refused(&["unknown field `colour`"]);
    let kernel = common::payload("serial_echo");
    vm.put("/boot-source", json!({ "kernel_image_path": kernel }))
        .done();
    vm.put(
        "/logger",
        json!({ "show_level": true, "show_log_origin": true }),
    )
    .done();
    vm.put("/logger", json!({ "log_path": second, "level": "WARNING" }))
        .done();
    vm.put(
        "/logger",
        json!({ "level": "Debug", "module": "bulle::vm" }),
    )
    .done();
    let config = vm.get("/vm/config").value();
    assert_eq!(config["logger"]["log_path"], second.to_str().unwrap());
    assert_eq!(config["logger"]["level"], "Debug");
    assert_eq!(config["logger"]["show_level"], true);
    let mut vm = vm.start().wait_for("ready");
    vm.put("/logger", json!({ "level": "Error" }))
        .refused(&[AFTER]);
    vm.types("\n");
    vm.finish().exits(0);
    let text = fs::read_to_string(second).unwrap();
    assert!(
        text.contains(" [log-1:") && text.contains(":DEBUG:src/vm/"),
        "{text}"
    );
    assert!(text.lines().all(|line| line.contains(":src/vm/")), "{text}");
    assert!(first.exists());
}

#[test]
fn a_log_can_be_lines_of_json() {
    let mut vm = Served::payload("hello");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let logger =
        json!({ "log_path": path, "level": "Debug", "format": "Json", "module": "bulle::vm" });
    vm.put("/logger", logger).done();
    assert_eq!(vm.get("/vm/config").value()["logger"]["format"], "Json");
    vm.start().finish().exits(7);
    let text = fs::read_to_string(path).unwrap();
    assert!(!text.is_empty());
    for line in text.lines() {
        let object: Value = serde_json::from_str(line).unwrap();
        assert_eq!(object["level"], "DEBUG");
        let module = object["module"].as_str().unwrap();
        assert!(module.starts_with("bulle::vm"), "{line}");
        assert!(
            object["text"].is_string() && object["id"].is_string(),
            "{line}"
        );
    }
}

#[test]
fn figures_are_differences_between_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let mut vm = Served::with(&["--id", "m-1"]);
    let kernel = common::payload("serial_echo");
    vm.put("/boot-source", json!({ "kernel_image_path": kernel }))
        .done();
    vm.action("FlushMetrics").refused(&[BEFORE]);
    vm.put("/metrics", json!({ "metrics_path": "/nowhere/metrics" }))
        .refused(&["/nowhere"]);
    vm.put("/metrics", json!({ "metrics_path": path, "emit_id": 1 }))
        .refused(&["invalid type"]);
    let labels = json!({ "a": "b" });
    vm.put(
        "/metrics",
        json!({ "metrics_path": path, "emit_id": true, "properties": labels, "x": 1 }),
    )
    .done();
    vm.put("/metrics", json!({ "metrics_path": path }))
        .refused(&["Reinitialization of metrics not allowed."]);
    let mut vm = vm.start().wait_for("ready");
    vm.types("abc");
    let mut vm = vm.wait_for("abc");
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    vm.action("FlushMetrics").done();
    vm.action("FlushMetrics").done();
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    vm.put("/metrics", json!({ "metrics_path": path }))
        .refused(&[AFTER]);
    vm.types("\n");
    vm.finish().exits(0);
    let lines = lines(&path);
    let of = |at: usize, name: &str| lines[at].pointer(name).map_or(0, |v| v.as_u64().unwrap());
    // At the start, two by request, at the end.
    assert_eq!(lines.len(), 4);
    assert_eq!(of(0, "/vcpu/exit_io_in"), 0);
    assert_eq!(of(0, "/put_api_requests/metrics_fails"), 3);
    assert_eq!(of(0, "/put_api_requests/boot_source_count"), 1);
    assert!(of(1, "/vcpu/exit_io_in") > 3, "{}", lines[1]);
    assert!(of(1, "/vcpu/exit_io_out") > 3, "{}", lines[1]);
    let [least, most, sum] =
        ["min", "max", "sum"].map(|name| of(1, &format!("/vcpu/exit_io_out_agg/{name}_us")));
    assert!(least <= most && 0 < most && most <= sum, "{}", lines[1]);
    assert_eq!(of(2, "/vcpu/exit_io_out_agg/sum_us"), 0);
    let latency = |at, name| of(at, &format!("/latencies_us/{name}"));
    assert!(latency(1, "vmm_pause_vm") > 0, "{}", lines[1]);
    assert!(latency(1, "pause_vm") >= latency(1, "vmm_pause_vm"));
    assert_eq!(
        (latency(1, "resume_vm"), of(1, "/uart/error_count")),
        (0, 0)
    );
    assert!(latency(3, "resume_vm") >= latency(3, "vmm_resume_vm"));
    // It says that it is ready and what is typed, and reads that.
    assert!(of(1, "/uart/write_count") >= 8 && of(1, "/uart/read_count") == 3);
    assert_eq!(of(2, "/uart/write_count"), 0);
    for line in &lines {
        assert_eq!(
            (&line["id"], &line["properties"]),
            (&json!("m-1"), &json!({ "a": "b" }))
        );
    }
    // It stood still.
    assert_eq!(of(2, "/vcpu/exit_io_in"), 0);
    assert_eq!(of(2, "/put_api_requests/actions_count"), 1);
    assert!(of(3, "/vcpu/exit_io_in") > 0, "{}", lines[3]);
    assert_eq!(of(3, "/patch_api_requests/vm_count"), 1);
    let stamps: Vec<_> = (0..4).map(|at| of(at, "/utc_timestamp_ms")).collect();
    assert!(stamps.is_sorted() && stamps[0] > 1 << 40, "{stamps:?}");
}

#[test]
fn figures_into_a_pipe_that_nobody_reads_hold_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
    let mut vm = Served::with(&["--metrics-path", path.to_str().unwrap()]);
    let kernel = common::payload("serial_echo");
    vm.put("/boot-source", json!({ "kernel_image_path": kernel }))
        .done();
    let mut vm = vm.start().wait_for("ready");
    for _ in 0..200 {
        vm.action("FlushMetrics").done();
    }
    vm.types("\n");
    vm.finish().exits(0);
}

#[test]
fn figures_of_a_run_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let (path, file) = (dir.path().join("metrics"), dir.path().join("vm.json"));
    let config = json!({
        "boot-source": { "kernel_image_path": common::payload("hello") },
        "metrics": { "metrics_path": path },
        "logger": { "log_path": dir.path().join("log"), "level": "Debug" },
    });
    fs::write(&file, config.to_string()).unwrap();
    let outcome = common::Bulle::run()
        .arg("--config")
        .arg(&file)
        .outcome()
        .exits(7);
    assert_eq!(outcome.stderr, "");
    let lines = lines(&path);
    assert_eq!(lines.len(), 2);
    assert!(lines[1]["vcpu"]["exit_io_out"].as_u64().unwrap() > 0);
    assert!(
        fs::read_to_string(dir.path().join("log"))
            .unwrap()
            .contains("vCPUs ready")
    );
}

#[test]
fn under_firecrackers_name_it_has_its_arguments_and_codes() {
    let version = firecracker(&["--version"]);
    assert!(version.status.success());
    let text = String::from_utf8(version.stdout).unwrap();
    assert!(text.starts_with("Firecracker v1.17.0\n"), "{text}");
    let own = ["runtime-dir"];
    assert_eq!(options("firecracker"), sorted(&[FIRECRACKER, &own]));
    assert_eq!(options("jailer"), sorted(&[JAILER]));
    for (arguments, code, words) in [
        (&["--nonsense"][..], 153, "--nonsense"),
        (&["--no-api"], 153, "--config-file"),
        (&["--id", "a_b"], 153, "letters"),
        (&["--metadata", "/x"], 1, "Cannot read the metadata /x"),
        (
            &["--no-seccomp", "--seccomp-filter", "/x"],
            153,
            "--seccomp-filter",
        ),
        (&["--seccomp-filter", "/x"], 1, "bulle installs none"),
        (
            &["--describe-snapshot", "/x"],
            1,
            "Cannot read the state file /x",
        ),
        (
            &["--describe-snapshot", "/dev/zero"],
            1,
            "not a regular file",
        ),
        (
            &["--describe-snapshot", "/proc/self/exe"],
            1,
            "no snapshot of bulle",
        ),
        (&["--config-file", "/nowhere", "--no-api"], 152, "/nowhere"),
    ] {
        let output = firecracker(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(words), "{arguments:?}: {text}");
        assert_eq!(output.stdout, b"");
    }
}

#[test]
fn the_versions_of_snapshots_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (state, memory) = (dir.path().join("state"), dir.path().join("memory"));
    let mut vm = Served::payload("hlt_forever").start();
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    vm.put("/snapshot/create", files).done();
    let said = |arguments: &[&str]| {
        let output = firecracker(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let describe = ["--describe-snapshot", state.to_str().unwrap()];
    assert_eq!(said(&["--snapshot-version"]), "v1.0.0\n");
    assert_eq!(said(&describe), "v1.0.0\n");
    // A later format keeps the header.
    let mut bytes = fs::read(&state).unwrap();
    bytes[8] = 7;
    let sum = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&sum.to_le_bytes());
    fs::write(&state, bytes).unwrap();
    assert_eq!(said(&describe), "v7.0.0\n");
}

#[test]
fn without_an_api_the_configuration_says_all() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("vm.json"), dir.path().join("api"));
    let metrics = dir.path().join("metrics");
    let config = json!({
        "boot-source": { "kernel_image_path": common::payload("memory_map") }, "drives": [],
    });
    fs::write(&file, config.to_string()).unwrap();
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    let start = (now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000).to_string();
    let output = firecracker(&[
        "--no-api",
        "--config-file",
        file.to_str().unwrap(),
        "--api-sock",
        socket.to_str().unwrap(),
        "--metrics-path",
        metrics.to_str().unwrap(),
        "--start-time-us",
        &start,
        "--start-time-cpu-us",
        "0",
        "--parent-cpu-time-us",
        "1000000",
        "--no-seccomp",
    ]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    // 128 MiB, as the API has it.
    let ram = text
        .lines()
        .find_map(|line| line.strip_prefix("RAM "))
        .unwrap();
    let kib: u64 = ram.split(' ').next().unwrap().parse().unwrap();
    assert!((127 * 1024..=128 * 1024).contains(&kib), "{ram}");
    assert!(!socket.exists());
    let first = &lines(&metrics)[0]["api_server"];
    let wall = first["process_startup_time_us"].as_u64().unwrap();
    assert!((1..60_000_000).contains(&wall), "{first}");
    assert!(
        first["process_startup_time_cpu_us"].as_u64().unwrap() > 1_000_000,
        "{first}"
    );
}

#[test]
fn the_log_says_how_long_the_guest_took_to_boot() {
    let dir = tempfile::tempdir().unwrap();
    let (log, file) = (dir.path().join("log"), dir.path().join("vm.json"));
    let log_path = log.to_str().unwrap();
    let kernel = common::payload("boot_timer");
    let mut vm = Served::with(&["--boot-timer", "--log-path", log_path, "--level", "Info"]);
    vm.put("/boot-source", json!({ "kernel_image_path": kernel }))
        .done();
    assert_eq!(vm.get("/vm/config").value()["boot-timer"], true);
    vm.start().finish().exits(0).prints("reads 0");
    let text = fs::read_to_string(&log).unwrap();
    let line = text
        .lines()
        .find(|line| line.contains("Guest-boot-time = "));
    let line = line.unwrap_or_else(|| panic!("{text}"));
    let (_, times) = line.split_once("= ").unwrap();
    let words: Vec<_> = times.split_whitespace().collect();
    assert_eq!(
        (words[1], words[3], words[5], words[6]),
        ("us", "ms,", "CPU", "us")
    );
    let micros: u64 = words[0].parse().unwrap();
    assert!((1..290_000_000).contains(&micros), "{line}");
    // Without it, nothing is there.
    let config = json!({ "boot-source": { "kernel_image_path": kernel } });
    fs::write(&file, config.to_string()).unwrap();
    let run = common::Bulle::run().arg("--config").arg(&file);
    run.outcome().exits(0).prints("reads 255");
}

#[test]
fn under_firecrackers_name_it_says_firecrackers_version() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.arg0("firecracker").arg("--api-sock").arg(&socket);
    let _running = Running::start(command, Input::Null, Duration::from_secs(60));
    let mut client = Client::connect(&socket);
    let version = client.ask("GET", "/version", "").value();
    assert_eq!(version, json!({ "firecracker_version": "1.17.0" }));
    assert_eq!(client.ask("GET", "/", "").value()["vmm_version"], "1.17.0");
}

/// Groups that are in each line, and those of a disk.
const GROUPS: &[&str] = &[
    "api_server",
    "balloon",
    "block",
    "block_d",
    "deprecated_api",
    "entropy",
    "get_api_requests",
    "i8042",
    "interrupts",
    "latencies_us",
    "logger",
    "memory_hotplug",
    "mmds",
    "net",
    "patch_api_requests",
    "pmem",
    "put_api_requests",
    "seccomp",
    "signals",
    "uart",
    "vcpu",
    "vmm",
    "vsock",
];

#[test]
fn every_device_has_its_figures_and_they_are_there_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, disk) = (dir.path().join("metrics"), dir.path().join("disk"));
    fs::write(&disk, [0; 4096]).unwrap();
    let mut vm = Served::with(&["--metrics-path", path.to_str().unwrap()]);
    let kernel = common::payload("serial_echo");
    let drive = json!({ "drive_id": "d", "path_on_host": disk });
    let console = json!({ "serial_out_path": dir.path().join("out"), "rate_limiter": { "size": 4, "refill_time": 3_600_000 } });
    for (endpoint, body) in [
        ("/boot-source", json!({ "kernel_image_path": kernel })),
        ("/drives/d", drive),
        ("/serial", console),
    ] {
        vm.put(endpoint, body).done();
    }
    let mut vm = vm.start();
    let other = json!({ "drive_id": "d", "path_on_host": "/nowhere" });
    vm.patch("/drives/d", other).refused(&["/nowhere"]);
    vm.patch(
        "/drives/d",
        json!({ "drive_id": "d", "path_on_host": disk }),
    )
    .done();
    let sum = |lines: &[Value], name| -> u64 {
        let of = |line: &Value| line["uart"][name].as_u64().unwrap();
        lines.iter().map(of).sum()
    };
    while sum(&lines(&path), "rate_limiter_dropped_bytes") < 2 {
        vm.action("FlushMetrics").done();
    }
    vm.signal(Signal::SIGHUP).finish();
    let lines = lines(&path);
    let last = lines.last().unwrap();
    for group in GROUPS {
        let figures = last[*group]
            .as_object()
            .unwrap_or_else(|| panic!("{group}: {last}"));
        assert!(!figures.is_empty(), "{group}");
    }
    let keys = |group: &str| {
        last[group]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(keys("block"), keys("block_d"));
    assert_eq!(last["signals"]["sighup"], 1);
    assert_eq!(last["memory_hotplug"]["plug_agg"]["min_us"], 0);
    // The first four bytes of what it says may pass.
    let dropped = sum(&lines, "rate_limiter_dropped_bytes");
    let written = sum(&lines, "write_count");
    assert!(
        written >= 5 && dropped == written - 4,
        "{written}, {dropped}"
    );
}

#[test]
fn a_disk_has_figures_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (path, disk) = (dir.path().join("metrics"), dir.path().join("disk"));
    fs::write(&disk, [0; 4096]).unwrap();
    let mut vm = Served::with(&["--metrics-path", path.to_str().unwrap()]);
    let kernel = common::payload("virtio_disk");
    let boot = json!({ "kernel_image_path": kernel, "boot_args": "reads=50 log=3" });
    vm.put("/boot-source", boot).done();
    let drive = json!({ "drive_id": "d", "path_on_host": disk });
    vm.put("/drives/d", drive).done();
    vm.start().finish().exits(0);
    let lines = lines(&path);
    let last = lines.last().unwrap();
    for group in ["block", "block_d"] {
        let of = |name: &str| last[group][name].as_u64().unwrap();
        assert!(of("read_count") > 50 && of("write_count") > 3, "{last}");
        assert_eq!(of("read_bytes"), 512 * of("read_count"));
        assert_eq!(of("write_bytes"), 512 * of("write_count"));
        assert!(
            of("flush_count") >= 3 && of("queue_event_count") > 0,
            "{last}"
        );
        // It asks for a sector beyond the end.
        assert_eq!((of("invalid_reqs_count"), of("execute_fails")), (1, 0));
        assert!(last[group]["read_agg"]["sum_us"].is_u64());
        let interrupts = last["interrupts"]["triggers"].as_u64().unwrap();
        assert!(interrupts >= of("read_count"), "{last}");
        assert_eq!(
            (of("event_fails"), of("activate_fails"), of("update_fails")),
            (0, 0, 0)
        );
    }
    let aggregate = &last["block_d"]["write_agg"];
    let of = |name: &str| aggregate[name].as_u64().unwrap();
    assert!(of("min_us") <= of("max_us") && of("max_us") <= of("sum_us"));
    assert!(of("sum_us") > 0, "{last}");
}
