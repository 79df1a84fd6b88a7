//! Clones in processes of their own, and forks of a guest that runs.

use std::collections::VecDeque;
use std::io::{PipeReader, Read, pipe};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use bulle::bench::line;
use bulle::config::Spec;
use bulle::control::SnapshotLoad;
use bulle::pool::{Order, Stdio, Waiting};
use bulle::snapshot::fork::Ram;
use bulle::snapshot::ram::Origin;
use bulle::snapshot::{GuestFacts, Snapshot, Template};
use bulle::vm::Vm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vm_memory::{Bytes, GuestAddress};

use super::peers::kib;
use super::{common, machine};

const PATIENCE: Duration = Duration::from_secs(60);
/// Processes that wait at any time.
const POOL: usize = 4;
/// Clones whose rate is one figure.
const RATE: usize = 100;

/// The program whose processes become clones.
fn program() -> PathBuf {
    let built = std::env::var_os("BULLE").map(PathBuf::from);
    built.unwrap_or_else(|| env!("CARGO_BIN_EXE_bulle").into())
}

struct Parent {
    spec: Spec,
    vm: Vm,
    nonce: u64,
}

/// A guest that waits for a byte, with two devices.
fn parent(mib: u64, backing: &str, disk: &std::path::Path) -> Parent {
    std::fs::write(disk, vec![0; 1 << 20]).unwrap();
    let sections = format!(
        r#"{{"machine-config":{{"mem_size_mib":{mib},"memory_backing":"{backing}"}},"entropy":{{}},
            "drives":[{{"drive_id":"d","path_on_host":{disk:?},"is_read_only":true}}]}}"#
    );
    let spec = machine::config(&common::payload("nonce"), &sections);
    let spec = spec.validate().unwrap();
    let (vm, _, nonce) = machine::boot(&spec, machine::host(&spec));
    Parent { spec, vm, nonce }
}

fn print(what: &str, times: &mut [Duration]) {
    println!("  {}", line(what, [&mut [], &mut []], times));
}

/// A guest with two devices, saved twice, and what its clones are told.
struct Saved {
    templates: [Template; 2],
    nonce: [u8; 8],
    order: Order,
    _dir: tempfile::TempDir,
}

impl Saved {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let parent = parent(128, "anonymous", &dir.path().join("disk"));
        // The byte that it waits for is there as soon as it goes on.
        parent.vm.pause(PATIENCE).unwrap();
        machine::types(&parent.vm, b"n");
        Self {
            templates: ["a", "b"].map(|name| {
                let snapshot = machine::save(&parent.vm, &parent.spec, dir.path(), name);
                Template::new(snapshot).unwrap()
            }),
            nonce: parent.nonce.to_be_bytes(),
            order: Order {
                load: SnapshotLoad::new(PathBuf::new(), PathBuf::new()),
                base: None,
                name: None,
                command: Vec::new(),
            },
            _dir: dir,
        }
    }

    fn start(&self) -> (Waiting, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let stdio = Stdio {
            stdout: Some(writer.into()),
            stderr: None,
        };
        let waiting = Waiting::start(&program(), &self.templates[0], stdio);
        (waiting.unwrap(), reader)
    }

    /// A process that has given its guest's number, and how long its first byte took since `begin`.
    fn number(
        &self,
        (mut process, mut output): (Waiting, PipeReader),
        another: Option<&Template>,
        begin: Instant,
    ) -> (Child, Duration) {
        let mut bytes = [0; 8];
        process.order_of(&self.order, another).unwrap();
        let (first, more) = bytes.split_at_mut(1);
        output.read_exact(first).unwrap();
        let time = begin.elapsed();
        output.read_exact(more).unwrap();
        assert_eq!(bytes, self.nonce);
        (process.begun().unwrap().process, time)
    }
}

fn end(mut process: Child) {
    process.kill().unwrap();
    process.wait().unwrap();
}

/// From the order to the first byte of the guest's number on the process's standard output, which takes the guest
/// three exits and the pipe's reader a wake-up.
pub fn processes(count: usize) {
    println!("Clones in processes of their own; goal of pooled ones: 250 at p50");
    let saved = Saved::new();
    let other = &saved.templates[1];
    let mut filling = Vec::new();
    let [mut new, mut pooled, mut handed] = [const { Vec::new() }; 3];
    let mut pool = VecDeque::new();
    let first = |process, another, begin| {
        let (process, time) = saved.number(process, another, begin);
        end(process);
        time
    };
    for round in 0..count + 3 {
        while pool.len() < POOL {
            let begin = Instant::now();
            let mut one = saved.start();
            one.0.ready().unwrap();
            filling.push(begin.elapsed());
            pool.push_back(one);
        }
        let begin = Instant::now();
        let time = first(saved.start(), None, begin);
        let begin = Instant::now();
        let pool_time = first(pool.pop_front().unwrap(), None, begin);
        let begin = Instant::now();
        let handed_time = first(pool.pop_front().unwrap(), Some(other), begin);
        if round >= 3 {
            new.push(time);
            pooled.push(pool_time);
            handed.push(handed_time);
        }
    }
    print("new process, 128 MiB, 2 devices", &mut new);
    print("pooled process, 128 MiB, 2 devices", &mut pooled);
    print("  which gets another template", &mut handed);
    print("  making one for the pool", &mut filling);
}

/// What many at once cost, and whether the last are made as fast as the first.
pub fn alive(count: usize) {
    println!(
        "{count} clones at once in processes of their own; goal: the last made at 80 % of the rate of the first"
    );
    let saved = Saved::new();
    let available = || kib("/proc/meminfo", "MemAvailable:");
    let before = available();
    let mut clones = Vec::with_capacity(count);
    let mut first = None;
    while clones.len() < count {
        let more = RATE.min(count - clones.len());
        let mut making = Duration::ZERO;
        for _ in 0..more {
            let begin = Instant::now();
            let (process, time) = saved.number(saved.start(), None, begin);
            making += time;
            // One that stands still costs memory, not the time of the others.
            kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGSTOP).unwrap();
            clones.push(process);
        }
        let rate = more as f64 / making.as_secs_f64();
        let first = *first.get_or_insert(rate);
        if [more, count].contains(&clones.len()) {
            println!(
                "  {} alive: {} KiB each (MemAvailable); {rate:.0} made a second, {:.0} % of the first figure",
                clones.len(),
                before.saturating_sub(available()) / clones.len() as u64,
                100.0 * rate / first
            );
        }
    }
    clones.into_iter().for_each(end);
}

fn fork(parent: &Parent, ram: &mut Ram) -> (Snapshot, Duration) {
    let facts = || Some(GuestFacts::default());
    let config = parent.spec.config();
    let fork = parent.vm.fork((true, PATIENCE), config, facts, ram);
    let fork = fork.unwrap();
    (fork.snapshot, fork.pause)
}

/// How long a guest of 1 GiB, all of it written, stands still.
pub fn forks(count: usize) {
    const MIB: u64 = 1 << 20;
    println!("Forks of a guest that runs, all of it written; goal: 5000");
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (backing, origin) in [("memfd", Origin::Memfd), ("anonymous", Origin::Nothing)] {
        let (mut first, mut later, mut changed) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count.div_ceil(20) {
            let parent = parent(1024, backing, &dir.path().join("disk"));
            let fill = |from: u64, to: u64, with: u8| {
                for mib in from..to {
                    let piece = vec![with; MIB as usize];
                    parent
                        .vm
                        .memory()
                        .write_slice(&piece, GuestAddress(mib * MIB))
                        .unwrap();
                }
            };
            fill(64, 1024, 1);
            let mut ram = Ram {
                origin: origin.clone(),
                layers: Vec::new(),
            };
            first.push(fork(&parent, &mut ram).1);
            later.push(fork(&parent, &mut ram).1);
            fill(64, 64 + 51, 2);
            changed.push(fork(&parent, &mut ram).1);
        }
        print(&format!("fork, 1 GiB {backing}: pause"), &mut first);
        print("  again, nothing changed", &mut later);
        print("  again, 5 % changed", &mut changed);
    }
}
