//! A passt that is killed under a guest whose driver runs the network: another one comes, over and over.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{Input, Running, payload};

/// Processes that bulle started as passt and that have not ended.
fn passts(bulle: &Running) -> Vec<Pid> {
    let parent = bulle.pid().to_string();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let found = entries.filter_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (pid, rest) = stat.split_once(" (passt")?;
        let (state, rest) = rest.split_once(") ")?.1.split_once(' ')?;
        let child = rest.split(' ').next() == Some(&parent) && state != "Z";
        child.then(|| Pid::from_raw(pid.parse().unwrap()))
    });
    found.collect()
}

/// Its guest has IPv6 then, whose gateway passt answers for.
#[test]
fn a_host_without_ipv4_will_do() {
    let script = "
        ip tuntap add dev uplink mode tap; ip link set uplink up; ip link set lo up
        ip -6 addr add fe80::2/64 dev uplink nodad; ip -6 addr add 2001:db8::2/64 dev uplink nodad
        ip -6 route add default via 2001:db8::1 dev uplink
        exec \"$@\"";
    let outcome = |publish: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "sh", "-ec", script]);
        command.args(["sh", env!("CARGO_BIN_EXE_bulle"), "run", "--root", "none"]);
        command.args(["--net", "user", "--publish", publish, "--kernel"]);
        command.arg(payload("hello"));
        Running::start(command, Input::Null, Duration::from_secs(200)).finish()
    };
    outcome("[::1]:9080:80").exits(7);
    outcome("9080:80")
        .exits(125)
        .complains("passt does IPv4 only on a host with a default route of IPv4");
}

/// Connects to a socket that is there soon.
fn connect(path: &Path) -> UnixStream {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(begin.elapsed() < Duration::from_secs(60), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn passt_that_dies_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let script = "
        ip tuntap add dev uplink mode tap; ip addr add 192.0.2.2/24 dev uplink; ip link set uplink up
        ip link set lo up; ip route add default via 192.0.2.1
        exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "sh", "-ec", script]);
    command.args(["sh", env!("CARGO_BIN_EXE_bulle"), "run", "--root", "none"]);
    command.args(["--memory", "64M", "--timeout", "200s", "--name", "kept"]);
    command.args(["--net", "user", "--publish", "9080:80", "--kernel"]);
    command.arg(payload("idle_devices"));
    command.env("BULLE_RUNTIME_DIR", dir.path());
    let running = Running::start(command, Input::Null, Duration::from_secs(200));
    let running = running.wait_for("ready 1 devices\n");
    let mut events = connect(&dir.path().join("kept/api.sock"));
    events
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    events
        .write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let mut events = BufReader::new(events).lines();
    let mut hear = |event: &str| {
        let found = events.find(|line| {
            let line = line.as_ref().unwrap();
            line.strip_prefix("event: ")
                .is_some_and(|heard| heard != "state")
        });
        assert_eq!(found.unwrap().unwrap(), format!("event: {event}"));
    };
    for _ in 0..2 {
        let first = passts(&running);
        assert_eq!(first.len(), 1, "{first:?}");
        kill(first[0], Signal::SIGKILL).unwrap();
        hear("link_down");
        hear("link_up");
        let second = passts(&running);
        assert_ne!(second, first);
        // What wakes bulle's threads is not passt's.
        for fd in fs::read_dir(format!("/proc/{}/fd", second[0])).unwrap() {
            let target = fs::read_link(fd.unwrap().path()).unwrap_or_default();
            assert!(!target.to_string_lossy().contains("eventfd"), "{target:?}");
        }
        // The port is the host's again.
        let begin = Instant::now();
        let net = format!("/proc/{}/net/tcp", running.pid());
        while !fs::read_to_string(&net)
            .unwrap()
            .contains("0100007F:2378 00000000:0000 0A")
        {
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let last = passts(&running);
    running
        .signal(Signal::SIGINT)
        .finish()
        .exits(130)
        .complains("its link is down")
        .complains("network interface 'net0': passt is started again");
    assert_eq!(last.len(), 1);
    // It goes with its microVM.
    let begin = Instant::now();
    while kill(last[0], None).is_ok() {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{last:?} is left"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
