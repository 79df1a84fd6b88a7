//! vCPUs are told to run, to stand still and to end by several threads at once, and templates are let go of
//! while clones are made of them, in orders that proptest chooses.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use arch::state::ClockPolicy;
use bulle::snapshot::Template;
use bulle::vm::reset::Origin;
use bulle::vm::{Shell, Vm};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::machine::{self, Output};
use super::{Parent, alone, entries, parent};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Step {
    /// So often, which one time would do.
    Run(u8),
    /// Asked for so often before any answer is waited for.
    Pause(u8),
    /// Pauses by two threads, while a third one has it run.
    Race,
    Save,
    Reset,
    /// Microseconds.
    Wait(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..4_u8).prop_map(Step::Run),
        (1..4_u8).prop_map(Step::Pause),
        Just(Step::Race),
        Just(Step::Save),
        Just(Step::Reset),
        (0..500_u16).prop_map(Step::Wait),
    ]
}

/// All requests first, then all answers.
fn pause(vm: &Vm, times: u8) {
    let vcpus = vm.vcpus().iter();
    let asked: Vec<_> = vcpus
        .flat_map(|vcpu| (0..times).map(|_| vcpu.request_pause()))
        .collect();
    let deadline = Instant::now() + PATIENCE;
    assert!(asked.into_iter().all(|pausing| pausing.wait(deadline)));
}

fn take(vm: &Vm, origin: &Origin, step: Step) {
    match step {
        Step::Run(times) => (0..times).for_each(|_| vm.start()),
        Step::Pause(times) => pause(vm, times),
        Step::Race => std::thread::scope(|scope| {
            scope.spawn(|| pause(vm, 1));
            scope.spawn(|| pause(vm, 2));
            vm.start();
        }),
        Step::Save => {
            pause(vm, 1);
            vm.save().unwrap();
        }
        Step::Reset => {
            vm.reset(origin, ClockPolicy::Frozen, PATIENCE).unwrap();
        }
        Step::Wait(us) => std::thread::sleep(Duration::from_micros(us.into())),
    }
}

/// Whatever was before: it stands still when that is answered, and goes on from there.
fn is_whole(parent: &Parent, vm: &Vm, output: &Output) {
    pause(vm, 1);
    machine::types(vm, b"n");
    std::thread::sleep(Duration::from_millis(2));
    assert!(output.is_empty(), "a vCPU that stands still");
    vm.start();
    assert_eq!(output.take(8).0, parent.nonce.to_be_bytes());
}

#[test]
fn vcpus_stand_still_and_go_on_in_any_order_of_requests() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let sections = r#"{"machine-config":{"vcpu_count":2,"mem_size_mib":64}}"#;
    let parent = parent(dir.path(), sections);
    let origin = Origin::new(&parent.snapshot).unwrap();
    let config = Config {
        failure_persistence: None,
        ..Config::with_cases(24)
    };
    let steps = prop::collection::vec(step(), 1..12);
    let run = TestRunner::new(config).run(&steps, |steps| {
        let shell = Shell::new(parent.host.clone(), &parent.snapshot).unwrap();
        let (vm, output) = parent.adopt(shell);
        steps.iter().for_each(|step| take(&vm, &origin, *step));
        is_whole(&parent, &vm, &output);
        // It also ends amid anything.
        if let Some(last) = steps.last() {
            take(&vm, &origin, *last);
        }
        let begin = Instant::now();
        drop(vm);
        prop_assert!(begin.elapsed() < Duration::from_secs(5));
        Ok(())
    });
    run.unwrap();
}

/// Open descriptors of the files of the parent's memory.
fn open_memory(path: &Path) -> usize {
    let files = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let targets = files.filter_map(|file| fs::read_link(file.path()).ok());
    targets.filter(|target| target == path).count()
}

#[test]
fn a_template_lasts_as_long_as_any_clone_is_being_made_of_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut parent = parent(dir.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    let memory = dir.path().join("parent.memory");
    let state = dir.path().join("parent.state");
    let reopen = || bulle::snapshot::Snapshot::open(&state, &memory).unwrap();
    let template = Template::new(std::mem::replace(&mut parent.snapshot, reopen())).unwrap();
    // What is asked once is asked now.
    drop(parent.adopt(Shell::new(parent.host.clone(), &parent.snapshot).unwrap()));
    let (files, open) = (entries("/proc/self/fd"), open_memory(&memory));
    let config = Config {
        failure_persistence: None,
        ..Config::with_cases(12)
    };
    let delays = prop::collection::vec((0..2000_u64, 0..2000_u64, any::<bool>()), 2..6);
    let run = TestRunner::new(config).run(&delays, |delays| {
        let template = template.clone();
        std::thread::scope(|scope| {
            for (before, after, early) in delays {
                let (template, parent) = (template.clone(), &parent);
                scope.spawn(move || {
                    let wait = |us| std::thread::sleep(Duration::from_micros(us));
                    wait(before);
                    let output = Output::default();
                    let shell = Shell::new(parent.host.clone(), &template).unwrap();
                    let wiring = machine::wiring(&parent.spec, &output);
                    let vm = shell.adopt(&template, ClockPolicy::Frozen, wiring).unwrap();
                    if early {
                        drop(template);
                    }
                    wait(after);
                    parent.proves(&vm, &output);
                });
            }
            // Gone before most of them have begun.
            drop(template);
        });
        Ok(())
    });
    run.unwrap();
    assert_eq!(open_memory(&memory), open);
    let begin = Instant::now();
    while entries("/proc/self/fd") != files {
        assert!(begin.elapsed() < PATIENCE, "a descriptor is left");
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(template);
    assert_eq!(open_memory(&memory), open - 1, "the last one closes it");
}
