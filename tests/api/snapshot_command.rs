//! `bulle snapshot`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::{Bulle, Input, Outcome, Running};

const PATIENCE: Duration = Duration::from_secs(120);

fn command(base: &Path, words: &[&str], input: Input) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(words).env("BULLE_RUNTIME_DIR", base);
    Running::start(command, input, PATIENCE)
}

fn bulle(base: &Path, words: &[&str]) -> Outcome {
    command(base, words, Input::Null).finish()
}

/// A guest by this name that has counted the letters `abc`.
fn echoing(base: &Path, name: &str) -> Running {
    let bulle = Bulle::payload("serial_echo").args(["--name", name, "--memory", "64M"]);
    let bulle = bulle.arg("--runtime-dir").arg(base);
    let bulle = bulle.input(Input::Open).start().wait_for("ready");
    bulle.types("abc").wait_for("abc")
}

/// Saves such a guest, and what changed with two letters more, at which it ends.
fn save_with_changes(base: &Path, [whole, changes]: [&str; 2]) {
    let parent = echoing(base, "parent");
    // The first has all, and from then on what changes is known.
    bulle(base, &["snapshot", "create", "--diff", "parent", whole]).exits(0);
    let parent = parent.types("de").wait_for("de");
    let words = ["snapshot", "create", "--diff", "--kill", "parent", changes];
    bulle(base, &words).exits(0);
    parent.finish().exits(128 + Signal::SIGKILL as i32);
}

#[test]
fn a_guest_is_saved_by_its_name_and_made_again_of_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("run");
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let parent = echoing(&base, "parent");
    bulle(&base, &["snapshot", "create", "par", &at("s")]).exits(0);
    let words = ["snapshot", "create", "--background", "par", &at("b")];
    assert_eq!(bulle(&base, &words).exits(0).stderr, "");
    let copy = command(&base, &["snapshot", "restore", &at("b")], Input::Open);
    copy.types("d\n").finish().exits(0).prints("4 bytes");
    for _ in 0..2 {
        let copy = command(&base, &["snapshot", "restore", &at("s")], Input::Open);
        copy.types("de\n").finish().exits(0).prints("5 bytes");
    }
    let info = bulle(&base, &["snapshot", "info", "--json", &at("s")]).exits(0);
    let info: Value = serde_json::from_str(&info.stdout).unwrap();
    assert_eq!(info["config"]["machine-config"]["mem_size_mib"], 64);
    assert_eq!(info["memory_files"].as_array().unwrap().len(), 1);
    let text = bulle(&base, &["snapshot", "info", &at("s")])
        .exits(0)
        .stdout;
    assert!(text.contains("memory   64 MiB"), "{text}");
    bulle(&base, &["snapshot", "verify", &at("s")]).exits(0);
    parent.types("d\n").finish().exits(0).prints("4 bytes");
}

#[test]
fn changes_are_made_whole() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("run");
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    save_with_changes(&base, [&at("0"), &at("1")]);
    let files = |name: &str| {
        let info = bulle(&base, &["snapshot", "info", "--json", &at(name)]).exits(0);
        let info: Value = serde_json::from_str(&info.stdout).unwrap();
        info["memory_files"].as_array().unwrap().len()
    };
    assert_eq!((files("0"), files("1")), (1, 2));
    bulle(&base, &["snapshot", "rebase", &at("1"), &at("whole")]).exits(0);
    bulle(&base, &["snapshot", "rebase", &at("1")]).exits(0);
    std::fs::remove_dir_all(dir.path().join("0")).unwrap();
    for name in ["1", "whole"] {
        assert_eq!(files(name), 1);
        bulle(&base, &["snapshot", "verify", &at(name)]).exits(0);
        let copy = command(&base, &["snapshot", "restore", &at(name)], Input::Open);
        copy.types("f\n").finish().exits(0).prints("6 bytes");
    }
}

#[test]
fn what_cannot_be_is_said_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("run");
    let none = dir.path().join("none");
    let none = none.to_str().unwrap();
    for (words, text) in [
        (&["snapshot", "create", "nobody", none][..], "nobody"),
        (&["snapshot", "restore", none], "Cannot read the state file"),
        (&["snapshot", "info", none], "Cannot read the state file"),
    ] {
        let outcome = bulle(&base, words).exits(125).complains(text);
        assert_eq!(
            outcome.stderr.trim_end().lines().count(),
            1,
            "{}",
            outcome.stderr
        );
    }
}

#[test]
fn an_interrupt_ends_a_load() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("run");
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    save_with_changes(&base, [&at("0"), &at("1")]);
    let restore = ["snapshot", "restore", &at("1")];
    // It may be loaded before the signal comes, which ends the guest then.
    let cancelled = (0..100).any(|_| {
        let command = command(&base, &restore, Input::Open);
        let status = format!("/proc/{}/status", command.pid());
        let blocks = || {
            let status = std::fs::read_to_string(&status).unwrap();
            let (_, mask) = status.split_once("SigBlk:\t").unwrap();
            u64::from_str_radix(&mask[..16], 16).unwrap() & 2 != 0
        };
        while !blocks() {
            std::thread::sleep(Duration::from_micros(100));
        }
        let outcome = command.signal(Signal::SIGINT).finish().exits(130);
        outcome
            .stderr
            .contains("loading the snapshot was cancelled")
    });
    assert!(cancelled);
    let copy = command(&base, &restore, Input::Open);
    copy.types("f\n").finish().exits(0).prints("6 bytes");
}

#[test]
fn an_interrupt_cancels_and_lets_the_guest_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("run");
    let at = dir.path().join("s");
    let at = at.to_str().unwrap();
    let parent = echoing(&base, "parent");
    bulle(&base, &["snapshot", "create", "parent", at]).exits(0);
    for words in [
        &["snapshot", "create"][..],
        &["snapshot", "create", "--background"],
    ] {
        // The command waits for the microVM, and is told meanwhile.
        let pid = parent.pid();
        nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
        let command = command(&base, &[words, &["parent", at]].concat(), Input::Null);
        let status = format!("/proc/{}/status", command.pid());
        // All three signals are its own from then on.
        let ready = || {
            std::fs::read_to_string(&status)
                .unwrap()
                .contains("SigBlk:\t0000000000004003")
        };
        while !ready() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let command = command.signal(Signal::SIGINT);
        nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
        let outcome = command.finish();
        // In the background it may be written before anybody asks.
        if words.len() == 2 || outcome.code != 0 {
            outcome.exits(130).complains("the snapshot was cancelled");
        }
        bulle(&base, &["snapshot", "verify", at]).exits(0);
    }
    parent.types("d\n").finish().exits(0).prints("4 bytes");
}
