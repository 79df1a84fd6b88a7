//! Disks that other processes serve (vhost-user): from the start on, and over PCI later.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use devices::virtio::vhost_user::peer::{Fault, Peer, PeerOptions, request};
use serde_json::{Value, json};

use crate::common::payload;
use crate::served::{Served, boot};

/// A backend with a disk of 16 sectors, and the drive that it is.
fn backend(vm: &Served, id: &str) -> (Peer, Value) {
    let socket: PathBuf = vm.dir.path().join(id);
    let peer = Peer::start(&socket, 16, PeerOptions::default());
    let drive = json!({ "drive_id": id, "socket": socket, "is_root_device": false });
    (peer, drive)
}

/// The last line of figures.
fn figures(vm: &mut Served) -> Value {
    vm.action("FlushMetrics").done();
    let text = std::fs::read_to_string(vm.dir.path().join("metrics")).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

/// The guest that drives disks that come, with drive `a` from the start on.
fn started() -> (Served, Peer) {
    let mut vm = Served::with(&["--enable-pci"]);
    vm.put("/boot-source", boot(&payload("hotplug"))).done();
    let metrics = vm.dir.path().join("metrics");
    vm.put("/metrics", json!({ "metrics_path": metrics }))
        .done();
    let (peer, drive) = backend(&vm, "a");
    vm.put("/drives/a", drive).done();
    (vm.start().wait_for("ready"), peer)
}

#[test]
fn a_disk_comes_changes_and_goes() {
    let (mut vm, _first) = started();
    let (second, drive) = backend(&vm, "b");
    vm.put("/drives/b", drive.clone()).done();
    let mut vm =
        vm.wait_for("slot 2: device 2\nsectors 16 read Some(0) first 0x0\nwritten Some(0)");
    assert_eq!(second.read(512, 1), [0x77]);

    second.resize(32);
    let update = json!({ "drive_id": "b" });
    vm.patch("/drives/b", update.clone()).done();
    for (key, value) in [
        ("path_on_host", json!("/dev/null")),
        (
            "rate_limiter",
            json!({ "ops": { "size": 1, "refill_time": 1 } }),
        ),
    ] {
        let mut update = update.clone();
        update[key] = value;
        vm.patch("/drives/b", update)
            .refused(&["Running method expected different backend.", "'b'"]);
    }
    second.set_fault(Some(Fault::Wrong(request::GET_CONFIG)));
    vm.patch("/drives/b", update)
        .refused(&["tell the configuration space"]);
    second.set_fault(None);

    let figures = figures(&mut vm);
    let group = figures["vhost_user_block_b"].as_object().unwrap();
    for (name, value) in group {
        let expected = match name.as_str() {
            "cfg_fails" => value == 1,
            "activate_fails" | "event_fails" => value == 0,
            _ => value.as_u64().unwrap() > 0,
        };
        assert!(expected, "{name} is {value}");
    }
    assert_eq!(group.len(), 6, "{group:?}");
    assert!(figures["vhost_user_block_a"]["init_time_us"].as_u64() > Some(0));
    assert!(figures.get("vhost_user_block").is_none());

    vm.client.ask("DELETE", "/drives/b", "").done();
    let mut vm = vm.wait_for("slot 2 is to go\nslot 2 is there: false");
    vm.put("/drives/b", drive).done();
    let mut vm = vm.wait_for("sectors 32 read Some(0) first 0x0\nwritten Some(0)");
    vm.types("q");
    vm.finish().exits(0);
}

#[test]
fn a_machine_outlives_its_backend_and_is_not_saved() {
    let (mut vm, first) = started();
    let (second, drive) = backend(&vm, "b");
    vm.put("/drives/b", drive).done();
    let mut vm = vm.wait_for("written Some(0)");
    drop(second);
    let begun = Instant::now();
    loop {
        let statistics = vm.get("/vm/statistics").value();
        let devices = statistics["devices"].as_array().unwrap().iter();
        let mut failed = devices.filter(|device| device["needs_reset"] == true);
        if let Some(device) = failed.next() {
            assert_eq!(device["id"], "b");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{statistics}");
    }
    vm.patch("/drives/b", json!({ "drive_id": "b" }))
        .refused(&["vhost-user backend at"]);
    vm.client.ask("DELETE", "/drives/b?force=true", "").done();

    let files = ["state", "memory"].map(|name| vm.dir.path().join(name));
    let fork = json!({ "uds_path": vm.dir.path().join("nobody") });
    vm.put("/fork", fork).refused(&["drive 'a'", "vhost-user"]);
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let [state, memory] = &files;
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    vm.put("/snapshot/create", create)
        .refused(&["drive 'a'", "no snapshots and no clones"]);
    assert!(files.iter().all(|file| !file.exists()));
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    drop(first);
    vm.types("q");
    vm.finish().exits(0);
}
