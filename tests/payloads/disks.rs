//! Disks under a bare-metal guest that polls: what is acknowledged is kept, and a host that cannot
//! write is the guest's I/O error.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::{Bulle, Input, Outcome, Running, payload};

const ENGINES: [&str; 2] = ["io_uring", "sync"];

fn image(dir: &Path, sectors: u64) -> std::path::PathBuf {
    let path = dir.join("disk");
    File::create(&path).unwrap().set_len(sectors * 512).unwrap();
    path
}

fn disk(path: &Path, options: &str) -> String {
    format!("path={},{options}", path.display())
}

/// The numbers of the sectors that the guest saw `done`.
fn sectors(outcome: &Outcome, done: &str) -> Vec<u64> {
    // The last line may be cut.
    let whole = outcome
        .stdout
        .rsplit_once('\n')
        .map_or("", |(text, _)| text);
    let lines = whole.lines().filter_map(|line| line.strip_prefix(done));
    let first = |line: &str| line.trim().split(' ').next()?.parse().ok();
    lines.filter_map(first).collect()
}

#[track_caller]
fn on_the_image(path: &Path, sectors: &[u64]) {
    let file = File::open(path).unwrap();
    for number in sectors {
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, number * 512).unwrap();
        let (words, _) = sector.as_chunks();
        let good = words
            .iter()
            .all(|word| u64::from_le_bytes(*word) == *number);
        assert!(good, "sector {number}: {sector:?}");
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_monitor_is_killed() {
    for options in ["writeback", "none", "unsafe"] {
        for engine in ENGINES {
            let dir = tempfile::tempdir().unwrap();
            // Sectors of 512 bytes need a host that can write them without its page cache.
            let path = image(dir.path(), 1 << 20);
            let cache = match options {
                "none" if !takes_direct_sectors(&path) => continue,
                cache => cache,
            };
            let list = disk(&path, &format!("engine={engine},cache={cache}"));
            let running = Bulle::payload("virtio_disk")
                .args(["--append", "log=1000000", "--disk", &list])
                .input(Input::Open)
                .start();
            let killed = running
                .wait_for("\nflushed 100\n")
                .signal(Signal::SIGKILL)
                .finish()
                .exits(137);
            let flushed = sectors(&killed, "flushed");
            assert!(flushed.len() >= 100, "{killed:#?}");
            assert!(sectors(&killed, "failed").is_empty(), "{killed:#?}");
            on_the_image(&path, &flushed);
        }
    }
}

/// Whether O_DIRECT takes single sectors here, as ext4 and xfs on most disks do.
fn takes_direct_sectors(path: &Path) -> bool {
    let list = disk(path, "cache=none,logical_block_size=512");
    let hello = Bulle::payload("hello").args(["--disk", &list]).outcome();
    hello.code == 7
}

/// `bulle run` with the disk's log, started by a shell after `prepare`, which has the image's
/// directory as $DIR.
fn after(prepare: &str, dir: &Path, list: &str) -> Running {
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    let script = format!("{prepare} && exec \"$0\" \"$@\"");
    let words: [&OsStr; 4] = ["--mount", "sh", "-ec", &script].map(OsStr::new);
    command.args(words).env("DIR", dir);
    let run = [env!("CARGO_BIN_EXE_bulle"), "run", "--timeout", "60s"];
    command.args(run).args(["--root", "none", "--kernel"]);
    command.arg(payload("virtio_disk"));
    command.args(["--append", "log=200", "--disk", list]);
    Running::start(command, Input::Null, Duration::from_secs(60))
}

/// The guest sees errors for what did not fit, the rest is there, and the log is short.
fn goes_on_without_room(outcome: &Outcome, reason: &str) -> Vec<u64> {
    let (flushed, failed) = (sectors(outcome, "flushed"), sectors(outcome, "failed"));
    assert_eq!(flushed.len() + failed.len(), 200, "{outcome:#?}");
    assert!(!flushed.is_empty() && failed.len() > 20, "{outcome:#?}");
    assert!(outcome.stdout.contains("failed 200 1 0\nreads back true\n"));
    let warnings = outcome.stderr.lines().filter(|l| l.contains(reason));
    assert!((1..=16).contains(&warnings.count()), "{outcome:#?}");
    flushed
}

#[test]
fn a_full_host_is_an_error_of_the_guest_only() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let prepare = "mount -t tmpfs -o size=64k none \"$DIR\" && truncate -s 1M \"$DIR/disk\"";
        let list = disk(&path, &format!("engine={engine}"));
        let outcome = after(prepare, dir.path(), &list).finish().exits(0);
        goes_on_without_room(&outcome, "No space left on device");
    }
}

#[test]
fn the_limit_of_file_sizes_is_an_error_of_the_guest_only() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 2048);
        // Units of 512 bytes: sectors 0 to 99 are within the limit.
        let list = disk(&path, &format!("engine={engine}"));
        let outcome = after("ulimit -f 100", dir.path(), &list).finish().exits(0);
        let flushed = goes_on_without_room(&outcome, "File too large");
        assert_eq!(flushed, (1..100).collect::<Vec<_>>());
        on_the_image(&path, &flushed);
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    }
}

#[test]
fn limits_of_a_group_are_those_of_all_its_disks() {
    let time = |lists: [&str; 2]| {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 2048);
        let other = dir.path().join("other");
        fs::write(&other, [0; 512]).unwrap();
        let lists = [(&path, lists[0]), (&other, lists[1])].map(|(p, l)| disk(p, l));
        let run = Bulle::payload("virtio_disk").args(["--append", "log=20"]);
        let run = run.args(["--disk", &lists[0], "--disk", &lists[1]]);
        let outcome = run.outcome().exits(0);
        assert_eq!(sectors(&outcome, "flushed").len(), 20, "{outcome:#?}");
        outcome.elapsed
    };
    // About 45 operations, two at once and then one each 20 ms.
    let limit = |ms| format!("rate.ops.size=2,rate.ops.refill_time={ms},rate.group=slow");
    let limited = time(["rate.group=slow", &limit(40)]);
    assert!(limited >= Duration::from_millis(700), "{limited:?}");
    // With an operation each two seconds it would not come to its end in time.
    time(["id=free", &limit(4000)]);
}
