//! Clones of one snapshot in this process: `make bench`, or `cargo bench --bench clone`.
//!
//! The guest has a random number in its memory and nowhere else. A clone's time goes from before its
//! devices are opened to the first byte of that number on its serial port. CLONES is the number of samples.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/machine.rs"]
mod machine;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use arch::state::ClockPolicy;
use bulle::config::Spec;
use bulle::snapshot::Snapshot;
use bulle::vm::{Host, Shell, Vm};
use machine::Output;

/// Shells that wait at any time.
const POOL: usize = 8;

/// One way to a clone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A new virtual machine.
    New,
    /// One that waits.
    Pooled,
}

struct Bench {
    spec: Spec,
    host: Host,
    snapshot: Snapshot,
    nonce: u64,
    pool: VecDeque<Shell>,
    filling: Vec<Duration>,
    reaping: Vec<Duration>,
}

impl Bench {
    fn fill(&mut self) {
        while self.pool.len() < POOL {
            let begin = Instant::now();
            let shell = Shell::new(self.host.clone(), &self.snapshot).unwrap();
            self.filling.push(begin.elapsed());
            self.pool.push_back(shell);
        }
    }

    /// Makes a clone and has it prove that it is one.
    fn clone(&mut self, way: Way) -> (Vm, Duration) {
        let shell = match way {
            Way::New => None,
            Way::Pooled => self.pool.pop_front(),
        };
        let output = Output::default();
        let begin = Instant::now();
        let wiring = machine::wiring(&self.spec, &output);
        let vm = match shell {
            None => {
                let host = self.host.clone();
                Vm::restore(host, &self.snapshot, ClockPolicy::Advance, wiring)
                    .unwrap()
                    .0
            }
            Some(shell) => shell
                .adopt(&self.snapshot, ClockPolicy::Advance, wiring)
                .unwrap(),
        };
        machine::types(&vm, b"n");
        vm.start();
        let (bytes, first) = output.take(8);
        assert_eq!(bytes, self.nonce.to_be_bytes());
        (vm, first - begin)
    }

    fn sample(&mut self, way: Way) -> Duration {
        let (vm, time) = self.clone(way);
        let begin = Instant::now();
        drop(vm);
        self.reaping.push(begin.elapsed());
        time
    }
}

fn line(what: &str, samples: &mut [Duration], goal: &str) {
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() * percent).div_ceil(100).max(1) - 1];
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{what:<44}{:>9.1}{:>9.1}{:>9.1}   {goal}",
        micros(samples[0]),
        micros(at(50)),
        micros(at(99))
    );
}

fn bench(mib: u64, devices: bool, count: usize) {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let virtio = match devices {
        true => format!(
            r#","entropy":{{}},"drives":[{{"drive_id":"d","path_on_host":{disk:?},"is_read_only":true}}]"#
        ),
        false => String::new(),
    };
    let sections =
        format!(r#"{{"machine-config":{{"vcpu_count":1,"mem_size_mib":{mib}}}{virtio}}}"#);
    let spec = machine::config(&common::payload("nonce"), &sections)
        .validate()
        .unwrap();
    let host = machine::host(&spec);
    let (vm, _, nonce) = machine::boot(&spec, host.clone());
    let snapshot = machine::save(&vm, &spec, dir.path(), "a");
    drop(vm);
    let mut bench = Bench {
        spec,
        host,
        snapshot,
        nonce,
        pool: VecDeque::new(),
        filling: Vec::new(),
        reaping: Vec::new(),
    };
    let (mut new, mut pooled) = (Vec::new(), Vec::new());
    for round in 0..count + 3 {
        bench.fill();
        // In turns, so that a noisy machine is noisy for both.
        let times = [bench.sample(Way::New), bench.sample(Way::Pooled)];
        if round >= 3 {
            new.push(times[0]);
            pooled.push(times[1]);
        }
    }
    let with = if devices { "2 devices" } else { "no device" };
    line(
        &format!("new machine, {mib} MiB, {with}"),
        &mut new,
        "goal 700 at p50",
    );
    line(
        &format!("pooled, {mib} MiB, {with}"),
        &mut pooled,
        "goal 80 at p50, 200 at p99",
    );
    line("  making one for the pool", &mut bench.filling, "");
    line("  closing a clone", &mut bench.reaping, "");
}

fn main() {
    let count = std::env::var("CLONES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(200);
    println!("Clones in this process, from the request to the guest's number; µs, {count} samples");
    println!("{:<44}{:>9}{:>9}{:>9}", "", "fastest", "p50", "p99");
    bench(128, true, count);
    bench(128, false, count);
    bench(64, true, count);
    bench(8192, true, count);
}
