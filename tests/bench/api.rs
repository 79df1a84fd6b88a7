//! The API, side by side with Firecracker's: `make bench`.
//!
//! From the start of the process to the first answer, from InstanceStart to the guest's first byte, and single
//! calls; then what the API's thread costs while nobody asks. Contenders take turns. FIRECRACKER and BULLE are
//! paths, BENCH_N is the number of samples. Nothing is dropped: a sample that fails ends the benchmark.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Calls of one sample.
const CALLS: usize = 200;
/// How long the API's thread is watched.
const IDLE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(10);
const WARM_UP: usize = 2;

/// A monitor with the API.
struct Contender {
    name: &'static str,
    binary: PathBuf,
    arguments: &'static [&'static str],
    /// The name of the thread that serves it.
    thread: &'static str,
}

/// A process of one of them, killed when dropped.
struct Served {
    child: Child,
    client: UnixStream,
}

impl Served {
    /// Starts it; says how long the first answer took.
    fn start(contender: &Contender, socket: &Path) -> (Self, Duration) {
        let _ = fs::remove_file(socket);
        let mut command = Command::new(&contender.binary);
        command
            .args(contender.arguments)
            .arg("--api-sock")
            .arg(socket);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let begin = Instant::now();
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        let client = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "{}: {error}", contender.name),
            }
            std::thread::sleep(Duration::from_micros(20));
        };
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut served = Self { child, client };
        served.ask("GET", "/", "", 200);
        (served, begin.elapsed())
    }

    /// One call; the time to its answer.
    fn ask(&mut self, method: &str, path: &str, body: &str, status: u16) -> Duration {
        let length = body.len();
        let request = match length {
            0 => format!("{method} {path} HTTP/1.1\r\n\r\n"),
            _ => format!("{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}"),
        };
        let begin = Instant::now();
        self.client.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 4096];
        // It comes in one piece.
        let len = self.client.read(&mut answer).unwrap();
        let took = begin.elapsed();
        let text = String::from_utf8_lossy(&answer[..len]);
        assert!(
            text.starts_with(&format!("HTTP/1.1 {status} ")),
            "{path}: {text}"
        );
        took
    }

    /// Starts a payload; the times from InstanceStart to its answer and to the guest's byte.
    fn boot(&mut self, payload: &str, byte: u8) -> [Duration; 2] {
        let source = serde_json::json!({
            "kernel_image_path": common::payload(payload), "boot_args": "console=ttyS0",
        });
        self.ask("PUT", "/boot-source", &source.to_string(), 204);
        let machine = r#"{"vcpu_count":1,"mem_size_mib":128}"#;
        self.ask("PUT", "/machine-config", machine, 204);
        let body = r#"{"action_type":"InstanceStart"}"#;
        let length = body.len();
        let request = format!("PUT /actions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
        let begin = Instant::now();
        self.client.write_all(request.as_bytes()).unwrap();
        // Either may come first.
        let stdout = self.child.stdout.as_mut().unwrap();
        let [mut answered, mut said] = [None, None];
        let mut some = [0; 4096];
        while answered.is_none() || said.is_none() {
            let mut fds = [
                PollFd::new(self.client.as_fd(), PollFlags::POLLIN),
                PollFd::new(stdout.as_fd(), PollFlags::POLLIN),
            ];
            assert!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap() > 0);
            let now = begin.elapsed();
            let [client, output] = fds.map(|fd| fd.any().unwrap());
            if client {
                let len = self.client.read(&mut some).unwrap();
                assert!(some[..len].starts_with(b"HTTP/1.1 204 "));
                answered = Some(now);
            }
            if output {
                let len = stdout.read(&mut some).unwrap();
                assert!(len > 0, "the guest says nothing");
                said = said.or(some[..len].contains(&byte).then_some(now));
            }
        }
        [answered, said].map(Option::unwrap)
    }

    /// Processor time of the threads with this name.
    fn time_of(&self, thread: &str) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let time = |task: fs::DirEntry| {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let spent = read("schedstat").split(' ').next()?.parse().ok()?;
            (read("comm").trim() == thread).then_some(Duration::from_nanos(spent))
        };
        let times: Vec<_> = tasks.flatten().filter_map(time).collect();
        assert!(!times.is_empty(), "no thread {thread}");
        times.iter().sum()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who was named, bulle first.
fn contenders() -> Vec<Contender> {
    let path = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
    let own = path("BULLE").map_or_else(|| env!("CARGO_BIN_EXE_bulle").into(), PathBuf::from);
    let mut all = vec![Contender {
        name: "bulle",
        binary: own,
        arguments: &["api"],
        thread: "api",
    }];
    match path("FIRECRACKER") {
        None => println!("absent: firecracker (FIRECRACKER is not set)"),
        Some(binary) => all.push(Contender {
            name: "firecracker",
            binary: binary.into(),
            arguments: &["--no-seccomp", "--log-path", "/dev/null"],
            thread: "fc_api",
        }),
    }
    all
}

/// Milliseconds of each kind.
#[derive(Default)]
struct Samples {
    start: Vec<f64>,
    answered: Vec<f64>,
    byte: Vec<f64>,
    calls: Vec<f64>,
}

/// The value that `percent` of them do not exceed (nearest rank).
fn percentile(all: &[f64], percent: usize) -> f64 {
    let mut sorted = all.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}

fn sample(contender: &Contender, socket: &Path, into: Option<&mut Samples>) {
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let (mut served, start) = Served::start(contender, socket);
    let calls = (0..CALLS).map(|_| served.ask("GET", "/machine-config", "", 200));
    let calls: Vec<_> = calls.map(millis).collect();
    let [answered, byte] = served.boot("first_byte", b'B');
    if let Some(samples) = into {
        samples.start.push(millis(start));
        samples.answered.push(millis(answered));
        samples.byte.push(millis(byte));
        samples.calls.extend(calls);
    }
}

/// Processor time of the API's thread beside a guest that halts and clients that ask nothing.
fn idle(contender: &Contender, socket: &Path) -> Duration {
    let (mut served, _) = Served::start(contender, socket);
    served.boot("hlt_forever", b'h');
    let _clients: Vec<_> = (0..5)
        .map(|_| UnixStream::connect(socket).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let before = served.time_of(contender.thread);
    std::thread::sleep(IDLE);
    served.time_of(contender.thread) - before
}

fn goal(what: &str, value: f64, limit: f64, unit: &str, at_least: bool) {
    let (met, word) = match at_least {
        true => (value >= limit, "≥"),
        false => (value <= limit, "≤"),
    };
    let verdict = if met { "met" } else { "MISSED" };
    println!("{verdict:<7} {what}: {value:.3} {unit} (goal {word} {limit})");
}

fn main() {
    let count = std::env::var("BENCH_N").map_or(60, |n| n.parse().expect("BENCH_N is a number"));
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let contenders = contenders();
    let mut samples: Vec<_> = contenders.iter().map(|_| Samples::default()).collect();
    for round in 0..count + WARM_UP {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let into = (round >= WARM_UP).then_some(&mut samples[at]);
            sample(&contenders[at], &socket, into);
        }
    }
    println!(
        "\nAPI: {count} samples each of {CALLS} calls, 1 processor, 128 MiB; ms, median and p99"
    );
    println!(
        "{:<14}{:>18}{:>18}{:>18}{:>18}{:>14}",
        "", "spawn → answer", "start → answer", "start → byte", "call", "idle µs/s"
    );
    for (contender, samples) in contenders.iter().zip(&samples) {
        print!("{:<14}", contender.name);
        let Samples {
            start,
            answered,
            byte,
            calls,
        } = samples;
        for all in [start, answered, byte, calls] {
            print!("{:>10.3}{:>8.3}", percentile(all, 50), percentile(all, 99));
        }
        let spent = idle(contender, &socket).as_secs_f64() / IDLE.as_secs_f64();
        println!("{:>14.1}", spent * 1e6);
    }
    println!();
    let own = &samples[0];
    let median = percentile(&own.start, 50);
    goal("spawn → first answer", median, 3.0, "ms", false);
    if let Some(peer) = samples.get(1) {
        let ratio = percentile(&peer.start, 50) / median;
        goal("the same against firecracker", ratio, 2.0, "times", true);
    }
    let byte = percentile(&own.byte, 50);
    goal(
        "InstanceStart → the guest's first byte",
        byte,
        1.0,
        "ms",
        false,
    );
    goal("an API call", percentile(&own.calls, 50), 0.1, "ms", false);
}
