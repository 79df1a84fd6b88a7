//! Memory that was plugged, in snapshots of all kinds that are loaded in all ways.

use serde_json::{Value, json};

use crate::background;
use crate::huge::{self, Pool};
use crate::pager::{Pager, Way};
use crate::saved::{Files, machine, save, try_load};
use crate::served::Served;
use crate::uffd::uffd;

/// A guest that has filled its plugged memory, and waits.
fn waiting(config: Value) -> Served {
    let mut vm = machine("plug", "wait=1", config);
    let hotplug = json!({ "total_size_mib": 128, "requested_size_mib": 4 });
    vm.put("/hotplug/memory", hotplug).done();
    vm.start().wait_for("waits")
}

/// Has a guest whose memory was plugged go on, and look at it.
fn goes_on(mut vm: Served) {
    vm.types("x");
    vm.finish()
        .exits(0)
        .prints("state then Some((0, 0))")
        .prints("used then 0x12345678")
        .prints("kept 256")
        .prints("unplug Some((0, 0))")
        .prints("after 0x0");
}

#[test]
fn it_comes_from_a_handler_when_a_vcpu_or_a_device_touches_it() {
    comes_from_a_handler(json!({}));
}

#[test]
fn it_comes_from_a_handler_in_huge_pages() {
    let _alone = huge::alone();
    let _pool = Pool::of("80");
    comes_from_a_handler(json!({ "huge_pages": "2M" }));
}

fn comes_from_a_handler(config: Value) {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "plugged");
    let mut vm = waiting(config);
    save(&mut vm, &files);
    drop(vm);
    let socket = dir.path().join("a");
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let (vm, answer) = try_load(&files, uffd(&socket));
    answer.done();
    goes_on(vm);
    let mappings = pager.end();
    let [.., plugged] = mappings.as_slice() else {
        panic!("{mappings:?}");
    };
    assert_eq!((plugged.size, plugged.offset), (2 << 20, 64 << 20));
    // Nothing has touched it when it is saved again.
    let (socket, again) = (dir.path().join("b"), Files::named(dir.path(), "again"));
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let mut body = uffd(&socket);
    body["resume_vm"] = json!(false);
    let (mut vm, answer) = try_load(&files, body);
    answer.done();
    vm.put("/snapshot/create", again.create()).done();
    drop(vm);
    pager.end();
    let (vm, answer) = try_load(&again, json!({}));
    answer.done();
    goes_on(vm);
}

#[test]
fn it_is_in_snapshots_of_all_kinds() {
    is_in_all_kinds(json!({ "track_dirty_pages": true }));
}

#[test]
fn it_is_in_snapshots_of_all_kinds_in_huge_pages() {
    let _alone = huge::alone();
    let _pool = Pool::of("80");
    is_in_all_kinds(json!({ "huge_pages": "2M" }));
}

fn is_in_all_kinds(config: Value) {
    let dir = tempfile::tempdir().unwrap();
    let [whole, meanwhile, changes] =
        ["whole", "meanwhile", "changes"].map(|name| Files::named(dir.path(), name));
    let can_track = config.get("huge_pages").is_none();
    let mut vm = waiting(config);
    save(&mut vm, &whole);
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    vm.put("/snapshot/create", background::create(&meanwhile))
        .done();
    assert_eq!(background::ended(&mut vm)["state"], "saved");
    let mut all = vec![&whole, &meanwhile];
    if can_track {
        vm.patch("/vm", json!({ "state": "Paused" })).done();
        let mut body = changes.create();
        body["snapshot_type"] = json!("Diff");
        vm.put("/snapshot/create", body).done();
        all.push(&changes);
    }
    drop(vm);
    for files in all {
        for way in ["File", "Lazy"] {
            let backend = json!({ "backend_type": way, "backend_path": files.memory });
            let (vm, answer) = try_load(files, json!({ "mem_backend": backend }));
            answer.done();
            goes_on(vm);
        }
    }
}
