//! Clones of one snapshot in this process, and clones in others (`clone_processes.rs`, `clone_peers.rs`):
//! `make bench`, or `cargo bench --bench clone`.
//!
//! The guest has a random number in its memory and nowhere else. A clone's time goes from before its
//! devices are opened to the first byte of that number on its serial port. CLONES is the number of
//! samples, ALIVE that of the clones that live at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../api/client.rs"]
mod client;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/machine.rs"]
mod machine;
#[path = "clone_peers.rs"]
mod peers;
#[path = "clone_processes.rs"]
mod processes;

use std::io::Write;
use std::time::Instant;

use bulle::bench::{Cloner, Guest, heading};
use bulle::vm::Vm;
use machine::Output;

/// The guest with the number.
struct Nonce {
    nonce: u64,
    output: Output,
    /// The one that goes back again and again, whose console was the first.
    looped: Option<Output>,
}

impl Guest for Nonce {
    fn console(&mut self) -> Box<dyn Write + Send> {
        self.output = Output::default();
        self.looped.get_or_insert_with(|| self.output.clone());
        Box::new(self.output.clone())
    }

    fn ask(&mut self, vm: &Vm) {
        machine::types(vm, b"n");
    }

    fn answer(&mut self, _: &Vm, _: Instant) -> Option<Instant> {
        let (bytes, first) = self.output.take(8);
        assert_eq!(bytes, self.nonce.to_be_bytes());
        Some(first)
    }

    fn dirty(&mut self, vm: &Vm) {
        self.output = self.looped.clone().unwrap();
        // 64 pages, and the number itself.
        machine::types(vm, b"dc");
        self.output.take(2);
    }
}

fn bench(mib: u64, devices: bool, count: usize, alive: usize) {
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
    let (vm, _, nonce) = machine::boot(&spec, machine::host(&spec));
    let snapshot = machine::save(&vm, &spec, dir.path(), "a");
    drop(vm);
    let mut guest = Nonce {
        nonce,
        output: Output::default(),
        looped: None,
    };
    let with = if devices { "2 devices" } else { "no device" };
    println!("{mib} MiB, {with}");
    let mut print = |line| println!("  {line}");
    let mut cloner = Cloner::new(snapshot).unwrap();
    cloner.times(&mut guest, count, &mut print).unwrap();
    // Before many are closed, which keeps the kernel busy for a while.
    if mib == 128 && devices {
        peers::print(&mut cloner, &mut guest, count);
    }
    let mut print = |line| println!("  {line}");
    cloner.cost(&mut guest, alive, &mut print).unwrap();
}

fn main() {
    let number = |name, default| {
        let value = std::env::var(name).ok();
        value.and_then(|n| n.parse().ok()).unwrap_or(default)
    };
    let (count, alive) = (number("CLONES", 200), number("ALIVE", 2000));
    println!("Clones in this process, from the request to the guest's number");
    println!("Goals: new 700 at p50; pooled 80 at p50, 200 at p99; reset with 64 pages 35");
    println!("  {}", heading(count));
    bench(128, true, count, alive);
    bench(128, false, count, 0);
    bench(64, true, count, 0);
    bench(8192, true, count, 0);
    processes::processes(count);
    processes::alive(alive);
    processes::forks(count);
}
