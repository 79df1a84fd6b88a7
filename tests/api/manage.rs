//! The commands that find microVMs: `bulle ps` and the others.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::client::Client;
use crate::common::{Bulle, Input, Outcome, Running, bulle_at};
use crate::served::Served;

/// A directory of microVMs, alone with them.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn base(&self) -> &Path {
        self.0.path()
    }

    /// `bulle run` with a payload.
    fn start(&self, name: &str, payload: &str) -> Running {
        let bulle = Bulle::payload(payload).args(["--name", name, "--memory", "64M"]);
        let bulle = bulle.arg("--runtime-dir").arg(self.base());
        bulle.input(Input::Open).start()
    }

    /// Runs one of the commands.
    fn bulle(&self, words: &[&str]) -> Outcome {
        bulle_at(self.base(), words)
    }

    /// What `bulle ps --json` lists.
    fn list(&self) -> Vec<Value> {
        let listed = self.bulle(&["ps", "--json"]).exits(0).stdout;
        serde_json::from_str(&listed).unwrap()
    }

    /// Waits until a microVM is listed.
    fn wait_for(&self, name: &str) -> Value {
        for _ in 0..6000 {
            if let Some(found) = self
                .list()
                .into_iter()
                .find(|vm| vm["name"] == name && vm["state"] != "no answer")
            {
                return found;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{name} is never listed");
    }

    fn entries(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.base()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn what_runs_is_listed_until_it_ends() {
    let place = Place::new();
    assert_eq!(place.list(), Vec::<Value>::new());
    let one = place.start("one", "serial_echo").wait_for("ready");
    let two = place.start("two", "hlt_forever").wait_for("\n");
    let (first, second) = (place.wait_for("one"), place.wait_for("two"));
    assert_eq!(first["state"], "running");
    assert_eq!(first["pid"], one.pid().as_raw());
    assert_eq!(
        (&first["vcpu_count"], &first["mem_size_mib"]),
        (&1.into(), &64.into())
    );
    assert!(first["created_ms"].as_u64() <= second["created_ms"].as_u64());
    let table = place.bulle(&["ps"]).exits(0).stdout;
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("NAME  STATE    PID"), "{table}");
    assert!(lines[1].starts_with("one   running"), "{table}");
    assert!(lines[1].ends_with("/serial_echo)"), "{table}");
    assert_eq!(lines.len(), 3, "{table}");
    place
        .bulle(&["kill", "--signal", "INT", "one", "tw"])
        .exits(0);
    one.finish().exits(128 + 2);
    two.finish().exits(128 + 2);
    assert_eq!(place.entries(), Vec::<PathBuf>::new());
}

#[test]
fn a_name_is_told_once_and_in_words() {
    let place = Place::new();
    let first = place.start("web", "hlt_forever").wait_for("\n");
    let second = place.start("web", "hello").finish().exits(125);
    assert_eq!(second.stdout, "");
    let second = second.complains("A microVM called 'web' runs already");
    assert_eq!(second.stderr.lines().count(), 1);
    let _other = place.start("web2", "hlt_forever").wait_for("\n");
    place.wait_for("web2");
    for (words, text) in [
        (
            &["inspect", "wbe"][..],
            "No microVM is called 'wbe'; there is web",
        ),
        (
            &["pause", "zzz"],
            "No microVM is called 'zzz': `bulle ps` lists",
        ),
        (
            &["inspect", "we"],
            "'we' is the beginning of several names, web, web2",
        ),
    ] {
        let outcome = place.bulle(words).exits(125).complains(text);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:#?}");
    }
    drop(first);
}

#[test]
fn a_pause_is_seen_and_ends() {
    let place = Place::new();
    let vm = place.start("a", "spin_forever").wait_for("spinning");
    place.wait_for("a");
    place.bulle(&["pause", "a"]).exits(0);
    assert_eq!(place.wait_for("a")["state"], "paused");
    let before = vm.cpu_time();
    std::thread::sleep(Duration::from_millis(300));
    assert!(vm.cpu_time() - before < Duration::from_millis(100));
    place.bulle(&["resume", "a"]).exits(0);
    assert_eq!(place.wait_for("a")["state"], "running");
}

#[test]
fn inspect_says_all() {
    let place = Place::new();
    let _vm = place.start("a", "hlt_forever").wait_for("\n");
    place.wait_for("a");
    let text = place.bulle(&["inspect", "a"]).exits(0).stdout;
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["name"], "a");
    assert_eq!(value["instance"]["id"], "a");
    assert_eq!(value["instance"]["state"], "Running");
    assert_eq!(value["config"]["machine-config"]["mem_size_mib"], 64);
    assert_eq!(value["process"]["arguments"][1], "run");
    assert_eq!(value["statistics"]["vcpus"].as_array().unwrap().len(), 1);
}

#[test]
fn a_guest_stops_at_ctrl_alt_del() {
    let place = Place::new();
    let vm = place.start("a", "keyboard").wait_for("listening");
    place.wait_for("a");
    let stopped = place.bulle(&["stop", "--timeout", "20", "a"]).exits(0);
    assert_eq!(stopped.stderr, "");
    vm.finish().exits(0).prints("key 71");
    assert_eq!(place.entries(), Vec::<PathBuf>::new());
}

#[test]
fn a_guest_that_does_not_stop_is_killed_and_nothing_is_left() {
    let place = Place::new();
    let vm = place.start("a", "spin_forever").wait_for("spinning");
    place.wait_for("a");
    place.bulle(&["pause", "a"]).exits(0);
    let stopped = place.bulle(&["stop", "--timeout", "300ms", "a"]).exits(0);
    stopped.complains("'a' did not stop within 300ms and was killed");
    vm.finish().exits(128 + 9);
    assert_eq!(place.entries(), Vec::<PathBuf>::new());
}

#[test]
fn stale_entries_go_and_hung_processes_are_said_to_hang() {
    let place = Place::new();
    let dead = place.start("dead", "hlt_forever").wait_for("\n");
    let hung = place.start("hung", "hlt_forever").wait_for("\n");
    place.wait_for("dead");
    place.wait_for("hung");
    let dead = dead.signal(nix::sys::signal::Signal::SIGKILL);
    dead.finish().exits(128 + 9);
    assert_eq!(place.entries().len(), 2);
    let hung = hung.signal(nix::sys::signal::Signal::SIGSTOP);
    let listed = place.list();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["state"], "no answer");
    assert_eq!(place.entries().len(), 1);
    place.bulle(&["kill", "hung"]).exits(0);
    hung.finish().exits(128 + 9);
    assert_eq!(place.entries(), Vec::<PathBuf>::new());
}

#[test]
fn what_is_served_at_a_socket_of_its_own_is_listed_too() {
    let place = Place::new();
    let arguments = ["--runtime-dir", place.base().to_str().unwrap(), "--id"];
    let with = |id: &str| Served::with(&[&arguments[..], &[id]].concat());
    let mut one = with("vm-1");
    let second = with("vm-1");
    let listed = place.wait_for("vm-1");
    assert_eq!(
        (&listed["state"], &listed["mem_size_mib"]),
        (&"not started".into(), &128.into())
    );
    let begin = Instant::now();
    while place.list().len() < 2 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "the second is never listed"
        );
    }
    // It is the socket that was asked for, in whatever state the microVM is.
    assert_eq!(one.state(), "Not started");
    place
        .bulle(&["pause", "vm-1"])
        .exits(125)
        .complains("not supported before starting");
    place.bulle(&["stop", "vm-1"]).exits(0);
    one.finish().exits(128 + 15);
    drop(second);
    assert_eq!(place.list().len(), 0);
}

#[test]
fn without_a_place_a_microvm_runs_all_the_same() {
    let bulle = Bulle::payload("serial_echo").args(["--runtime-dir", "/proc/nowhere"]);
    let bulle = bulle.args(["--log", "debug"]).input(Input::Open);
    // The first echo tells that it is going to look for a place, the second that it has.
    let vm = bulle.start().wait_for("ready").types("x").wait_for("x");
    std::thread::sleep(Duration::from_millis(200));
    let vm = vm.types("y").wait_for("y");
    let outcome = vm.types("\n").finish().exits(0).prints("2 bytes");
    outcome.complains("commands do not find this machine: Cannot use /proc/nowhere");
}

#[test]
fn a_console_is_read_by_several_and_typed_into() {
    let place = Place::new();
    let vm = place.start("a", "serial_echo").wait_for("ready");
    place.wait_for("a");
    let log = place.bulle(&["logs", "a"]).exits(0).stdout;
    assert!(log.contains("ready"), "{log:?}");
    let start = |words: &[&str], input: Input| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.args(words).env("BULLE_RUNTIME_DIR", place.base());
        Running::start(command, input, Duration::from_secs(60))
    };
    let follower = start(&["logs", "--follow", "a"], Input::Null).wait_for("ready");
    let mut silent = start(&["console", "a"], Input::Open).wait_for("ready");
    let _stdin = silent.take_stdin();
    let typist = start(&["console", "a"], Input::Bytes(b"abc".to_vec())).wait_for("abc");
    let typist_ends = start(&["console", "a"], Input::Bytes(b"de\n".to_vec()));
    vm.finish().exits(0).prints("5 bytes");
    for reader in [follower, silent, typist, typist_ends] {
        reader.finish().exits(0).prints("abcde").prints("5 bytes");
    }
}

#[test]
fn statistics_are_a_table_or_json_once_or_again() {
    let place = Place::new();
    let vm = place.start("a", "spin_forever").wait_for("spinning");
    place.wait_for("a");
    let table = place.bulle(&["stats"]).exits(0).stdout;
    assert!(table.starts_with("NAME  CPU%"), "{table}");
    assert_eq!(table.lines().count(), 2, "{table}");
    let json = place.bulle(&["stats", "--json", "a"]).exits(0).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["name"], "a");
    assert!(json[0]["process"]["rss_bytes"].as_u64().unwrap() > 1 << 20);
    let watch = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.args(words).env("BULLE_RUNTIME_DIR", place.base());
        Running::start(command, Input::Null, Duration::from_secs(60)).wait_for("/s")
    };
    let watches = [
        watch(&["stats", "--watch=200ms"]),
        watch(&["stats", "--watch=200ms", "a"]),
    ];
    place.bulle(&["kill", "a"]).exits(0);
    vm.finish().exits(128 + 9);
    for watch in watches {
        watch.finish().exits(0);
    }
}

#[test]
fn one_that_has_no_place_for_another_client_hides_no_other() {
    let place = Place::new();
    let _full = place.start("full", "hlt_forever").wait_for("\n");
    let _other = place.start("other", "hlt_forever").wait_for("\n");
    place.wait_for("full");
    place.wait_for("other");
    let clients: Vec<_> = (0..10)
        .map(|_| Client::connect(&place.base().join("full/api.sock")))
        .collect();
    let states: Vec<_> = place.list().iter().map(|vm| vm["state"].clone()).collect();
    assert_eq!(states, ["no answer", "running"]);
    let stats = place.bulle(&["stats"]).exits(0);
    let stats = stats.complains("'full' refuses: Too many open connections");
    assert!(stats.stdout.contains("other"), "{stats:?}");
    drop(clients);
}

#[test]
fn who_has_ended_meanwhile_is_said_to_have_ended() {
    let place = Place::new();
    let vm = place.start("a", "hlt_forever").wait_for("\n");
    place.wait_for("a");
    // A process that lives, and a socket that nobody listens at.
    fs::remove_file(place.base().join("a/api.sock")).unwrap();
    for words in [
        &["inspect", "a"][..],
        &["pause", "a"],
        &["logs", "a"],
        &["stats", "a"],
    ] {
        let outcome = place.bulle(words).exits(125);
        outcome.complains("The microVM 'a' has ended meanwhile");
    }
    drop(vm);
}

#[test]
fn a_guest_without_agent_runs_no_commands() {
    let place = Place::new();
    let _vm = place.start("a", "hlt_forever").wait_for("\n");
    place.wait_for("a");
    let outcome = place.bulle(&["exec", "a", "--", "true"]).exits(125);
    let outcome = outcome.complains("'a' refuses: this guest has no agent of bulle's");
    assert_eq!(outcome.stderr.lines().count(), 1);
    let mut vm = Served::new();
    let early = vm.put("/exec", serde_json::json!({ "command": ["true"] }));
    early.refused(&["not supported before starting"]);
    let kernel = vm.put("/boot-source", crate::served::boot("/nothing".as_ref()));
    let answer = kernel.refused(&["cannot be opened"]).body;
    let error: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(error["code"], "no-file");
    assert_eq!(error["cause"], "No such file or directory (os error 2)");
}
