//! Guests that are saved when they wait for a command, and get one in other processes.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use crate::common::{Input, Outcome, Running};
use crate::linux;
use crate::net::{in_a_network, sh};

fn restore(dir: &Path, words: &[&str], input: Input) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(["snapshot", "restore"]).arg(dir);
    command.arg("--").args(words);
    Running::start(command, input, Duration::from_secs(280)).finish()
}

/// All ways in which a command ends that is not simply done.
fn ends(dir: &Path) {
    let run = |words: &[&str]| restore(dir, words, Input::Null);
    let shell = |script: &str| run(&["sh", "-c", script]).within(Duration::from_secs(90));
    run(&["no-such-command"])
        .exits(127)
        .complains("no-such-command");
    run(&["/proc/version"])
        .exits(126)
        .complains("/proc/version");
    shell("kill -9 $$").exits(137);
    shell("poweroff -f; sleep 100").exits(0);
    shell("halt; sleep 100").exits(0);
    shell("reboot -f; sleep 100").exits(123);
}

#[test]
fn a_guest_that_waits_takes_another_command_in_each_process() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("ready");
    let saved = linux("amd64")
        .args(["--cpus", "2", "--entropy", "--save"])
        .arg(&dir);
    let outcome = saved.start().finish().exits(0);
    assert_eq!((outcome.stdout, outcome.stderr), Default::default());
    let mut seen = std::collections::BTreeSet::new();
    for code in [0, 37] {
        let script = format!("head -c 32 /dev/urandom | md5sum; nproc; date +%s; cat; exit {code}");
        let typed = Input::Bytes(b"typed\n".to_vec());
        let outcome = restore(&dir, &["sh", "-c", &script], typed).exits(code);
        let lines: Vec<_> = outcome.stdout.lines().collect();
        let [random, processors, clock, typed] = lines[..] else {
            panic!("{outcome:?}");
        };
        assert!(
            seen.insert(random.to_owned()),
            "both have the random number {random}"
        );
        assert_eq!((processors, typed), ("2", "typed"));
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let behind = now.as_secs() as i64 - clock.parse::<i64>().unwrap();
        assert!((-2..60).contains(&behind), "the clock is {behind} s behind");
    }
    ends(&dir);
}

/// A guest's command, whose input and output go to one process after the other; with its own runtime
/// directory, in which it is called `vm`.
fn begin(place: &Path, mut command: Command) -> Running {
    command.env("BULLE_RUNTIME_DIR", place);
    Running::start(command, Input::Open, Duration::from_secs(280))
}

fn bulle(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(words);
    command
}

/// Where the host believes that the guest is.
fn neighbour() -> String {
    let output = Command::new("ip")
        .args(["neigh", "show", "10.9.0.2"])
        .output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

#[test]
fn a_command_goes_on_in_another_process() {
    in_a_network(goes_on);
}

fn goes_on() {
    const COMMAND: &str =
        "trap 'echo hung up' HUP; ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
        echo begun >&2; echo begun
        while read line; do n=$((n + 1)); echo got $n $line; done; exit 5";
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("saved");
    let dir = path.to_str().unwrap();
    let at = |words: &[&str]| begin(place.path(), bulle(words));
    sh(
        "ip tuntap add dev clone0 mode tap; ip addr add 10.9.0.1/24 dev clone0
        ip link set clone0 up; echo 1 >/proc/sys/net/ipv4/conf/clone0/arp_accept",
    );
    let net = "tap=clone0,id=net0,mac=02:00:00:00:be:ef";
    let new = "02:00:00:00:be:f0";
    let run = linux("amd64").args(["--name", "vm", "--net", net, "--runtime-dir"]);
    let run = run.arg(place.path()).input(Input::Open);
    let first = run.command(["sh", "-c", COMMAND]).start();
    let first = first.wait_for("begun\n").types("one\n");
    let first = first.wait_for("got 1 one\n");
    // It has nobody any more when the guest goes on.
    let beside = at(&["exec", "vm", "--", "sh", "-c", "echo here; sleep 1000"]);
    let beside = beside.wait_for("here\n");
    at(&["snapshot", "create", "vm", dir]).finish().exits(0);
    let first = first.types("two\n").wait_for("got 2 two\n");
    drop((first, beside));
    at(&["snapshot", "restore", dir, "--", "true"])
        .finish()
        .exits(125)
        .complains("leave yours out");
    let mac = format!("net0={new}");
    let mut vm = at(&["snapshot", "restore", dir, "--name", "vm", "--mac", &mac]);
    vm = vm.types("other\n").wait_for("got 2 other\n");
    at(&["exec", "vm", "--", "cat", "/sys/class/net/eth0/address"])
        .finish()
        .exits(0)
        .prints(new);
    // Nobody has asked the guest for it.
    let begin = Instant::now();
    while !neighbour().contains(new) {
        assert!(
            begin.elapsed() < Duration::from_secs(100),
            "{}",
            neighbour()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    at(&["exec", "vm", "--", "sh", "-c", "echo beside; exit 3"])
        .finish()
        .exits(3)
        .prints("beside\n");
    drop(vm.take_stdin());
    let outcome = vm.finish().exits(5);
    assert!(!outcome.stdout.contains("begun"), "{outcome:?}");
    assert!(!outcome.stdout.contains("hung up"), "{outcome:?}");
    assert_eq!(outcome.stderr, "");
}
