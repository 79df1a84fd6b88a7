//! Guests that are saved when they wait for a command, and get one in other processes.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::common::{Input, Outcome, Running};
use crate::linux;

fn restore(dir: &Path, script: &str, input: Input) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(["snapshot", "restore"]).arg(dir);
    command.args(["--", "sh", "-c", script]);
    Running::start(command, input, Duration::from_secs(280)).finish()
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
        let outcome = restore(&dir, &script, Input::Bytes(b"typed\n".to_vec())).exits(code);
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
}
