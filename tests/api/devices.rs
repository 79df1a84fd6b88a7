//! Devices: configured before the start, commanded after it.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};

use crate::served::{Served, boot};

const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";

/// A guest that only listens, with what `configure` gives it.
fn running(configure: impl FnOnce(&mut Served)) -> Served {
    let mut vm = Served::payload("serial_echo");
    configure(&mut vm);
    vm.start().wait_for("ready")
}

#[test]
fn a_balloon_is_sized_before_and_after_the_start() {
    let mut vm = Served::payload("balloon");
    vm.put(
        "/balloon",
        json!({ "amount_mib": 128, "deflate_on_oom": true }),
    )
    .refused(&["128 MiB"]);
    vm.put(
        "/balloon",
        json!({ "amount_mib": -1, "deflate_on_oom": true }),
    )
    .refused(&["An error occurred when deserializing"]);
    vm.put(
        "/balloon",
        json!({ "amount_mib": 48, "deflate_on_oom": true }),
    )
    .done();
    assert_eq!(vm.get("/balloon").value()["amount_mib"], 48);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": 40 }),
    )
    .refused(&["48 MiB"]);
    let mut vm = vm.start().wait_for("waiting");
    vm.patch("/balloon", json!({ "amount_mib": 128 }))
        .refused(&["Requested memory should be less than 128MiB"]);
    vm.patch(
        "/balloon",
        json!({ "amount_mib": 1, "stats_polling_interval_s": 1 }),
    )
    .refused(&["unknown field `stats_polling_interval_s`"]);
    vm.patch("/balloon", json!({ "amount_mib": 10 })).done();
    assert_eq!(vm.get("/balloon").value()["amount_mib"], 10);
    assert_eq!(vm.get("/vm/config").value()["balloon"]["amount_mib"], 10);
    vm.get("/balloon/statistics").refused(&["statistics"]);
    vm.patch(
        "/balloon/statistics",
        json!({ "stats_polling_interval_s": 1 }),
    )
    .refused(&["Statistics cannot be enabled"]);
    vm.patch("/balloon/hinting/start", json!({}))
        .refused(&["hinting"]);
    vm.types("\n");
    vm.finish().exits(0).prints("target 12288");
}

#[test]
fn statistics_and_hints_of_a_balloon_that_has_them() {
    let mut vm = running(|vm| {
        vm.put(
            "/balloon",
            json!({
                "amount_mib": 8, "deflate_on_oom": false, "stats_polling_interval_s": 2,
                "free_page_hinting": true, "free_page_reporting": true,
            }),
        )
        .done();
    });
    let statistics = vm.get("/balloon/statistics").value();
    let expected = json!({
        "target_pages": 2048, "actual_pages": 0, "target_mib": 8, "actual_mib": 0,
    });
    assert_eq!(statistics, expected);
    vm.patch(
        "/balloon/statistics",
        json!({ "stats_polling_interval_s": 0 }),
    )
    .refused(&["Statistics cannot be enabled or disabled"]);
    vm.patch(
        "/balloon/statistics",
        json!({ "stats_polling_interval_s": 5 }),
    )
    .done();
    assert_eq!(vm.get("/balloon").value()["stats_polling_interval_s"], 5);
    let status = |vm: &mut Served| vm.get("/balloon/hinting/status").value()["host_cmd"].clone();
    assert_eq!(status(&mut vm), 0);
    vm.client.ask("PATCH", "/balloon/hinting/start", "").done();
    assert_eq!(status(&mut vm), 2);
    vm.patch("/balloon/hinting/stop", json!({})).done();
    assert_eq!(status(&mut vm), 1);
    vm.patch(
        "/balloon/hinting/start",
        json!({ "acknowledge_on_stop": false }),
    )
    .done();
    assert_eq!(status(&mut vm), 3);
}

#[test]
fn memory_is_plugged_by_request() {
    let mut vm = running(|vm| {
        let bad = [
            (json!({ "total_size_mib": 100 }), "128 MiB"),
            (
                json!({ "total_size_mib": 256, "block_size_mib": 3 }),
                "power of two",
            ),
            (
                json!({ "total_size_mib": 256, "slot_size_mib": 64 }),
                "slot size",
            ),
        ];
        for (body, why) in bad {
            vm.put("/hotplug/memory", body).refused(&[why]);
        }
        vm.put(
            "/hotplug/memory",
            json!({ "total_size_mib": 512, "block_size_mib": 4, "slot_size_mib": 128 }),
        )
        .done();
    });
    vm.patch("/hotplug/memory", json!({ "requested_size_mib": 6 }))
        .refused(&["multiple of"]);
    for too_much in [516, u64::MAX] {
        vm.patch("/hotplug/memory", json!({ "requested_size_mib": too_much }))
            .refused(&["cannot be plugged"]);
    }
    vm.patch("/hotplug/memory", json!({ "requested_size_mib": 8 }))
        .done();
    let expected = json!({
        "total_size_mib": 512, "slot_size_mib": 128, "block_size_mib": 4,
        "plugged_size_mib": 0, "requested_size_mib": 8,
    });
    assert_eq!(vm.get("/hotplug/memory").value(), expected);
}

#[test]
fn network_interfaces_are_configured_and_their_limits_changed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut vm = Served::payload("serial_echo");
    let path = "/network-interfaces/eth0";
    let net = |more: Value| {
        let mut body = json!({ "iface_id": "eth0", "mode": "fd", "fd": theirs.as_raw_fd() });
        let body = body.as_object_mut().unwrap();
        body.extend(more.as_object().unwrap().clone());
        Value::from(body.clone())
    };
    vm.put(path, json!({ "iface_id": "eth0" }))
        .refused(&["host_dev_name"]);
    vm.put(path, json!({ "iface_id": "eth1", "host_dev_name": "tap0" }))
        .refused(&["does not match"]);
    vm.put(path, net(json!({ "guest_mac": "AA:FC" })))
        .refused(&["AA:FC"]);
    vm.put(path, net(json!({ "mtu": 60 })))
        .refused(&["MTU of 60"]);
    vm.patch(path, json!({ "iface_id": "eth0" }))
        .refused(&[BEFORE]);
    vm.client.ask("DELETE", path, "").refused(&[BEFORE]);
    vm.put(
        path,
        json!({ "iface_id": "eth0", "host_dev_name": "bulle-gone0" }),
    )
    .done();
    vm.action("InstanceStart")
        .refused(&["Start microvm error", "bulle-gone0"]);
    let mac = "AA:FC:00:00:00:01";
    vm.put(path, net(json!({ "guest_mac": mac, "mtu": 1400 })))
        .done();
    let other = json!({ "iface_id": "eth1", "host_dev_name": "tap0", "guest_mac": mac });
    vm.put("/network-interfaces/eth1", other).refused(&[mac]);
    let mut vm = vm.start().wait_for("ready");
    vm.put(path, net(json!({})))
        .refused(&["PCI is not enabled"]);
    vm.patch(path, json!({ "iface_id": "eth0" }))
        .refused(&["nothing is to change"]);
    vm.patch("/network-interfaces/x", json!({ "iface_id": "x" }))
        .refused(&["Device not found", "'x'"]);
    let bucket = json!({ "size": 1000, "refill_time": 100, "one_time_burst": 0 });
    let limits = json!({ "bandwidth": bucket, "ops": bucket });
    vm.patch(
        path,
        json!({ "iface_id": "eth0", "rx_rate_limiter": limits }),
    )
    .done();
    let off = json!({ "ops": { "size": 0, "refill_time": 0 } });
    vm.patch(
        path,
        json!({ "iface_id": "eth0", "rx_rate_limiter": off, "tx_rate_limiter": limits }),
    )
    .done();
    let config = vm.get("/vm/config").value()["network-interfaces"][0].clone();
    assert_eq!(config["rx_rate_limiter"], json!({ "bandwidth": bucket }));
    assert_eq!(config["tx_rate_limiter"], limits);
    vm.types("\n");
    vm.finish().exits(0);
    drop(ours);
}

#[test]
fn sockets_are_there_while_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let mut vm = running(|vm| {
        vm.put("/vsock", json!({ "guest_cid": 2, "uds_path": path }))
            .refused(&["CID 2"]);
        let old = json!({ "vsock_id": "v", "guest_cid": 3, "uds_path": path });
        let answer = vm.put("/vsock", old).done();
        assert!(
            answer.head.contains("\r\nDeprecation: true\r\n"),
            "{answer:?}"
        );
        vm.put("/vsock", json!({ "guest_cid": 5, "uds_path": path }))
            .done();
        assert!(!path.exists());
    });
    assert!(path.exists());
    vm.types("\n");
    vm.finish().exits(0);
    assert!(!path.exists());
}

#[test]
fn persistent_memory_is_one_root_of_several() {
    let mut vm = Served::new();
    let mut source = boot(&crate::common::payload("pmem"));
    source["boot_args"] = "wait=1".into();
    vm.put("/boot-source", source).done();
    let file = vm.file("pmem", &[1; 4 << 20]);
    let pmem =
        |id: &str, root: bool| json!({ "id": id, "path_on_host": file, "root_device": root });
    vm.put("/pmem/a", json!({ "id": "a", "path_on_host": "/nowhere" }))
        .refused(&["Unable to create the virtio pmem device 'a'", "/nowhere"]);
    vm.put("/pmem/a", pmem("b", false))
        .refused(&["does not match"]);
    vm.put("/pmem/a", pmem("a", true)).done();
    vm.put("/pmem/b", pmem("b", true))
        .refused(&["'a' and 'b'", "root device"]);
    let disk = vm.file("disk", &[0; 4096]);
    vm.put(
        "/drives/d",
        json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": true }),
    )
    .refused(&["root device"]);
    vm.put("/pmem/a", pmem("a", false)).done();
    let mut vm = vm.start().wait_for("waiting");
    vm.patch("/pmem/a", json!({ "id": "a" }))
        .refused(&["nothing is to change"]);
    let limits = json!({ "ops": { "size": 5, "refill_time": 100, "one_time_burst": 0 } });
    vm.patch("/pmem/a", json!({ "id": "a", "rate_limiter": limits }))
        .done();
    assert_eq!(
        vm.get("/vm/config").value()["pmem"][0]["rate_limiter"],
        limits
    );
    vm.patch("/pmem/b", json!({ "id": "b", "rate_limiter": limits }))
        .refused(&["Device not found"]);
}

#[test]
fn an_entropy_device_has_limits() {
    let mut vm = Served::payload("serial_echo");
    let limits = json!({ "bandwidth": { "size": 1000, "refill_time": 100, "one_time_burst": 0 } });
    vm.put("/entropy", json!({ "rate_limiter": { "size": 1 } }))
        .refused(&["unknown field `size`"]);
    vm.put("/entropy", json!({ "rate_limiter": limits })).done();
    assert_eq!(
        vm.get("/vm/config").value()["entropy"]["rate_limiter"],
        limits
    );
    let mut vm = vm.start().wait_for("ready");
    vm.put("/entropy", json!({})).refused(&[AFTER]);
}

#[test]
fn the_console_goes_to_a_file_within_its_limit() {
    for limit in [None, Some(json!({ "size": 10, "refill_time": 3_600_000 }))] {
        let mut vm = Served::payload("hello");
        let file = vm.dir.path().join("console");
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("console");
        vm.put("/serial", json!({ "rate_limiter": { "bandwidth": null } }))
            .refused(&["unknown field `bandwidth`"]);
        vm.put(
            "/serial",
            json!({ "serial_out_path": keep, "rate_limiter": limit }),
        )
        .done();
        assert!(!file.exists());
        let outcome = vm.start().finish().exits(7);
        assert_eq!(outcome.stdout, "");
        let text = fs::read_to_string(keep).unwrap();
        match limit {
            None => assert_eq!(text, "hello from the guest\n"),
            Some(_) => assert_eq!(text, "hello from"),
        }
    }
}

#[test]
fn a_disk_is_limited_and_grows_while_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let other = dir.path().join("other");
    fs::write(&other, [0; 4096]).unwrap();
    let mut vm = running(|vm| {
        vm.put(
            "/drives/a",
            json!({
                "drive_id": "a", "path_on_host": disk, "is_root_device": false,
                "is_read_only": null, "partuuid": null, "cache_type": "Unsafe", "io_engine": "Sync",
                "rate_limiter": {
                    "ops": { "size": 100, "refill_time": 100, "one_time_burst": null },
                },
            }),
        )
        .done();
    });
    let patch = |vm: &mut Served, body: Value| {
        let mut body = body;
        body["drive_id"] = json!("a");
        vm.patch("/drives/a", body)
    };
    patch(&mut vm, json!({})).refused(&["Unable to patch the block device", "verify the request"]);
    fs::write(&disk, [0; 8192]).unwrap();
    patch(&mut vm, json!({ "path_on_host": disk })).done();
    patch(&mut vm, json!({ "path_on_host": "/nowhere" }))
        .refused(&["cannot open disk", "/nowhere"]);
    let path = |vm: &mut Served| vm.get("/vm/config").value()["drives"][0]["path_on_host"].clone();
    assert_eq!(path(&mut vm), disk.to_str().unwrap());
    patch(&mut vm, json!({ "path_on_host": other })).done();
    assert_eq!(path(&mut vm), other.to_str().unwrap());
    patch(&mut vm, json!({ "rate_limiter": { "group": "g" } })).refused(&["group"]);
    let bandwidth = json!({ "size": 1000, "refill_time": 100, "one_time_burst": 5 });
    patch(
        &mut vm,
        json!({ "rate_limiter": { "bandwidth": bandwidth } }),
    )
    .done();
    let limits =
        |vm: &mut Served| vm.get("/vm/config").value()["drives"][0]["rate_limiter"].clone();
    let ops = json!({ "size": 100, "refill_time": 100, "one_time_burst": 0 });
    assert_eq!(
        limits(&mut vm),
        json!({ "bandwidth": bandwidth, "ops": ops })
    );
    patch(
        &mut vm,
        json!({ "rate_limiter": { "ops": { "size": 0, "refill_time": 0 } } }),
    )
    .done();
    assert_eq!(limits(&mut vm), json!({ "bandwidth": bandwidth }));
    vm.patch(
        "/drives/b",
        json!({ "drive_id": "b", "path_on_host": disk }),
    )
    .refused(&["Device not found", "'b'"]);
    vm.types("\n");
    vm.finish().exits(0);
}

#[test]
fn limits_of_a_disk_that_had_none_hold_until_they_are_gone() {
    let mut vm = Served::payload("disk_pattern");
    let disk = vm.file("disk", &[0; 256 << 10]);
    vm.put(
        "/drives/a",
        json!({ "drive_id": "a", "path_on_host": disk }),
    )
    .done();
    let mut vm = vm.start().wait_for("round 1");
    let limit = |vm: &mut Served, size: u32| {
        let ops = json!({ "size": size, "refill_time": 1000 });
        let body = json!({ "drive_id": "a", "rate_limiter": { "ops": ops } });
        vm.patch("/drives/a", body).done();
    };
    limit(&mut vm, 1);
    // What was under way, however late its reader: without a limit it never becomes quiet.
    let begin = Instant::now();
    loop {
        vm.running.more_output();
        std::thread::sleep(Duration::from_millis(500));
        let rounds = vm.running.more_output().matches("round").count();
        if rounds <= 1 {
            break;
        }
        let late = begin.elapsed() > Duration::from_secs(60);
        assert!(!late, "{rounds} rounds");
    }
    limit(&mut vm, 0);
    let begin = Instant::now();
    let mut vm = (0..3).fold(vm, |vm, _| vm.wait_for("round"));
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(vm.state(), "Running");
}
