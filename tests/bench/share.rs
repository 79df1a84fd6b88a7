//! A shared directory: reads, look-ups and attributes by a guest that speaks FUSE without an operating
//! system, against a process of the host that does the same on the same files. All is in the page cache.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::turns::{self, Turn};
use super::{Guest, middle};

/// Bytes of the file that is read.
const DATA: usize = 64 << 20;
/// Files that are looked up.
const FILES: usize = 1000;

fn prepare(dir: &Path) -> File {
    for n in 0..FILES {
        File::create(dir.join(format!("f{n}"))).unwrap();
    }
    let bytes: Vec<u8> = (0..DATA).map(|n| (n % 251) as u8).collect();
    fs::write(dir.join("data"), bytes).unwrap();
    File::open(dir.join("data")).unwrap()
}

/// The guest's turn: `op` as its payload has it.
fn guest(dir: &Path, op: &str, depth: usize, size: usize, count: usize, hertz: f64) -> Turn {
    let append =
        format!("op={op} depth={depth} size={size} count={count} bytes={DATA} files={FILES}");
    let share = format!("path={},tag=bench", dir.display());
    let mut guest = Guest::start("fs_bench", &append, &["--share".to_owned(), share]);
    let line = guest.line();
    let numbers: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
    let [_, cycles, median, p99, kicks] = numbers[..] else {
        panic!("the guest said {line:?}")
    };
    let count = count as f64;
    Turn {
        rate: count * hertz / cycles,
        times: Some([median, p99].map(|cycles| Duration::from_secs_f64(cycles / hertz))),
        kicks: kicks / count,
        cpu: turns::vmm_time(&guest) / count,
    }
}

/// One look-up as the host has it: a file's attributes by its name in a directory.
fn look_up(dir: &File, name: &str) {
    let name = std::ffi::CString::new(name).unwrap();
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the name ends with a zero byte, and the pointer is valid for writes.
    let result = unsafe { libc::fstatat(dir.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), 0) };
    assert_eq!(result, 0);
}

/// Measures and prints the table.
pub fn print(rounds: usize, hertz: f64) {
    let dir = tempfile::tempdir().unwrap();
    let data = prepare(dir.path());
    let names = File::open(dir.path()).unwrap();
    turns::head("shared directory", rounds);
    for (name, size, depth) in [
        ("1 MiB sequential read, depth 1", 1 << 20, 1),
        ("128 KiB sequential read, depth 4", 128 << 10, 4),
        ("4 KiB sequential read, depth 4", 4 << 10, 4),
    ] {
        let mut buffer = vec![0; size];
        let mut turn = |count| {
            turns::host(count, |n| {
                let at = n * size % DATA;
                data.read_exact_at(&mut buffer, at as u64).unwrap();
            })
        };
        let count = enough(turn(200).rate);
        let guest = || guest(dir.path(), "read", depth, size, count, hertz);
        turns::compare(name, size, rounds, || turn(count), guest);
    }
    let by_name = |count| turns::host(count, |n| look_up(&names, &format!("f{}", n % FILES)));
    let attributes = |count| {
        turns::host(count, |_| {
            data.metadata().unwrap();
        })
    };
    type Host<'a> = &'a dyn Fn(usize) -> Turn;
    let cases: [(&str, &str, usize, Host); 4] = [
        ("look-up of 1000 names, depth 1", "lookup", 1, &by_name),
        ("look-up of 1000 names, depth 16", "lookup", 16, &by_name),
        ("attributes of a file, depth 1", "getattr", 1, &attributes),
        ("attributes of a file, depth 16", "getattr", 16, &attributes),
    ];
    for (name, op, depth, host) in cases {
        let probe = middle((0..3).map(|_| host(1000).rate).collect());
        let count = enough(probe / 8.0);
        let guest = || guest(dir.path(), op, depth, 4096, count, hertz);
        turns::compare(name, 0, rounds, || host(count), guest);
    }
}

/// Operations that take about a turn at so many a second.
fn enough(rate: f64) -> usize {
    ((rate * super::TURN.as_secs_f64()) as usize).clamp(200, 50_000)
}
