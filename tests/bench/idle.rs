//! What devices cost a machine that does not use them: time at its start, and processor time of
//! the threads that are no vCPU while nothing happens.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Guest, bulle, common, goal, middle};

/// How long a machine is watched.
const WATCHED: Duration = Duration::from_secs(5);

fn disks(dir: &Path, count: usize) -> Vec<String> {
    let list = |n| {
        let path: PathBuf = dir.join(format!("disk{n}"));
        fs::write(&path, [0; 4096]).unwrap();
        ["--disk".to_owned(), format!("path={}", path.display())]
    };
    (0..count).flat_map(list).collect()
}

/// Milliseconds from the spawn to the reaped process of a guest that ends at once, and milliseconds
/// of processor time.
#[allow(clippy::zombie_processes)] // wait4 reaps it
fn start(devices: &[String]) -> [f64; 2] {
    let begin = Instant::now();
    let child = Command::new(bulle())
        .args(["run", "--root", "none", "--cpus", "1"])
        .args(["--memory", "128M", "--kernel"])
        .arg(common::payload("first_byte"))
        .args(devices)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("bulle runs");
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both pointers are valid for writes; a zeroed rusage is a valid one.
    let usage = unsafe {
        let pid = libc::wait4(child.id() as i32, &raw mut status, 0, usage.as_mut_ptr());
        assert_eq!(pid, child.id() as i32);
        usage.assume_init()
    };
    let times = [usage.ru_utime, usage.ru_stime];
    let cpu = times.map(|t| t.tv_sec as f64 * 1000.0 + t.tv_usec as f64 / 1000.0);
    [
        begin.elapsed().as_secs_f64() * 1000.0,
        cpu.iter().sum::<f64>(),
    ]
}

/// Context switches and hundredths of a second of all threads but vCPUs.
pub fn used(pid: u32) -> (u64, u64) {
    let (mut switches, mut ticks) = (0, 0);
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if read("comm").starts_with("vcpu") {
            continue;
        }
        let number = |text: &str| text.trim().parse::<u64>().unwrap_or(0);
        let status = read("status");
        let lines = status.lines().filter_map(|line| line.split_once(':'));
        let lines = lines.filter(|(name, _)| name.ends_with("_ctxt_switches"));
        switches += lines.map(|(_, value)| number(value)).sum::<u64>();
        let stat = read("stat");
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let times = fields.split_ascii_whitespace().skip(11).take(2);
        ticks += times.map(number).sum::<u64>();
    }
    (switches, ticks)
}

/// Measures and prints both.
pub fn print(rounds: usize) {
    let dir = tempfile::tempdir().unwrap();
    let four = disks(dir.path(), 4);
    let kinds: [(&str, &[String]); 3] = [("none", &[]), ("1 disk", &four[..2]), ("4 disks", &four)];
    println!(
        "devices at boot: spawn to reaped and processor time, ms, medians of {}",
        10 * rounds
    );
    for transport in ["mmio", "pci"] {
        let pci = if transport == "pci" {
            vec!["--pci".to_owned()]
        } else {
            Vec::new()
        };
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..10 * rounds {
            for ((_, devices), times) in kinds.iter().zip(&mut times) {
                times.push(start(&[&pci[..], devices].concat()));
            }
        }
        for (at, what) in ["time", "processor time"].into_iter().enumerate() {
            let of = |runs: &Vec<[f64; 2]>| middle(runs.iter().map(|run| run[at]).collect());
            let [none, one, four] = [0, 1, 2].map(|n: usize| of(&times[n]));
            println!(
                "{transport}, {what}: {none:.2} without, {one:.2} with one disk, {four:.2} with four"
            );
            let each = (four - none) / 4.0;
            let what = format!("ms of {what} for each of four disks over {transport}");
            goal(&what, each, 0.1, false);
        }
    }
    let mut all = four.clone();
    all.push("--entropy".to_owned());
    let mut guest = Guest::start("idle_devices", "", &all);
    let line = guest.line();
    assert!(line.starts_with("ready"), "the guest said {line:?}");
    // What starting them took is over.
    std::thread::sleep(Duration::from_millis(200));
    let before = used(guest.child.id());
    std::thread::sleep(WATCHED);
    let after = used(guest.child.id());
    println!(
        "idle for {WATCHED:?}, {}: {} context switches",
        line.trim(),
        after.0 - before.0
    );
    goal(
        "hundredths of a second of processor time while idle",
        (after.1 - before.1) as f64,
        0.0,
        false,
    );
}
