//! A loaded guest is where it was when it was saved: memory, registers, timers, devices.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bulle::snapshot::Snapshot;
use serde_json::{Value, json};

use crate::saved::{Files, Story, machine, save, try_load};
use crate::served::Served;

const IRQCHIPS: [&str; 2] = ["split", "kernel"];
const TRANSPORTS: [&str; 2] = ["mmio", "pci"];

/// Saves and loads `vm` so often, each time in a process of its own.
fn cycles(vm: Served, story: &mut Story, cycles: usize) {
    let save = |vm: &mut Served, files: &Files, _| save(vm, files);
    cycles_with(vm, story, cycles, save);
}

/// The same, saved by `save`, which is told the number of the cycle. Files of earlier cycles stay.
fn cycles_with(
    mut vm: Served,
    story: &mut Story,
    cycles: usize,
    mut save: impl FnMut(&mut Served, &Files, usize),
) {
    let dir = tempfile::tempdir().unwrap();
    story.follow(&mut vm, 5);
    for cycle in 0..cycles {
        let files = Files::named(dir.path(), &format!("cycle{cycle}"));
        save(&mut vm, &files, cycle);
        story.hear_out(vm);
        let (loaded, answer) = try_load(&files, json!({}));
        answer.done();
        vm = loaded;
        assert_eq!(vm.state(), "Running");
        story.follow(&mut vm, 2 + cycle % 5);
    }
    story.check();
}

/// A machine with a disk whose requests wait for their tokens most of the time, so that one is under way
/// when all stops. The disk is in `dir`, since the machine's own directory goes with its process.
fn with_disk(dir: &Path, config: Value) -> Served {
    let mut vm = machine("carry_on", "disk=1", config);
    let disk = dir.join("disk");
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let drive = json!({
        "drive_id": "d",
        "path_on_host": disk,
        "rate_limiter": { "ops": { "size": 1, "refill_time": 20 } },
    });
    vm.put("/drives/d", drive).done();
    vm.start()
}

#[test]
fn memory_and_registers_are_as_they_were() {
    for irqchip in IRQCHIPS {
        let vm = machine("carry_on", "", json!({ "irqchip": irqchip })).start();
        let mut wide = false;
        cycles_with(vm, &mut Story::default(), 10, |vm, files, _| {
            save(vm, files);
            let snapshot = Snapshot::open(&files.state, &files.memory).unwrap();
            // XSTATE_BV: the upper halves of vectors are in use.
            wide |= snapshot.machine.vcpus[0].xsave[512] & 4 != 0;
        });
        assert_eq!(wide, is_x86_feature_detected!("avx"));
    }
}

#[test]
fn a_disk_goes_on_amid_its_requests_on_both_transports() {
    for transport in TRANSPORTS {
        for irqchip in IRQCHIPS {
            let kept = tempfile::tempdir().unwrap();
            let config = json!({ "irqchip": irqchip, "virtio_transport": transport });
            let vm = with_disk(kept.path(), config);
            let mut story = Story::default();
            cycles(vm, &mut story, 5);
        }
    }
}

#[test]
fn nothing_is_lost_in_a_hundred_cycles() {
    let kept = tempfile::tempdir().unwrap();
    let vm = with_disk(kept.path(), json!({ "virtio_transport": "pci" }));
    cycles(vm, &mut Story::default(), 100);
}

#[test]
fn twenty_changes_load_as_a_chain() {
    let kept = tempfile::tempdir().unwrap();
    let vm = with_disk(kept.path(), json!({}));
    cycles_with(vm, &mut Story::default(), 20, |vm, files, cycle| {
        vm.patch("/vm", json!({ "state": "Paused" })).done();
        let mut body = files.create();
        body["snapshot_type"] = match cycle {
            0 => "Full",
            _ => "Diff",
        }
        .into();
        vm.put("/snapshot/create", body).done();
        let snapshot = Snapshot::open(&files.state, &files.memory).unwrap();
        assert_eq!(snapshot.layers.len(), cycle + 1);
    });
}

/// Changes that would replace what they build on could never be loaded.
#[test]
fn changes_to_the_names_of_what_they_build_on_are_all_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| Files::named(dir.path(), name));
    let mut vm = machine("carry_on", "", json!({ "track_dirty_pages": true })).start();
    let mut story = Story::default();
    story.follow(&mut vm, 2);
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let layers = |vm: &mut Served, files: &Files, kind: &str| {
        let mut body = files.create();
        body["snapshot_type"] = kind.into();
        vm.put("/snapshot/create", body).done();
        let snapshot = Snapshot::open(&files.state, &files.memory).unwrap();
        snapshot.layers.len()
    };
    assert_eq!(layers(&mut vm, &a, "Full"), 1);
    assert_eq!(layers(&mut vm, &a, "Diff"), 1, "over its base");
    assert_eq!(layers(&mut vm, &b, "Diff"), 2, "beside it");
    assert_eq!(layers(&mut vm, &a, "Diff"), 1, "over the base of its base");
    std::fs::remove_file(&a.state).unwrap();
    assert_eq!(layers(&mut vm, &b, "Diff"), 1, "its base is gone");
    story.hear_out(vm);
    let (mut vm, answer) = try_load(&b, json!({}));
    answer.done();
    story.follow(&mut vm, 3);
    story.check();
}

#[test]
fn the_timer_of_the_local_apic_goes_on() {
    for irqchip in IRQCHIPS {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::named(dir.path(), "ticking");
        let mut vm = machine("ticking", "", json!({ "irqchip": irqchip })).start();
        vm = vm.wait_for("...");
        save(&mut vm, &files);
        std::thread::sleep(Duration::from_millis(50));
        let dots = 3 + vm.running.more_output().len();
        drop(vm);
        let (vm, answer) = try_load(&files, json!({}));
        answer.done();
        let outcome = vm.finish().exits(0).prints("100 ticks");
        let more = outcome.stdout.matches('.').count();
        // Some of the first dots may have come together.
        assert!(
            (1..=100 - 3).contains(&more),
            "{dots} and then {outcome:#?}"
        );
        let least = Duration::from_millis(50) * (more as u32 / 2);
        assert!(
            outcome.elapsed > least,
            "{more} dots too fast: {outcome:#?}"
        );
    }
}

#[test]
fn a_machine_is_loaded_standing_still_where_that_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "still");
    let mut story = Story::default();
    let mut vm = machine("carry_on", "", json!({})).start();
    story.follow(&mut vm, 3);
    save(&mut vm, &files);
    story.hear_out(vm);
    let (mut loaded, answer) = try_load(&files, json!({ "resume_vm": false }));
    answer.done();
    assert_eq!(loaded.state(), "Paused");
    assert_eq!(loaded.running.more_output(), "");
    loaded.patch("/vm", json!({ "state": "Resumed" })).done();
    story.follow(&mut loaded, 10);
    story.check();
    // One that was saved goes on too.
    save(&mut loaded, &Files::named(dir.path(), "again"));
    loaded.patch("/vm", json!({ "state": "Resumed" })).done();
    story.follow(&mut loaded, 3);
    story.check();
}

#[test]
fn many_are_made_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "one");
    let mut first = Story::default();
    let mut vm = machine("carry_on", "", json!({})).start();
    first.follow(&mut vm, 3);
    save(&mut vm, &files);
    first.hear_out(vm);
    let (memory, state) = (fs::read(&files.memory), fs::read(&files.state));
    let clones: Vec<_> = (0..4).map(|_| try_load(&files, json!({}))).collect();
    for (mut clone, answer) in clones {
        answer.done();
        let mut story = first.clone();
        story.follow(&mut clone, 10);
        story.check();
    }
    // None of them changed what they were made of.
    assert_eq!(fs::read(&files.memory).unwrap(), memory.unwrap());
    assert_eq!(fs::read(&files.state).unwrap(), state.unwrap());
}
