//! The vCPU set-up against the host's KVM: what is written is there, and what is left at its reset
//! value has the value a guest needs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not marked as tests"
)]

mod nested;
mod state;

use arch::capabilities::{self, Capabilities};
use arch::cpu_template::{Bits, CpuidChange};
use arch::report::VcpuReport;
use arch::topology::Topology;
use arch::vcpu::{Boot, VcpuError, VcpuTemplate, configure};
use arch::vm::{IrqchipMode, before_memory, create_irqchip, create_pit};
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_cpuid_entry2, kvm_lapic_state,
    kvm_msr_entry, kvm_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The host's KVM; none on a machine without it, which CI must not be.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) if std::env::var_os("CI").is_some() => {
            panic!("CI needs /dev/kvm and cannot open it: {error}")
        }
        Err(error) => {
            eprintln!("not tested: /dev/kvm cannot be opened: {error}");
            None
        }
    }
}

struct Machine {
    vcpus: Vec<VcpuFd>,
    template: VcpuTemplate,
    vm: VmFd,
}

fn machine(kvm: &Kvm, mode: IrqchipMode, topology: Topology) -> Machine {
    let capabilities = capabilities::check(kvm).unwrap();
    let template = VcpuTemplate::new(kvm, &topology, &capabilities, None, &[]).unwrap();
    let vm = kvm.create_vm().unwrap();
    before_memory(&vm).unwrap();
    create_irqchip(&vm, mode, &capabilities).unwrap();
    if mode == IrqchipMode::Kernel {
        create_pit(&vm).unwrap();
    }
    let vcpus: Vec<_> = (0..topology.vcpus())
        .map(|index| vm.create_vcpu(u64::from(topology.apic_id(index))).unwrap())
        .collect();
    let boot = Boot {
        enter: &|sregs| {
            sregs.cs.base = 0x1000;
            sregs.cs.selector = 0x100;
            kvm_regs {
                rip: 0x20,
                rflags: 2,
                rsi: 0x7000,
                ..Default::default()
            }
        },
        irqchip: mode,
    };
    for (index, vcpu) in (0..).zip(&vcpus) {
        configure(vcpu, index, &template, (index == 0).then_some(&boot)).unwrap();
    }
    Machine {
        vcpus,
        template,
        vm,
    }
}

fn msr(vcpu: &VcpuFd, index: u32) -> u64 {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .unwrap();
    assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1, "MSR {index:#x}");
    msrs.as_slice()[0].data
}

fn lapic(vcpu: &VcpuFd, offset: usize) -> u32 {
    lapic_register(&vcpu.get_lapic().unwrap(), offset)
}

fn lapic_register(state: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| {
        state.regs[offset + i].cast_unsigned()
    }))
}

fn check_machine(kvm: &Kvm, mode: IrqchipMode, topology: Topology) {
    let machine = machine(kvm, mode, topology);
    for (index, vcpu) in (0..).zip(&machine.vcpus) {
        let wanted = machine.template.cpuid.for_vcpu(index).unwrap();
        let found = vcpu.get_cpuid2(256).unwrap();
        let apic_ids = |cpuid: &kvm_bindings::CpuId| {
            let ids = cpuid
                .as_slice()
                .iter()
                .filter(|e| matches!(e.function, 0xb | 0x1f));
            ids.map(|e| e.edx).collect::<Vec<_>>()
        };
        // KVM before Linux 6.8 says 256, the entries behind the last being zero.
        let there = |entry: &&kvm_cpuid_entry2| **entry != kvm_cpuid_entry2::default();
        let count = found.as_slice().iter().filter(there).count();
        assert_eq!(count, wanted.as_slice().len());
        assert_eq!(apic_ids(&found), apic_ids(&wanted));
        assert!(
            apic_ids(&found)
                .iter()
                .all(|id| *id == topology.apic_id(index))
        );

        assert_eq!(msr(vcpu, 0x2ff), 0x806, "MTRRs on, write-back");
        assert_eq!(msr(vcpu, 0x1a0) & 1, 1, "fast strings");
        let state = if index == 0 {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_UNINITIALIZED
        };
        assert_eq!(vcpu.get_mp_state().unwrap().mp_state, state, "vCPU {index}");

        let xsave = vcpu.get_xsave().unwrap();
        assert_eq!(xsave.region[0] & 0xffff, 0x37f, "FCW");
        assert_eq!(xsave.region[6], 0x1f80, "MXCSR");
    }
    let boot = &machine.vcpus[0];
    let regs = boot.get_regs().unwrap();
    assert_eq!((regs.rip, regs.rsi), (0x20, 0x7000));
    assert_eq!(boot.get_sregs().unwrap().cs.base, 0x1000);
    let lint0 = if mode == IrqchipMode::Kernel {
        0x700
    } else {
        0x1_0000
    };
    assert_eq!(lapic(boot, 0x350) & 0x1_0700, lint0);
    assert_eq!(lapic(boot, 0x360) & 0x1_0700, 0x400);
}

/// One and four vCPUs, threads, ids with gaps, and 64 vCPUs.
fn check_mode(mode: IrqchipMode) {
    let Some(kvm) = kvm() else { return };
    let shapes = [
        [1, 1, 1, 1, 1],
        [4, 1, 4, 1, 1],
        [4, 2, 2, 1, 1],
        [6, 1, 3, 1, 2],
        [64, 2, 8, 2, 2],
    ];
    for [vcpus, threads, cores, dies, sockets] in shapes {
        let topology = Topology::new(vcpus, threads, cores, dies, sockets);
        check_machine(&kvm, mode, topology.unwrap());
    }
}

#[test]
fn vcpus_with_all_interrupt_controllers_in_the_kernel() {
    check_mode(IrqchipMode::Kernel);
}

#[test]
fn vcpus_with_a_split_irqchip() {
    check_mode(IrqchipMode::Split);
}

/// A guest in real mode with the local APIC's pins as firmware leaves them.
struct RealMode {
    vcpu: VcpuFd,
    vm: VmFd,
    // Dropped after the VM that has it mapped.
    memory: GuestMemoryMmap<()>,
}

/// `code` runs at 0x1000 in 16 KiB of memory, with all interrupt controllers in the kernel.
fn real_mode(kvm: &Kvm, topology: Topology, code: &[u8]) -> RealMode {
    let capabilities = capabilities::check(kvm).unwrap();
    let template = VcpuTemplate::new(kvm, &topology, &capabilities, None, &[]).unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    memory.write_slice(code, GuestAddress(0x1000)).unwrap();
    let vm = kvm.create_vm().unwrap();
    before_memory(&vm).unwrap();
    let region = kvm_userspace_memory_region {
        memory_size: 0x4000,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    // SAFETY: the region is all of `memory`, which lives as long as the VM.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    create_irqchip(&vm, IrqchipMode::Kernel, &capabilities).unwrap();
    create_pit(&vm).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let boot = Boot {
        enter: &|sregs| {
            (sregs.cs.base, sregs.cs.selector) = (0x1000, 0x100);
            kvm_regs {
                rflags: 2,
                rsp: 0x3000,
                ..Default::default()
            }
        },
        irqchip: IrqchipMode::Kernel,
    };
    configure(&vcpu, 0, &template, Some(&boot)).unwrap();
    RealMode { vcpu, vm, memory }
}

/// A guest that knows of no PIC, as Linux on hardware-reduced ACPI, must not get the PIC's vectors,
/// which are those of exceptions until someone programs it.
#[test]
fn lines_do_not_reach_a_guest_through_the_pic() {
    const CODE: &[u8] = &[
        0xfb, // sti
        0xe6, 0x10, // out 0x10, al
        0xeb, 0xfc, // jmp back to it
    ];
    const HANDLER: &[u8] = &[0xe6, 0x11, 0xcf]; // out 0x11, al; iret
    let Some(kvm) = kvm() else { return };
    let mut guest = real_mode(&kvm, Topology::new(1, 1, 1, 1, 1).unwrap(), CODE);
    guest
        .memory
        .write_slice(HANDLER, GuestAddress(0x2000))
        .unwrap();
    for vector in 0..256u64 {
        guest
            .memory
            .write_obj(0x0200_0000u32, GuestAddress(vector * 4))
            .unwrap();
    }
    for line in [3, 4, 12] {
        guest.vm.set_irq_line(line, true).unwrap();
    }
    for _ in 0..20 {
        let exit = guest.vcpu.run().unwrap();
        assert!(
            matches!(exit, VcpuExit::IoOut(0x10, _)),
            "interrupted: {exit:?}"
        );
    }
}

/// A guest asks CPUID for its topology: what it sees is what was configured, and the report shows
/// where it stopped.
#[test]
fn a_guest_sees_its_topology() {
    const CODE: &[u8] = &[
        0x66, 0xb8, 0x0b, 0, 0, 0, // mov eax, 0xb
        0x66, 0xb9, 1, 0, 0, 0, // mov ecx, 1
        0x0f, 0xa2, // cpuid
        0xe6, 0x10, // out 0x10, al
        0xf4, // hlt
    ];
    let Some(kvm) = kvm() else { return };
    let RealMode {
        mut vcpu,
        memory,
        vm: _vm,
    } = real_mode(&kvm, Topology::new(4, 2, 2, 1, 1).unwrap(), CODE);
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, VcpuExit::IoOut(0x10, [2])), "{exit:?}");
    let report = VcpuReport::collect(&vcpu).unwrap();
    assert_eq!(
        (report.regs.rbx, report.regs.rcx, report.regs.rdx),
        (4, 0x201, 0)
    );
    // RIP is at the instruction that exits or, where KVM completes it first, behind it.
    let bytes = report.instruction_bytes(&memory);
    assert!(
        matches!(bytes[..], [0xe6, 0x10, 0xf4, ..] | [0xf4, ..]),
        "{bytes:x?}\n{report}"
    );
}

#[test]
fn a_host_without_a_split_irqchip_is_told_apart() {
    let Some(kvm) = kvm() else { return };
    let found = capabilities::check(&kvm).unwrap();
    assert!(found.max_vcpus >= 1 && found.max_vcpu_id >= found.max_vcpus);
    let without = Capabilities {
        split_irqchip: false,
        ..found
    };
    let error = create_irqchip(&kvm.create_vm().unwrap(), IrqchipMode::Split, &without);
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("KVM_CAP_SPLIT_IRQCHIP")
    );
}

/// A guest's processor with the changes of a template; those that cannot be made are refused.
#[test]
fn a_template_changes_a_vcpu() {
    let Some(kvm) = kvm() else { return };
    let topology = Topology::new(1, 1, 1, 1, 1).unwrap();
    let capabilities = capabilities::check(&kvm).unwrap();
    // The processor's stepping, which is no feature of anything.
    let model = CpuidChange {
        leaf: 1,
        registers: [
            vec![Bits {
                mask: 0xf,
                value: 9,
            }],
            vec![],
            vec![],
            vec![],
        ],
        ..CpuidChange::default()
    };
    let new =
        |change: CpuidChange| VcpuTemplate::new(&kvm, &topology, &capabilities, None, &[change]);
    let mut template = new(model).unwrap();
    let vm = kvm.create_vm().unwrap();
    create_irqchip(&vm, IrqchipMode::Split, &capabilities).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    const LSTAR: u32 = 0xc000_0082;
    const SYSENTER_EIP: u32 = 0x176;
    const PAT: u32 = 0x277;
    let low = Bits {
        mask: 0xff,
        value: 6,
    };
    let changes = [(PAT, low), (SYSENTER_EIP, low)];
    template.msrs.change(&kvm, &vcpu, &changes).unwrap();
    let before = msr(&vcpu, PAT);
    configure(&vcpu, 0, &template, None).unwrap();
    let cpuid = vcpu.get_cpuid2(256).unwrap();
    let leaf = cpuid.as_slice().iter().find(|e| e.function == 1);
    assert_eq!(leaf.unwrap().eax & 0xf, 9);
    assert_eq!(msr(&vcpu, PAT), before & !0xff | 6);
    assert_eq!(msr(&vcpu, SYSENTER_EIP), 0, "bulle's own come last");

    let unknown = CpuidChange {
        leaf: 0x1234,
        ..CpuidChange::default()
    };
    let error = new(unknown).unwrap_err().to_string();
    assert!(error.contains("Leaf: 1234, Subleaf: 0"), "{error}");
    let error = template.msrs.change(&kvm, &vcpu, &[(0xdead, low)]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("Register Address: dead"), "{error}");
    let high = Bits {
        mask: 1 << 63,
        value: 1 << 63,
    };
    template.msrs.change(&kvm, &vcpu, &[(LSTAR, high)]).unwrap();
    let error = configure(&vcpu, 0, &template, None).unwrap_err();
    let VcpuError::Msr { source, .. } = error else {
        panic!("{error}")
    };
    assert!(
        source
            .to_string()
            .contains("which the CPU template asks for"),
        "{source}"
    );
}
