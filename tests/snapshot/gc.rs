//! `bulle snapshot gc`: what interrupted snapshots left, and chains of which some are kept.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::json;

use crate::common::{Input, Outcome, Running};
use crate::saved::{Files, machine, try_load};
use crate::served::Served;

pub fn gc(dir: &Path, more: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(["snapshot", "gc"]).arg(dir).args(more);
    Running::start(command, Input::Null, Duration::from_secs(60)).finish()
}

fn files(dir: &Path, name: &str) -> Files {
    let dir = dir.join(name);
    Files {
        state: dir.join("state"),
        memory: dir.join("memory"),
    }
}

/// Saves to a directory as `bulle snapshot create` does; the machine goes on.
fn save(vm: &mut Served, dir: &Path, name: &str, kind: &str) {
    fs::create_dir_all(dir.join(name)).unwrap();
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let mut body = files(dir, name).create();
    body["snapshot_type"] = kind.into();
    vm.put("/snapshot/create", body).done();
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
}

fn leftover(path: &Path) {
    let file = fs::File::create(path).unwrap();
    file.set_len(1 << 20).unwrap();
    written_a_while_ago(&file);
}

pub fn written_a_while_ago(file: &fs::File) {
    let before = SystemTime::now() - Duration::from_secs(60);
    file.set_modified(before).unwrap();
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_nothing_kept_builds_on_goes_with_what_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut vm = machine("carry_on", "slices=1", json!({ "track_dirty_pages": true })).start();
    save(&mut vm, dir, "base", "Full");
    save(&mut vm, dir, "one", "Diff");
    save(&mut vm, dir, "two", "Diff");
    save(&mut vm, dir, "other", "Full");
    drop(vm);
    fs::write(dir.join("notes"), "mine").unwrap();
    fs::create_dir(dir.join("mine")).unwrap();
    fs::write(dir.join("mine/state"), "mine").unwrap();
    leftover(&dir.join("one/.bulle-abc.tmp"));
    // Of a snapshot that goes, and of one that stays.
    fs::write(dir.join("other/memory.working-set"), "").unwrap();
    fs::write(dir.join("two/memory.working-set"), "").unwrap();
    // One that is being written, and one that may be about to be.
    let busy = dir.join("one/.bulle-busy.tmp");
    leftover(&busy);
    let busy = fs::File::open(busy).unwrap();
    busy.lock().unwrap();
    fs::write(dir.join("one/.bulle-new.tmp"), "").unwrap();
    let before = names(dir);

    let said = gc(dir, &["--keep", "two", "--dry-run"]).exits(0);
    let said = said.prints("other/state").prints("could be free");
    assert!(!said.stdout.contains("base") && !said.stdout.contains("two"));
    assert_eq!(names(dir), before);
    // Without names all of them are kept.
    gc(dir, &[])
        .exits(0)
        .prints(".bulle-abc.tmp  0 KiB  not finished");
    assert_eq!(names(dir), before);
    assert_eq!(
        names(&dir.join("one")),
        [".bulle-busy.tmp", ".bulle-new.tmp", "memory", "state"]
    );
    gc(dir, &["--keep", "two", "--keep", "none"])
        .exits(125)
        .complains("none is to be kept");
    assert_eq!(names(dir), before);
    gc(dir, &["--keep", "two"]).exits(0).prints("is free");
    assert_eq!(names(dir), ["base", "mine", "notes", "one", "two"]);
    assert_eq!(
        names(&dir.join("two")),
        ["memory", "memory.working-set", "state"]
    );
    let (vm, answer) = try_load(&files(dir, "two"), json!({}));
    answer.done();
    vm.wait_for("tick");
}

#[test]
fn of_two_memory_files_the_one_of_the_state_stays() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut vm = machine("carry_on", "slices=1", json!({})).start();
    save(&mut vm, dir, "first", "Full");
    save(&mut vm, dir, "second", "Full");
    drop(vm);
    let (first, second) = (files(dir, "first"), files(dir, "second"));
    // As a process leaves it that was killed between the names of the new files.
    fs::rename(&first.memory, dir.join("first/.memory.previous")).unwrap();
    fs::copy(&second.memory, &first.memory).unwrap();
    // The same of a first snapshot.
    fs::create_dir(dir.join("third")).unwrap();
    let third = files(dir, "third");
    fs::copy(&second.memory, &third.memory).unwrap();
    let left = dir.join("third/.bulle-left.tmp");
    fs::copy(&second.state, &left).unwrap();
    written_a_while_ago(&fs::File::options().append(true).open(left).unwrap());
    // And after them.
    fs::copy(&first.memory, dir.join("second/.memory.previous")).unwrap();
    let said = gc(dir, &[]).exits(0);
    said.prints("first/memory ")
        .prints("second/.memory.previous ")
        .prints("third/memory ");
    assert!(!dir.join("third").exists());
    assert_eq!(names(&dir.join("first")), [".memory.previous", "state"]);
    assert_eq!(names(&dir.join("second")), ["memory", "state"]);
    for files in [first, second] {
        let (vm, answer) = try_load(&files, json!({}));
        answer.done();
        vm.wait_for("tick");
    }
}
