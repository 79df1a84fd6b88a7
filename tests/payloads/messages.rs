//! Messages that KVM sends at events, without bulle: they reach the local APIC, each its own, and with
//! KVM's controllers its pins still do.

use arch::capabilities;
use arch::vm::{IrqchipMode, create_irqchip};
use bulle::config::Irqchip as Mode;
use bulle::vm::irq::Irqchip;
use kvm_bindings::{KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ADDRESS: u64 = 0xfee0_0000;
/// Registers of the local APIC: spurious vector with the bit that switches it on, interrupt requests.
const SVR: usize = 0xf0;
const IRR: usize = 0x200;

fn is_requested(vcpu: &VcpuFd, vector: u8) -> bool {
    let at = IRR + usize::from(vector / 32) * 0x10 + usize::from(vector % 32 / 8);
    vcpu.get_lapic().unwrap().regs[at] as u8 >> (vector % 8) & 1 != 0
}

fn check(mode: Mode, kernels: IrqchipMode) {
    let kvm = Kvm::new().unwrap();
    let vm = std::sync::Arc::new(kvm.create_vm().unwrap());
    create_irqchip(&vm, kernels, &capabilities::check(&kvm).unwrap()).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    (lapic.regs[SVR], lapic.regs[SVR + 1]) = (-1, 1);
    vcpu.set_lapic(&lapic).unwrap();

    let irqchip = Irqchip::new(mode, &vm, Default::default());
    let messages = irqchip.messages();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (first, second, third) = (event(), event(), event());
    let ways = [(&first, 0x41), (&second, 0x42)]
        .map(|(event, data)| messages.direct(ADDRESS, data, event).unwrap());
    second.write(1).unwrap();
    assert!(is_requested(&vcpu, 0x42) && !is_requested(&vcpu, 0x41));
    assert!(second.read().is_err(), "KVM has taken it");

    // What comes while there is no message stays, and is sent with the next.
    drop(ways);
    first.write(1).unwrap();
    let _way = messages.direct(ADDRESS, 0x51, &third).unwrap();
    assert!(!is_requested(&vcpu, 0x41));
    let _other = messages.direct(ADDRESS, 0x61, &first).unwrap();
    let soon = std::time::Instant::now() + super::SOON;
    while !is_requested(&vcpu, 0x61) {
        assert!(std::time::Instant::now() < soon);
    }
    third.write(1).unwrap();
    assert!(is_requested(&vcpu, 0x51));

    // A message that KVM refuses, for its address is no local APIC's, is not in the way of others.
    let ids = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [KVM_X2APIC_API_USE_32BIT_IDS.into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&ids).unwrap();
    let fourth = event();
    let nowhere = ADDRESS | 1 << 32;
    assert!(messages.direct(nowhere, 0x71, &fourth).is_none());
    let _fourth = messages.direct(ADDRESS, 0x72, &fourth).unwrap();
    fourth.write(1).unwrap();
    assert!(is_requested(&vcpu, 0x72));
}

#[test]
fn kvm_sends_messages_at_events() {
    check(Mode::Split, IrqchipMode::Split);
    check(Mode::Kernel, IrqchipMode::Kernel);
}
