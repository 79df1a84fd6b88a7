//! Messages of devices (MSI) to KVM's local APICs: each by a system call, or from the host's kernel at an
//! event (irqfd), for which KVM has a route.
//!
//! Routes are those of the whole VM and are set as one, so they are kept here, behind KVM's own for the
//! pins of its controllers. Sent from any thread.

use std::sync::{Arc, Mutex, PoisonError};

use devices::ioapic::MsiSink;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::config::Irqchip;
use crate::telemetry::Limited;

static DELIVERY_FAILURES: Limited = Limited::new(5);

/// Pins of the I/O APIC, and of them those that the two PICs have as well.
const PINS: u32 = 24;
const PIC_PINS: u32 = 16;
/// Most messages that have routes at once; KVM has room for 4096 routes on all kernels.
const MAX_ROUTES: usize = 2048;

/// Where the messages of a VM's devices go.
pub(super) struct Messages(Arc<Inner>);

struct Inner {
    vm: Arc<VmFd>,
    irqchip: Irqchip,
    /// By number of the route, from [`PINS`] on.
    routes: Mutex<Vec<Option<(u64, u32)>>>,
}

impl Messages {
    pub(super) fn new(vm: Arc<VmFd>, irqchip: Irqchip) -> Self {
        Self(Arc::new(Inner {
            vm,
            irqchip,
            routes: Mutex::default(),
        }))
    }
}

impl MsiSink for Messages {
    fn send(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        if let Err(error) = self.0.vm.signal_msi(msi)
            && DELIVERY_FAILURES.allow()
        {
            log::warn!("message {data:#x} to {address:#x} not delivered: {error}");
        }
    }

    fn direct(&self, address: u64, data: u32, event: &EventFd) -> Option<Box<dyn Send>> {
        match Direct::new(&self.0, (address, data), event) {
            Ok(direct) => Some(Box::new(direct)),
            Err(error) => {
                if DELIVERY_FAILURES.allow() {
                    log::warn!("message {data:#x} takes the way through bulle: {error}");
                }
                None
            }
        }
    }
}

impl Inner {
    /// Changes the routes, and has KVM know of it.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<Option<(u64, u32)>>) -> Option<T>,
    ) -> Result<T, kvm_ioctls::Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let full = || kvm_ioctls::Error::new(libc::ENOSPC);
        let mut changed = routes.clone();
        let result = change(&mut changed).ok_or_else(full)?;
        let mut entries = match self.irqchip {
            Irqchip::Kernel => (0..PINS).flat_map(pin).collect(),
            Irqchip::Split => Vec::new(),
        };
        let messages = (PINS..).zip(changed.iter());
        entries.extend(messages.filter_map(|(gsi, message)| Some(entry(gsi, (*message)?))));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| full())?;
        // One that KVM refuses, with an address of the guest's, is not to be in the next table.
        self.vm.set_gsi_routing(&table)?;
        *routes = changed;
        Ok(result)
    }
}

/// KVM's own routes of a pin.
fn pin(gsi: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = match gsi {
        0..8 => Some((KVM_IRQCHIP_PIC_MASTER, gsi)),
        8..PIC_PINS => Some((KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
        _ => None,
    };
    let chips = [Some((KVM_IRQCHIP_IOAPIC, gsi)), pic];
    chips.into_iter().flatten().map(move |(irqchip, pin)| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    })
}

fn entry(gsi: u32, (address, data): (u64, u32)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..kvm_irq_routing_msi::default()
    };
    entry
}

/// A message that KVM sends at each event.
struct Direct {
    inner: Arc<Inner>,
    event: EventFd,
    gsi: u32,
}

impl Direct {
    fn new(
        inner: &Arc<Inner>,
        message: (u64, u32),
        event: &EventFd,
    ) -> Result<Self, kvm_ioctls::Error> {
        let event = event.try_clone();
        let event = event.map_err(|e| kvm_ioctls::Error::new(e.raw_os_error().unwrap_or(0)))?;
        let index = inner.change(|routes| {
            let free = routes.iter().position(Option::is_none);
            let index = free.unwrap_or(routes.len());
            match routes.get_mut(index) {
                Some(route) => *route = Some(message),
                None if index < MAX_ROUTES => routes.push(Some(message)),
                None => return None,
            }
            Some(index)
        })?;
        let direct = Self {
            inner: inner.clone(),
            event,
            gsi: PINS + index as u32,
        };
        // An event that is there already is sent now. Dropping it on failure takes the route back.
        inner.vm.register_irqfd(&direct.event, direct.gsi)?;
        Ok(direct)
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        // Refused only where it was not registered.
        let _ = self.inner.vm.unregister_irqfd(&self.event, self.gsi);
        let index = (self.gsi - PINS) as usize;
        let removed = self.inner.change(|routes| {
            *routes.get_mut(index)? = None;
            Some(())
        });
        if let Err(error) = removed
            && DELIVERY_FAILURES.allow()
        {
            log::warn!("KVM keeps a route that nothing uses: {error}");
        }
    }
}
