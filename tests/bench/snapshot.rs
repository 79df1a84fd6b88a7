//! Snapshots of a guest with 1 GiB, of which 5 % changed: how long it stands still, and how soon its memory
//! is there again. `make bench`, or `cargo bench --bench snapshot`; SNAPSHOTS is the number of samples.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/machine.rs"]
mod machine;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use arch::state::ClockPolicy;
use bulle::config::Spec;
use bulle::snapshot::background::Background;
use bulle::snapshot::ram::Origin;
use bulle::snapshot::working_set::WorkingSet;
use bulle::snapshot::{self, Files, GuestFacts, Request, Snapshot};
use bulle::vm::{Host, Vm};
use machine::Output;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1024;
const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// Every twentieth page, beyond what the guest itself uses.
fn pages() -> impl Iterator<Item = GuestAddress> {
    (16 << 20..MIB << 20)
        .step_by(20 * PAGE as usize)
        .map(GuestAddress)
}

fn line(what: &str, samples: &mut [Duration], goal: &str) {
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() * percent).div_ceil(100).max(1) - 1];
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let [fastest, middle, slow] = [samples[0], at(50), at(99)].map(millis);
    println!("{what:<52}{fastest:>9.2}{middle:>9.2}{slow:>9.2}   {goal}");
}

/// A machine that was loaded, and what its changes build on.
struct Loaded {
    vm: Vm,
    snapshot: Snapshot,
    origin: Origin,
}

impl Loaded {
    fn new(spec: &Spec, host: &Host, snapshot: Snapshot) -> Self {
        let wiring = machine::wiring(spec, &Output::default());
        let vm = Vm::restore(host.clone(), &snapshot, ClockPolicy::Frozen, wiring);
        let (vm, origin) = vm.unwrap();
        Self {
            vm,
            snapshot,
            origin,
        }
    }

    /// How long the guest stands still for a snapshot of what changed.
    fn pause(&self, dir: &Path, background: bool) -> Duration {
        let (state, memory) = (dir.join("b.state"), dir.join("b.memory"));
        let files = Files::new((&state, &memory)).unwrap();
        self.vm.start();
        std::thread::sleep(Duration::from_millis(5));
        let begin = Instant::now();
        self.vm.pause(PATIENCE).unwrap();
        let request = Request {
            state_path: &state,
            memory_path: &memory,
            config: &self.snapshot.config,
            machine: &self.vm.save().unwrap(),
            guest: &GuestFacts::default(),
            memory: self.vm.memory(),
            origin: &self.origin,
            base: self.snapshot.as_base().unwrap(),
            plugged: &[],
            watch: None,
        };
        let writing = match background {
            true => Some(Background::begin(files, &request).unwrap()),
            false => {
                snapshot::create(&request).unwrap();
                None
            }
        };
        self.vm.start();
        let pause = begin.elapsed();
        // Spinning, it would slow down what is written.
        self.vm.pause(PATIENCE).unwrap();
        if let Some(mut writing) = writing {
            while writing.ended().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        pause
    }
}

/// Has the host forget what it read of `file`.
fn forget(file: &Path) {
    let file = File::open(file).unwrap();
    file.sync_all().unwrap();
    // SAFETY: gives advice about a file that is open.
    let result = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(result, 0);
}

/// How long it takes to touch all that changed, in no order, after a load from a cold disk.
fn touch(spec: &Spec, host: &Host, snapshot: Snapshot, set: Option<&WorkingSet>) -> Duration {
    let Loaded { vm, snapshot, .. } = {
        forget(&snapshot.layers[0].image.path);
        Loaded::new(spec, host, snapshot)
    };
    let begin = Instant::now();
    let prefetch = set.map(|set| set.clone().prefetch(vm.memory().clone()).unwrap());
    let all: Vec<_> = pages().collect();
    let mut sum = 0;
    for index in 0..all.len() {
        // A step that meets every page once.
        let page = all[index * 7919 % all.len()];
        sum += vm.memory().read_obj::<u64>(page).unwrap();
    }
    let time = begin.elapsed();
    assert!(sum > 0);
    drop((prefetch, snapshot));
    time
}

/// Prints how long a machine stands still, alone in this process, and says what was touched. `all`: the
/// guest read all of its memory.
fn pauses(loaded: &Loaded, dir: &Path, samples: usize, all: bool) -> WorkingSet {
    write(&loaded.vm);
    let memory = loaded.vm.memory();
    let set = WorkingSet::of(memory).unwrap();
    if all {
        let every = (0..MIB << 20).step_by(PAGE as usize).map(GuestAddress);
        every.for_each(|page| drop(memory.read_obj::<u8>(page)));
    }
    let what = if all {
        ", guest read all its memory"
    } else {
        ""
    };
    let mut pauses: [Vec<Duration>; 2] = Default::default();
    for _ in 0..samples {
        // In turns, so that a noisy machine is noisy for both.
        pauses[0].push(loaded.pause(dir, true));
        pauses[1].push(loaded.pause(dir, false));
    }
    line(
        &format!("pause, background{what}"),
        &mut pauses[0],
        "goal 5",
    );
    line(
        &format!("pause, written meanwhile{what}"),
        &mut pauses[1],
        "goal 50",
    );
    set
}

fn write(vm: &Vm) {
    pages().for_each(|page| vm.memory().write_obj(page.0, page).unwrap());
}

fn main() {
    let samples = std::env::var("SNAPSHOTS").ok();
    let samples: usize = samples.and_then(|n| n.parse().ok()).unwrap_or(100);
    let sections = format!(r#"{{"machine-config":{{"vcpu_count":1,"mem_size_mib":{MIB}}}}}"#);
    let spec = machine::config(&common::payload("nonce"), &sections);
    let spec = spec.validate().unwrap();
    let host = machine::host(&spec);
    let (vm, _, _) = machine::boot(&spec, host.clone());
    write(&vm);
    // What a disk takes to sync would be all that is seen of pauses; a cold load needs one.
    let shared = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let (shared, disk) = (shared.unwrap(), tempfile::tempdir().unwrap());
    for dir in [&shared, &disk] {
        drop(machine::save(&vm, &spec, dir.path(), "a"));
    }
    drop(vm);
    let open = |dir: &TempDir| {
        let [state, memory] = ["a.state", "a.memory"].map(|name| dir.path().join(name));
        Snapshot::open(&state, &memory).unwrap()
    };
    println!(
        "Snapshots of a guest with {MIB} MiB, {} MiB of them changed; ms, {samples} samples",
        pages().count() >> 8
    );
    println!("{:<52}{:>9}{:>9}{:>9}", "", "fastest", "p50", "p99");
    let [set, _] = [false, true].map(|all| {
        let loaded = Loaded::new(&spec, &host, open(&shared));
        pauses(&loaded, shared.path(), samples, all)
    });
    let mut times: [Vec<Duration>; 2] = Default::default();
    for _ in 0..samples.div_ceil(10) {
        times[0].push(touch(&spec, &host, open(&disk), None));
        times[1].push(touch(&spec, &host, open(&disk), Some(&set)));
    }
    line("all touched after a cold load", &mut times[0], "");
    line("the same with a recorded working set", &mut times[1], "");
}
