//! The metadata service as the host sees it: the document, its limits, and where the service is.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};

use crate::common;
use crate::served::Served;

const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const NONE: &str = "The MMDS data store is not initialized.";

/// One end of a network that nobody uses.
pub fn network() -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    drop(ours);
    theirs
}

/// Gives `vm` that network as `eth0`.
pub fn attach(vm: &mut Served, end: &UnixStream) {
    let body = json!({ "iface_id": "eth0", "mode": "fd", "fd": end.as_raw_fd() });
    vm.put("/network-interfaces/eth0", body).done();
}

#[test]
fn the_service_is_configured_before_the_start() {
    let network = network();
    let mut vm = Served::payload("serial_echo");
    let path = "/mmds/config";
    let on = |more: Value| {
        let mut body = json!({ "network_interfaces": ["eth0"] });
        let fields = body.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        body
    };
    vm.put(path, json!({}))
        .refused(&["missing field `network_interfaces`"]);
    vm.put(path, json!({ "network_interfaces": [] })).refused(&[
        "The list of network interface IDs that allow forwarding MMDS requests is empty.",
    ]);
    vm.put(path, on(json!({}))).refused(&[
        "The list of network interface IDs provided contains at least one ID that does not correspond to \
         any existing network interface.",
        "'eth0'",
    ]);
    attach(&mut vm, &network);
    for address in ["169.254.0.255", "169.254.255.0", "10.0.0.1"] {
        vm.put(path, on(json!({ "ipv4_address": address })))
            .refused(&["The MMDS IPv4 address is not link local.", address]);
    }
    vm.put(path, on(json!({ "ipv4_address": "x" })))
        .refused(&["An error occurred when deserializing"]);
    vm.put(path, on(json!({ "version": "V3" })))
        .refused(&["unknown variant `V3`"]);
    let section = |vm: &mut Served| vm.get("/vm/config").value()["mmds-config"].clone();
    assert_eq!(section(&mut vm), Value::Null);
    // The first version is deprecated, whether it is asked for or not.
    for body in [
        on(json!({ "ipv4_address": null })),
        on(json!({ "version": "V1" })),
    ] {
        let answer = vm.put(path, body).done();
        assert!(
            answer.head.contains("\r\nDeprecation: true\r\n"),
            "{answer:#?}"
        );
    }
    let expected = json!({
        "version": "V1", "ipv4_address": "169.254.169.254", "network_interfaces": ["eth0"],
        "imds_compat": false,
    });
    assert_eq!(section(&mut vm), expected);
    let more = json!({ "version": "V2", "ipv4_address": "169.254.1.0", "imds_compat": true });
    let answer = vm.put(path, on(more.clone())).done();
    assert!(!answer.head.contains("Deprecation"), "{answer:#?}");
    assert_eq!(section(&mut vm), on(more.clone()));
    let load = json!({
        "snapshot_path": "/s", "mem_backend": { "backend_type": "File", "backend_path": "/m" },
    });
    vm.put("/snapshot/load", load)
        .refused(&["after configuring boot-specific resources"]);
    let mut vm = vm.start().wait_for("ready");
    vm.put(path, on(more)).refused(&[AFTER]);
}

#[test]
fn the_document_is_put_patched_and_read_in_both_phases() {
    let network = network();
    let mut vm = Served::payload("serial_echo");
    assert_eq!(vm.get("/mmds").value(), json!({}));
    vm.patch("/mmds", json!({ "a": 1 })).refused(&[NONE]);
    vm.client
        .ask("PUT", "/mmds", "")
        .refused(&["Empty PUT request."]);
    vm.client
        .ask("PUT", "/mmds", "{")
        .refused(&["An error occurred when deserializing"]);
    attach(&mut vm, &network);
    vm.put(
        "/mmds/config",
        json!({ "network_interfaces": ["eth0"], "version": "V2" }),
    )
    .done();
    let first = json!({ "latest": { "meta-data": { "ami-id": "ami-1", "x": [1] } } });
    vm.put("/mmds", first.clone()).done();
    assert_eq!(vm.get("/mmds").value(), first);
    let mut vm = vm.start().wait_for("ready");
    assert_eq!(vm.get("/mmds").value(), first);
    let patch = json!({ "latest": { "meta-data": { "ami-id": null, "y": {} } }, "z": "z" });
    vm.patch("/mmds", patch).done();
    let second = json!({ "latest": { "meta-data": { "x": [1], "y": {} } }, "z": "z" });
    assert_eq!(vm.get("/mmds").value(), second);
    vm.put("/mmds", json!("text")).done();
    assert_eq!(vm.get("/mmds").value(), "text");
    vm.put("/mmds", Value::Null).done();
    assert_eq!(vm.get("/mmds").value(), json!({}));
}

#[test]
fn without_the_service_there_is_no_document_after_the_start() {
    let mut vm = Served::payload("serial_echo");
    vm.put("/mmds", json!({ "a": 1 })).done();
    let mut vm = vm.start().wait_for("ready");
    vm.get("/mmds").refused(&[NONE]);
    vm.put("/mmds", json!({})).refused(&[NONE]);
    vm.patch("/mmds", json!({})).refused(&[NONE]);
}

#[test]
fn the_document_has_a_limit_of_its_own() {
    let mut vm = Served::with(&["--mmds-size-limit", "20"]);
    let too_large = "The MMDS patch request doesn't fit.";
    vm.put("/mmds", json!({ "a": "0123456789abc" }))
        .refused_as(413, &[too_large, "21 bytes", "20 are allowed"]);
    assert_eq!(vm.get("/mmds").value(), json!({}));
    let fits = json!({ "a": "0123456789ab" });
    vm.put("/mmds", fits.clone()).done();
    vm.patch("/mmds", json!({ "b": 1 }))
        .refused_as(413, &[too_large]);
    assert_eq!(vm.get("/mmds").value(), fits);
    // Else it is that of a request's body.
    let mut vm = Served::with(&["--http-api-max-payload-size", "100"]);
    let fits = json!({ "a": "x".repeat(92) });
    vm.put("/mmds", fits).done();
    vm.patch("/mmds", json!({ "b": 1 }))
        .refused_as(413, &[too_large]);
}

#[test]
fn a_document_comes_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("metadata");
    std::fs::write(&file, r#" { "a" : "b" } "#).unwrap();
    let mut vm = Served::with(&["--metadata", file.to_str().unwrap()]);
    assert_eq!(vm.get("/mmds").value(), json!({ "a": "b" }));
    let refused = |content: &str, limit: &str, words: &str| {
        std::fs::write(&file, content).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_bulle"))
            .args(["api", "--api-sock"])
            .arg(dir.path().join("none"))
            .args(["--mmds-size-limit", limit, "--metadata"])
            .arg(&file)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(words), "{text}");
    };
    refused("{", "100", "are not JSON");
    refused(r#""0123456789""#, "10", "12 bytes, and 10 are allowed");
}

#[test]
fn metadata_of_a_run_need_a_network() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("metadata");
    std::fs::write(&file, "{}").unwrap();
    let run = || {
        let run = common::Bulle::run().arg("--kernel");
        let run = run
            .arg(common::payload("hello"))
            .arg("--metadata")
            .arg(&file);
        run.args(["--root", "none"])
    };
    run().outcome().exits(125).complains("is empty");
    let printed = run()
        .args(["--net", "tap=t", "--net", "user,id=u", "--print-config"])
        .outcome()
        .exits(0);
    let config: Value = serde_json::from_str(&printed.stdout).unwrap();
    let interfaces = &config["mmds-config"]["network_interfaces"];
    assert_eq!(*interfaces, json!(["net0", "u"]));
}
