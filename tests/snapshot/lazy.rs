//! Memory of which bulle itself brings each page from the files when it is touched.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::client;
use crate::huge::{Pool, alone};
use crate::saved::{Files, Story, ends, machine, save, saved_with_changes, try_load};
use crate::served::Served;

fn lazy(files: &Files) -> Value {
    json!({ "mem_backend": { "backend_type": "Lazy", "backend_path": files.memory } })
}

fn load(files: &Files, more: Value) -> Served {
    let mut body = lazy(files);
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    let (vm, answer) = try_load(files, body);
    answer.done();
    vm
}

/// A guest that was saved after a few ticks, and its changes after some more.
fn chain(dir: &Path) -> (Files, Story) {
    let [base, top] = ["base", "top"].map(|name| Files::named(dir, name));
    let story = saved_with_changes(&base, &top);
    (top, story)
}

/// KiB of the mappings of guest memory that are in RAM, of the kind that `field` counts.
fn resident(vm: &Served, field: &str) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.running.pid())).unwrap();
    let (mut here, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (name, value) = (words.next().unwrap(), words.next());
        let value = || value.unwrap().parse::<u64>().unwrap();
        match name {
            "Size:" => here = value() == 64 << 10,
            name if name == field && here => sum += value(),
            _ => {}
        }
    }
    sum
}

#[test]
fn pages_of_a_chain_come_when_they_are_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = chain(dir.path());
    let still = load(&files, json!({ "resume_vm": false }));
    let few = resident(&still, "Rss:");
    assert!(
        (1..1024).contains(&few),
        "{few} KiB of a machine that stands still"
    );
    drop(still);
    let mut vm = load(&files, json!({}));
    // All memory that it wrote before is gone through in 16 ticks.
    story.follow(&mut vm, 20);
    assert!(resident(&vm, "Rss:") > 4 << 10);
    // What is saved of it is whole.
    let again = Files::named(dir.path(), "again");
    save(&mut vm, &again);
    story.hear_out(vm);
    let mut vm = load(&again, json!({}));
    story.follow(&mut vm, 20);
    story.check();
}

#[test]
fn huge_pages_are_filled_when_they_are_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = chain(dir.path());
    let _alone = alone();
    let _pool = Pool::of("32");
    let huge = json!({ "huge_pages": "2M", "resume_vm": false });
    let mut vm = load(&files, huge);
    let few = resident(&vm, "Private_Hugetlb:");
    assert!((2048..32 << 10).contains(&few), "{few} KiB before it runs");
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    story.follow(&mut vm, 20);
    story.check();
}

#[test]
fn what_the_balloon_gave_back_stays_zero() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "balloon");
    let mut vm = machine("balloon", "wait=1", json!({ "mem_size_mib": 128 }));
    let balloon = json!({ "amount_mib": 48, "deflate_on_oom": false });
    vm.put("/balloon", balloon).done();
    let mut vm = vm.start().wait_for("touched");
    save(&mut vm, &files);
    drop(vm);
    let mut vm = load(&files, json!({}));
    vm.types("xx");
    vm.finish()
        .exits(0)
        .prints("given true")
        .prints("kept 2")
        .prints("kept then 3");
}

#[test]
fn a_working_set_is_recorded_and_brought() {
    let dir = tempfile::tempdir().unwrap();
    let (files, story) = chain(dir.path());
    let mut vm = load(&files, json!({ "record_working_set": true }));
    story.clone().follow(&mut vm, 20);
    vm.signal(Signal::SIGTERM).finish();
    let vm = load(&files, json!({ "resume_vm": false }));
    let begin = Instant::now();
    while resident(&vm, "Rss:") < 4 << 10 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(vm);
    // Of a set that says more than there is, what there is comes, into huge pages as well.
    let _alone = alone();
    let _pool = Pool::of("32");
    let mut vm = load(&files, json!({ "huge_pages": "2M" }));
    let mut again = story.clone();
    again.follow(&mut vm, 20);
    again.check();
}

#[test]
fn a_file_that_cannot_be_read_ends_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (files, _) = chain(dir.path());
    let mut vm = load(&files, json!({ "resume_vm": false }));
    for name in ["base", "top"] {
        let memory = Files::named(dir.path(), name).memory;
        File::options()
            .write(true)
            .open(memory)
            .unwrap()
            .set_len(0)
            .unwrap();
    }
    let begin = Instant::now();
    // It may end before it answers.
    let resume = client::request("PATCH", "/vm", r#"{"state":"Resumed"}"#);
    vm.client.send(resume.as_bytes());
    ends(vm, begin, "cannot bring the guest's memory from ");
}

#[test]
fn what_cannot_be_lazy_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = chain(dir.path());
    let mut wrong = files.clone();
    wrong.memory = dir.path().join("nowhere");
    let (mut vm, answer) = try_load(&files, lazy(&wrong));
    answer.refused(&["Load snapshot error", "nowhere"]);
    let mut body = files.load();
    body["mem_backend"] = lazy(&files)["mem_backend"].clone();
    vm.put("/snapshot/load", body).done();
    story.follow(&mut vm, 3);
    story.check();
}

#[test]
fn memory_that_can_be_plugged_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "plugged");
    let mut story = Story::default();
    let mut vm = machine("carry_on", "", json!({}));
    vm.put("/hotplug/memory", json!({ "total_size_mib": 128 }))
        .done();
    let mut vm = vm.start();
    story.follow(&mut vm, 5);
    save(&mut vm, &files);
    story.hear_out(vm);
    let mut vm = load(&files, json!({}));
    assert_eq!(vm.get("/hotplug/memory").value()["total_size_mib"], 128);
    story.follow(&mut vm, 20);
    story.check();
}
