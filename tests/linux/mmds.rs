//! The metadata service as Linux sees it: over a tap with a route of its own, and behind the gateway of
//! user mode.

use std::fs;

use serde_json::{Value, json};

use super::linux;
use super::net::{in_a_network, md5, sh};
use crate::served::Served;

/// Tokens, both formats, a large answer, a change while the guest runs, and the tap beside all that.
fn sessions() {
    sh("ip tuntap add dev vm0 mode tap; ip addr add 10.9.0.1/24 dev vm0; ip link set vm0 up");
    let dir = tempfile::tempdir().unwrap();
    let (file, metadata) = (dir.path().join("vm.json"), dir.path().join("metadata"));
    let large = "0123456789abcdef".repeat(2500);
    let document = json!({ "latest": { "meta-data": { "ami-id": "ami-1" } }, "large": large });
    fs::write(&metadata, document.to_string()).unwrap();
    let script = "
        ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ip route add 169.254.169.254 dev eth0
        at=http://169.254.169.254
        say() { printf \"$1\\r\\n$2\\r\\nConnection: close\\r\\n\\r\\n\" | nc 169.254.169.254 80; }
        token=$(say 'PUT /latest/api/token HTTP/1.1' 'X-metadata-token-ttl-seconds: 60' | tail -n 1)
        get() { wget -q -O - --header \"X-aws-ec2-metadata-token: $token\" \"$@\"; }
        echo refused $(say 'GET / HTTP/1.1' 'A: b' | head -n 1)
        echo names $(get $at/); echo id $(get $at/latest/meta-data/ami-id)
        echo json $(get --header 'Accept: application/json' $at/latest)
        echo large $(get $at/large | md5sum)
        for n in 1 2 3 4 5 6 7 8; do get $at/large >/tmp/$n & done; wait
        echo at-once $(cat /tmp/[1-8] | md5sum)
        ping -c 3 -i 0.1 10.9.0.1 | grep -o '[0-9]*% packet loss'
        echo waiting; read line; echo changed $(get $at/latest/meta-data/ami-id)";
    let config = linux("amd64")
        .args(["--net", "tap=vm0", "--print-config"])
        .command(["sh", "-c", script])
        .outcome()
        .exits(0);
    let mut config: Value = serde_json::from_str(&config.stdout).unwrap();
    config["mmds-config"] = json!({ "network_interfaces": ["net0"], "version": "V2" });
    fs::write(&file, config.to_string()).unwrap();
    let paths = [&file, &metadata].map(|path| path.to_str().unwrap());
    let vm = Served::with(&["--config-file", paths[0], "--metadata", paths[1]]);
    let mut vm = vm.wait_for("waiting");
    let change = json!({ "latest": { "meta-data": { "ami-id": "ami-2" } } });
    vm.patch("/mmds", change).done();
    vm.types("\n");
    let outcome = vm.finish().exits(0);
    assert_eq!(outcome.value("refused"), "HTTP/1.1 401");
    assert_eq!(outcome.value("names"), "large latest/");
    assert_eq!(outcome.value("id"), "ami-1");
    assert_eq!(outcome.value("json"), r#"{"meta-data":{"ami-id":"ami-1"}}"#);
    assert_eq!(
        outcome.value("large"),
        format!("{} -", md5(large.as_bytes()))
    );
    let eight = format!("{} -", md5(large.repeat(8).as_bytes()));
    assert_eq!(outcome.value("at-once"), eight);
    assert_eq!(outcome.value("0%"), "packet loss");
    assert_eq!(outcome.value("changed"), "ami-2");
}

#[test]
fn metadata_over_a_tap() {
    in_a_network(sessions);
}

#[test]
fn metadata_in_user_mode() {
    in_a_network(|| {
        let dir = tempfile::tempdir().unwrap();
        let metadata = dir.path().join("metadata");
        fs::write(&metadata, r#"{ "a": { "b": "from the host" } }"#).unwrap();
        let script = "echo route $(ip route get 169.254.169.254 | grep -o 'via [^ ]*')
            echo b $(wget -q -O - http://169.254.169.254/a/b)";
        let outcome = linux("cloud-amd64")
            .args(["--pci", "--net", "user", "--metadata"])
            .arg(&metadata)
            .command(["sh", "-c", script])
            .outcome()
            .exits(0);
        assert_eq!(outcome.value("route"), "via 10.0.2.2");
        assert_eq!(outcome.value("b"), "from the host");
    });
}
