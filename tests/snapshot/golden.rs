//! Snapshots of every version that was released load (`resources/golden/vN`).
//!
//! `state` is the state file, `memory.zst` the memory file, `disk.zst` the guest's disk, `story` what the
//! guest had said until it was saved. Where the present version has none yet, the test writes it and fails: commit it then.

use std::fs;
use std::path::{Path, PathBuf};

use bulle::snapshot::Snapshot;
use bulle::snapshot::format::VERSION;
use serde_json::json;

use crate::common::tree;
use crate::saved::{Files, Story, machine, save, try_load};

/// What a host may lack that is like the one on which the file was made, in the words of the refusal.
const LACKS: [&str; 6] = [
    "this host lacks what the guest's processor has",
    "which this host's KVM lacks",
    "which this host's KVM does not",
    "use a host of the same",
    "use a host with the same",
    "KVM refuses",
];

fn golden(version: u16) -> PathBuf {
    tree().join(format!("resources/golden/v{version}"))
}

fn sized(path: &Path, len: u64) {
    fs::File::create(path).unwrap().set_len(len).unwrap();
}

/// Writes the files of this version.
fn make(to: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name| dir.path().join(name);
    sized(&path("disk"), 4 << 20);
    sized(&path("pmem"), 2 << 20);
    let mut vm = machine("carry_on", "disk=1 slices=1", json!({}));
    let mut put = |at: &str, body| vm.put(at, body).done();
    put(
        "/drives/disk",
        json!({ "drive_id": "disk", "path_on_host": path("disk") }),
    );
    put(
        "/pmem/pmem",
        json!({ "id": "pmem", "path_on_host": path("pmem") }),
    );
    put(
        "/vsock",
        json!({ "guest_cid": 5, "uds_path": path("vsock") }),
    );
    put("/entropy", json!({}));
    put(
        "/balloon",
        json!({ "amount_mib": 1, "deflate_on_oom": true }),
    );
    put("/hotplug/memory", json!({ "total_size_mib": 128 }));
    let mut vm = vm.start();
    let mut story = Story::default();
    story.follow(&mut vm, 5);
    let files = Files::named(dir.path(), "golden");
    save(&mut vm, &files);
    story.hear_out(vm);
    story.check();
    fs::create_dir_all(to).unwrap();
    fs::copy(&files.state, to.join("state")).unwrap();
    for (from, name) in [(&files.memory, "memory.zst"), (&path("disk"), "disk.zst")] {
        let large = fs::File::open(from).unwrap();
        let small = fs::File::create(to.join(name)).unwrap();
        zstd::stream::copy_encode(large, small, 19).unwrap();
    }
    fs::write(to.join("story"), story.text()).unwrap();
}

/// The files of a version, ready to be loaded from `dir`.
fn unpack(version: u16, dir: &Path) -> (Files, Story) {
    let from = golden(version);
    let files = Files::named(dir, "golden");
    fs::copy(from.join("state"), &files.state).unwrap();
    for (name, to) in [
        ("memory.zst", &files.memory),
        ("disk.zst", &dir.join("disk")),
    ] {
        let small = fs::File::open(from.join(name)).unwrap();
        zstd::stream::copy_decode(small, fs::File::create(to).unwrap()).unwrap();
    }
    let story = fs::read_to_string(from.join("story")).unwrap();
    (files, Story::from(story))
}

#[test]
fn snapshots_of_every_version_load() {
    let newest = golden(VERSION);
    if !newest.exists() {
        make(&newest);
        panic!("{} was made: commit it", newest.display());
    }
    for version in 1..=VERSION {
        let dir = tempfile::tempdir().unwrap();
        let (files, mut story) = unpack(version, dir.path());
        let snapshot = Snapshot::open(&files.state, &files.memory).unwrap();
        snapshot.verify().unwrap();
        assert_eq!(snapshot.machine.vcpus.len(), 1);
        let parts = snapshot.machine.board.parts.as_ref().unwrap();
        let mut ids: Vec<_> = parts.virtio.iter().map(|d| d.id.as_str()).collect();
        ids.sort_unstable();
        assert_eq!(
            ids,
            [
                "balloon",
                "disk",
                "entropy",
                "memory-hotplug",
                "pmem",
                "vsock"
            ],
            "version {version}"
        );
        sized(&dir.path().join("pmem"), 2 << 20);
        let path = |name| dir.path().join(name);
        let (mut vm, answer) = try_load(
            &files,
            json!({
                "drive_overrides": [{ "drive_id": "disk", "path_on_host": path("disk") }],
                "pmem_overrides": [{ "id": "pmem", "path_on_host": path("pmem") }],
                "vsock_override": { "uds_path": path("vsock") },
            }),
        );
        if answer.status == 400 && LACKS.iter().any(|words| answer.body.contains(words)) {
            println!(
                "version {version}: read, but of another host: {}",
                answer.body
            );
            continue;
        }
        answer.done();
        story.follow(&mut vm, 5);
        story.check();
    }
}
