//! What a host process and a guest did by turns, and the lines of the tables.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{common, middle};

/// One turn of one of them.
#[derive(Clone, Copy)]
pub struct Turn {
    /// Operations a second.
    pub rate: f64,
    /// Of one operation; nothing where it is not measured.
    pub times: Option<[Duration; 2]>,
    /// Kicks per operation; each is an exit.
    pub kicks: f64,
    /// Seconds of processor time per operation: of the host's process, or of all threads of the VMM
    /// that are no vCPU.
    pub cpu: f64,
}

/// Seconds of processor time of this thread so far.
pub fn thread_time() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is valid for writes.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The same of the threads of a process that are no vCPU.
pub fn vmm_time(pid: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let time = |task: fs::DirEntry| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (spent, comm) = (read("schedstat"), read("comm"));
        let spent = spent.split_ascii_whitespace().next()?.parse::<f64>().ok()?;
        let runs_guest = comm.starts_with("vcpu") || comm.starts_with("CPU ");
        (!runs_guest).then_some(spent / 1e9)
    };
    tasks.flatten().filter_map(time).sum()
}

/// Where QEMU's microvm has its MMIO devices.
const QEMU_WINDOWS: u64 = 0xfeb0_0000;

/// The command for a payload in the peer QEMU, if it is named, with more arguments.
pub fn qemu(payload: &str, append: &str, more: &[String]) -> Option<Command> {
    let binary = std::env::var_os("QEMU").filter(|value| !value.is_empty())?;
    let mut command = Command::new(binary);
    command
        .args([
            "-M",
            "microvm,accel=kvm,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off",
        ])
        .args(["-cpu", "host,-arch-capabilities", "-m", "128", "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
        .args(["-serial", "stdio", "-name", "qemu,debug-threads=on"])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args([
            "-append",
            &format!("{append} windows={QEMU_WINDOWS}"),
            "-kernel",
        ])
        .arg(common::payload(payload))
        .args(more);
    Some(command)
}

/// Where Firecracker has its MMIO devices.
const FIRECRACKER_WINDOWS: u64 = 0xc000_1000;

/// The command for a payload in the peer Firecracker, if it is named, with such a disk.
pub fn firecracker(payload: &str, append: &str, drive: &serde_json::Value) -> Option<Command> {
    let binary = std::env::var_os("FIRECRACKER").filter(|value| !value.is_empty())?;
    let kernel = common::payload(payload);
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": kernel,
            "boot_args": format!("{append} windows={FIRECRACKER_WINDOWS}"),
        },
        "drives": [drive],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
    });
    let file = kernel.with_extension("firecracker.json");
    fs::write(&file, config.to_string()).expect("target/payloads is writable");
    let mut command = Command::new(binary);
    command.args(["--no-api", "--no-seccomp", "--log-path", "/dev/null"]);
    command.arg("--config-file").arg(file);
    Some(command)
}

/// Does `what` so many times in this thread.
pub fn host(count: usize, mut what: impl FnMut(usize)) -> Turn {
    let mut times = Vec::with_capacity(count);
    let (begin, cpu) = (Instant::now(), thread_time());
    for n in 0..count {
        let begin = Instant::now();
        what(n);
        times.push(begin.elapsed());
    }
    let elapsed = begin.elapsed().as_secs_f64();
    let cpu = (thread_time() - cpu) / count as f64;
    times.sort_unstable();
    Turn {
        rate: count as f64 / elapsed,
        times: Some([times[(count - 1) / 2], times[(count - 1) * 99 / 100]]),
        kicks: 0.0,
        cpu,
    }
}

/// The head of a table.
pub fn head(what: &str, rounds: usize) {
    println!("\n{what}: {rounds} turns each, medians; thousands a second, µs, per operation");
    println!(
        "{:<36}{:>36}{:>36}{:>24}{:>36}",
        "", "host", "guest", "", "QEMU microvm, if named"
    );
    print!("{:<36}", "");
    for _ in 0..2 {
        print!("{:>9}{:>9}{:>9}{:>9}", "rate", "p50", "p99", "CPU");
    }
    println!(
        "{:>8}{:>8}{:>8}{:>9}{:>9}{:>9}{:>9}",
        "ratio", "kicks", "GB/s", "rate", "p50", "p99", "CPU"
    );
}

/// Has all take `rounds` turns, prints the line, and gives the median ratio of the guest's rate to the
/// host's. An operation moves `bytes`; a peer that is absent gives nothing.
pub fn compare(
    name: &str,
    bytes: usize,
    rounds: usize,
    mut host: impl FnMut() -> Turn,
    mut guest: impl FnMut() -> Turn,
    mut peer: impl FnMut() -> Option<Turn>,
) -> f64 {
    let (mut hosts, mut guests, mut peers) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        for turn in [round % 3, (round + 1) % 3, (round + 2) % 3] {
            match turn {
                0 => hosts.push(host()),
                1 => guests.push(guest()),
                _ => peers.extend(peer()),
            }
        }
    }
    print!("{name:<36}");
    figures(&hosts);
    figures(&guests);
    let of = |what: fn(&Turn) -> f64| middle(guests.iter().map(what).collect());
    let ratios = hosts.iter().zip(&guests).map(|(h, g)| g.rate / h.rate);
    let ratio = middle(ratios.collect());
    let rate = of(|turn| turn.rate) * bytes as f64 / 1e9;
    print!("{ratio:>8.2}{:>8.3}{rate:>8.2}", of(|turn| turn.kicks));
    if !peers.is_empty() {
        figures(&peers);
    }
    println!();
    ratio
}

/// Prints rate, times and processor time.
fn figures(turns: &[Turn]) {
    let of = |what: &dyn Fn(&Turn) -> f64| middle(turns.iter().map(what).collect());
    print!("{:>9.2}", of(&|turn| turn.rate) / 1000.0);
    for at in 0..2 {
        let micros = |turn: &Turn| turn.times.map_or(0.0, |t| t[at].as_secs_f64() * 1e6);
        match turns[0].times {
            Some(_) => print!("{:>9.1}", of(&micros)),
            None => print!("{:>9}", "-"),
        }
    }
    print!("{:>9.1}", of(&|turn| turn.cpu) * 1e6);
}
