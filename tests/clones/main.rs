//! Clones of one snapshot in this process, on this machine's /dev/kvm.
//!
//! Not part of a plain `cargo test`, since it needs KVM: `cargo test --test clones`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod forks;
mod handover;
#[path = "../common/machine.rs"]
mod machine;
mod many;
mod processes;
mod resets;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use arch::state::ClockPolicy;
use bulle::config::Spec;
use bulle::snapshot::Snapshot;
use bulle::vm::{BuildError, Host, Shell, Vm};
use machine::Output;

/// Held by each test, since files and threads are the whole process's.
static ALONE: Mutex<()> = Mutex::new(());

struct Parent {
    spec: Spec,
    host: Host,
    snapshot: Snapshot,
    nonce: u64,
}

/// A guest that was saved below `dir`, with two devices.
fn parent(dir: &Path, sections: &str) -> Parent {
    let disk = dir.join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let devices = format!(
        r#","entropy":{{}},"drives":[{{"drive_id":"d","path_on_host":{disk:?},"is_read_only":true}}]}}"#
    );
    let sections = sections.strip_suffix('}').unwrap().to_owned() + &devices;
    let spec = machine::config(&common::payload("nonce"), &sections);
    let spec = spec.validate().unwrap();
    let host = machine::host(&spec);
    let (vm, _, nonce) = machine::boot(&spec, host.clone());
    let snapshot = machine::save(&vm, &spec, dir, "parent");
    Parent {
        spec,
        host,
        snapshot,
        nonce,
    }
}

impl Parent {
    fn adopt(&self, shell: Shell) -> (Vm, Output) {
        let output = Output::default();
        let wiring = machine::wiring(&self.spec, &output);
        let vm = shell.adopt(&self.snapshot, ClockPolicy::Frozen, wiring);
        (vm.unwrap(), output)
    }

    /// Has a clone that is not started say its number.
    #[track_caller]
    fn proves(&self, vm: &Vm, output: &Output) {
        machine::types(vm, b"n");
        vm.start();
        assert_eq!(output.take(8).0, self.nonce.to_be_bytes());
    }
}

/// Machine configurations whose interrupt controllers and transports differ.
const MACHINES: [&str; 2] = [
    r#""vcpu_count":1,"mem_size_mib":64"#,
    r#""vcpu_count":2,"mem_size_mib":64,"irqchip":"kernel","virtio_transport":"pci""#,
];

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn clones_share_no_memory_that_they_write() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let parent = parent(dir.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    let shells: Vec<_> = (0..4)
        .map(|_| Shell::new(parent.host.clone(), &parent.snapshot).unwrap())
        .collect();
    let clones: Vec<_> = shells
        .into_iter()
        .map(|shell| parent.adopt(shell))
        .collect();
    for (vm, output) in &clones {
        parent.proves(vm, output);
        // Before the next looks at its own.
        machine::types(vm, b"d");
        assert_eq!(output.take(1).0, b".");
    }
    // The files are as they were, for all that their pages were written to.
    parent.snapshot.verify().unwrap();
    let ids: std::collections::BTreeSet<_> = clones
        .iter()
        .map(|(vm, _)| arch::vmgenid::read(vm.memory()).unwrap())
        .collect();
    assert_eq!(
        ids.len(),
        clones.len(),
        "each has a generation id of its own"
    );
}

#[test]
fn a_shell_takes_a_snapshot_of_its_shape_only() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let small = parent(dir.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    let other = tempfile::tempdir().unwrap();
    let large = parent(other.path(), r#"{"machine-config":{"mem_size_mib":96}}"#);
    let again = tempfile::tempdir().unwrap();
    let same = parent(again.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    let shell = |parent: &Parent| Shell::new(parent.host.clone(), &parent.snapshot).unwrap();
    let wiring = machine::wiring(&small.spec, &Output::default());
    let refused = shell(&large).adopt(&small.snapshot, ClockPolicy::Frozen, wiring);
    let error = refused.err().unwrap();
    assert!(matches!(error, BuildError::Shape(_)), "{error}");
    assert!(error.to_string().contains("64 MiB of memory"), "{error}");
    // Of the same shape it takes any.
    let (vm, output) = same.adopt(shell(&small));
    same.proves(&vm, &output);
}

#[test]
fn the_bench_command_measures_each_way() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let _parent = parent(dir.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    for name in ["state", "memory"] {
        let from = dir.path().join(format!("parent.{name}"));
        std::fs::rename(from, dir.path().join(name)).unwrap();
    }
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_bulle"))
        .args(["bench", "clone", "--count", "5", "--alive", "3"])
        .arg(dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<_> = text.lines().map(str::trim_start).collect();
    for way in [
        "new ",
        "pooled ",
        "reset in place  ",
        "making one ",
        "closing ",
        "3 alive: ",
    ] {
        let line = lines.iter().find(|line| line.starts_with(way));
        let figures = line.map(|line| line.split_whitespace().filter(|w| w.parse::<f64>().is_ok()));
        assert!(figures.is_some_and(|f| f.count() > 0), "{way}: {text}");
    }
}
