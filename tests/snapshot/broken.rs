//! Files that are no snapshot, or no more: one clear error each, and a process that goes on.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::Answer;
use crate::saved::{Files, Story, machine, save};
use crate::served::Served;

/// A saved guest, and its story so far.
fn saved(dir: &Path, name: &str) -> (Files, Story) {
    let files = Files::named(dir, name);
    let mut vm = machine("carry_on", "", json!({})).start();
    let mut story = Story::default();
    story.follow(&mut vm, 2);
    save(&mut vm, &files);
    story.hear_out(vm);
    (files, story)
}

/// A process that is asked again and again.
struct Loader(Served);

impl Loader {
    fn new() -> Self {
        Self(Served::new())
    }

    #[track_caller]
    fn load(&mut self, files: &Files) -> Answer {
        self.0.put("/snapshot/load", files.load())
    }

    /// Refused with a reason, and the process is as before.
    #[track_caller]
    fn refuses(&mut self, files: &Files, what: &str) {
        let answer = self.load(files);
        assert_eq!(answer.status, 400, "{what}: {answer:#?}");
        let value: Value = serde_json::from_str(&answer.body).unwrap();
        let reason = value["fault_message"].as_str().unwrap();
        assert!(reason.len() > 20, "{what}: {reason}");
        assert_eq!(self.0.state(), "Not started", "{what}");
    }

    /// Loads the whole one after all.
    #[track_caller]
    fn goes_on(mut self, files: &Files, mut story: Story) {
        self.load(files).done();
        story.follow(&mut self.0, 5);
        story.check();
    }
}

/// A guest that was saved below `dir`, the bytes of its state file, and the same with another state file,
/// which is not there yet.
fn good_and_bad(dir: &Path) -> (Files, Story, Vec<u8>, Files) {
    let (files, story) = saved(dir, "good");
    let good = fs::read(&files.state).unwrap();
    let bad = Files {
        state: dir.join("bad.state"),
        ..files.clone()
    };
    (files, story, good, bad)
}

/// Offsets all over a file: each of the first and last bytes, and some in between.
fn offsets(len: usize) -> impl Iterator<Item = usize> {
    let step = (len / 300).max(1) | 1;
    let between = (96..len.saturating_sub(96)).step_by(step);
    (0..96.min(len))
        .chain(between)
        .chain(len.saturating_sub(96)..len)
}

#[test]
fn a_state_file_with_a_flipped_bit_is_refused_wherever_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (files, story, good, bad) = good_and_bad(dir.path());
    let mut loader = Loader::new();
    for offset in offsets(good.len()) {
        let mut bytes = good.clone();
        bytes[offset] ^= 1 << (offset % 8);
        fs::write(&bad.state, bytes).unwrap();
        loader.refuses(&bad, &format!("byte {offset} of {}", good.len()));
    }
    loader.goes_on(&files, story);
}

#[test]
fn a_state_file_of_another_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (files, story, good, bad) = good_and_bad(dir.path());
    let mut loader = Loader::new();
    for len in offsets(good.len()) {
        fs::write(&bad.state, &good[..len]).unwrap();
        loader.refuses(&bad, &format!("{len} bytes of {}", good.len()));
    }
    for more in [&[0][..], &[0xff; 4096], &good] {
        fs::write(&bad.state, [&good, more].concat()).unwrap();
        loader.refuses(&bad, &format!("{} bytes more", more.len()));
    }
    loader.goes_on(&files, story);
}

#[test]
fn other_files_and_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (files, story) = saved(dir.path(), "good");
    let (other, _) = saved(dir.path(), "other");
    let mut loader = Loader::new();
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    let with = |state: &Path, memory: &Path| Files {
        state: state.to_owned(),
        memory: memory.to_owned(),
    };
    for (state, memory, what) in [
        ("/no/such".as_ref(), &*files.memory, "no state file"),
        (&*files.state, "/no/such".as_ref(), "no memory file"),
        (dir.path(), &files.memory, "a directory"),
        (&files.state, dir.path(), "a directory"),
        ("/dev/zero".as_ref(), &files.memory, "an endless file"),
        (&files.state, "/dev/zero".as_ref(), "an endless memory"),
        (&empty, &files.memory, "an empty state"),
        (&files.state, &empty, "an empty memory"),
        (&files.memory, &files.state, "the one for the other"),
        (&files.state, &other.memory, "another guest's memory"),
        (&other.state, &files.memory, "another guest's state"),
    ] {
        loader.refuses(&with(state, memory), what);
    }
    loader.goes_on(&files, story);
}

#[test]
fn a_memory_file_of_another_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (files, story) = saved(dir.path(), "good");
    let len = fs::metadata(&files.memory).unwrap().len();
    let mut loader = Loader::new();
    let bad = Files {
        memory: dir.path().join("bad.memory"),
        ..files.clone()
    };
    for other in [
        1,
        4096,
        len / 2,
        len - 4096,
        len - 1,
        len + 1,
        len + 4096,
        1 << 40,
    ] {
        fs::copy(&files.memory, &bad.memory).unwrap();
        let file = fs::File::options().write(true).open(&bad.memory).unwrap();
        file.set_len(other).unwrap();
        loader.refuses(&bad, &format!("{other} bytes of {len}"));
    }
    loader.goes_on(&files, story);
}

#[test]
fn what_cannot_be_saved_or_loaded_now_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (files, _) = saved(dir.path(), "good");
    let mut vm = machine("carry_on", "", json!({}));
    let create = |vm: &mut Served| vm.put("/snapshot/create", files.create());
    create(&mut vm).refused(&["not", "start"]);
    let mut vm = vm.start();
    create(&mut vm).refused(&["aus"]);
    vm.put("/snapshot/load", files.load())
        .refused(&["after starting"]);
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    vm.put("/snapshot/load", files.load())
        .refused(&["after starting"]);
    // Nor into a machine that is configured already.
    let mut half = machine("carry_on", "", json!({}));
    half.put("/snapshot/load", files.load()).refused(&["oad"]);
}
