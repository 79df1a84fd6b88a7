//! Host files of a loaded machine: other ones under the same ids, and those that do not fit.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::saved::{Files, Story, machine, save, try_load};

/// A saved guest with a disk, a share, persistent memory and sockets in `dir`.
fn saved(dir: &Path, transport: &str) -> (Files, Story) {
    let disk = dir.join("disk");
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    fs::write(dir.join("pmem"), vec![1; 2 << 20]).unwrap();
    let mut vm = machine(
        "carry_on",
        "disk=1",
        json!({ "virtio_transport": transport }),
    );
    vm.put(
        "/drives/d",
        json!({ "drive_id": "d", "path_on_host": disk }),
    )
    .done();
    vm.put(
        "/pmem/p",
        json!({ "id": "p", "path_on_host": dir.join("pmem") }),
    )
    .done();
    vm.put(
        "/vsock",
        json!({ "guest_cid": 5, "uds_path": dir.join("vsock") }),
    )
    .done();
    vm.put("/entropy", json!({})).done();
    let mut vm = vm.start();
    let mut story = Story::default();
    story.follow(&mut vm, 3);
    let files = Files::named(dir, "saved");
    save(&mut vm, &files);
    story.hear_out(vm);
    (files, story)
}

fn copy(from: &Path, name: &str) -> PathBuf {
    let to = from.with_file_name(name);
    fs::copy(from, &to).unwrap();
    to
}

#[test]
fn devices_are_known_by_their_ids_whatever_is_behind_them() {
    for transport in ["mmio", "pci"] {
        let dir = tempfile::tempdir().unwrap();
        let (files, mut story) = saved(dir.path(), transport);
        let disk = copy(&dir.path().join("disk"), "moved disk");
        let pmem = copy(&dir.path().join("pmem"), "moved pmem");
        let socket = dir.path().join("moved vsock");
        fs::remove_file(dir.path().join("disk")).unwrap();
        fs::remove_file(dir.path().join("pmem")).unwrap();
        let (mut vm, answer) = try_load(
            &files,
            json!({
                "drive_overrides": [{ "drive_id": "d", "path_on_host": disk }],
                "pmem_overrides": [{ "id": "p", "path_on_host": pmem }],
                "vsock_override": { "uds_path": socket },
            }),
        );
        answer.done();
        story.follow(&mut vm, 10);
        story.check();
        assert!(socket.exists());
        assert!(!dir.path().join("disk").exists());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = saved(dir.path(), "mmio");
    let disk = dir.path().join("disk");
    let small = copy(&disk, "small");
    let cut = fs::File::options().write(true).open(&small).unwrap();
    cut.set_len(2 << 20).unwrap();
    let pmem = dir.path().join("pmem 2");
    fs::write(&pmem, vec![1; 4 << 20]).unwrap();
    let drive = |id: &str, path: &Path| json!({ "drive_overrides": [{ "drive_id": id, "path_on_host": path }] });
    for (more, words) in [
        (drive("d", &small), &["'d'", "small", "sectors"][..]),
        (drive("e", &disk), &["'e'", "d"]),
        (drive("d", "/no/such".as_ref()), &["/no/such"]),
        (
            json!({ "pmem_overrides": [{ "id": "p", "path_on_host": pmem }] }),
            &["'p'", "pmem 2", "bytes"],
        ),
        (
            json!({ "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap0" }] }),
            &["eth0"],
        ),
    ] {
        let (mut vm, answer) = try_load(&files, more);
        answer.refused(words);
        assert_eq!(vm.state(), "Not started");
    }
    // Nothing was written to what was refused, or to what was not.
    let (mut vm, answer) = try_load(&files, json!({}));
    answer.done();
    story.follow(&mut vm, 10);
    story.check();
}

#[test]
fn a_larger_disk_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let (files, _) = saved(dir.path(), "mmio");
    let disk = fs::File::options()
        .write(true)
        .open(dir.path().join("disk"));
    disk.unwrap().set_len(8 << 20).unwrap();
    let (mut vm, answer) = try_load(&files, json!({}));
    answer.done();
    assert_eq!(vm.state(), "Running");
}

/// Of a tap that this process may make; elsewhere there is none to load.
#[test]
fn an_interface_keeps_its_address_or_has_another() {
    let may = nix::unistd::geteuid().is_root() && Path::new("/dev/net/tun").exists();
    if !may {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "saved");
    let mut vm = machine("carry_on", "", json!({}));
    // Its address is a random one.
    let net = json!({ "iface_id": "n", "host_dev_name": "bullesnap%d" });
    vm.put("/network-interfaces/n", net).done();
    let mut vm = vm.start();
    let mut story = Story::default();
    story.follow(&mut vm, 3);
    save(&mut vm, &files);
    story.hear_out(vm);
    let other = |mac: &str| json!({ "network_overrides": [{ "iface_id": "n", "guest_mac": mac }] });
    let (_, answer) = try_load(&files, other("01:00:00:00:00:07"));
    answer.refused(&["01:00:00:00:00:07", "Ethernet"]);
    let mac = "02:00:00:00:00:07";
    for (more, now) in [(json!({}), json!(null)), (other(mac), json!(mac))] {
        let (mut vm, answer) = try_load(&files, more);
        answer.done();
        let config = vm.get("/vm/config").value();
        assert_eq!(config["network-interfaces"][0]["guest_mac"], now);
        story.clone().follow(&mut vm, 3);
    }
}
