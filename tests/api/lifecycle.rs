//! Start, pause, go on, end.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::client::{Client, request};
use crate::common;
use crate::served::{Served, boot};

fn paused() -> serde_json::Value {
    json!({ "state": "Paused" })
}

fn resumed() -> serde_json::Value {
    json!({ "state": "Resumed" })
}

#[test]
fn a_guest_runs_to_its_end() {
    let mut vm = Served::payload("exit_code");
    let kernel = common::payload("exit_code");
    vm.put(
        "/boot-source",
        json!({ "kernel_image_path": kernel, "boot_args": "exit=37" }),
    )
    .done();
    let outcome = vm.start().finish().exits(37).prints("exit=37");
    assert_eq!(outcome.stderr, "");
}

#[test]
fn all_that_was_set_is_there_on_both_transports() {
    for arguments in [&[][..], &["--enable-pci"]] {
        let mut vm = Served::with(arguments);
        vm.put("/boot-source", boot(&common::payload("memory_map")))
            .done();
        vm.put(
            "/machine-config",
            json!({ "vcpu_count": 2, "mem_size_mib": 200 }),
        )
        .done();
        let disk = vm.file("disk", &[7; 1 << 20]);
        vm.put(
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk }),
        )
        .done();
        vm.put("/entropy", json!({})).done();
        let map = vm.start().finish().exits(0);
        let total: u64 = map.value("RAM").split(' ').next().unwrap().parse().unwrap();
        assert!((199 * 1024..=200 * 1024).contains(&total), "{total}");
    }
}

#[test]
fn who_asks_at_the_time_of_the_start_is_answered() {
    for _ in 0..20 {
        let mut vm = Served::payload("serial_echo");
        let mut other = Client::connect(&vm.socket());
        other.ask("GET", "/", "").value();
        // It finds both.
        kill(vm.running.pid(), Signal::SIGSTOP).unwrap();
        let start = json!({ "action_type": "InstanceStart" });
        let start = request("PUT", "/actions", &start.to_string());
        vm.client.send(start.as_bytes());
        other.send(request("GET", "/", "").as_bytes());
        kill(vm.running.pid(), Signal::SIGCONT).unwrap();
        vm.client.answer().done();
        assert_eq!(other.answer().value()["state"], "Running");
    }
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    let mut vm = Served::new();
    vm.action("InstanceStart")
        .refused(&["Start microvm error: Cannot start microvm without kernel configuration."]);
    vm.put("/boot-source", boot("/dev/null".as_ref())).done();
    vm.action("InstanceStart")
        .refused(&["Start microvm error: ", "/dev/null"]);
    assert_eq!(vm.state(), "Not started");
    let disk = vm.file("disk", &[0; 512]);
    vm.put(
        "/drives/a",
        json!({ "drive_id": "a", "path_on_host": disk }),
    )
    .done();
    std::fs::remove_file(&disk).unwrap();
    vm.put("/boot-source", boot(&common::payload("hello")))
        .done();
    vm.action("InstanceStart")
        .refused(&["Start microvm error: ", "No such file"]);
    vm.file("disk", &[0; 512]);
    vm.start().finish().exits(7).prints("hello from the guest");
}

#[test]
fn a_pause_stops_the_guest_and_it_goes_on_where_it_was() {
    for cpus in [1, 4] {
        let mut vm = Served::payload("serial_echo");
        vm.put(
            "/machine-config",
            json!({ "vcpu_count": cpus, "mem_size_mib": 64 }),
        )
        .done();
        let mut vm = vm.start().wait_for("ready");
        vm.types("one.");
        let mut vm = vm.wait_for("one.");
        for round in 0..20 {
            vm.patch("/vm", paused()).done();
            vm.patch("/vm", paused()).done();
            assert_eq!(vm.state(), "Paused");
            vm.types("x");
            if round == 0 {
                std::thread::sleep(Duration::from_millis(100));
                let before = vm.running.cpu_time();
                std::thread::sleep(Duration::from_millis(500));
                let used = vm.running.cpu_time() - before;
                assert!(used <= Duration::from_millis(20), "{used:?}");
            }
            vm.patch("/vm", resumed()).done();
            vm.patch("/vm", resumed()).done();
            assert_eq!(vm.state(), "Running");
        }
        let mut vm = vm.wait_for("xxxxxxxxxxxxxxxxxxxx");
        vm.types("\n");
        vm.finish().exits(0).prints("24 bytes");
    }
}

#[test]
fn a_paused_guest_says_nothing() {
    let mut vm = Served::payload("serial_echo").start().wait_for("ready");
    vm.patch("/vm", paused()).done();
    vm.types("quiet");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vm.running.more_output().trim(), "");
    vm.patch("/vm", resumed()).done();
    let mut vm = vm.wait_for("quiet");
    vm.types("\n");
    vm.finish().exits(0).prints("5 bytes");
}

#[test]
fn pauses_in_the_middle_of_string_output_lose_and_repeat_nothing() {
    let mut vm = Served::new();
    let mut source = boot(&common::payload("console_flood"));
    // More than it comes to.
    source["boot_args"] = "lines=100000000".into();
    vm.put("/boot-source", source).done();
    let mut vm = vm.start().wait_for("\n");
    for _ in 0..500 {
        vm.patch("/vm", paused()).done();
        vm.patch("/vm", resumed()).done();
    }
    let outcome = vm.signal(Signal::SIGINT).finish().exits(128 + 2);
    // As the payload makes it.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let expected = (1..=outcome.stdout.len()).map(|at| {
        if at % 64 == 0 {
            return b'\n';
        }
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        b' ' + 1 + (state % 90) as u8
    });
    assert!(outcome.stdout.len() > 1000, "{}", outcome.stdout.len());
    assert!(expected.eq(outcome.stdout.bytes()), "{}", outcome.stdout);
}

#[test]
fn signals_end_a_paused_guest_and_one_that_was_not_started() {
    Served::new()
        .signal(Signal::SIGTERM)
        .finish()
        .exits(128 + 15);
    let vm = Served::new().signal(Signal::SIGWINCH);
    let mut vm = vm.signal(Signal::SIGUSR1);
    assert_eq!(vm.state(), "Not started");
    let mut vm = Served::payload("spin_forever").start().wait_for("spinning");
    vm.patch("/vm", paused()).done();
    vm.signal(Signal::SIGINT).finish().exits(128 + 2);
}

#[test]
fn ctrl_alt_del_goes_to_a_keyboard_that_somebody_reads() {
    let mut deaf = Served::payload("hlt_forever").start().wait_for("\n");
    deaf.action("SendCtrlAltDel")
        .refused(&["does not read its keyboard"]);
    assert_eq!(deaf.state(), "Running");
    let mut vm = Served::payload("keyboard").start().wait_for("listening");
    vm.action("SendCtrlAltDel").done();
    vm.finish().exits(0).prints("key 71");
}

#[test]
fn a_configuration_file_starts_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    let config = json!({
        "boot-source": { "kernel_image_path": common::payload("serial_echo") },
        "drives": [],
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 64, "smt": true },
    });
    std::fs::write(&file, config.to_string()).unwrap();
    let vm = Served::with(&["--config-file", file.to_str().unwrap()]);
    let mut vm = vm.wait_for("ready");
    assert_eq!(vm.state(), "Running");
    let dump = vm.get("/vm/config").value();
    assert_eq!(dump["machine-config"]["smt"], true);
    vm.types("\n");
    vm.finish().exits(0).prints("0 bytes");
    // And what it says of itself starts the same machine again.
    std::fs::write(&file, dump.to_string()).unwrap();
    let again = Served::with(&["--config-file", file.to_str().unwrap()]);
    let mut again = again.wait_for("ready");
    assert_eq!(again.get("/vm/config").value(), dump);
    again.types("\n");
    again.finish().exits(0);
}

#[test]
fn many_microvms_one_after_the_other_leave_nothing() {
    let begin = Instant::now();
    for _ in 0..20 {
        Served::payload("hello").start().finish().exits(7);
    }
    assert!(begin.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_socket_that_is_there_already_is_not_taken() {
    let vm = Served::new();
    let socket = vm.socket();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(["api", "--api-sock"]).arg(&socket);
    let second = common::Running::start(command, common::Input::Null, Duration::from_secs(20));
    second
        .finish()
        .exits(125)
        .complains("there is something already");
    Client::connect(&socket).ask("GET", "/version", "").value();
}
