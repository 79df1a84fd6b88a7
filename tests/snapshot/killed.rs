//! A process that is killed while it saves leaves the old snapshot or the new one, never a half.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::client::request;
use crate::gc::{gc, names, written_a_while_ago};
use crate::saved::{Files, Story, machine, save, try_load, value};
use crate::served::Served;

/// A running guest, its story so far, and a moment later its machine standing still.
fn standing_still() -> (Served, Story) {
    let mut vm = machine("carry_on", "", json!({})).start();
    let mut story = Story::default();
    story.follow(&mut vm, 2);
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    (vm, story)
}

/// The nonce of the guest that `files` have, by what it says next.
fn loaded_nonce(files: &Files, nonces: [u64; 2]) -> u64 {
    let (mut vm, answer) = try_load(files, json!({}));
    answer.done();
    let mut text = String::new();
    let begin = Instant::now();
    // The first line is the end of one that was begun before.
    while text.lines().count() < 4 {
        text.push_str(&vm.running.more_output());
        let late = begin.elapsed() > Duration::from_secs(60) || !vm.running.is_running();
        assert!(!late && !text.contains("LOST"), "{text:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    let line = text.lines().nth(2).unwrap();
    let mut words = line.strip_prefix("tick ").unwrap().split(' ');
    let mut number = || words.next().unwrap().parse::<u64>().unwrap();
    let (tick, said) = (number(), number());
    let known = nonces.iter().find(|nonce| value(**nonce, tick) == said);
    *known.unwrap_or_else(|| panic!("{line:?} is of neither guest"))
}

#[test]
fn there_is_always_a_whole_snapshot() {
    // Of the time that it takes to save, so many moments.
    const MOMENTS: u32 = 16;
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "kept");
    let (mut vm, story) = standing_still();
    vm.put("/snapshot/create", files.create()).done();
    let begin = Instant::now();
    vm.put("/snapshot/create", files.create()).done();
    let takes = begin.elapsed();
    let mut nonce = story.nonce();
    let (mut old, mut new) = (0, 0);
    // On to where it is too late to keep the new one from being there, however busy the machine is.
    for step in 0.. {
        let (mut vm, story) = standing_still();
        let body = files.create().to_string();
        let request = request("PUT", "/snapshot/create", &body);
        vm.client.send(request.as_bytes());
        std::thread::sleep(takes * step / MOMENTS);
        kill(vm.running.pid(), Signal::SIGKILL).unwrap();
        drop(vm);
        let loaded = loaded_nonce(&files, [nonce, story.nonce()]);
        match loaded == nonce {
            true => old += 1,
            false => new += 1,
        }
        nonce = loaded;
        assert!(step < 20 * MOMENTS, "{old} old ones and {new} new ones");
        if step >= MOMENTS && new >= 3 {
            break;
        }
    }
    assert!(old > 0);
    // And what a killed process left behind is in nobody's way.
    let (mut vm, story) = standing_still();
    vm.put("/snapshot/create", files.create()).done();
    drop(vm);
    assert_eq!(loaded_nonce(&files, [nonce, story.nonce()]), story.nonce());
    // A memory file and a state file of each at most, and all go when asked.
    let left = names(dir.path());
    assert!(left.len() <= 2 + 2 * (old + new), "{left:?}");
    for name in left.iter().filter(|name| name.ends_with(".tmp")) {
        written_a_while_ago(&fs::File::open(dir.path().join(name)).unwrap());
    }
    gc(dir.path(), &[]).exits(0);
    assert_eq!(names(dir.path()), ["kept.memory", "kept.state"]);
}

#[test]
fn a_full_disk_leaves_the_old_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "kept");
    let (mut vm, first) = standing_still();
    vm.put("/snapshot/create", files.create()).done();
    drop(vm);
    let (mut vm, second) = standing_still();
    // A file that may not become as large as the memory fails like a full disk.
    let pid = vm.running.pid();
    set_file_limit(pid.as_raw(), 1 << 16);
    vm.put("/snapshot/create", files.create())
        .refused(&["kept.memory"]);
    assert_eq!(vm.state(), "Paused");
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    let mut vm = vm.wait_for("tick");
    let nonces = [first.nonce(), second.nonce()];
    assert_eq!(loaded_nonce(&files, nonces), first.nonce());
    // With room again the same machine can be saved.
    set_file_limit(pid.as_raw(), u64::MAX);
    save(&mut vm, &files);
    drop(vm);
    assert_eq!(loaded_nonce(&files, nonces), second.nonce());
}

/// Limits how large a file a process may write.
fn set_file_limit(pid: i32, bytes: u64) {
    let status = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string()])
        .arg(match bytes {
            u64::MAX => "--fsize=unlimited:unlimited".to_owned(),
            bytes => format!("--fsize={bytes}:unlimited"),
        })
        .status()
        .unwrap();
    assert!(status.success());
}
