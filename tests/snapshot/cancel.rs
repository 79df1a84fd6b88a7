//! Snapshots that nobody wants any more.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::background::{create, ended, goes_on, names, status, stuck, ticking};
use crate::client::{Client, request};
use crate::saved::{Files, saved_with_changes};
use crate::served::Served;

#[test]
fn one_in_the_background_is_cancelled_and_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut story) = ticking(json!({}));
    let files = Files::named(dir.path(), "saved");
    let nothing = |vm: &mut crate::served::Served| {
        let answer = vm.client.ask("DELETE", "/snapshot/create", "");
        answer.refused(&["No snapshot is being written"]);
    };
    nothing(&mut vm);
    vm.put("/snapshot/create", create(&files)).done();
    assert_eq!(ended(&mut vm)["state"], "saved");
    nothing(&mut vm);
    let writer = stuck(&mut vm, &files);
    let before = fs::read(&files.state).unwrap();
    vm.client.ask("DELETE", "/snapshot/create", "").done();
    assert!(kill(writer, None).is_err(), "it is gone");
    let status = status(&mut vm);
    assert_eq!(
        (&status["state"], &status["error"]),
        (&json!("failed"), &json!("it was cancelled"))
    );
    assert_eq!(names(dir.path()), ["saved.memory", "saved.state"]);
    assert_eq!(fs::read(&files.state).unwrap(), before);
    nothing(&mut vm);
    assert_eq!(vm.state(), "Running");
    story.follow(&mut vm, 3);
    vm.put("/snapshot/create", create(&files)).done();
    assert_eq!(ended(&mut vm)["state"], "saved");
    story.check();
    goes_on(&files, story.nonce());
}

#[test]
fn one_whose_caller_goes_leaves_what_was_there_or_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut story) = ticking(json!({}));
    let files = Files::named(dir.path(), "saved");
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    vm.put("/snapshot/create", files.create()).done();
    let mut before = fs::read(&files.state).unwrap();
    let mut body = files.create();
    body["cancellable"] = json!(true);
    let pid = vm.running.pid();
    let mut cancelled = 0;
    for _ in 0..100 {
        // Connections are served in the order in which they came: this one before the one that asks afterwards.
        let mut caller = Client::connect(&vm.socket());
        caller.ask("GET", "/", "").value();
        // It finds both, the request and the caller's end.
        kill(pid, Signal::SIGSTOP).unwrap();
        caller.send(request("PUT", "/snapshot/create", &body.to_string()).as_bytes());
        drop(caller);
        kill(pid, Signal::SIGCONT).unwrap();
        let state = Client::connect(&vm.socket()).ask("GET", "/", "").value();
        assert_eq!(state["state"], "Paused");
        assert_eq!(names(dir.path()), ["saved.memory", "saved.state"]);
        let now = fs::read(&files.state).unwrap();
        cancelled += u32::from(now == before);
        before = now;
        if cancelled > 1 {
            break;
        }
    }
    assert!(cancelled > 1);
    // Without that word the caller may go.
    let mut caller = Client::connect(&vm.socket());
    caller.send(request("PUT", "/snapshot/create", &files.create().to_string()).as_bytes());
    drop(caller);
    while fs::read(&files.state).unwrap() == before {
        assert_eq!(vm.state(), "Paused");
    }
    goes_on(&files, story.nonce());
    vm.patch("/vm", json!({ "state": "Resumed" })).done();
    story.follow(&mut vm, 3);
    story.check();
}

/// Asks for a load that its caller does not wait for: the process finds both, the request and the caller's end.
fn load_and_go(vm: &Served, body: &serde_json::Value) {
    let mut caller = Client::connect(&vm.socket());
    caller.ask("GET", "/", "").value();
    kill(vm.running.pid(), Signal::SIGSTOP).unwrap();
    caller.send(request("PUT", "/snapshot/load", &body.to_string()).as_bytes());
    drop(caller);
    kill(vm.running.pid(), Signal::SIGCONT).unwrap();
}

#[test]
fn a_load_ends_with_its_caller_and_another_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let [base, changes] = ["base", "changes"].map(|name| Files::named(dir.path(), name));
    let mut story = saved_with_changes(&base, &changes);
    let mut body = changes.load();
    body["cancellable"] = json!(true);
    let count = |vm: &Served, what: &str| {
        let all = fs::read_dir(format!("/proc/{}/{what}", vm.running.pid()));
        all.unwrap().count()
    };
    let mut cancelled = 0;
    for _ in 0..100 {
        let mut vm = Served::new();
        assert_eq!(vm.state(), "Not started");
        let before = ["fd", "task"].map(|what| count(&vm, what));
        load_and_go(&vm, &body);
        // The first question may come before the load.
        vm.state();
        if vm.state() != "Not started" {
            continue;
        }
        // Two callers have gone, and the first may be unnoticed yet. A thread is listed for a while after its end.
        let begin = Instant::now();
        loop {
            let after = ["fd", "task"].map(|what| count(&vm, what));
            if after[0] <= before[0] + 2 && after[1] == before[1] {
                break;
            }
            let late = begin.elapsed() > Duration::from_secs(60);
            assert!(!late, "{before:?}, {after:?}");
        }
        cancelled += 1;
        if cancelled == 3 {
            vm.put("/snapshot/load", body).done();
            story.follow(&mut vm, 5);
            break;
        }
    }
    assert_eq!(cancelled, 3);
    story.check();
    // Without that word the caller may go.
    let mut vm = Served::new();
    load_and_go(&vm, &changes.load());
    vm.state();
    assert_eq!(vm.state(), "Running");
}
