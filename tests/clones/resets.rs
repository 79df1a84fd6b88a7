//! Machines that go back in place to the snapshot that they were made of.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use arch::layout;
use arch::state::{ClockPolicy, VcpuState};
use bulle::board::BoardState;
use bulle::config::Spec;
use bulle::snapshot::{MachineState, Snapshot};
use bulle::vm::build::Initrd;
use bulle::vm::reset::{Origin, ResetError};
use bulle::vm::{Shell, Vm};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::machine::{self, Output};
use super::{MACHINES, alone, common, entries, parent};

const PATIENCE: Duration = Duration::from_secs(60);

fn reset(vm: &Vm, origin: &Origin) -> u64 {
    vm.reset(origin, ClockPolicy::Frozen, PATIENCE).unwrap()
}

#[test]
fn hundreds_of_resets_leave_nothing() {
    let _alone = alone();
    for machine in MACHINES {
        let dir = tempfile::tempdir().unwrap();
        let sections = format!(r#"{{"machine-config":{{{machine}}}}}"#);
        let parent = parent(dir.path(), &sections);
        let origin = Origin::new(&parent.snapshot).unwrap();
        let (vm, output) = parent.adopt(Shell::new(parent.host.clone(), &parent.snapshot).unwrap());
        let own = || {
            let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
            let line = rollup.lines().find(|l| l.starts_with("Anonymous:"));
            let kib = line.and_then(|l| l.split_whitespace().nth(1)).unwrap();
            kib.parse::<u64>().unwrap()
        };
        let mut before = None;
        let mut last = arch::vmgenid::read(vm.memory()).unwrap();
        for round in 0..200 {
            parent.proves(&vm, &output);
            // Changes 64 pages, a register of a device, and its own number.
            machine::types(&vm, b"dc");
            assert_eq!(output.take(2).0, b"..");
            machine::types(&vm, b"n");
            assert_ne!(output.take(8).0, parent.nonce.to_be_bytes());
            let written = reset(&vm, &origin);
            assert!((64 << 12..4 << 20).contains(&written), "{written}");
            let id = arch::vmgenid::read(vm.memory()).unwrap();
            assert_ne!(std::mem::replace(&mut last, id), id, "a new generation");
            let counts = || ["fd", "task"].map(|what| entries(&format!("/proc/self/{what}")));
            match round {
                10 => before = Some((counts(), own())),
                _ => {
                    if let Some((first, kib)) = before {
                        // A thread is listed for a while after its end.
                        let begin = Instant::now();
                        while counts().iter().zip(first).any(|(now, first)| *now > first) {
                            assert!(begin.elapsed() < PATIENCE, "round {round}, {machine}");
                        }
                        assert!(own() < kib + 4096, "round {round}: {kib} KiB, {}", own());
                    }
                }
            }
        }
        parent.proves(&vm, &output);
    }
}

/// A guest with a disk whose requests wait for their tokens most of the time, so that one is under way
/// whenever it is stopped.
fn busy(dir: &Path, sections: &str) -> Spec {
    let disk = dir.join("disk");
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let limit = r#""rate_limiter":{"ops":{"size":1,"refill_time":5}}"#;
    let drive = format!(r#"{{"drive_id":"d","path_on_host":{disk:?},{limit}}}"#);
    let sections =
        format!(r#"{{"machine-config":{{{sections}}},"drives":[{drive}],"entropy":{{}}}}"#);
    let mut config = machine::config(&common::payload("carry_on"), &sections);
    config.boot_source.boot_args = Some("disk=1 slices=2".to_owned());
    config.validate().unwrap()
}

/// What of a state goes back: without the clocks, which go on, and the interrupt that tells of a new
/// generation.
fn still(machine: &MachineState) -> (Vec<VcpuState>, BoardState) {
    let MachineState {
        mut vcpus,
        mut board,
        ..
    } = machine.clone();
    for vcpu in &mut vcpus {
        (vcpu.tsc.value, vcpu.tsc.offset) = (0, None);
    }
    board.power.events = 0;
    let ioapic = board.parts.as_mut().and_then(|parts| parts.ioapic.as_mut());
    if let Some(ioapic) = ioapic {
        ioapic.pending |= 1 << layout::GED_IRQ;
    }
    (vcpus, board)
}

/// Where in RAM the machine is not as the snapshot is, in pages.
fn differences(vm: &Vm, snapshot: &Snapshot) -> Vec<u64> {
    let config = &snapshot.config.machine_config;
    let (saved, _) = bulle::snapshot::ram::map(snapshot, config).unwrap();
    let mut pages = Vec::new();
    for (a, b) in vm.memory().iter().zip(saved.iter()) {
        // SAFETY: both mappings, of which nothing writes now.
        let bytes = |r: &vm_memory::GuestRegionMmap| unsafe {
            std::slice::from_raw_parts(r.as_ptr(), r.len() as usize).to_vec()
        };
        let (a_bytes, b_bytes) = (bytes(a), bytes(b));
        let pairs = a_bytes.chunks(4096).zip(b_bytes.chunks(4096)).enumerate();
        let differ = pairs.filter(|(_, (a, b))| a != b);
        pages.extend(differ.map(|(page, _)| a.start_addr().0 + page as u64 * 4096));
    }
    pages
}

#[test]
fn a_machine_in_the_middle_of_work_goes_back_whole() {
    let _alone = alone();
    for sections in MACHINES {
        let dir = tempfile::tempdir().unwrap();
        let spec = busy(dir.path(), sections);
        let kernel =
            arch::kernel::KernelImage::open(&spec.config().boot_source.kernel_image_path).unwrap();
        let output = Output::default();
        let host = machine::host(&spec);
        let wiring = machine::wiring(&spec, &output);
        let vm = Vm::build(&spec, host.clone(), &kernel, Initrd::default(), wiring).unwrap();
        vm.start();
        while !output.line().starts_with("tick 3 ") {}
        let snapshot = machine::save(&vm, &spec, dir.path(), "busy");
        drop(vm);

        let origin = Origin::new(&snapshot).unwrap();
        let output = Output::default();
        let wiring = machine::wiring(&spec, &output);
        let (vm, _) = Vm::restore(host, &snapshot, ClockPolicy::Frozen, wiring).unwrap();
        let mut stories = Vec::new();
        for round in 0..6_usize {
            vm.start();
            // What of a line came before the snapshot is not told again.
            let mut story = vec![output.line()];
            while story.len() < 3 + round {
                story.push(output.line());
            }
            assert!(!story.iter().any(|line| line.contains("LOST")), "{story:?}");
            stories.push(story);
            reset(&vm, &origin);
            let differ = differences(&vm, &snapshot);
            let generation = layout::VMGENID_START & !4095..layout::VMCLOCK_START + 4096;
            assert!(differ.iter().all(|p| generation.contains(p)), "{differ:x?}");
            let (vcpus, board) = still(&vm.save().unwrap());
            let (saved_vcpus, saved_board) = still(&snapshot.machine);
            assert_eq!(board, saved_board, "{sections}");
            for (vcpu, saved) in vcpus.iter().zip(&saved_vcpus) {
                assert_eq!(vcpu.msrs, saved.msrs, "{sections}");
                assert!(vcpu == saved, "{sections}: {vcpu:?} {saved:?}");
            }
            // What the one before had still to say.
            output.clear();
        }
        for story in &stories {
            let (all, last) = (&stories[5], story.len());
            assert_eq!(story[..], all[..last], "{sections}");
        }
    }
}

#[test]
fn only_what_was_made_of_the_snapshot_goes_back_to_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let one = parent(dir.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    let again = tempfile::tempdir().unwrap();
    let other = parent(again.path(), r#"{"machine-config":{"mem_size_mib":64}}"#);
    let (vm, output) = one.adopt(Shell::new(one.host.clone(), &one.snapshot).unwrap());
    let [ours, theirs] = [&one, &other].map(|p| Origin::new(&p.snapshot).unwrap());
    let try_reset = |origin| vm.reset(origin, ClockPolicy::Frozen, PATIENCE);
    assert!(matches!(try_reset(&theirs), Err(ResetError::Other)));
    one.proves(&vm, &output);
    reset(&vm, &ours);
    // Saved as what changed, its memory has other files from then on.
    vm.rebased();
    assert!(matches!(try_reset(&ours), Err(ResetError::Other)));
    one.proves(&vm, &output);
    // One that ended does not come back.
    let (vm, _) = one.adopt(Shell::new(one.host.clone(), &one.snapshot).unwrap());
    machine::types(&vm, b"\n");
    vm.start();
    while vm.exit().take().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let gone = vm.reset(&ours, ClockPolicy::Frozen, PATIENCE);
    assert!(
        matches!(gone, Err(ResetError::Ended { index: 0 })),
        "{gone:?}"
    );
}
