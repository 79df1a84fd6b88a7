//! The machine's interrupt lines, over either interrupt controller.
//!
//! With KVM's controller a line is an ioctl on its pin; with the split one bulle's I/O APIC turns
//! the pin into a message for the local APICs in KVM. Lines are signalled on any thread.

use std::sync::Arc;

use devices::ioapic::{IoApic, IoApicState, MsiSink};
use devices::irq::Interrupt;
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

use crate::config;
use crate::telemetry::Limited;

static DELIVERY_FAILURES: Limited = Limited::new(5);

/// The interrupt controller of one VM.
pub enum Irqchip {
    /// PIC, I/O APIC and PIT in KVM.
    Kernel(Arc<VmFd>),
    /// I/O APIC here.
    Split(Arc<IoApic>),
}

impl Irqchip {
    /// The controller for `mode` on `vm`, at reset.
    pub fn new(mode: config::Irqchip, vm: &Arc<VmFd>) -> Self {
        match mode {
            config::Irqchip::Kernel => Self::Kernel(vm.clone()),
            config::Irqchip::Split => {
                let sink = Arc::new(KvmMsi(vm.clone()));
                Self::Split(Arc::new(IoApic::new(sink, IoApicState::default())))
            }
        }
    }

    /// The edge-triggered line at `pin`.
    pub fn line(&self, pin: u32) -> Arc<dyn Interrupt> {
        match self {
            Self::Kernel(vm) => Arc::new(KernelLine {
                vm: vm.clone(),
                pin,
            }),
            Self::Split(ioapic) => ioapic.line(pin as usize),
        }
    }

    /// bulle's own I/O APIC, where it has one.
    pub fn ioapic(&self) -> Option<&Arc<IoApic>> {
        match self {
            Self::Kernel(_) => None,
            Self::Split(ioapic) => Some(ioapic),
        }
    }
}

struct KernelLine {
    vm: Arc<VmFd>,
    pin: u32,
}

impl Interrupt for KernelLine {
    fn signal(&self) {
        for level in [true, false] {
            if let Err(error) = self.vm.set_irq_line(self.pin, level)
                && DELIVERY_FAILURES.allow()
            {
                log::warn!("interrupt {} not delivered: {error}", self.pin);
            }
        }
    }
}

struct KvmMsi(Arc<VmFd>);

impl MsiSink for KvmMsi {
    fn send(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        if let Err(error) = self.0.signal_msi(msi)
            && DELIVERY_FAILURES.allow()
        {
            log::warn!("message {data:#x} to {address:#x} not delivered: {error}");
        }
    }
}
