//! Loads of a snapshot by a new process over its API, which is how Firecracker makes clones: bulle's
//! beside those of a Firecracker that FIRECRACKER names, and beside clones in this process.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bulle::bench::{Cloner, at, line};
use serde_json::{Value, json};

use super::client::{Answer, Client, request};
use super::{Nonce, common};

/// A program that serves Firecracker's API, and the snapshot that it made.
struct Program {
    name: &'static str,
    binary: PathBuf,
    args: &'static [&'static str],
    dir: tempfile::TempDir,
    nonce: u64,
}

/// A process of it.
struct Process {
    child: Child,
    client: Client,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Process {
    fn start(program: &Program) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let socket = program.path(&format!("socket{number}"));
        let mut command = Command::new(&program.binary);
        command.args(program.args).arg("--api-sock").arg(&socket);
        command.args(["--no-seccomp", "--log-path", "/dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        Self {
            client: Client::connect(&socket),
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn call(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        let bytes = request(method, path, &body.to_string());
        self.client.send(bytes.as_bytes());
        self.client.answer()
    }
}

impl Program {
    fn new(name: &'static str, binary: PathBuf, args: &'static [&'static str]) -> Self {
        Self {
            name,
            binary,
            args,
            dir: tempfile::tempdir_in("/dev/shm").unwrap(),
            nonce: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A guest with two devices, saved with its number in memory.
    fn save(&mut self) {
        let disk = self.path("disk");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let mut process = Process::start(self);
        let mut put = |path: &str, body: Value| process.call("PUT", path, &body).done();
        let kernel = common::payload("nonce");
        put(
            "/boot-source",
            json!({ "kernel_image_path": kernel, "boot_args": "console=ttyS0" }),
        );
        put(
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 128 }),
        );
        put("/entropy", json!({}));
        put(
            "/drives/d",
            json!({
                "drive_id": "d",
                "path_on_host": disk,
                "is_root_device": false,
                "is_read_only": true,
            }),
        );
        put("/actions", json!({ "action_type": "InstanceStart" }));
        let mut text = String::new();
        process.stdout.read_line(&mut text).unwrap();
        let digits = text.trim_end().strip_prefix("nonce ").unwrap();
        self.nonce = u64::from_str_radix(digits, 16).unwrap();
        let paused = json!({ "state": "Paused" });
        process.call("PATCH", "/vm", &paused).done();
        let create = json!({
            "snapshot_path": self.path("state"),
            "mem_file_path": self.path("memory"),
        });
        process.call("PUT", "/snapshot/create", &create).done();
    }

    /// How long it takes from the start of a process to the guest's number.
    fn load(&self) -> Duration {
        self.loaded().1
    }

    /// A process that has given its guest's number, and how long that took.
    fn loaded(&self) -> (Process, Duration) {
        let begin = Instant::now();
        let mut process = Process::start(self);
        // It waits for the guest to read it.
        process.stdin.write_all(b"n").unwrap();
        let load = json!({
            "snapshot_path": self.path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": self.path("memory") },
            "resume_vm": true,
        });
        process.call("PUT", "/snapshot/load", &load).done();
        let mut bytes = [0; 8];
        process.stdout.read_exact(&mut bytes).unwrap();
        let time = begin.elapsed();
        assert_eq!(bytes, self.nonce.to_be_bytes(), "{}", self.name);
        (process, time)
    }

    /// What each of `count` clones that stand still costs, of the host's available memory and of their own (PSS), in KiB.
    fn cost(&self, count: u64) -> [u64; 2] {
        let before = kib("/proc/meminfo", "MemAvailable:");
        let clones: Vec<_> = (0..count)
            .map(|_| {
                let mut process = self.loaded().0;
                let paused = json!({ "state": "Paused" });
                process.call("PATCH", "/vm", &paused).done();
                process
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        let taken = before.saturating_sub(kib("/proc/meminfo", "MemAvailable:"));
        let pss = clones.iter().map(|process| {
            let pid = process.child.id();
            kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
        });
        [taken / count, pss.sum::<u64>() / count]
    }
}

/// A figure of a file of /proc.
pub fn kib(file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.unwrap().split_whitespace().next().unwrap();
    number.parse().unwrap()
}

fn named(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}

/// Takes `count` samples of each by turns.
pub fn print(cloner: &mut Cloner, guest: &mut Nonce, count: usize) {
    println!(
        "New processes that load a snapshot over their API, 128 MiB, 2 devices; goal: a new clone in this"
    );
    println!("process 15 times faster than Firecracker");
    let own = named("BULLE").unwrap_or_else(|| Path::new(env!("CARGO_BIN_EXE_bulle")).into());
    let mut programs = vec![Program::new("bulle", own, &["api"])];
    match named("FIRECRACKER") {
        Some(path) => programs.push(Program::new("firecracker", path, &[])),
        None => println!("  absent: firecracker (FIRECRACKER is not set)"),
    }
    programs.iter_mut().for_each(Program::save);
    let mut clones = Vec::new();
    let mut loads = vec![Vec::new(); programs.len()];
    for round in 0..count + 3 {
        let clone = cloner.sample(guest).unwrap().expect("the guest answers");
        let times: Vec<_> = programs.iter().map(Program::load).collect();
        if round >= 3 {
            clones.push(clone);
            loads
                .iter_mut()
                .zip(times)
                .for_each(|(all, time)| all.push(time));
        }
    }
    println!(
        "  {}",
        line("clone in this process", [&mut [], &mut []], &mut clones)
    );
    for (program, times) in programs.iter().zip(&mut loads) {
        let what = format!("{}: start, load", program.name);
        println!("  {}", line(&what, [&mut [], &mut []], times));
        let middle = |times: &mut [Duration]| at(times, 50).unwrap().as_secs_f64();
        let ratio = middle(times) / middle(&mut clones);
        println!("    {ratio:.1} times a clone in this process");
    }
    print_costs(&programs);
}

/// By turns, since what is available changes by itself.
fn print_costs(programs: &[Program]) {
    const CLONES: u64 = 40;
    const ROUNDS: usize = 3;
    println!(
        "The same, {CLONES} at once that stand still; goals: memory of the host 0.60 of Firecracker's, PSS 200 KiB"
    );
    let mut costs = vec![Vec::new(); programs.len()];
    for _ in 0..ROUNDS {
        for (program, costs) in programs.iter().zip(&mut costs) {
            costs.push(program.cost(CLONES));
        }
    }
    let mut memory = Vec::new();
    for (program, costs) in programs.iter().zip(&mut costs) {
        costs.sort_unstable();
        let [taken, pss] = costs[ROUNDS / 2];
        println!(
            "  {}: {taken} KiB each (MemAvailable), {pss} KiB each (PSS)",
            program.name
        );
        memory.push(taken);
    }
    if let [own, other] = memory[..] {
        println!("    {:.2} of it", own as f64 / other as f64);
    }
}
