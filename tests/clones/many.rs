//! Ten thousand clones of every way in one process, which is as it was afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use arch::state::ClockPolicy;
use bulle::sandbox::reaper::Reaper;
use bulle::vm::reset::Origin;
use bulle::vm::{Shell, Vm};

use super::machine::{self, Output};
use super::{MACHINES, Parent, alone, entries, parent};

const PATIENCE: Duration = Duration::from_secs(60);
/// Clones, of all machines together.
const ALL: usize = 10_000;
/// Of each round: new ones, those of shells that waited, and such that went back in place.
const ROUND: [usize; 3] = [1, 2, 97];

/// Open files, threads and mappings of this process, and KiB of memory of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    files: usize,
    threads: usize,
    mappings: usize,
    kib: usize,
}

impl Held {
    fn now() -> Self {
        let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let line = rollup.lines().find(|l| l.starts_with("Anonymous:"));
        let kib = line.and_then(|l| l.split_whitespace().nth(1)).unwrap();
        Self {
            files: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            mappings: fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .count(),
            kib: kib.parse().unwrap(),
        }
    }

    /// Not more than before: memory and mappings may be cached by the allocator.
    fn is_within(&self, before: &Self) -> bool {
        self.files <= before.files
            && self.threads <= before.threads
            && self.mappings <= before.mappings + 16
            && self.kib <= before.kib + 4096
    }
}

fn one_round(parent: &Parent, (looped, output): &(Vm, Output), origin: &Origin, reaper: &Reaper) {
    let [new, pooled, resets] = ROUND;
    for _ in 0..new {
        let output = Output::default();
        let wiring = machine::wiring(&parent.spec, &output);
        let (host, policy) = (parent.host.clone(), ClockPolicy::Frozen);
        let (vm, _) = Vm::restore(host, &parent.snapshot, policy, wiring).unwrap();
        parent.proves(&vm, &output);
        reaper.reap(vm);
    }
    let shells: Vec<_> = (0..pooled)
        .map(|_| Shell::new(parent.host.clone(), &parent.snapshot).unwrap())
        .collect();
    for shell in shells {
        let (vm, output) = parent.adopt(shell);
        parent.proves(&vm, &output);
        reaper.reap(vm);
    }
    let mut ids = BTreeSet::new();
    for _ in 0..resets {
        looped.reset(origin, ClockPolicy::Frozen, PATIENCE).unwrap();
        ids.insert(arch::vmgenid::read(looped.memory()).unwrap());
        parent.proves(looped, output);
    }
    assert_eq!(ids.len(), resets, "each has a generation id of its own");
}

#[test]
fn ten_thousand_clones_leave_nothing() {
    let _alone = alone();
    let rounds = ALL / ROUND.iter().sum::<usize>() / MACHINES.len();
    for machine in MACHINES {
        let dir = tempfile::tempdir().unwrap();
        let sections = format!(r#"{{"machine-config":{{{machine}}}}}"#);
        let parent = parent(dir.path(), &sections);
        let origin = Origin::new(&parent.snapshot).unwrap();
        let looped = parent.adopt(Shell::new(parent.host.clone(), &parent.snapshot).unwrap());
        let mut before = None;
        for round in 0..rounds {
            let reaper = Reaper::new().unwrap();
            one_round(&parent, &looped, &origin, &reaper);
            // Waits until all are closed.
            drop(reaper);
            if round == 4 {
                before = Some(Held::now());
            }
        }
        let before = before.unwrap();
        // A thread that was joined may be listed a moment longer.
        let begin = Instant::now();
        while !Held::now().is_within(&before) {
            let late = begin.elapsed() > PATIENCE;
            assert!(!late, "{machine}: {before:?}, now {:?}", Held::now());
        }
    }
}
