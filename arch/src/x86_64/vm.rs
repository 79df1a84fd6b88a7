//! The parts of a VM that belong to the architecture: what is set before memory, and the interrupt
//! controllers.
//!
//! Owner: the thread that builds the VM. Order of construction, which the caller keeps:
//! `create_vm → [before_memory] → memory slots → [create_irqchip] → [create_pit] → vCPUs →
//! irqfd and ioeventfd`. Memory slots come before the interrupt controllers because KVM waits for
//! an SRCU grace period when a slot is registered once they exist: about 7 ms for each slot, against
//! less than 0.2 ms before (measured).

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap, kvm_irqchip, kvm_pic_state, kvm_pit_config,
};
use kvm_ioctls::VmFd;

use crate::capabilities::Capabilities;
use crate::layout;

/// The architecture's part of a VM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `KVM_SET_TSS_ADDR` failed.
    #[error(
        "cannot place KVM's task state at {:#x} (KVM_SET_TSS_ADDR)",
        layout::TSS_START
    )]
    Tss(#[source] kvm_ioctls::Error),
    /// `KVM_SET_IDENTITY_MAP_ADDR` failed.
    #[error(
        "cannot place KVM's identity map at {:#x} (KVM_SET_IDENTITY_MAP_ADDR)",
        layout::IDENTITY_MAP_START
    )]
    IdentityMap(#[source] kvm_ioctls::Error),
    /// `KVM_CREATE_IRQCHIP` failed.
    #[error("cannot create the interrupt controllers in the kernel (KVM_CREATE_IRQCHIP)")]
    Irqchip(#[source] kvm_ioctls::Error),
    /// `KVM_SET_IRQCHIP` failed.
    #[error("cannot mask the lines of the PICs (KVM_SET_IRQCHIP)")]
    Pic(#[source] kvm_ioctls::Error),
    /// A split irqchip was asked for on a host that has none.
    #[error(
        "this host's KVM lacks KVM_CAP_SPLIT_IRQCHIP: use the interrupt controllers in the kernel"
    )]
    NoSplitIrqchip,
    /// Enabling the split irqchip failed.
    #[error("cannot split the interrupt controllers (KVM_CAP_SPLIT_IRQCHIP)")]
    SplitIrqchip(#[source] kvm_ioctls::Error),
    /// Enabling the x2APIC interface failed.
    #[error("cannot enable 32-bit APIC ids (KVM_CAP_X2APIC_API)")]
    X2apic(#[source] kvm_ioctls::Error),
    /// `KVM_CREATE_PIT2` failed.
    #[error("cannot create the interval timer (KVM_CREATE_PIT2)")]
    Pit(#[source] kvm_ioctls::Error),
}

/// Where the interrupt controllers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqchipMode {
    /// PIC, I/O APIC and local APICs in the kernel.
    Kernel,
    /// Only the local APICs in the kernel; the I/O APIC is a device of the VMM and there is no PIC
    /// and no PIT.
    Split,
}

/// What KVM wants to know before the first memory slot: pages for Intel processors that cannot run
/// real mode in a guest.
///
/// # Errors
/// [`VmError`] when KVM refuses.
pub fn before_memory(vm: &VmFd) -> Result<(), VmError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP_START)
        .map_err(VmError::IdentityMap)?;
    // On a 64-bit host, the only one there is, this cast keeps the value.
    vm.set_tss_address(layout::TSS_START as usize)
        .map_err(VmError::Tss)
}

/// Create the interrupt controllers: after the memory slots (see the head of this module), before
/// the first vCPU.
///
/// # Errors
/// [`VmError`] when KVM refuses, or has no split irqchip though one is asked for.
pub fn create_irqchip(
    vm: &VmFd,
    mode: IrqchipMode,
    capabilities: &Capabilities,
) -> Result<(), VmError> {
    match mode {
        IrqchipMode::Kernel => {
            vm.create_irq_chip().map_err(VmError::Irqchip)?;
            mask_pics(vm)?;
        }
        IrqchipMode::Split if !capabilities.split_irqchip => return Err(VmError::NoSplitIrqchip),
        IrqchipMode::Split => enable(vm, KVM_CAP_SPLIT_IRQCHIP, u64::from(layout::IOAPIC_PINS))
            .map_err(VmError::SplitIrqchip)?,
    }
    if capabilities.x2apic_api {
        let wanted = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(vm, KVM_CAP_X2APIC_API, u64::from(wanted)).map_err(VmError::X2apic)?;
    }
    Ok(())
}

/// Mask all lines of both PICs, as firmware leaves them. After reset they are open with vectors from
/// 0 on, and LINT0 lets the PIC's interrupts through; a guest that does not program the PIC, which
/// Linux on hardware-reduced ACPI does not, would take a line's interrupt for an exception.
fn mask_pics(vm: &VmFd) -> Result<(), VmError> {
    // The bits are the lines that can be level-triggered, as KVM sets them when it creates a PIC.
    for (chip_id, elcr_mask) in [
        (KVM_IRQCHIP_PIC_MASTER, 0xf8),
        (KVM_IRQCHIP_PIC_SLAVE, 0xde),
    ] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        chip.chip.pic = kvm_pic_state {
            imr: 0xff,
            elcr_mask,
            ..Default::default()
        };
        vm.set_irqchip(&chip).map_err(VmError::Pic)?;
    }
    Ok(())
}

/// Create the interval timer, after the interrupt controllers and only in [`IrqchipMode::Kernel`].
/// The speaker port is answered by KVM too: guests gate a calibration of their clocks with it.
///
/// # Errors
/// [`VmError::Pit`] when KVM refuses.
pub fn create_pit(vm: &VmFd) -> Result<(), VmError> {
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(config).map_err(VmError::Pit)
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}
