//! The threads of a running monitor: where they run, and what its I/O thread used.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the threads may take to appear.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a thread used so far.
pub struct Used {
    /// Processor time.
    pub cpu: Duration,
    /// Calls of `write`.
    pub writes: u64,
}

fn read(task: &Path, name: &str) -> String {
    fs::read_to_string(task.join(name)).unwrap_or_default()
}

/// The thread of process `pid` that has this name.
fn named(pid: u32, name: &str) -> Option<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let mut paths = tasks.map(|task| task.path());
    paths.find(|task| read(task, "comm").trim() == name)
}

/// Gives these two threads, a vCPU and an I/O thread, a processor each, where there are two: else the
/// scheduler of a busy host has both wait for one.
pub fn pin(pid: u32, names: [&str; 2]) {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return;
    }
    for (processor, name) in names.into_iter().enumerate() {
        let begin = Instant::now();
        let task = loop {
            match named(pid, name) {
                Some(task) => break task,
                None => assert!(begin.elapsed() < PATIENCE, "no thread {name}"),
            }
        };
        let id = task.file_name().and_then(|id| id.to_str());
        let id: i32 = id.unwrap().parse().unwrap();
        // SAFETY: a zeroed set is an empty one, and the pointer is valid for its size.
        let result = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(id, size_of_val(&set), &raw const set)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

/// What the second of these threads of process `pid` used.
pub fn used(pid: u32, [_, name]: [&str; 2]) -> Used {
    let task = named(pid, name).expect("an I/O thread");
    let ran = read(&task, "schedstat");
    let ran = ran.split_whitespace().next().and_then(|n| n.parse().ok());
    let io = read(&task, "io");
    let writes = io.lines().find_map(|line| line.strip_prefix("syscw: "));
    Used {
        cpu: Duration::from_nanos(ran.unwrap_or(0)),
        writes: writes.and_then(|n| n.parse().ok()).unwrap_or(0),
    }
}
