//! `bulle clone` and `bulle fork`: each clone a process of its own, found by its name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulle::control::SnapshotLoad;
use bulle::pool::{Order, Pool};
use bulle::snapshot::{Snapshot, Template};
use serde_json::Value;
use tempfile::TempDir;

use crate::alone;
use crate::common::{Bulle, Input, Outcome, Running, bulle_at};

const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of microVMs, which end with it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs one of the commands.
    fn bulle(&self, words: &[&str]) -> Outcome {
        bulle_at(self.0.path(), words)
    }

    /// A guest that writes a line for each step of a sequence that began with a random number.
    fn parent(&self, more: &[&str]) -> Running {
        let bulle = Bulle::payload("carry_on").args(["--name", "parent", "--memory", "64M"]);
        let bulle = bulle.arg("--runtime-dir").arg(self.0.path());
        bulle.args(more).input(Input::Open).start().wait_for("tick")
    }

    fn names(&self) -> BTreeSet<String> {
        let listed = self.bulle(&["ps", "--json"]).exits(0).stdout;
        let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
        let names = listed.iter().map(|vm| vm["name"].as_str().unwrap());
        names.map(str::to_owned).collect()
    }

    /// Whole lines of a microVM's console, once there are some.
    #[track_caller]
    fn lines(&self, name: &str) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let log = self.bulle(&["logs", name]).exits(0).stdout;
            let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let lines: Vec<_> = whole.lines().map(str::to_owned).collect();
            // The first may be the end of one that began before.
            if lines.len() > 3 {
                return lines[1..].to_vec();
            }
            assert!(begin.elapsed() < PATIENCE, "{name} says nothing: {log:?}");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for name in self.names() {
            self.bulle(&["kill", &name]);
        }
    }
}

/// Checks that all of `lines` come to be said by `parent` too, which goes on as if nothing had been.
#[track_caller]
fn follows(parent: &mut Running, said: &mut String, lines: &[String]) {
    let begin = Instant::now();
    while !said.contains(lines.last().unwrap()) {
        said.push_str(&parent.more_output());
        assert!(begin.elapsed() < PATIENCE, "{lines:?} is not in {said}");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(
        said.contains(&lines.join("\n")),
        "{lines:?} is not in {said}"
    );
    assert!(!said.contains("LOST"), "{said}");
}

#[test]
fn a_guest_that_runs_is_forked_again_and_again() {
    let _alone = alone();
    for backing in ["memfd", "anonymous"] {
        let place = Place::new();
        let mut parent = place.parent(&["--memory-backing", backing]);
        let mut said = String::new();
        for round in 0..2 {
            let prefix = format!("kid{round}");
            let fork = ["fork", "parent", "--count", "3", "--name", &prefix];
            let names = place.bulle(&fork).exits(0).stdout;
            assert_eq!(names, format!("{prefix}-1\n{prefix}-2\n{prefix}-3\n"));
            for name in names.lines() {
                let lines = place.lines(name);
                assert!(!lines.join("\n").contains("LOST"), "{lines:?}");
                follows(&mut parent, &mut said, &lines);
            }
        }
        assert_eq!(place.names().len(), 7);
        place.bulle(&["kill", "parent"]).exits(0);
        // Its memory is its children's for as long as one lives.
        let before = place.lines("kid1-3").len();
        let begin = Instant::now();
        while place.lines("kid1-3").len() == before {
            assert!(begin.elapsed() < PATIENCE);
        }
    }
}

#[test]
fn a_child_is_forked_and_a_paused_parent_stays_paused() {
    let _alone = alone();
    let place = Place::new();
    let _parent = place.parent(&["--memory-backing", "memfd"]);
    place.bulle(&["fork", "parent", "--name", "a"]).exits(0);
    place.bulle(&["fork", "a", "--name", "b"]).exits(0);
    place.bulle(&["pause", "parent"]).exits(0);
    place
        .bulle(&["fork", "parent", "--name", "c", "--paused"])
        .exits(0);
    let listed = place.bulle(&["ps", "--json"]).exits(0).stdout;
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let state = |name: &str| {
        let vm = listed.iter().find(|vm| vm["name"] == name).unwrap();
        vm["state"].as_str().unwrap()
    };
    assert_eq!(
        ["parent", "a", "b", "c"].map(state),
        ["paused", "running", "running", "paused"]
    );
    place.lines("b");
}

#[test]
fn clones_of_a_snapshot_are_processes_with_names() {
    let _alone = alone();
    let place = Place::new();
    let mut parent = place.parent(&[]);
    let saved = place.path("saved");
    place
        .bulle(&["snapshot", "create", "parent", &saved])
        .exits(0);
    let mut said = String::new();
    for more in [&[][..], &["--in-memory"]] {
        let clone = [&["clone", &saved, "--count", "4"], more].concat();
        let names = place.bulle(&clone).exits(0).stdout;
        if !more.is_empty() {
            // From here on nobody has them.
            std::fs::remove_dir_all(Path::new(&saved)).unwrap();
        }
        assert_eq!(names.lines().count(), 4);
        let mut first = BTreeSet::new();
        for name in names.lines() {
            let lines = place.lines(name);
            first.insert(lines[0].clone());
            follows(&mut parent, &mut said, &lines);
        }
        assert_eq!(first.len(), 1, "all begin where it was saved");
    }
    assert_eq!(place.names().len(), 9);
}

#[test]
fn a_fork_has_its_parents_files_wherever_it_is_asked_for() {
    let _alone = alone();
    let place = Place::new();
    std::fs::write(place.path("disk"), vec![0; 1 << 20]).unwrap();
    let parent = Bulle::payload("carry_on").args(["--name", "parent", "--memory", "64M"]);
    let parent = parent.args(["--disk", "path=disk,ro,id=d", "--runtime-dir", "."]);
    let parent = parent.current_dir(place.0.path()).input(Input::Open);
    let _parent = parent.start().wait_for("tick");
    place.bulle(&["fork", "parent", "--name", "kid"]).exits(0);
    place.lines("kid");
    let inspected = place.bulle(&["inspect", "kid"]).exits(0);
    inspected.prints(&place.path("disk"));
}

#[test]
fn what_cannot_be_cloned_says_why() {
    let _alone = alone();
    let place = Place::new();
    let disk = place.path("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let drive = format!("path={disk},id=d");
    let _parent = place.parent(&["--disk", &drive]);
    let fork = ["fork", "parent", "--count", "2", "--name", "kid"];
    let refused = place.bulle(&fork).exits(125);
    refused
        .complains("drive 'd' of the parent and clone 1")
        .complains("--drive");
    for number in 1..=2 {
        std::fs::copy(&disk, format!("{disk}-{number}")).unwrap();
    }
    let drive = format!("d={disk}-%n");
    let again = [&fork[..], &["--drive", &drive]].concat();
    place.bulle(&again).exits(0);
    // The names are theirs now: a third of that name is refused, a fourth is not.
    let taken = place.bulle(&again).exits(125);
    taken.complains("kid-1' runs already");
    let missing = place.bulle(&["fork", "parent", "--drive", "x=/nowhere"]);
    missing.exits(125).complains("no drive 'x'");
    place
        .bulle(&["fork", "nobody"])
        .exits(125)
        .complains("'nobody'");
    place.bulle(&["clone", &place.path("nothing")]).exits(125);
    assert_eq!(place.names().len(), 3);
}

/// Process ids of the children of `pid`.
fn children(pid: nix::unistd::Pid) -> BTreeSet<i32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    list.split_whitespace()
        .map(|c| c.parse().unwrap())
        .collect()
}

#[track_caller]
fn soon(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_pool_of_processes_makes_a_clone_of_each_line_and_replaces_what_is_killed() {
    let _alone = alone();
    let place = Place::new();
    let parent = place.parent(&[]);
    let saved = place.path("saved");
    place
        .bulle(&["snapshot", "create", "parent", &saved])
        .exits(0);
    drop(parent);
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.env("BULLE_RUNTIME_DIR", place.0.path());
    command.args(["clone", "--pool", "2", &saved]);
    let mut pool = Running::start(command, Input::Open, PATIENCE);
    let pid = pool.pid();
    soon("two wait", || children(pid).len() == 2);
    let first_two = children(pid);
    let fds = || {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    };
    pool = pool.types("first\n").wait_for("first");
    soon("another waits", || children(pid).len() == 3);
    // One that is just being started has some more for a moment.
    let (before, files) = (children(pid), fds());
    // The last one waits for an order, ready or not.
    let victim = *before.difference(&first_two).next().unwrap();
    soon("it confines itself", || {
        let status = std::fs::read_to_string(format!("/proc/{victim}/status"));
        status.unwrap().contains("NoNewPrivs:\t1")
    });
    let victim = nix::unistd::Pid::from_raw(victim);
    nix::sys::signal::kill(victim, nix::sys::signal::Signal::SIGKILL).unwrap();
    soon("it is replaced", || {
        let now = children(pid);
        now.len() == 3 && !now.contains(&victim.as_raw())
    });
    for name in ["second", "third", "fourth", "fifth"] {
        pool = pool.types(&format!("{name}\n")).wait_for(name);
        assert!(!place.lines(name).join("").contains("LOST"));
    }
    // Each of the four that are more is watched.
    soon("as many as before wait", || {
        children(pid).len() == 2 + 5 && fds() <= files + 4
    });
    place.bulle(&["kill", "third"]).exits(0);
    soon("it is waited for", || children(pid).len() == 2 + 4);
    // A name that is taken is refused, and the next line is not.
    pool = pool.types("first\n\n").wait_for("\n");
    soon("the ended one is gone", || children(pid).len() == 2 + 5);
    assert_eq!(place.names().len(), 5);
    place.bulle(&["kill", "fourth"]).exits(0);
    pool = pool.types("last");
    drop(pool.take_stdin());
    let outcome = pool.finish().exits(125);
    outcome.complains("clone 'first'").complains("runs already");
    assert_eq!(place.names().len(), 5, "clones outlive the command");
    assert!(
        place.names().iter().any(|name| name == "last"),
        "a line without an end is one"
    );
}

#[test]
fn a_pool_makes_clones_of_other_templates() {
    let _alone = alone();
    let place = Place::new();
    let [a, b, c] = [("a", "64M"), ("b", "64M"), ("c", "128M")].map(|(name, memory)| {
        let parent = Bulle::payload("carry_on").args(["--name", name, "--memory", memory]);
        let parent = parent.arg("--runtime-dir").arg(place.0.path());
        let parent = parent.input(Input::Open).start().wait_for("tick");
        let saved = place.path(&format!("saved-{name}"));
        place.bulle(&["snapshot", "create", name, &saved]).exits(0);
        let file = |file| Path::new(&saved).join(file);
        let snapshot = Snapshot::open(&file("state"), &file("memory")).unwrap();
        (Template::new(snapshot).unwrap(), parent)
    });
    let mut pool = Pool::new(env!("CARGO_BIN_EXE_bulle").into(), a.0.clone(), 2);
    pool.fill().unwrap();
    pool.ready().unwrap();
    let mut clones = Vec::new();
    for (name, another, left) in [
        ("of-b", Some(&b.0), 1),
        // Of another shape, which no process waits for.
        ("of-c", Some(&c.0), 1),
        ("of-a", None, 0),
    ] {
        let order = Order {
            load: SnapshotLoad::new(PathBuf::new(), PathBuf::new()),
            base: Some(place.0.path().to_owned()),
            name: Some(name.to_owned()),
            command: Vec::new(),
        };
        clones.push(pool.clone_of(another, &order).unwrap().process);
        assert_eq!(pool.events().count(), left, "{name}");
    }
    for (name, (_, mut parent)) in [("of-a", a), ("of-b", b), ("of-c", c)] {
        let lines = place.lines(name);
        follows(&mut parent, &mut String::new(), &lines);
    }
    for mut clone in clones {
        clone.kill().unwrap();
        clone.wait().unwrap();
    }
}
