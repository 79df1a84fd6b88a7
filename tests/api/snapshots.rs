//! Saving, and loading what was saved.

use std::path::Path;

use serde_json::{Value, json};

use crate::events::Listener;
use crate::served::Served;

const BEFORE: &str = "not supported before starting the microVM";
const AFTER: &str = "not supported after starting the microVM";

fn create(dir: &Path, name: &str) -> Value {
    json!({
        "snapshot_path": dir.join(format!("{name}.state")),
        "mem_file_path": dir.join(format!("{name}.memory")),
    })
}

fn load(dir: &Path, name: &str) -> Value {
    json!({
        "snapshot_path": dir.join(format!("{name}.state")),
        "mem_backend": {
            "backend_type": "File",
            "backend_path": dir.join(format!("{name}.memory")),
        },
        "resume_vm": true,
    })
}

fn with(mut body: Value, name: &str, value: Value) -> Value {
    body[name] = value;
    body
}

fn pause(vm: &mut Served) {
    vm.patch("/vm", json!({ "state": "Paused" })).done();
}

fn resume(vm: &mut Served) {
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
}

/// A guest that has counted the letters `abc` in its memory, paused.
fn echoing(machine: Value) -> Served {
    let mut vm = Served::payload("serial_echo");
    vm.put("/machine-config", machine).done();
    let mut vm = vm.start().wait_for("ready");
    vm.types("abc");
    let mut vm = vm.wait_for("abc");
    pause(&mut vm);
    vm
}

fn small() -> Value {
    json!({ "vcpu_count": 1, "mem_size_mib": 64 })
}

#[test]
fn a_saved_guest_goes_on_where_it_was_and_so_does_the_one_it_was_saved_from() {
    for irqchip in ["split", "kernel"] {
        let mut vm = echoing(with(small(), "irqchip", json!(irqchip)));
        let dir = tempfile::tempdir().unwrap();
        vm.put("/snapshot/create", create(dir.path(), "a")).done();
        for text in ["de\n", "defg\n"] {
            let mut copy = Served::new();
            copy.put("/snapshot/load", load(dir.path(), "a")).done();
            assert_eq!(copy.state(), "Running");
            let machine = copy.get("/machine-config").value();
            assert_eq!(machine["mem_size_mib"], 64);
            copy.types(text);
            let bytes = format!("{} bytes", 3 + text.len() - 1);
            copy.finish().exits(0).prints(&bytes);
        }
        resume(&mut vm);
        vm.types("x\n");
        vm.finish().exits(0).prints("4 bytes");
    }
}

#[test]
fn a_loaded_guest_stands_still_until_it_is_told() {
    let mut vm = echoing(small());
    let dir = tempfile::tempdir().unwrap();
    vm.put("/snapshot/create", create(dir.path(), "a")).done();
    let mut copy = Served::new();
    let body = with(load(dir.path(), "a"), "resume_vm", json!(false));
    copy.put("/snapshot/load", body).done();
    assert_eq!(copy.state(), "Paused");
    copy.put("/snapshot/create", create(dir.path(), "b")).done();
    resume(&mut copy);
    copy.types("d\n");
    copy.finish().exits(0).prints("4 bytes");
    // The copy's copy, which has never run in between.
    let mut copy = Served::new();
    copy.put("/snapshot/load", load(dir.path(), "b")).done();
    copy.types("\n");
    copy.finish().exits(0).prints("3 bytes");
}

#[test]
fn changes_alone_are_saved_and_load_with_what_they_build_on() {
    let dir = tempfile::tempdir().unwrap();
    let size = |name: &str| {
        let path = dir.path().join(format!("{name}.memory"));
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
    };
    let mut vm = echoing(with(small(), "track_dirty_pages", json!(true)));
    vm.put("/snapshot/create", create(dir.path(), "0")).done();
    for (index, text) in ["d", "ef", "ghi"].into_iter().enumerate() {
        resume(&mut vm);
        vm.types(text);
        vm = vm.wait_for(text);
        pause(&mut vm);
        let body = create(dir.path(), &(index + 1).to_string());
        let body = with(body, "snapshot_type", json!("Diff"));
        vm.put("/snapshot/create", body).done();
    }
    assert!(size("3") < 1 << 20, "{}", size("3"));
    for (name, count) in [("0", 3), ("1", 4), ("2", 6), ("3", 9)] {
        let mut copy = Served::new();
        let mut listener = Listener::new(&copy.socket());
        copy.put("/snapshot/load", load(dir.path(), name)).done();
        // What a chain has of small changes is read.
        listener.next();
        if name != "0" {
            let told = listener.next();
            assert_eq!(told["event"], "load_progress", "{told}");
            let path = dir.path().join(format!("{name}.state"));
            assert_eq!(told["path"], path.to_str().unwrap());
        }
        while listener.next()["event"] != "started" {}
        copy.types("\n");
        copy.finish().exits(0).prints(&format!("{count} bytes"));
    }
    // A whole snapshot of a copy of the chain needs nothing else.
    let mut copy = Served::new();
    let body = with(load(dir.path(), "3"), "resume_vm", json!(false));
    copy.put("/snapshot/load", body).done();
    copy.put("/snapshot/create", create(dir.path(), "all"))
        .done();
    drop(copy);
    for name in ["0", "1", "2"] {
        std::fs::remove_file(dir.path().join(format!("{name}.memory"))).unwrap();
    }
    let mut copy = Served::new();
    copy.put("/snapshot/load", load(dir.path(), "3"))
        .refused(&["has changes only", "2.state"]);
    copy.put("/snapshot/load", load(dir.path(), "all")).done();
    copy.types("\n");
    copy.finish().exits(0).prints("9 bytes");
}

#[test]
fn a_snapshot_that_cannot_be_loaded_leaves_a_microvm_that_can_be_configured() {
    let mut vm = echoing(small());
    let dir = tempfile::tempdir().unwrap();
    vm.put("/snapshot/create", create(dir.path(), "a")).done();
    vm.put("/snapshot/create", create(dir.path(), "b")).done();
    let at = |name: &str| dir.path().join(name);
    let mut copy = Served::new();
    let memory = |path: &Path| {
        let mut body = load(dir.path(), "a");
        body["mem_backend"]["backend_path"] = json!(path);
        body
    };
    copy.put("/snapshot/load", memory(&at("b.memory")))
        .refused(&["Load snapshot error", "belongs to another snapshot"]);
    copy.put("/snapshot/load", memory(&at("none")))
        .refused(&["Cannot open the memory file"]);
    let body = with(
        load(dir.path(), "a"),
        "snapshot_path",
        json!(at("a.memory")),
    );
    copy.put("/snapshot/load", body)
        .refused(&["no snapshot of bulle"]);
    let pipe = at("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    copy.put("/snapshot/load", memory(&pipe))
        .refused(&["Cannot open the memory file", "not a regular file"]);
    let body = with(load(dir.path(), "a"), "snapshot_path", json!(pipe));
    copy.put("/snapshot/load", body)
        .refused(&["Cannot read the state file", "not a regular file"]);
    let other = json!([{ "iface_id": "eth0", "host_dev_name": "tap0" }]);
    copy.put(
        "/snapshot/load",
        with(load(dir.path(), "a"), "network_overrides", other),
    )
    .refused(&["the snapshot has no network interface 'eth0'"]);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(at("b.memory"))
        .unwrap();
    file.set_len(1 << 20).unwrap();
    copy.put("/snapshot/load", load(dir.path(), "b"))
        .refused(&["has 1048576 bytes", "cut short"]);
    let state = std::fs::read(at("a.state")).unwrap();
    std::fs::write(at("b.state"), &state[..state.len() - 1]).unwrap();
    copy.put("/snapshot/load", load(dir.path(), "b"))
        .refused(&["cut short"]);
    // It is all there, and loads after all that.
    copy.put("/snapshot/load", load(dir.path(), "a")).done();
    copy.types("\n");
    copy.finish().exits(0).prints("3 bytes");
}

#[test]
fn a_snapshot_that_cannot_be_written_changes_nothing() {
    let mut vm = echoing(small());
    let dir = tempfile::tempdir().unwrap();
    vm.put("/snapshot/create", create(dir.path(), "a")).done();
    let body = with(
        create(dir.path(), "a"),
        "mem_file_path",
        json!("/nowhere/memory"),
    );
    vm.put("/snapshot/create", body)
        .refused(&["Create snapshot error", "/nowhere/memory"]);
    let state = dir.path().join("a.state");
    let body = with(create(dir.path(), "a"), "mem_file_path", json!(state));
    vm.put("/snapshot/create", body)
        .refused(&["name two files"]);
    let names = std::fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.memory", "a.state"]);
    let mut copy = Served::new();
    copy.put("/snapshot/load", load(dir.path(), "a")).done();
    copy.types("\n");
    copy.finish().exits(0).prints("3 bytes");
    resume(&mut vm);
    vm.types("\n");
    vm.finish().exits(0).prints("3 bytes");
}

#[test]
fn bodies_and_phases_are_checked() {
    let file = json!({ "backend_type": "File", "backend_path": "/m" });
    let create = json!({ "snapshot_path": "/s", "mem_file_path": "/m" });
    let load = |name: &str, value: Value| with(json!({ "snapshot_path": "/s" }), name, value);
    let mut vm = Served::new();
    vm.put("/snapshot/create", create.clone())
        .refused(&[BEFORE]);
    vm.put("/snapshot/load", json!({ "snapshot_path": "/s" }))
        .refused(&["exactly one"]);
    let both = with(
        load("mem_file_path", json!("/m")),
        "mem_backend",
        file.clone(),
    );
    vm.put("/snapshot/load", both).refused(&["exactly one"]);
    vm.put(
        "/snapshot/load",
        load("mem_backend", json!({ "backend_type": "Tape" })),
    )
    .refused(&["unknown variant `Tape`"]);
    let answer = vm.put("/snapshot/load", load("mem_file_path", json!("/m")));
    assert!(answer.head.contains("Deprecation: true"), "{answer:?}");
    answer.refused(&["Cannot read the state file /s"]);
    vm.put("/serial", json!({})).done();
    vm.put("/snapshot/load", load("mem_backend", file.clone()))
        .refused(&["Cannot read the state file /s"]);
    vm.put("/entropy", json!({})).done();
    vm.put("/snapshot/load", load("mem_backend", file.clone()))
        .refused(&[
            "Loading a microVM snapshot not allowed after configuring boot-specific resources.",
        ]);
    let mut vm = echoing(small());
    vm.put("/snapshot/load", load("mem_backend", file))
        .refused(&[AFTER]);
    vm.put("/snapshot/create", json!({ "snapshot_path": "/s" }))
        .refused(&["missing field `mem_file_path`"]);
    resume(&mut vm);
    vm.put("/snapshot/create", create)
        .refused(&["save/restore unavailable while running"]);
    vm.types("x\n");
    vm.finish().exits(0).prints("4 bytes");
}
