//! Memory that a page fault handler brings.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client;
use crate::common::{Outcome, bulle_at};
use crate::pager::{Pager, Way};
use crate::saved::{Files, Story, ends, machine, save, try_load};
use crate::served::Served;

/// A guest that was saved after a few ticks, and what it said.
fn saved(dir: &Path) -> (Files, Story) {
    let files = Files::named(dir, "saved");
    let mut story = Story::default();
    let mut vm = machine("carry_on", "", json!({})).start();
    story.follow(&mut vm, 5);
    save(&mut vm, &files);
    story.hear_out(vm);
    (files, story)
}

pub fn uffd(socket: &Path) -> Value {
    json!({ "mem_backend": { "backend_type": "Uffd", "backend_path": socket } })
}

#[test]
fn pages_come_from_the_handler_when_they_are_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = saved(dir.path());
    let socket = dir.path().join("socket");
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let (mut vm, answer) = try_load(&files, uffd(&socket));
    answer.done();
    // All memory that it wrote before is gone through in 16 ticks.
    story.follow(&mut vm, 20);
    // What is saved of it is whole, though most of it was never touched.
    let again = Files::named(dir.path(), "again");
    save(&mut vm, &again);
    let faults = pager.faults.load(Ordering::SeqCst);
    story.hear_out(vm);
    let mappings = pager.end();
    let size: u64 = mappings.iter().map(|mapping| mapping.size).sum();
    assert_eq!(size, 64 << 20);
    assert!(
        mappings
            .iter()
            .all(|m| m.page_size == 4096 && m.page_size_kib == 4096)
    );
    assert!(faults >= 1024, "{faults}");
    let (mut vm, answer) = try_load(&again, json!({}));
    answer.done();
    story.follow(&mut vm, 20);
    story.check();
}

#[test]
fn what_the_balloon_gave_back_is_told_and_stays_zero() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "balloon");
    let mut vm = machine("balloon", "wait=1", json!({ "mem_size_mib": 128 }));
    vm.put(
        "/balloon",
        json!({ "amount_mib": 48, "deflate_on_oom": false }),
    )
    .done();
    let mut vm = vm.start().wait_for("touched");
    save(&mut vm, &files);
    drop(vm);
    let socket = dir.path().join("socket");
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let (mut vm, answer) = try_load(&files, uffd(&socket));
    answer.done();
    vm.types("xx");
    vm.finish()
        .exits(0)
        .prints("given true")
        .prints("kept 2")
        .prints("kept then 3");
    assert_eq!(pager.removed.load(Ordering::SeqCst), 48 << 8);
    pager.end();
}

/// A microVM that commands find in a directory, killed when dropped.
struct Child<'a>(&'a Path);

impl Child<'_> {
    fn bulle(&self, words: &[&str]) -> Outcome {
        bulle_at(self.0, words)
    }
}

impl Drop for Child<'_> {
    fn drop(&mut self) {
        self.bulle(&["kill", "child"]);
    }
}

#[test]
fn a_fork_has_what_the_handler_had_not_brought_yet() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = saved(dir.path());
    let (socket, place) = (dir.path().join("socket"), dir.path().join("run"));
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let mut vm = Served::with(&["--runtime-dir", place.to_str().unwrap(), "--id", "parent"]);
    let mut body = files.load();
    body["mem_backend"] = uffd(&socket)["mem_backend"].clone();
    vm.put("/snapshot/load", body).done();
    let child = Child(&place);
    child
        .bulle(&["fork", "parent", "--name", "child"])
        .exits(0)
        .prints("child\n");
    // In so many ticks it goes through all of its memory.
    let begin = Instant::now();
    let said = loop {
        let said = child.bulle(&["logs", "child"]).exits(0).stdout;
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        if let Some((_, whole)) = whole.split_once('\n')
            && whole.lines().count() > 20
        {
            break whole.to_owned();
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{said}");
    };
    // Its parent goes on as if nothing had been, and comes to say the same.
    while !story.text().contains(&said) {
        story.follow(&mut vm, 1);
        assert!(begin.elapsed() < Duration::from_secs(120), "{said}");
    }
    story.check();
    drop(vm);
    pager.end();
}

#[test]
fn a_handler_that_dies_ends_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = saved(dir.path());
    let lost = "the page fault handler at ";
    // Amid its work: vCPUs stand in faults, or will.
    let socket = dir.path().join("a");
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let (mut vm, answer) = try_load(&files, uffd(&socket));
    answer.done();
    story.follow(&mut vm, 3);
    pager.end();
    ends(vm, Instant::now(), lost);
    // Of a VM that stands still.
    let socket = dir.path().join("b");
    let pager = Pager::start(&socket, &files.memory, Way::Serve);
    let mut body = uffd(&socket);
    body["resume_vm"] = json!(false);
    let (vm, answer) = try_load(&files, body);
    answer.done();
    pager.end();
    ends(vm, Instant::now(), lost);
}

#[test]
fn a_handler_that_brings_nothing_ends_the_process_when_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (files, _) = saved(dir.path());
    for (name, way) in [("a", Way::Leave), ("b", Way::Listen)] {
        let socket = dir.path().join(name);
        let pager = Pager::start(&socket, &files.memory, way);
        let mut vm = Served::new();
        let mut body = files.load();
        body["mem_backend"] = uffd(&socket)["mem_backend"].clone();
        // The machine's own thread stands in a fault, so that nobody answers.
        let request = client::request("PUT", "/snapshot/load", &body.to_string());
        vm.client.send(request.as_bytes());
        if way == Way::Listen {
            let begin = Instant::now();
            while pager.faults.load(Ordering::SeqCst) == 0 {
                assert!(begin.elapsed() < Duration::from_secs(60));
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        pager.end();
        ends(vm, Instant::now(), "closed its connection");
    }
}

#[test]
fn without_a_handler_nothing_is_loaded_and_all_is_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut story) = saved(dir.path());
    let (mut vm, answer) = try_load(&files, uffd(&dir.path().join("nobody")));
    answer.refused(&["Load snapshot error", "page fault handler at", "nobody"]);
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    let mut body = files.load();
    body["mem_backend"] = uffd(&plain)["mem_backend"].clone();
    vm.put("/snapshot/load", body)
        .refused(&["Connection refused"]);
    vm.put("/snapshot/load", files.load()).done();
    story.follow(&mut vm, 3);
    story.check();
}
