//! Forks of guests that run. A word in guest memory that only the host writes shows which time a
//! machine's memory is of; the guest's nonce shows that it lives.

use std::time::Duration;

use arch::state::ClockPolicy;
use bulle::config::Spec;
use bulle::snapshot::fork::Ram;
use bulle::snapshot::ram::Origin;
use bulle::snapshot::{GuestFacts, Snapshot};
use bulle::vm::{Fork, Host, Shell, Vm};
use vm_memory::{Bytes, GuestAddress};

use super::machine::{self, Output};
use super::{alone, common};

const PATIENCE: Duration = Duration::from_secs(60);
/// Where neither payload nor its tables are.
const WORDS: u64 = 48 << 20;
const PAGE: u64 = 4096;

struct Parent {
    spec: Spec,
    host: Host,
    vm: Vm,
    output: Output,
    nonce: u64,
    ram: Ram,
}

impl Parent {
    fn new(backing: &str) -> Self {
        let spec = machine::config(
            &common::payload("nonce"),
            &format!(
                r#"{{"machine-config":{{"mem_size_mib":64,"memory_backing":"{backing}"}},"entropy":{{}}}}"#
            ),
        );
        let spec = spec.validate().unwrap();
        let host = machine::host(&spec);
        let (vm, output, nonce) = machine::boot(&spec, host.clone());
        let origin = match backing {
            "memfd" => Origin::Memfd,
            _ => Origin::Nothing,
        };
        Self {
            spec,
            host,
            vm,
            output,
            nonce,
            ram: Ram {
                origin,
                layers: Vec::new(),
            },
        }
    }

    fn fork(&mut self) -> Fork {
        let (config, facts) = (self.spec.config(), || Some(GuestFacts::default()));
        let fork = self.vm.fork((true, PATIENCE), config, facts, &mut self.ram);
        fork.unwrap()
    }

    fn child(&self, snapshot: &Snapshot) -> (Vm, Output) {
        let output = Output::default();
        let shell = Shell::new(self.host.clone(), snapshot).unwrap();
        let wiring = machine::wiring(&self.spec, &output);
        let vm = shell.adopt(snapshot, ClockPolicy::Advance, wiring);
        (vm.unwrap(), output)
    }

    /// Has a machine that runs say its number.
    #[track_caller]
    fn proves(&self, vm: &Vm, output: &Output) {
        machine::types(vm, b"n");
        assert_eq!(output.take(8).0, self.nonce.to_be_bytes());
    }

    #[track_caller]
    fn lives(&self) {
        self.proves(&self.vm, &self.output);
    }
}

/// Writes `value` to `pages` pages from the given one on.
fn write(vm: &Vm, first: u64, pages: u64, value: u64) {
    for page in first..first + pages {
        let at = GuestAddress(WORDS + page * PAGE);
        vm.memory().write_obj(value, at).unwrap();
    }
}

fn read(vm: &Vm, page: u64) -> u64 {
    let at = GuestAddress(WORDS + page * PAGE);
    vm.memory().read_obj(at).unwrap()
}

#[test]
fn a_child_has_its_parent_s_memory_and_neither_sees_the_other_s_writes() {
    let _alone = alone();
    for backing in ["memfd", "anonymous"] {
        let mut parent = Parent::new(backing);
        write(&parent.vm, 0, 2, 1);
        let first = parent.fork().snapshot;
        parent.lives();
        write(&parent.vm, 0, 1, 2);
        let second = parent.fork().snapshot;
        parent.lives();
        write(&parent.vm, 0, 1, 3);
        let children = [&first, &second].map(|snapshot| parent.child(snapshot));
        for ((vm, output), word) in children.iter().zip([1, 2]) {
            vm.start();
            parent.proves(vm, output);
            assert_eq!((read(vm, 0), read(vm, 1)), (word, 1), "{backing}");
            write(vm, 0, 2, 100 + word);
        }
        assert_eq!((read(&parent.vm, 0), read(&parent.vm, 1)), (3, 1));
        assert_eq!(read(&children[1].0, 0), 102);
        let third = parent.fork().snapshot;
        let (vm, _) = parent.child(&third);
        assert_eq!((read(&vm, 0), read(&vm, 1)), (3, 1), "{backing}");
        let ids = [&parent.vm, &children[0].0, &children[1].0, &vm];
        let ids = ids.map(|vm| arch::vmgenid::read(vm.memory()).unwrap());
        let different: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(different.len(), 4, "each has a generation id of its own");
    }
}

#[test]
fn forks_of_a_parent_that_goes_on_have_what_it_had_each_time() {
    let _alone = alone();
    let mut parent = Parent::new("memfd");
    let mut all = Vec::new();
    // More than a chain is long, of changes that are mapped and of such that are copied.
    for round in 1..40 {
        write(&parent.vm, 0, 1, round);
        write(&parent.vm, 32 * (round % 4) + 1, 30, round);
        all.push((round, parent.fork().snapshot));
    }
    parent.lives();
    for (round, snapshot) in &all {
        assert!(snapshot.layers.len() <= 34, "{}", snapshot.layers.len());
        let (vm, output) = parent.child(snapshot);
        vm.start();
        parent.proves(&vm, &output);
        assert_eq!(read(&vm, 0), *round);
        for before in round.saturating_sub(3).max(1)..=*round {
            let page = 32 * (before % 4) + 1;
            assert_eq!((read(&vm, page), read(&vm, page + 29)), (before, before));
        }
    }
}

#[test]
fn many_children_of_a_running_parent_live_at_once() {
    let _alone = alone();
    let mut parent = Parent::new("memfd");
    let snapshot = parent.fork().snapshot;
    let children: Vec<_> = (0..32).map(|_| parent.child(&snapshot)).collect();
    for (number, (vm, output)) in (0..).zip(&children) {
        vm.start();
        parent.proves(vm, output);
        write(vm, 0, 1, number);
    }
    for (number, (vm, output)) in (0..).zip(&children) {
        parent.proves(vm, output);
        assert_eq!(read(vm, 0), number);
    }
    parent.lives();
    assert_eq!(read(&parent.vm, 0), 0);
}

#[test]
fn a_child_is_forked_as_its_parent_is() {
    let _alone = alone();
    let mut parent = Parent::new("memfd");
    write(&parent.vm, 0, 40, 1);
    let snapshot = parent.fork().snapshot;
    let (vm, output) = parent.child(&snapshot);
    vm.start();
    parent.proves(&vm, &output);
    write(&vm, 1, 1, 2);
    let mut child = Parent {
        ram: Ram {
            origin: bulle::snapshot::ram::origin(&snapshot.layers),
            layers: snapshot.layers.clone(),
        },
        spec: parent.spec.clone(),
        host: parent.host.clone(),
        vm,
        output,
        nonce: parent.nonce,
    };
    let snapshot = child.fork().snapshot;
    drop(parent);
    let (vm, output) = child.child(&snapshot);
    vm.start();
    child.proves(&vm, &output);
    assert_eq!([0, 1, 2].map(|page| read(&vm, page)), [1, 2, 1]);
}
