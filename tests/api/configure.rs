//! Before the start: each endpoint, and each way to be refused.

use serde_json::json;

use crate::served::{Served, boot};

#[test]
fn a_new_microvm_says_who_it_is() {
    let mut vm = Served::with(&["--id", "vm-1"]);
    let version = env!("CARGO_PKG_VERSION");
    let expected = json!({
        "id": "vm-1",
        "state": "Not started",
        "vmm_version": version,
        "app_name": "Firecracker",
    });
    assert_eq!(vm.get("/").value(), expected);
    let expected = json!({ "firecracker_version": version });
    assert_eq!(vm.get("/version").value(), expected);
    let machine = vm.get("/machine-config").value();
    for (field, expected) in [
        ("vcpu_count", json!(1)),
        ("mem_size_mib", json!(128)),
        ("smt", json!(false)),
        ("track_dirty_pages", json!(false)),
        ("huge_pages", json!("None")),
    ] {
        assert_eq!(machine[field], expected, "{field}");
    }
}

#[test]
fn a_machine_is_set_and_changed_or_left_as_it_is() {
    let mut vm = Served::new();
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 4, "mem_size_mib": 256, "smt": true }),
    )
    .done();
    vm.patch(
        "/machine-config",
        json!({ "mem_size_mib": 512, "track_dirty_pages": true }),
    )
    .done();
    vm.put("/machine-config", json!({ "vcpu_count": 4 }))
        .refused(&["missing field `mem_size_mib`"]);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 0, "mem_size_mib": 64 }),
    )
    .refused(&["0 vCPUs", "1 to"]);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": 0 }),
    )
    .refused(&["0 MiB"]);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": -1, "mem_size_mib": 64 }),
    )
    .refused(&[
        "An error occurred when deserializing the json body of a request: ",
        "-1",
    ]);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "V1N1" }),
    )
    .refused(&["V1N1 is for ARM"]);
    vm.patch("/machine-config", json!({ "vcpu_count": 3 }))
        .refused(&["3 vCPUs do not divide"]);
    vm.patch("/machine-config", json!({}))
        .refused(&["Empty PATCH request."]);
    let machine = vm.get("/machine-config").value();
    assert_eq!(machine["vcpu_count"], 4);
    assert_eq!(machine["mem_size_mib"], 512);
    assert_eq!(machine["smt"], true);
    assert_eq!(machine["track_dirty_pages"], true);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "None", "huge_pages": "None" }),
    )
    .done();
    let machine = vm.get("/machine-config").value();
    assert_eq!(
        (&machine["smt"], &machine["vcpu_count"]),
        (&json!(false), &json!(1))
    );
}

#[test]
fn files_are_looked_at_when_they_are_named() {
    let mut vm = Served::new();
    vm.put("/boot-source", boot("/nowhere".as_ref()))
        .refused(&["The kernel file cannot be opened: No such file or directory (os error 2)"]);
    vm.put(
        "/boot-source",
        json!({ "kernel_image_path": "/dev/null", "initrd_path": "/nowhere" }),
    )
    .refused(&["The initrd file cannot be opened due to invalid path or invalid permissions."]);
    vm.put("/boot-source", json!({ "boot_args": "x" }))
        .refused(&["missing field `kernel_image_path`"]);
    let drive = |id: &str, path: &str, root: bool| json!({ "drive_id": id, "path_on_host": path, "is_root_device": root });
    vm.put("/drives/a", drive("a", "/nowhere", false))
        .refused(&["Unable to create the virtio block device", "/nowhere"]);
    let disk = vm.file("disk", &[0; 4096]);
    let disk = disk.to_str().unwrap();
    vm.put("/drives/a", drive("b", disk, false))
        .refused(&["The id from the path does not match the id from the body!"]);
    vm.put("/drives/a-b", drive("a-b", disk, false))
        .refused(&["API Resource IDs can only contain alphanumeric characters and underscores."]);
    vm.put("/drives/", drive("a", disk, false))
        .refused(&["The ID cannot be empty."]);
    vm.put("/drives/a", drive("a", disk, true)).done();
    vm.put("/drives/b", drive("b", disk, true))
        .refused(&["'a' and 'b'", "root device"]);
    vm.put("/drives/a", drive("a", disk, false)).done();
    vm.put("/entropy", json!({})).done();
    vm.put("/entropy", json!({ "rate_limiterr": null }))
        .refused(&["unknown field `rate_limiterr`"]);
    let config = vm.get("/vm/config").value();
    assert_eq!(config["drives"].as_array().unwrap().len(), 1);
    assert_eq!(config["drives"][0]["is_root_device"], false);
    assert!(config["entropy"].is_object());
}

#[test]
fn what_nobody_has_is_refused() {
    let mut vm = Served::new();
    vm.get("/nothing")
        .refused(&["Invalid request method and/or path: GET nothing."]);
    vm.put("/", json!({}))
        .refused(&["Invalid request method and/or path: PUT"]);
    vm.client
        .ask("GET", "/version", "{}")
        .refused(&["GET request cannot have a body."]);
    vm.client
        .ask("PUT", "/actions", "")
        .refused(&["Empty PUT request."]);
    vm.client
        .ask("PATCH", "/vm", "")
        .refused(&["Empty PATCH request."]);
    vm.client
        .ask("PUT", "/actions", "{")
        .refused(&["An error occurred when deserializing the json body of a request: EOF"]);
    vm.action("Dance").refused(&["unknown variant `Dance`"]);
}
