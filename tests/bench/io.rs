//! Input and output of a guest that polls its queues, as a ratio to a process of the host that does
//! the same: `make bench`.
//!
//! Guest and host take turns on one file. The guest is a payload at privilege level 3, which runs
//! natively on any KVM; its vCPU and the I/O thread each have a processor of their own. BULLE is the
//! binary, QEMU a peer's for disks, BENCH_ROUNDS the number of turns (7), BENCH_DIR where the file of
//! 256 MiB is made (target), BENCH_PARTS which parts are run (all): `idle`, what devices cost at boot
//! and while idle; `disks`; `share`; `sockets`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod host;
mod idle;
mod share;
mod sockets;
mod threads;
mod turns;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where QEMU's microvm has its MMIO devices.
const QEMU_WINDOWS: u64 = 0xfeb0_0000;
/// Bytes of the file.
const SPAN: usize = 256 << 20;

/// What is done, over and over.
pub struct Case {
    name: &'static str,
    write: bool,
    sequential: bool,
    depth: usize,
    size: usize,
}

/// How it went.
#[derive(Clone, Copy)]
pub struct Run {
    /// Requests a second.
    rate: f64,
    median: Duration,
    p99: Duration,
    /// Per request. Each is an exit, and the guest has no others of its own: it polls without
    /// interrupts.
    kicks: f64,
    /// Seconds of processor time per request: of the process, or of bulle's I/O thread.
    cpu: f64,
    /// Per request: what the I/O thread writes to event descriptors, mostly interrupts.
    interrupts: f64,
}

impl Case {
    /// Whether there are goals for it.
    fn is_judged(&self) -> bool {
        self.depth == 32 && !self.write
    }
}

const fn case(name: &'static str, write: bool, sequential: bool, depth: usize, kib: usize) -> Case {
    Case {
        name,
        write,
        sequential,
        depth,
        size: kib << 10,
    }
}

const CASES: [Case; 6] = [
    case("4 KiB random read, depth 1", false, false, 1, 4),
    case("4 KiB random read, depth 32", false, false, 32, 4),
    case("4 KiB random write, depth 1", true, false, 1, 4),
    case("4 KiB random write, depth 32", true, false, 32, 4),
    case("128 KiB sequential read, depth 8", false, true, 8, 128),
    case("128 KiB sequential write, depth 8", true, true, 8, 128),
];

/// About how long one turn is to take.
const TURN: Duration = Duration::from_millis(200);

/// The binary to be measured.
fn bulle() -> PathBuf {
    let named = std::env::var_os("BULLE").filter(|value| !value.is_empty());
    named.map_or_else(|| env!("CARGO_BIN_EXE_bulle").into(), PathBuf::from)
}

/// A guest, ended when dropped.
pub struct Guest {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Guest {
    fn start(payload: &str, append: &str, more: &[String]) -> Self {
        let mut command = Command::new(bulle());
        command
            .args(["run", "--root", "none", "--cpus", "1", "--memory", "128M"])
            .args(["--append", append, "--kernel"])
            .arg(common::payload(payload))
            .args(more);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the monitor runs");
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Cycles of the time stamp counter in a second.
fn cycles_per_second() -> f64 {
    // SAFETY: every x86_64 processor has one.
    let now = || unsafe { std::arch::x86_64::_rdtsc() };
    let (begin, cycles) = (Instant::now(), now());
    std::thread::sleep(Duration::from_millis(200));
    (now() - cycles) as f64 / begin.elapsed().as_secs_f64()
}

fn guest(who: &Monitor, case: &Case, disk: &Disk, count: usize, more: &str, hertz: f64) -> Run {
    let mut append = format!(
        "depth={} size={} count={count} {more}",
        case.depth, case.size
    );
    append += if case.write { " write=1" } else { "" };
    append += if case.sequential { " sequential=1" } else { "" };
    let mut guest = who.start(&append, disk);
    threads::pin(guest.child.id(), who.threads());
    let line = guest.line();
    let used = threads::used(guest.child.id(), who.threads());
    let numbers: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
    let [_, cycles, median, p99, kicks] = numbers[..] else {
        panic!("the guest said {line:?}")
    };
    let time = |cycles: f64| Duration::from_secs_f64(cycles / hertz);
    Run {
        rate: count as f64 / time(cycles).as_secs_f64(),
        median: time(median),
        p99: time(p99),
        kicks: kicks / count as f64,
        cpu: used.cpu.as_secs_f64() / count as f64,
        interrupts: used.writes as f64 / count as f64,
    }
}

/// Who runs the guest.
enum Monitor {
    Bulle,
    Qemu(PathBuf),
}

/// The file of the benchmark, and whether it is used without the page cache.
struct Disk {
    path: PathBuf,
    direct: bool,
}

impl Monitor {
    /// QEMU, if it is named.
    fn peer() -> Option<Self> {
        let named = std::env::var_os("QEMU").filter(|value| !value.is_empty());
        named.map(|path| Self::Qemu(path.into()))
    }

    /// Names of the vCPU's and of the I/O thread.
    fn threads(&self) -> [&'static str; 2] {
        match self {
            Self::Bulle => ["vcpu0", "io0"],
            Self::Qemu(_) => ["CPU 0/KVM", "IO io0"],
        }
    }

    fn start(&self, append: &str, disk: &Disk) -> Guest {
        let path = disk.path.display();
        match self {
            // With the kernel's controller each interrupt is a write to an event descriptor.
            Self::Bulle => {
                let cache = if disk.direct { "none" } else { "writeback" };
                let disk = format!("path={path},cache={cache}");
                let options = ["--irqchip", "kernel", "--disk", &disk];
                Guest::start("block_bench", append, &options.map(str::to_owned))
            }
            Self::Qemu(binary) => {
                let direct = if disk.direct { "on" } else { "off" };
                let drive = format!(
                    "if=none,id=d,file={path},format=raw,aio=io_uring,cache.direct={direct}"
                );
                let mut command = Command::new(binary);
                let machine = "microvm,accel=kvm,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off";
                command
                    .args([
                        "-M",
                        machine,
                        "-cpu",
                        "host,-arch-capabilities",
                        "-m",
                        "128",
                    ])
                    .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
                    .args(["-serial", "stdio", "-name", "qemu,debug-threads=on"])
                    .args(["-global", "virtio-mmio.force-legacy=false"])
                    .args(["-object", "iothread,id=io0", "-drive", &drive, "-device"])
                    .arg("virtio-blk-device,drive=d,iothread=io0,queue-size=256")
                    .args(["-append", &format!("{append} windows={QEMU_WINDOWS}")])
                    .arg("-kernel")
                    .arg(common::payload("block_bench"));
                Guest::spawn(command)
            }
        }
    }
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Measures `case` by turns and prints a line of the table; the ratio, and for a case with a goal
/// kicks and interrupts per request of a guest that asks for both.
fn measure(case: &Case, path: &Path, direct: bool, rounds: usize, hertz: f64) -> (f64, f64) {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let open = File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path);
    let file = open.expect("the file of the benchmark");
    let path = path.to_owned();
    let disk = Disk { path, direct };
    let peer = Monitor::peer();
    // A first turn of the host, to find how many requests make a turn.
    let probe = host::run(case, &file, 1000, 1).rate;
    let count = ((probe * TURN.as_secs_f64()) as usize).clamp(2000, 200_000);
    let (mut hosts, mut guests, mut peers) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds as u64 {
        let seed = format!("seed={round}");
        for turn in [round % 3, (round + 1) % 3, (round + 2) % 3] {
            let turn_of = |who: &Monitor| guest(who, case, &disk, count, &seed, hertz);
            match turn {
                0 => hosts.push(host::run(case, &file, count, round)),
                1 => guests.push(turn_of(&Monitor::Bulle)),
                _ => peers.extend(peer.as_ref().map(turn_of)),
            }
        }
    }
    let of = |runs: &[Run], what: fn(&Run) -> f64| middle(runs.iter().map(what).collect());
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let ratios = hosts
        .iter()
        .zip(&guests)
        .map(|(host, guest)| guest.rate / host.rate);
    let ratio = middle(ratios.collect());
    print!(
        "{:<34}{:<8}",
        case.name,
        if direct { "direct" } else { "cached" }
    );
    for runs in [&hosts, &guests] {
        print!(
            "{:>10.1}{:>9.1}{:>9.1}{:>7.2}",
            of(runs, |r| r.rate) / 1000.0,
            micros(Duration::from_secs_f64(of(runs, |r| r
                .median
                .as_secs_f64()))),
            micros(Duration::from_secs_f64(of(runs, |r| r.p99.as_secs_f64()))),
            of(runs, |r| r.cpu) * 1e6,
        );
    }
    print!("{ratio:>8.2}{:>9.4}", of(&guests, |r| r.kicks));
    match peers.is_empty() {
        true => println!(),
        false => println!(
            "{:>10.1}{:>9.1}{:>9.1}{:>7.2}",
            of(&peers, |r| r.rate) / 1000.0,
            micros(Duration::from_secs_f64(of(&peers, |r| r
                .median
                .as_secs_f64()))),
            micros(Duration::from_secs_f64(of(&peers, |r| r.p99.as_secs_f64()))),
            of(&peers, |r| r.cpu) * 1e6,
        ),
    }
    let mut events = 0.0;
    if case.is_judged() {
        let more = |round| format!("seed={round} interrupts=1");
        let turn = |round| guest(&Monitor::Bulle, case, &disk, count, &more(round), hertz);
        let runs: Vec<Run> = (0..rounds).map(turn).collect();
        events = of(&runs, |run| run.kicks + run.interrupts);
    }
    (ratio, events)
}

/// The file, written once so that every block has a place on the disk.
fn prepare() -> PathBuf {
    let dir =
        std::env::var_os("BENCH_DIR").map_or_else(|| common::tree().join("target"), PathBuf::from);
    let path = dir.join("bench.img");
    let mut file = File::create(&path).expect("BENCH_DIR is writable");
    let chunk: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    for _ in 0..SPAN / chunk.len() {
        file.write_all(&chunk).expect("room for the file");
    }
    file.sync_all().unwrap();
    path
}

fn goal(what: &str, value: f64, limit: f64, at_least: bool) {
    let met = if at_least {
        value >= limit
    } else {
        value <= limit
    };
    let (verdict, sign) = (
        if met { "met" } else { "MISSED" },
        if at_least { "≥" } else { "≤" },
    );
    println!("{verdict:<7} {what}: {value:.3} (goal {sign} {limit})");
}

/// Measures disks and prints their table and goals.
fn disks(rounds: usize, hertz: f64) {
    let path = prepare();
    println!("\nblock: {rounds} turns each, medians; thousands a second, µs, per request");
    println!(
        "{:<42}{:>35}{:>35}{:>17}{:>35}",
        "", "host", "guest, I/O thread", "", "QEMU microvm, if named"
    );
    println!(
        "{:<42}{:>10}{:>9}{:>9}{:>7}{:>10}{:>9}{:>9}{:>7}{:>8}{:>9}",
        "", "rate", "p50", "p99", "cpu", "rate", "p50", "p99", "cpu", "ratio", "kicks"
    );
    let mut goals = Vec::new();
    for direct in [true, false] {
        for case in &CASES {
            let figures = measure(case, &path, direct, rounds, hertz);
            if case.is_judged() {
                goals.push((direct, figures));
            }
        }
    }
    let _ = fs::remove_file(&path);
    println!();
    for (direct, (ratio, events)) in goals {
        let cache = if direct { "direct" } else { "cached" };
        goal(
            &format!("4 KiB random read at depth 32, {cache}"),
            ratio,
            0.9,
            true,
        );
        goal(
            &format!("kicks and interrupts per request at depth 32, {cache}"),
            events,
            0.06,
            false,
        );
    }
}

fn main() {
    let rounds = std::env::var("BENCH_ROUNDS").map_or(7, |n| n.parse().expect("a number"));
    let parts = std::env::var("BENCH_PARTS").unwrap_or_else(|_| "idle,disks,share,sockets".into());
    let hertz = cycles_per_second();
    for part in parts.split(',') {
        match part {
            "idle" => idle::print(rounds),
            "disks" => disks(rounds, hertz),
            "share" => share::print(rounds, hertz),
            "sockets" => sockets::print(rounds),
            other => {
                panic!("BENCH_PARTS: no part {other:?}; there are idle, disks, share, sockets")
            }
        }
    }
}
