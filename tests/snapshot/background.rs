//! Snapshots that are written while the guest goes on.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::huge::{Pool, alone};
use crate::saved::{Files, Story, machine, try_load, value};
use crate::served::Served;

const PATIENCE: Duration = Duration::from_secs(60);

pub fn create(files: &Files) -> Value {
    let mut body = files.create();
    body["background"] = json!(true);
    body
}

/// What is said of the snapshot that was begun last.
pub fn status(vm: &mut Served) -> Value {
    vm.get("/vm/statistics").value()["snapshot"].clone()
}

/// Waits for the end of what is being written.
#[track_caller]
pub fn ended(vm: &mut Served) -> Value {
    let begin = Instant::now();
    loop {
        let status = status(vm);
        if status["state"] != "writing" {
            return status;
        }
        assert!(begin.elapsed() < PATIENCE, "{status}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A guest that has said something.
pub fn ticking(config: Value) -> (Served, Story) {
    let mut vm = machine("carry_on", "", config).start();
    let mut story = Story::default();
    story.follow(&mut vm, 3);
    (vm, story)
}

/// Loads what was saved and checks that its guest goes on as one with this nonce would.
#[track_caller]
pub fn goes_on(files: &Files, nonce: u64) {
    let (vm, answer) = try_load(files, json!({}));
    answer.done();
    let begin = Instant::now();
    let mut said = String::new();
    // The first line may be the rest of one, and the last the beginning.
    while said.lines().count() < 20 {
        said += &vm.running.more_output();
        assert!(begin.elapsed() < PATIENCE, "{said:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    for line in said.lines().skip(1).take(18) {
        let words: Vec<&str> = line.split(' ').collect();
        let tick = words[1].parse().unwrap();
        assert_eq!(line, format!("tick {tick} {}", value(nonce, tick)));
    }
}

/// The processes that `vm` made.
fn children(vm: &Served) -> Vec<Pid> {
    let pid = vm.running.pid();
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let pids = text.split_ascii_whitespace();
    pids.map(|pid| Pid::from_raw(pid.parse().unwrap()))
        .collect()
}

/// Waits until a process that was told to stands still; false if it has ended.
fn stands(pid: Pid) -> bool {
    let begin = Instant::now();
    loop {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        match stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next())
        {
            Some('T') => return true,
            None | Some('Z' | 'X') => return false,
            Some(_) => assert!(begin.elapsed() < PATIENCE, "{stat}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Begins snapshots until one stands still amid its writing, before any of it has its name; gives the process that
/// writes it.
#[track_caller]
pub fn stuck(vm: &mut Served, files: &Files) -> Pid {
    for _ in 0..100 {
        vm.put("/snapshot/create", create(files)).done();
        if let [writer] = children(vm)[..]
            && kill(writer, Signal::SIGSTOP).is_ok()
        {
            let stands = stands(writer);
            let names = names(files.state.parent().unwrap());
            let begun = names.iter().filter(|name| name.ends_with(".tmp")).count();
            let published = names.iter().any(|name| name.ends_with(".previous"));
            if stands && begun == 2 && !published && status(vm)["state"] == "writing" {
                return writer;
            }
            // It may be gone.
            let _ = kill(writer, Signal::SIGCONT);
        }
        ended(vm);
    }
    panic!("all were too fast");
}

/// Names in a directory, temporary ones too.
pub fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_guest_goes_on_and_what_is_saved_is_how_it_was() {
    for irqchip in ["split", "kernel"] {
        let dir = tempfile::tempdir().unwrap();
        let (mut vm, mut story) = ticking(json!({ "irqchip": irqchip, "track_dirty_pages": true }));
        let files: Vec<_> = ["a", "b", "c"]
            .map(|name| Files::named(dir.path(), name))
            .into();
        for files in &files[..2] {
            vm.put("/snapshot/create", create(files)).done();
            assert_eq!(vm.state(), "Running");
            story.follow(&mut vm, 5);
            let status = ended(&mut vm);
            assert_eq!(status["state"], "saved", "{status}");
            assert_eq!(status["path"], json!(files.state));
            assert!(status.get("waited").is_none(), "{status}");
            assert!(status["pause_us"].as_u64().unwrap() > 0);
        }
        // Of a machine that stands still, which stays so.
        vm.patch("/vm", json!({ "state": "Paused" })).done();
        vm.put("/snapshot/create", create(&files[2])).done();
        assert_eq!(ended(&mut vm)["state"], "saved");
        assert_eq!(vm.state(), "Paused");
        vm.patch("/vm", json!({ "state": "Resumed" })).done();
        story.follow(&mut vm, 3);
        story.check();
        for files in &files {
            goes_on(files, story.nonce());
        }
    }
}

#[test]
fn changes_are_written_in_the_background_too_and_all_build_on_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut story) = ticking(json!({ "track_dirty_pages": true }));
    let base = Files::named(dir.path(), "base");
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    vm.put("/snapshot/create", base.create()).done();
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    let changes: Vec<_> = ["1", "2"].map(|name| Files::named(dir.path(), name)).into();
    for files in &changes {
        story.follow(&mut vm, 3);
        let mut body = create(files);
        body["snapshot_type"] = json!("Diff");
        vm.put("/snapshot/create", body).done();
        assert_eq!(ended(&mut vm)["state"], "saved");
    }
    drop(vm);
    let size = |files: &Files| {
        let metadata = fs::metadata(&files.memory).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
    };
    assert!(size(&changes[1]) < size(&base), "{changes:?}");
    // The second needs nothing of the first.
    fs::remove_file(&changes[0].memory).unwrap();
    goes_on(&changes[1], story.nonce());
}

#[test]
fn one_at_a_time_and_one_that_dies_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut story) = ticking(json!({}));
    let files = Files::named(dir.path(), "saved");
    vm.put("/snapshot/create", create(&files)).done();
    assert_eq!(ended(&mut vm)["state"], "saved");
    let writer = stuck(&mut vm, &files);
    let before = fs::read(&files.state).unwrap();
    // The guest goes on meanwhile, and nothing else is saved.
    story.follow(&mut vm, 3);
    let other = Files::named(dir.path(), "other");
    let busy = ["one is being written to", "saved.state"];
    vm.put("/snapshot/create", create(&other))
        .refused_with("busy", &busy);
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    vm.put("/snapshot/create", other.create()).refused(&busy);
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    assert!(names(dir.path()).len() > 2);
    kill(writer, Signal::SIGKILL).unwrap();
    let status = ended(&mut vm);
    assert_eq!(status["state"], "failed");
    assert!(
        status["error"].as_str().unwrap().contains("SIGKILL"),
        "{status}"
    );
    assert_eq!(names(dir.path()), ["saved.memory", "saved.state"]);
    assert_eq!(fs::read(&files.state).unwrap(), before);
    goes_on(&files, story.nonce());
    vm.put("/snapshot/create", create(&other)).done();
    assert_eq!(ended(&mut vm)["state"], "saved");
    goes_on(&other, story.nonce());
}

#[test]
fn a_full_disk_is_told_of_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut story) = ticking(json!({}));
    let files = Files::named(dir.path(), "saved");
    let limit = |vm: &Served, bytes: libc::rlim_t| {
        let limits = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: libc::RLIM_INFINITY,
        };
        let pid = vm.running.pid().as_raw();
        // SAFETY: reads a structure that is there.
        let done = unsafe {
            libc::prlimit(
                pid,
                libc::RLIMIT_FSIZE,
                &raw const limits,
                std::ptr::null_mut(),
            )
        };
        assert_eq!(done, 0);
    };
    limit(&vm, 1 << 20);
    vm.put("/snapshot/create", create(&files)).done();
    let status = ended(&mut vm);
    assert_eq!(status["state"], "failed", "{status}");
    let error = status["error"].as_str().unwrap();
    assert!(
        error.contains("saved.memory") && error.contains("File too large"),
        "{error}"
    );
    assert_eq!(names(dir.path()), Vec::<String>::new());
    story.follow(&mut vm, 3);
    limit(&vm, libc::RLIM_INFINITY);
    vm.put("/snapshot/create", create(&files)).done();
    assert_eq!(ended(&mut vm)["state"], "saved");
    goes_on(&files, story.nonce());
    let nowhere = Files::named(Path::new("/nowhere"), "saved");
    vm.put("/snapshot/create", create(&nowhere))
        .refused(&["Cannot write /nowhere/saved.state"]);
    story.follow(&mut vm, 1);
    story.check();
}

#[test]
fn a_guest_that_ends_meanwhile_is_saved_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "saved");
    let mut vm = machine("serial_echo", "", json!({}))
        .start()
        .wait_for("ready");
    vm.types("abc");
    let mut vm = vm.wait_for("abc");
    let writer = stuck(&mut vm, &files);
    vm.types("d\n");
    let mut vm = vm.wait_for("4 bytes");
    std::thread::sleep(Duration::from_millis(100));
    assert!(vm.running.is_running());
    kill(writer, Signal::SIGCONT).unwrap();
    vm.finish().exits(0);
    assert_eq!(names(dir.path()), ["saved.memory", "saved.state"]);
    let (mut copy, answer) = try_load(&files, json!({}));
    answer.done();
    copy.types("\n");
    copy.finish().exits(0).prints("3 bytes");
}

/// Saves a guest in the background over and over, while it goes on with all of its memory.
fn protected(config: Value) {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut story) = ticking(config);
    let files: Vec<_> = ["a", "b", "c"]
        .map(|name| Files::named(dir.path(), name))
        .into();
    for files in &files {
        vm.put("/snapshot/create", create(files)).done();
        assert_eq!(vm.state(), "Running");
        let status = ended(&mut vm);
        assert_eq!(status["state"], "saved", "{status}");
        assert!(status.get("waited").is_none(), "{status}");
        println!("{} µs", status["pause_us"]);
        // All memory is gone through in 16 ticks: nothing stays protected.
        story.follow(&mut vm, 20);
    }
    story.check();
    // One that does not come to its end leaves the guest as it was.
    vm.put(
        "/snapshot/create",
        create(&Files::named(Path::new("/dev/full"), "saved")),
    )
    .refused(&["Cannot write"]);
    let last = Files::named(dir.path(), "last");
    vm.put("/snapshot/create", create(&last)).done();
    vm.signal(Signal::SIGTERM).finish();
    for files in &files {
        goes_on(files, story.nonce());
    }
}

#[test]
fn shared_memory_is_protected_while_it_is_written() {
    protected(json!({ "memory_backing": "memfd" }));
    // Memory that is protected stays where it is.
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, _) = ticking(json!({ "memory_backing": "memfd" }));
    let files = Files::named(dir.path(), "a");
    let fork = json!({ "uds_path": "/nowhere" });
    let refused = (0..100).any(|_| {
        vm.put("/snapshot/create", create(&files)).done();
        let answer = vm.put("/fork", fork.clone());
        let busy = answer.body.contains(r#""code":"busy""#);
        ended(&mut vm);
        busy
    });
    assert!(refused);
}

#[test]
fn huge_pages_are_protected_while_they_are_written() {
    let _alone = alone();
    // Clones are loaded in pages of their own beside it.
    let _pool = Pool::of("64");
    protected(json!({ "huge_pages": "2M" }));
    protected(json!({ "huge_pages": "2M", "memory_backing": "memfd" }));
}

#[test]
fn memory_that_a_balloon_may_give_back_is_written_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::named(dir.path(), "saved");
    let mut vm = machine("carry_on", "", json!({ "memory_backing": "memfd" }));
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": false });
    vm.put("/balloon", balloon).done();
    let (mut vm, mut story) = (vm.start(), Story::default());
    story.follow(&mut vm, 3);
    vm.put("/snapshot/create", create(&files)).done();
    let status = status(&mut vm);
    assert_eq!(status["state"], "saved", "{status}");
    let why = status["waited"].as_str().unwrap();
    assert!(why.starts_with("a balloon may give back"), "{why}");
    story.follow(&mut vm, 3);
    story.check();
    goes_on(&files, story.nonce());
}
