//! Input and output of a guest that polls its queues, as a ratio to a process of the host that does
//! the same: `make bench`.
//!
//! Guest and host take turns on one file. The guest is a payload at privilege level 3, which runs
//! natively on any KVM. BULLE is the binary, BENCH_ROUNDS the number of turns (7), BENCH_DIR where
//! the file of 256 MiB is made (target), BENCH_PARTS which parts are run (all): `idle`, what devices cost at
//! boot and while idle; `disks`; `net`; `share`; `sockets`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod host;
mod idle;
mod net;
mod share;
mod sockets;
mod turns;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of the file.
const SPAN: usize = 256 << 20;

/// What is done, over and over.
pub struct Case {
    name: &'static str,
    write: bool,
    sequential: bool,
    depth: usize,
    size: usize,
    /// The guest asks for an interrupt whenever it has seen all that is done.
    interrupts: bool,
}

/// How it went.
#[derive(Clone, Copy)]
pub struct Run {
    /// Requests a second.
    rate: f64,
    median: Duration,
    p99: Duration,
    /// Per request. Each is an exit, and the guest has no others of its own: it polls, and takes no
    /// interrupt.
    kicks: f64,
    /// Interrupts that the device raised, per request.
    interrupts: f64,
}

const fn case(name: &'static str, write: bool, sequential: bool, depth: usize, kib: usize) -> Case {
    Case {
        name,
        write,
        sequential,
        depth,
        size: kib << 10,
        interrupts: false,
    }
}

/// A case in which the guest asks for interrupts.
const fn interrupting(name: &'static str, write: bool) -> Case {
    let mut case = case(name, write, false, 32, 4);
    case.interrupts = true;
    case
}

const CASES: [Case; 8] = [
    case("4 KiB random read, depth 1", false, false, 1, 4),
    case("4 KiB random read, depth 32", false, false, 32, 4),
    case("4 KiB random write, depth 1", true, false, 1, 4),
    case("4 KiB random write, depth 32", true, false, 32, 4),
    interrupting("4 KiB random read, depth 32, interrupts", false),
    interrupting("4 KiB random write, depth 32, interrupts", true),
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

fn append(case: &Case, count: usize, seed: u64) -> String {
    let mut append = format!(
        "depth={} size={} count={count} seed={seed}",
        case.depth, case.size
    );
    append += if case.write { " write=1" } else { "" };
    append += if case.sequential { " sequential=1" } else { "" };
    append + if case.interrupts { " interrupts=1" } else { "" }
}

fn guest(case: &Case, disk: &str, count: usize, seed: u64, hertz: f64) -> Run {
    let name = format!("bench-{}", std::process::id());
    let more = ["--name", &name, "--disk", disk].map(str::to_owned);
    let mut guest = Guest::start("block_bench", &append(case, count, seed), &more);
    let mut run = numbers(&guest.line(), count, hertz);
    if case.interrupts {
        run.interrupts = interrupts(&name) / count as f64;
    }
    run
}

/// The same in Firecracker, which has no O_DIRECT, with its io_uring, if it is named.
fn firecracker(case: &Case, path: &Path, count: usize, hertz: f64) -> Option<Run> {
    let drive = serde_json::json!({
        "drive_id": "d",
        "path_on_host": path,
        "is_root_device": false,
        "cache_type": "Writeback",
        "io_engine": "Async",
    });
    let command = turns::firecracker("block_bench", &append(case, count, 1), &drive)?;
    Some(numbers(&Guest::spawn(command).line(), count, hertz))
}

/// The same in the peer QEMU, with an I/O thread, if it is named.
fn qemu(case: &Case, (path, direct): (&Path, bool), count: usize, hertz: f64) -> Option<Run> {
    let cache = if direct { "none" } else { "writeback" };
    let path = path.display();
    let more = [
        "-object",
        "iothread,id=io",
        "-drive",
        // The kernel drops the lock of the monitor before it a moment after that is gone.
        &format!(
            "if=none,id=d,file.filename={path},file.locking=off,format=raw,cache={cache},aio=io_uring"
        ),
        "-device",
        "virtio-blk-device,drive=d,iothread=io",
    ];
    let append = append(case, count, 1);
    let command = turns::qemu("block_bench", &append, &more.map(str::to_owned))?;
    Some(numbers(&Guest::spawn(command).line(), count, hertz))
}

/// What the first device of a guest has raised.
fn interrupts(name: &str) -> f64 {
    let output = Command::new(bulle())
        .args(["stats", "--json", name])
        .output();
    let json = output.expect("bulle runs").stdout;
    let all: serde_json::Value = serde_json::from_slice(&json).expect("statistics");
    let value = &all[0]["devices"][0]["totals"]["interrupts"];
    value.as_f64().expect("a number of interrupts")
}

fn numbers(line: &str, count: usize, hertz: f64) -> Run {
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
        interrupts: 0.0,
    }
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Measures `case` by turns and prints a line of the table; the ratio, and kicks per request.
fn measure(case: &Case, path: &Path, direct: bool, rounds: usize, hertz: f64) -> (f64, f64) {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let open = File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path);
    let file = open.expect("the file of the benchmark");
    let cache = if direct { "none" } else { "writeback" };
    let disk = format!("path={},cache={cache}", path.display());
    // A first turn of the host, to find how many requests make a turn.
    let probe = host::run(case, &file, 1000, 1).rate;
    let count = ((probe * TURN.as_secs_f64()) as usize).clamp(2000, 200_000);
    let (mut hosts, mut guests) = (Vec::new(), Vec::new());
    let mut peers = [Vec::new(), Vec::new()];
    for round in 0..rounds as u64 {
        for turn in (round..round + 4).map(|turn| turn % 4) {
            match turn {
                0 => hosts.push(host::run(case, &file, count, round)),
                1 => guests.push(guest(case, &disk, count, round, hertz)),
                2 => peers[0].extend(qemu(case, (path, direct), count, hertz)),
                _ if direct => {}
                _ => peers[1].extend(firecracker(case, path, count, hertz)),
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
        "{:<42}{:<8}",
        case.name,
        if direct { "direct" } else { "cached" }
    );
    let figures = |runs: &[Run]| {
        print!(
            "{:>10.1}{:>9.1}{:>9.1}",
            of(runs, |r| r.rate) / 1000.0,
            micros(Duration::from_secs_f64(of(runs, |r| r
                .median
                .as_secs_f64()))),
            micros(Duration::from_secs_f64(of(runs, |r| r.p99.as_secs_f64()))),
        );
    };
    figures(&hosts);
    figures(&guests);
    let kicks = of(&guests, |r| r.kicks);
    let interrupts = of(&guests, |r| r.interrupts);
    print!("{ratio:>8.2}{kicks:>9.4}");
    match case.interrupts {
        true => print!("{interrupts:>9.4}"),
        false => print!("{:>9}", "-"),
    }
    for peer in &peers {
        match peer.is_empty() {
            true => print!("{:>10}{:>9}{:>9}", "-", "-", "-"),
            false => figures(peer),
        }
    }
    println!();
    (ratio, kicks + interrupts)
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
        "{:<50}{:>28}{:>28}{:>26}{:>28}{:>28}",
        "", "host", "guest", "", "QEMU microvm, if named", "Firecracker, if named"
    );
    println!(
        "{:<50}{:>10}{:>9}{:>9}{:>10}{:>9}{:>9}{:>8}{:>9}{:>9}{:>10}{:>9}{:>9}{:>10}{:>9}{:>9}",
        "",
        "rate",
        "p50",
        "p99",
        "rate",
        "p50",
        "p99",
        "ratio",
        "kicks",
        "intr",
        "rate",
        "p50",
        "p99",
        "rate",
        "p50",
        "p99"
    );
    let mut goals = Vec::new();
    for direct in [true, false] {
        for case in &CASES {
            let figures = measure(case, &path, direct, rounds, hertz);
            if case.depth == 32 && !case.write {
                goals.push((direct, case.interrupts, figures));
            }
        }
    }
    let _ = fs::remove_file(&path);
    println!();
    for (direct, interrupts, (ratio, per_request)) in goals {
        let cache = if direct { "direct" } else { "cached" };
        if interrupts {
            let what = format!("kicks and interrupts per request at depth 32, {cache}");
            goal(&what, per_request, 0.06, false);
        } else {
            let what = format!("4 KiB random read at depth 32, {cache}");
            goal(&what, ratio, 0.9, true);
        }
    }
}

fn main() {
    let rounds = std::env::var("BENCH_ROUNDS").map_or(7, |n| n.parse().expect("a number"));
    let parts =
        std::env::var("BENCH_PARTS").unwrap_or_else(|_| "idle,disks,net,share,sockets".into());
    let hertz = cycles_per_second();
    for part in parts.split(',') {
        match part {
            "idle" => idle::print(rounds),
            "disks" => disks(rounds, hertz),
            "net" => net::print(rounds, hertz),
            "share" => share::print(rounds, hertz),
            "sockets" => sockets::print(rounds),
            other => {
                panic!("BENCH_PARTS: no part {other:?}; there are idle, disks, net, share, sockets")
            }
        }
    }
}
