//! The machine's interrupt lines, over either interrupt controller.
//!
//! With KVM's controller a line is an ioctl on its pin; with the split one bulle's I/O APIC turns
//! the pin into a message for the local APICs in KVM. Lines are signalled on any thread.

use std::io;
use std::sync::Arc;

use devices::ioapic::{IoApic, IoApicState, MsiSink};
use devices::irq::Interrupt;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::messages::Messages;
use crate::config;
use crate::telemetry::Limited;

static DELIVERY_FAILURES: Limited = Limited::new(5);

/// The interrupt controller of one VM.
#[derive(Clone)]
pub struct Irqchip {
    lines: Lines,
    messages: Arc<Messages>,
}

#[derive(Clone)]
enum Lines {
    /// PIC, I/O APIC and PIT in KVM.
    Kernel(Arc<VmFd>),
    /// I/O APIC here.
    Split(Arc<IoApic>),
}

impl Irqchip {
    /// The controller for `mode` on `vm`. A state of KVM's own is not set here.
    pub fn new(mode: config::Irqchip, vm: &Arc<VmFd>, state: IoApicState) -> Self {
        let messages = Arc::new(Messages::new(vm.clone(), mode));
        let lines = match mode {
            config::Irqchip::Kernel => Lines::Kernel(vm.clone()),
            config::Irqchip::Split => Lines::Split(Arc::new(IoApic::new(messages.clone(), state))),
        };
        Self { lines, messages }
    }

    /// Where messages (MSI) of devices go, with either controller.
    pub fn messages(&self) -> Arc<dyn MsiSink> {
        self.messages.clone()
    }

    /// The edge-triggered line at `pin`.
    pub fn line(&self, pin: u32) -> Arc<dyn Interrupt> {
        match &self.lines {
            Lines::Kernel(vm) => Arc::new(KernelLine {
                vm: vm.clone(),
                pin,
            }),
            Lines::Split(ioapic) => ioapic.line(pin as usize),
        }
    }

    /// The edge-triggered line at `pin` for I/O threads, and the irqfd behind it where there is
    /// one, to be registered once there are vCPUs.
    pub fn fast_line(&self, pin: u32) -> io::Result<(Arc<dyn Interrupt>, Option<IrqFd>)> {
        match &self.lines {
            Lines::Kernel(_) => {
                let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
                let line = Arc::new(EventLine(event.try_clone()?));
                Ok((line, Some(IrqFd { event, pin })))
            }
            // A message is a single system call already.
            Lines::Split(_) => Ok((self.line(pin), None)),
        }
    }

    /// bulle's own I/O APIC, where it has one.
    pub fn ioapic(&self) -> Option<&Arc<IoApic>> {
        match &self.lines {
            Lines::Kernel(_) => None,
            Lines::Split(ioapic) => Some(ioapic),
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

/// An event descriptor that KVM turns into an edge on a pin.
pub struct IrqFd {
    event: EventFd,
    pin: u32,
}

impl IrqFd {
    /// Connects it. An edge that came before is delivered now.
    pub fn register(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        vm.register_irqfd(&self.event, self.pin)
    }
}

struct EventLine(EventFd);

impl Interrupt for EventLine {
    fn signal(&self) {
        if let Err(error) = self.0.write(1)
            && DELIVERY_FAILURES.allow()
        {
            log::warn!("an interrupt was not delivered: {error}");
        }
    }
}
