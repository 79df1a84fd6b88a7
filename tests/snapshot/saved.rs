//! A guest that is saved, killed and loaded again, and what it says all along.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Answer;
use crate::common;
use crate::served::{Served, boot};

/// Longest that a guest may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// The two files of a snapshot.
#[derive(Clone, Debug)]
pub struct Files {
    pub state: PathBuf,
    pub memory: PathBuf,
}

impl Files {
    /// Files of this name in a directory.
    pub fn named(dir: &Path, name: &str) -> Self {
        Self {
            state: dir.join(format!("{name}.state")),
            memory: dir.join(format!("{name}.memory")),
        }
    }

    /// What is asked to save.
    pub fn create(&self) -> Value {
        json!({ "snapshot_path": self.state, "mem_file_path": self.memory })
    }

    /// What is asked to load, and to run at once.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true,
        })
    }
}

/// Asks a new process to load; `more` is added to what is asked.
pub fn try_load(files: &Files, more: Value) -> (Served, Answer) {
    let mut vm = Served::new();
    let mut body = files.load();
    let fields = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    let answer = vm.put("/snapshot/load", body);
    (vm, answer)
}

/// Pauses and saves.
#[track_caller]
pub fn save(vm: &mut Served, files: &Files) {
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    vm.put("/snapshot/create", files.create()).done();
}

/// Waits for the end of a VM whose memory nobody brings any more since `begin`.
#[track_caller]
pub fn ends(vm: Served, begin: Instant, text: &str) {
    vm.running.finish().exits(125).complains(text);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
}

/// A machine with a payload that is not started.
pub fn machine(payload: &str, words: &str, machine: Value) -> Served {
    let mut vm = Served::new();
    let mut source = boot(&common::payload(payload));
    source["boot_args"] = words.into();
    vm.put("/boot-source", source).done();
    let mut config = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
    let fields = machine.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(fields);
    vm.put("/machine-config", config).done();
    vm
}

/// What `carry_on` says, over all processes that it lived in.
#[derive(Clone, Debug, Default)]
pub struct Story(String);

impl From<String> for Story {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Story {
    /// All that was said so far.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Listens until the guest has come `ticks` further.
    #[track_caller]
    pub fn follow(&mut self, vm: &mut Served, ticks: usize) {
        let wanted = self.ticks() + ticks;
        let begin = Instant::now();
        while self.ticks() < wanted {
            self.0.push_str(&vm.running.more_output());
            assert!(!self.0.contains("LOST"), "{}", self.end());
            let late = begin.elapsed() > PATIENCE || !vm.running.is_running();
            assert!(!late, "no {wanted} ticks: {}", self.end());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// All that a machine that stands still has said; it ends with this.
    pub fn hear_out(&mut self, mut vm: Served) {
        // Between two answers the process has put out what the guest wrote before.
        for _ in 0..2 {
            assert_eq!(vm.state(), "Paused");
        }
        self.0.push_str(&vm.running.last_output());
    }

    fn ticks(&self) -> usize {
        self.0.lines().filter(|l| l.starts_with("tick")).count()
    }

    fn end(&self) -> String {
        let lines: Vec<&str> = self.0.lines().rev().take(5).collect();
        format!("… {:?}", lines.into_iter().rev().collect::<Vec<_>>())
    }

    /// The number that only the guest's memory had.
    pub fn nonce(&self) -> u64 {
        let line = self.0.lines().find_map(|l| l.strip_prefix("nonce "));
        line.unwrap().parse().unwrap()
    }

    /// Checks that every value follows from the one before, and none is missing or said twice.
    #[track_caller]
    pub fn check(&self) {
        let mut now = self.nonce();
        let whole = self.0.rsplit_once('\n').unwrap().0;
        let lines = whole.lines().filter(|line| !line.starts_with("nonce "));
        for (tick, line) in (0u64..).zip(lines) {
            now = next(now, tick);
            assert_eq!(line, format!("tick {tick} {now}"));
        }
    }
}

/// The rule of `carry_on`: what comes after `value` in a tick.
fn next(value: u64, tick: u64) -> u64 {
    value
        .wrapping_mul(0x2545_f491_4f6c_dd1d)
        .rotate_left(17)
        .wrapping_add(tick)
}

/// What a guest with this nonce says in a tick.
pub fn value(nonce: u64, tick: u64) -> u64 {
    (0..=tick).fold(nonce, next)
}

/// Saves a guest after a few ticks to `base`, and its changes after some more to `top`.
pub fn saved_with_changes(base: &Files, top: &Files) -> Story {
    let mut story = Story::default();
    let mut vm = machine("carry_on", "", json!({ "track_dirty_pages": true })).start();
    story.follow(&mut vm, 3);
    save(&mut vm, base);
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    story.follow(&mut vm, 3);
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let mut body = top.create();
    body["snapshot_type"] = json!("Diff");
    vm.put("/snapshot/create", body).done();
    story.hear_out(vm);
    story
}
