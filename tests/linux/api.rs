//! `bulle api` with Linux in it: the drivers of an unmodified kernel answer what is asked.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::linux;
use crate::served::Served;

/// Asks until the answer is as wanted.
fn until(vm: &mut Served, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let begin = Instant::now();
    loop {
        let value = vm.get(path).value();
        if wanted(&value) {
            return value;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(120),
            "{path} stays {value}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_guest_stands_still_and_its_memory_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.json");
    let script = "(while :; do echo tick; sleep 0.2; done) & read line; kill $!; echo end $line";
    let config = linux("amd64")
        .args(["--memory", "384M", "--balloon", "size=16M,stats=1s,hinting"])
        .args(["--hotplug-memory", "total=256M", "--print-config"])
        .command(["sh", "-c", script])
        .outcome()
        .exits(0);
    std::fs::write(&file, config.stdout).unwrap();
    let vm = Served::with(&["--config-file", file.to_str().unwrap()]);
    let mut vm = vm.wait_for("tick");
    assert_eq!(vm.state(), "Running");

    vm.patch("/vm", json!({ "state": "Paused" })).done();
    // What was on its way.
    std::thread::sleep(Duration::from_millis(500));
    vm.running.more_output();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(vm.running.more_output(), "");
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    let mut vm = vm.wait_for("tick");

    let statistics = "/balloon/statistics";
    let first = until(&mut vm, statistics, |s| {
        s["actual_mib"] == 16 && s["total_memory"].is_u64()
    });
    let total = first["total_memory"].as_u64().unwrap();
    assert!(total > 256 << 20 && total < 384 << 20, "{first}");
    vm.patch("/balloon", json!({ "amount_mib": 48 })).done();
    until(&mut vm, statistics, |s| s["actual_mib"] == 48);
    vm.patch("/balloon", json!({ "amount_mib": 0 })).done();
    until(&mut vm, statistics, |s| s["actual_mib"] == 0);

    vm.client.ask("PATCH", "/balloon/hinting/start", "").done();
    // It has hinted all, and has its pages back.
    until(&mut vm, "/balloon/hinting/status", |s| s["host_cmd"] == 1);

    vm.patch("/hotplug/memory", json!({ "requested_size_mib": 128 }))
        .done();
    until(&mut vm, "/hotplug/memory", |m| m["plugged_size_mib"] == 128);

    vm.types("bye\n");
    vm.finish().exits(0).prints("end bye");
}
