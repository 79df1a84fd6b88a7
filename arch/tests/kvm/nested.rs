//! A guest that runs a virtual machine of its own (AMD-V) is saved while that one runs.

use arch::capabilities;
use arch::state::{ClockPolicy, Context, VcpuState, VmState};
use arch::topology::Topology;
use arch::vm::IrqchipMode;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{RealMode, kvm, real_mode};

/// Where the guest has its virtual machine's control block, its code, and what it saves itself to. Its own
/// page directory is at 0.
const VMCB: u64 = 0x2000;
const INNER: u64 = 0x800;
const HSAVE: u64 = 0x3000;
const VM_HSAVE_PA: u32 = 0xc001_0117;
const EFER_SVME: u64 = 1 << 12;
const CR0: u64 = 0x11;
const PG: u64 = 1 << 31;
const PSE: u64 = 1 << 4;
const EXIT_VMMCALL: u8 = 0x81;

/// The guest: runs its virtual machine and says why that stopped.
const OUTER: &[u8] = &[
    0xb8, 0x00, 0x20, 0, 0, // mov eax, VMCB
    0x0f, 0x01, 0xd8, // vmrun
    0xa0, 0x70, 0x20, 0, 0, // mov al, [VMCB + EXITCODE]
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xfe, // jmp $
];
/// Its virtual machine: counts at a port that is the host's, then calls the guest.
const COUNTS: &[u8] = &[
    0xb0, 1, // mov al, 1
    0xe6, 0x11, // out 0x11, al
    0xfe, 0xc0, // inc al
    0xe6, 0x11, // out 0x11, al
    0x0f, 0x01, 0xd9, // vmmcall
];

/// A flat segment with these attributes: code 0x9b, data 0x93.
fn flat(kind: u8, selector: u16) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind & 0xf,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// The control block (APM volume 2, appendix B).
fn write_vmcb(memory: &GuestMemoryMmap<()>) {
    let put = |at: u64, value: u64, bytes: usize| {
        let value = &value.to_le_bytes()[..bytes];
        memory.write_slice(value, GuestAddress(VMCB + at)).unwrap();
    };
    // The page directory of the guest: 4 MiB as they are.
    memory.write_obj(0x83_u32, GuestAddress(0)).unwrap();
    // Intercepted: VMRUN, which must be, and VMMCALL.
    put(0x10, 3, 4);
    put(0x58, 1, 4);
    for (at, attributes, selector) in [
        (0x400, 0xc93, 16),
        (0x410, 0xc9b, 8),
        (0x420, 0xc93, 16),
        (0x430, 0xc93, 16),
    ] {
        put(at, selector, 2);
        put(at + 2, attributes, 2);
        put(at + 4, u64::from(u32::MAX), 4);
    }
    put(0x4d0, EFER_SVME, 8);
    put(0x558, CR0, 8);
    put(0x560, 0x400, 8);
    put(0x568, 0xffff_0ff0, 8);
    put(0x570, 2, 8);
    put(0x578, INNER, 8);
    put(0x5d8, INNER + 0x400, 8);
    put(0x668, 0x0007_0406_0007_0406, 8);
    memory.write_slice(COUNTS, GuestAddress(INNER)).unwrap();
}

/// In 32-bit protected mode with SVM switched on, and with paging, which KVM wants for that.
fn enter_protected_mode(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = flat(0x9b, 8);
    let data = flat(0x93, 16);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0 | PG, 0, PSE);
    sregs.efer = EFER_SVME;
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let hsave = kvm_msr_entry {
        index: VM_HSAVE_PA,
        data: HSAVE,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[hsave]).unwrap();
    assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 1);
}

/// The next byte that comes, and at which port.
#[track_caller]
fn said(vcpu: &mut VcpuFd) -> (u16, u8) {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(port, [byte]) => (port, *byte),
        exit => panic!("{exit:?}"),
    }
}

/// Completes the access that a vCPU left for.
fn settle(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    assert!(vcpu.run().is_err());
    vcpu.set_kvm_immediate_exit(0);
}

fn has_svm(kvm: &Kvm) -> bool {
    let cpuid = kvm.get_supported_cpuid(256).unwrap();
    let mut entries = cpuid.as_slice().iter();
    entries.any(|e| e.function == 0x8000_0001 && e.ecx & 1 << 2 != 0)
}

#[test]
fn a_guests_own_virtual_machine_goes_on_in_another_vm() {
    let Some(kvm) = kvm() else { return };
    let capabilities = capabilities::check(&kvm).unwrap();
    if !has_svm(&kvm) || !capabilities.nested_state {
        eprintln!("not tested: guests have no AMD-V of their own on this host");
        return;
    }
    let context = Context::new(&kvm, &capabilities).unwrap();
    let topology = Topology::new(1, 1, 1, 1, 1).unwrap();
    let machine = || real_mode(&kvm, topology, OUTER);
    let RealMode {
        mut vcpu,
        vm,
        memory,
    } = machine();
    write_vmcb(&memory);
    enter_protected_mode(&vcpu);
    let outer = VcpuState::save(&vcpu, 0, &context).unwrap();
    assert_eq!(outer.nested.len(), 128, "none runs yet");
    assert_eq!(said(&mut vcpu), (0x11, 1));
    settle(&mut vcpu);
    let inner = VcpuState::save(&vcpu, 0, &context).unwrap();
    assert_eq!(inner.nested.len(), 128 + 4096, "the inner one runs");
    let json = serde_json::to_vec(&inner).unwrap();
    let inner: VcpuState = serde_json::from_slice(&json).unwrap();
    let shift = VmState::save(&vm, IrqchipMode::Kernel).unwrap();
    let shift = shift.shift(ClockPolicy::Frozen);

    let mut other = machine();
    let mut copy = vec![0; 0x4000];
    memory.read_slice(&mut copy, GuestAddress(0)).unwrap();
    other.memory.write_slice(&copy, GuestAddress(0)).unwrap();
    inner.restore(&other.vcpu, &context, &shift).unwrap();
    let whole = [(0x11, 2), (0x10, EXIT_VMMCALL)];
    for vcpu in [&mut other.vcpu, &mut vcpu] {
        assert_eq!([said(vcpu), said(vcpu)], whole);
    }
    // Back into the inner one, from there to before it began, and that again.
    settle(&mut vcpu);
    inner.reset_registers(&vcpu, &context, &shift).unwrap();
    assert_eq!(said(&mut vcpu), (0x11, 2));
    settle(&mut vcpu);
    outer.reset_registers(&vcpu, &context, &shift).unwrap();
    write_vmcb(&memory);
    assert_eq!(said(&mut vcpu), (0x11, 1));
    assert_eq!([said(&mut vcpu), said(&mut vcpu)], whole);

    for len in [1, 127, 200, 9000] {
        let mut wrong = inner.clone();
        wrong.nested.resize(len, 0);
        let error = wrong.restore(&machine().vcpu, &context, &shift);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("virtual machines of its own"), "{error}");
    }
}
