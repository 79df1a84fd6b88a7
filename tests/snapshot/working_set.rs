//! Pages that a guest touches after it was loaded, recorded and brought early.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::saved::{Files, Story, machine, save, try_load};
use crate::served::Served;

fn list(files: &Files) -> PathBuf {
    files.memory.with_file_name("saved.memory.working-set")
}

/// KiB of the memory file that `vm` has mapped and in RAM.
fn resident(vm: &Served, memory: &Path) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.running.pid())).unwrap();
    let (mut here, mut sum) = (false, 0);
    for line in smaps.lines() {
        if line.split_ascii_whitespace().count() > 5 || line.contains('-') {
            here = line.ends_with(memory.to_str().unwrap());
        } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| here) {
            sum += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn what_was_touched_is_there_the_next_time() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "saved");
    let mut story = Story::default();
    let mut vm = machine("carry_on", "", json!({})).start();
    story.follow(&mut vm, 3);
    save(&mut vm, &files);
    story.hear_out(vm);
    let loaded = |more| {
        let (vm, answer) = try_load(&files, more);
        answer.done();
        vm
    };
    // A machine that stands still has touched hardly anything.
    let still = loaded(json!({ "resume_vm": false }));
    assert!(resident(&still, &files.memory) < 1024);
    drop(still);
    assert!(!list(&files).exists());
    // All memory that it wrote before is gone through in 16 ticks.
    let mut vm = loaded(json!({ "record_working_set": true }));
    let mut once = story.clone();
    once.follow(&mut vm, 20);
    vm.signal(Signal::SIGTERM).finish();
    assert!(list(&files).exists());
    let vm = loaded(json!({ "resume_vm": false }));
    let begin = Instant::now();
    while resident(&vm, &files.memory) < 4 << 10 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(vm);
    // What is not the snapshot's is no reason not to load it.
    for bytes in [fs::read(&files.state).unwrap(), b"damaged".to_vec()] {
        fs::write(list(&files), bytes).unwrap();
        let mut vm = loaded(json!({}));
        let mut again = story.clone();
        again.follow(&mut vm, 5);
        again.check();
    }
}

#[test]
fn it_is_recorded_of_a_microvm_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "saved");
    let mut story = Story::default();
    let mut vm = machine("carry_on", "", json!({})).start();
    story.follow(&mut vm, 3);
    let record = |vm: &mut Served| vm.put("/snapshot/working-set", json!(null));
    record(&mut vm).refused(&["Record working set error", "was not made of a snapshot"]);
    save(&mut vm, &files);
    story.hear_out(vm);
    let lazy = json!({ "mem_backend": { "backend_type": "Lazy", "backend_path": files.memory } });
    for more in [json!({}), lazy] {
        let (mut vm, answer) = try_load(&files, more);
        answer.done();
        let mut again = story.clone();
        // All memory that it wrote before is gone through in 16 ticks.
        again.follow(&mut vm, 20);
        record(&mut vm).done();
        assert!(list(&files).exists());
        again.follow(&mut vm, 3);
        again.check();
        drop(vm);
        let (vm, answer) = try_load(&files, json!({ "resume_vm": false }));
        answer.done();
        let begin = Instant::now();
        while resident(&vm, &files.memory) < 4 << 10 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::remove_file(list(&files)).unwrap();
    }
}
