//! What was saved is there after a restore, through a serialised form, and what a host cannot take
//! is refused by name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arch::capabilities;
use arch::state::{ClockPolicy, Context, HostCpuid, StateError, VcpuState, VmState};
use arch::topology::Topology;
use arch::vm::IrqchipMode;
use kvm_bindings::{KVM_MP_STATE_HALTED, Msrs, kvm_mp_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::{Machine, kvm, lapic, lapic_register, machine, msr, real_mode};

const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Registers that every 64-bit guest uses, with values that are valid in them.
const GUEST_MSRS: [(u32, u64); 5] = [
    (0xc000_0081, 0x0023_0010_0000_0000), // STAR
    (LSTAR, 0xffff_ffff_8100_0080),
    (0xc000_0084, 0x47700), // SYSCALL_MASK
    (KERNEL_GS_BASE, 0xffff_8880_3e80_0000),
    (0x277, 0x0007_0106_0007_0106), // PAT
];
const LVT_TIMER: usize = 0x320;
const TIMER_COUNT: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
/// KVM's local APIC has 1 GHz, which the timer divides by two after reset.
const TIMER_PER_MS: u32 = 500_000;
const MASKED: u32 = 1 << 16;
const TSC_DEADLINE_MODE: u32 = 2 << 17;
const TSC_DEADLINE: u32 = 0x6e0;
const TSC: u32 = 0x10;

fn context(kvm: &Kvm) -> Context {
    Context::new(kvm, &capabilities::check(kvm).unwrap()).unwrap()
}

fn write_lapic(vcpu: &VcpuFd, values: &[(usize, u32)]) {
    let mut state = vcpu.get_lapic().unwrap();
    for (offset, value) in values {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            state.regs[offset + i] = byte.cast_signed();
        }
    }
    vcpu.set_lapic(&state).unwrap();
}

fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) {
    let entries: Vec<_> = values
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    let written = vcpu.set_msrs(&Msrs::from_entries(&entries).unwrap());
    assert_eq!(written.unwrap(), values.len());
}

/// Values everywhere, another pattern for every vCPU.
fn fill(vcpu: &VcpuFd, seed: u64) {
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.rsp, regs.r15) = (seed * 3, seed * 5, u64::MAX - seed);
    (regs.rip, regs.rflags) = (0x1234 + seed, 0x46);
    vcpu.set_regs(&regs).unwrap();

    let mut xsave = vcpu.get_xsave().unwrap();
    // ST0 to ST7 and XMM0 to XMM15, and that they are in use.
    for (i, word) in xsave.region[8..104].iter_mut().enumerate() {
        // ST registers have ten bytes; the rest of their 16 is reserved.
        *word = match i {
            0..32 if i % 4 == 2 => 0x4000,
            0..32 if i % 4 == 3 => 0,
            _ => 0x0101_0101 * (i as u32) + seed as u32,
        };
    }
    xsave.region[128] |= 3;
    // SAFETY: it has the 4096 bytes that KVM gave.
    unsafe { vcpu.set_xsave(&xsave) }.unwrap();

    let mut debug = vcpu.get_debug_regs().unwrap();
    debug.db = [0x1000 + seed, 0x2000, 0x3000, 0x4000];
    debug.dr7 = 0x455;
    vcpu.set_debug_regs(&debug).unwrap();

    write_lapic(
        vcpu,
        &[(0xf0, 0x1ff), (LVT_TIMER, MASKED | 0xec), (0x80, 0x20)],
    );
    write_msrs(vcpu, &GUEST_MSRS);
    write_msrs(vcpu, &[(KERNEL_GS_BASE, 0xffff_8880_0000_0000 + seed)]);
}

fn save(machine: &Machine, context: &Context) -> Vec<VcpuState> {
    let vcpus = (0..).zip(&machine.vcpus);
    vcpus
        .map(|(index, vcpu)| VcpuState::save(vcpu, index, context).unwrap())
        .collect()
}

/// As a snapshot file would have it.
fn through_json<T: serde::Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
    serde_json::from_slice(&serde_json::to_vec(state).unwrap()).unwrap()
}

/// Without what goes on by itself.
fn still(state: &VcpuState) -> VcpuState {
    let mut state = state.clone();
    (state.tsc.value, state.tsc.offset) = (0, None);
    state
}

fn check_round_trip(kvm: &Kvm, mode: IrqchipMode, vcpus: u16) {
    let topology = Topology::new(vcpus, 1, vcpus, 1, 1).unwrap();
    let (context, source) = (context(kvm), machine(kvm, mode, topology));
    for (seed, vcpu) in (1..).zip(&source.vcpus) {
        fill(vcpu, seed);
    }
    if let [_, second, ..] = &source.vcpus[..] {
        let mp_state = KVM_MP_STATE_HALTED;
        second.set_mp_state(kvm_mp_state { mp_state }).unwrap();
    }
    let saved = save(&source, &context);
    let vm = VmState::save(&source.vm, mode).unwrap();
    assert_eq!(vm.irqchip(), mode);
    assert_eq!(
        (through_json(&saved), through_json(&vm)),
        (saved.clone(), vm.clone())
    );

    let target = machine(kvm, mode, topology);
    let shift = vm.shift(ClockPolicy::Frozen);
    for (state, vcpu) in saved.iter().zip(&target.vcpus) {
        state.restore(vcpu, &context, &shift).unwrap();
    }
    vm.restore(&target.vm, &shift).unwrap();
    let again = save(&target, &context);
    // And in two steps.
    let waited = machine(kvm, mode, topology);
    for (state, vcpu) in saved.iter().zip(&waited.vcpus) {
        assert!(state.can_wait());
        state.set_cpuid(vcpu).unwrap();
        state.prepare(vcpu, &context).unwrap();
        state.start_clocks(vcpu, &context, &shift).unwrap();
    }
    let waited = save(&waited, &context);
    for ((saved, again), waited) in saved.iter().zip(&again).zip(&waited) {
        assert_eq!(still(saved), still(again), "vCPU {}", saved.index);
        assert_eq!(still(saved), still(waited), "vCPU {}", saved.index);
        assert!(saved.msrs.iter().any(|e| e.index == LSTAR));
    }
    assert_eq!(VmState::save(&target.vm, mode).unwrap().chips, vm.chips);
    for (index, value) in &GUEST_MSRS[..2] {
        assert_eq!(msr(&target.vcpus[0], *index), *value);
    }
}

#[test]
fn state_goes_to_another_vm_whole() {
    let Some(kvm) = kvm() else { return };
    for vcpus in [1, 4] {
        check_round_trip(&kvm, IrqchipMode::Split, vcpus);
        check_round_trip(&kvm, IrqchipMode::Kernel, vcpus);
    }
}

/// A vCPU becomes what it was, whatever it has been since; and a new one what that was.
#[test]
fn what_a_new_vcpu_has_is_given_to_one_that_ran() {
    let Some(kvm) = kvm() else { return };
    let topology = Topology::new(2, 1, 2, 1, 1).unwrap();
    let (context, mode) = (context(&kvm), IrqchipMode::Split);
    let machine = machine(&kvm, mode, topology);
    let vm = VmState::save(&machine.vm, mode).unwrap();
    let new = save(&machine, &context);
    let shift = vm.shift(ClockPolicy::Frozen);
    for (seed, vcpu) in (1..).zip(&machine.vcpus) {
        fill(vcpu, seed);
        let mp_state = KVM_MP_STATE_HALTED;
        vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
        vcpu.nmi().unwrap();
    }
    let changed = save(&machine, &context);
    for (state, vcpu) in new.iter().zip(&machine.vcpus) {
        state.reset_registers(vcpu, &context, &shift).unwrap();
    }
    let fresh = super::machine(&kvm, mode, topology);
    for (state, vcpu) in new.iter().zip(&fresh.vcpus) {
        state.restore(vcpu, &context, &shift).unwrap();
    }
    let (again, fresh) = (save(&machine, &context), save(&fresh, &context));
    for (at, new) in new.iter().enumerate() {
        assert_ne!(still(&changed[at]), still(new), "vCPU {at}");
        assert_eq!(changed[at].events.nmi.pending, 1, "vCPU {at}");
        assert_eq!(still(&again[at]), still(new), "vCPU {at}");
        assert_eq!(still(&fresh[at]), still(new), "vCPU {at}");
    }
}

/// Whether the host can give a vCPU another time stamp counter than its own.
fn can_set_tsc(kvm: &Kvm) -> bool {
    let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
    arch::tsc::set_offset(&vcpu, 1 << 40).is_ok()
        && msr(&vcpu, TSC) >> 39 != arch::tsc::read() >> 39
}

/// One vCPU with a running timer of each kind, given to another; then the clocks of both.
#[test]
fn clocks_and_timers_go_on_where_they_were_or_jump() {
    let Some(kvm) = kvm() else { return };
    let topology = Topology::new(1, 1, 1, 1, 1).unwrap();
    let (context, mode) = (context(&kvm), IrqchipMode::Split);
    let source = machine(&kvm, mode, topology);
    let vcpu = &source.vcpus[0];
    let timer = [(TIMER_COUNT, u32::MAX), (TIMER_CURRENT, u32::MAX)];
    write_lapic(vcpu, &[(0xf0, 0x1ff), (LVT_TIMER, 0xec)]);
    write_lapic(vcpu, &timer);
    let begun = Instant::now();
    let vm = VmState::save(&source.vm, mode).unwrap();
    let saved = VcpuState::save(vcpu, 0, &context).unwrap();
    let done = Instant::now();
    let left = lapic_register(&saved.lapic, TIMER_CURRENT);
    assert!(!saved.can_wait(), "it would go off meanwhile");
    assert!((u32::MAX / 2..u32::MAX).contains(&left), "{left:#x}");

    std::thread::sleep(Duration::from_millis(300));
    for policy in [ClockPolicy::Frozen, ClockPolicy::Advance] {
        let target = machine(&kvm, mode, topology);
        let resumed = Instant::now();
        // What may have passed for the guest, in milliseconds: since the save, or since the restore.
        let check = |what: &str, passed: u64| {
            let (least, most) = match policy {
                ClockPolicy::Advance => ((resumed - done).as_millis(), begun.elapsed().as_millis()),
                ClockPolicy::Frozen => (0, resumed.elapsed().as_millis()),
            };
            // Clocks of the host differ by less.
            let range = least.saturating_sub(2)..=most + 2;
            assert!(
                range.contains(&passed.into()),
                "{policy:?}: {what} {passed}, not {range:?}"
            );
        };
        let shift = vm.shift(policy);
        saved.restore(&target.vcpus[0], &context, &shift).unwrap();
        vm.restore(&target.vm, &shift).unwrap();
        // The timer stands still meanwhile, whatever the clocks do.
        let timer = left.wrapping_sub(lapic(&target.vcpus[0], TIMER_CURRENT)) / TIMER_PER_MS;
        let most = resumed.elapsed().as_millis() + 2;
        assert!(u128::from(timer) <= most, "{policy:?}: {timer}, not {most}");
        let kvmclock = target.vm.get_clock().unwrap().clock;
        check("kvmclock", kvmclock.saturating_sub(vm.clock) / 1_000_000);
        if can_set_tsc(&kvm) {
            let khz = u64::from(target.vcpus[0].get_tsc_khz().unwrap());
            let tsc = msr(&target.vcpus[0], TSC);
            check("TSC", tsc.wrapping_sub(saved.tsc.value) / khz);
        }
    }
}

#[test]
fn a_deadline_survives_since_it_is_written_behind_the_tsc() {
    let Some(kvm) = kvm() else { return };
    if !capabilities::check(&kvm).unwrap().tsc_deadline_timer {
        return;
    }
    let topology = Topology::new(1, 1, 1, 1, 1).unwrap();
    let (context, mode) = (context(&kvm), IrqchipMode::Split);
    let source = machine(&kvm, mode, topology);
    let vcpu = &source.vcpus[0];
    write_lapic(
        vcpu,
        &[(0xf0, 0x1ff), (LVT_TIMER, TSC_DEADLINE_MODE | 0xec)],
    );
    let deadline = msr(vcpu, TSC) + 3_600_000 * u64::from(vcpu.get_tsc_khz().unwrap());
    write_msrs(vcpu, &[(TSC_DEADLINE, deadline)]);
    let vm = VmState::save(&source.vm, mode).unwrap();
    let saved = VcpuState::save(vcpu, 0, &context).unwrap();
    assert_eq!(
        saved.msrs.last().map(|e| (e.index, e.data)),
        Some((TSC_DEADLINE, deadline))
    );
    let target = machine(&kvm, mode, topology);
    saved
        .restore(&target.vcpus[0], &context, &vm.shift(ClockPolicy::Frozen))
        .unwrap();
    assert_eq!(msr(&target.vcpus[0], TSC_DEADLINE), deadline);

    let waited = machine(&kvm, mode, topology);
    let vcpu = &waited.vcpus[0];
    assert!(saved.can_wait());
    saved.prepare(vcpu, &context).unwrap();
    assert_eq!(
        msr(vcpu, TSC_DEADLINE),
        0,
        "nothing goes off before it runs"
    );
    let shift = vm.shift(ClockPolicy::Frozen);
    saved.start_clocks(vcpu, &context, &shift).unwrap();
    assert_eq!(msr(vcpu, TSC_DEADLINE), deadline);
}

/// A guest counts; its copy counts on in another VM, from where the first one was.
#[test]
fn a_guest_goes_on_in_another_vm() {
    const CODE: &[u8] = &[
        0x40, // inc ax
        0xe7, 0x10, // out 0x10, ax
        0xeb, 0xfb, // jmp back to it
    ];
    let Some(kvm) = kvm() else { return };
    let topology = Topology::new(1, 1, 1, 1, 1).unwrap();
    let (context, mode) = (context(&kvm), IrqchipMode::Kernel);
    let count = |vcpu: &mut VcpuFd| match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, data) => u16::from_le_bytes(data.try_into().unwrap()),
        exit => panic!("{exit:?}"),
    };
    let mut source = real_mode(&kvm, topology, CODE);
    for wanted in 1..=7 {
        assert_eq!(count(&mut source.vcpu), wanted);
    }
    // The access is complete only after the next entry, which goes no further.
    source.vcpu.set_kvm_immediate_exit(1);
    assert!(source.vcpu.run().is_err());
    source.vcpu.set_kvm_immediate_exit(0);
    let vm = VmState::save(&source.vm, mode).unwrap();
    let saved = VcpuState::save(&source.vcpu, 0, &context).unwrap();
    let mut target = real_mode(&kvm, topology, CODE);
    let shift = vm.shift(ClockPolicy::Advance);
    // CPUID is the same already.
    saved
        .restore_registers(&target.vcpu, &context, &shift)
        .unwrap();
    vm.restore(&target.vm, &shift).unwrap();
    for wanted in 8..=10 {
        assert_eq!(count(&mut target.vcpu), wanted);
    }
    assert_eq!(count(&mut source.vcpu), 8);
}

#[test]
fn a_guest_fits_the_host_that_it_comes_from() {
    let Some(kvm) = kvm() else { return };
    let kvm = Arc::new(kvm);
    let topology = Topology::new(2, 2, 1, 1, 1).unwrap();
    let machine = machine(&kvm, IrqchipMode::Split, topology);
    let host = HostCpuid::new(kvm.clone()).unwrap();
    for mut state in save(&machine, &context(&kvm)) {
        state.check(&host).unwrap();
        state.check(&host).unwrap();
        // What is known to fit is that alone.
        state.cpuid[0].ebx ^= 1;
        assert!(matches!(state.check(&host), Err(StateError::Vendor { .. })));
    }
}

/// What `change` makes of a good state, given to a new vCPU.
fn refused(kvm: &Kvm, change: &dyn Fn(&mut VcpuState)) -> StateError {
    let topology = Topology::new(1, 1, 1, 1, 1).unwrap();
    let (context, machine) = (context(kvm), machine(kvm, IrqchipMode::Split, topology));
    let vm = VmState::save(&machine.vm, IrqchipMode::Split).unwrap();
    let mut state = VcpuState::save(&machine.vcpus[0], 0, &context).unwrap();
    change(&mut state);
    let shift = vm.shift(ClockPolicy::Advance);
    let result = state.restore(&machine.vcpus[0], &context, &shift);
    result.unwrap_err()
}

#[test]
fn state_that_no_vcpu_can_have_is_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let error = refused(&kvm, &|state| drop(state.xsave.split_off(4000)));
    assert!(
        matches!(error, StateError::Xsave { found: 4000, .. }),
        "{error}"
    );
    let error = refused(&kvm, &|state| state.xsave.resize(1 << 20, 0));
    assert!(
        matches!(
            error,
            StateError::Xsave {
                found: 0x10_0000,
                ..
            }
        ),
        "{error}"
    );
    let error = refused(&kvm, &|state| state.xsave.resize(60 << 10, 1));
    assert!(matches!(error, StateError::Xsave { .. }), "{error}");
    let error = refused(&kvm, &|state| {
        state.cpuid = vec![Default::default(); 257];
    });
    assert!(
        matches!(error, StateError::TooMany { count: 257, .. }),
        "{error}"
    );
    let error = refused(&kvm, &|state| state.msrs[0].index = 0xdead_beef);
    assert!(
        matches!(
            error,
            StateError::MsrUnknown {
                index: 0xdead_beef,
                vcpu: 0
            }
        ),
        "{error}"
    );
    let error = refused(&kvm, &|state| state.mp_state.mp_state = 99);
    let ioctl = |error: &StateError| match error {
        StateError::Vcpu { ioctl, .. } => *ioctl,
        _ => "another error",
    };
    assert_eq!(ioctl(&error), "KVM_SET_MP_STATE", "{error}");
    // Paging without protected mode.
    let error = refused(&kvm, &|state| state.sregs.cr0 = 1 << 31);
    assert_eq!(ioctl(&error), "KVM_SET_SREGS", "{error}");
    // The header says that there is state of which no processor has heard.
    let error = refused(&kvm, &|state| state.xsave[512..520].fill(0xff));
    assert_eq!(ioctl(&error), "KVM_SET_XSAVE", "{error}");
    let error = refused(&kvm, &|state| state.xcrs.nr_xcrs = 1000);
    assert_eq!(ioctl(&error), "KVM_SET_XCRS", "{error}");
    let error = refused(&kvm, &|state| {
        let lstar = state.msrs.iter_mut().find(|e| e.index == LSTAR);
        lstar.unwrap().data = 1 << 63;
    });
    assert!(
        matches!(error, StateError::MsrRefused { index: LSTAR, value, vcpu: 0 } if value == 1 << 63),
        "{error}"
    );
}
