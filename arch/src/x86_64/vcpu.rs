//! A vCPU's state when its guest starts.
//!
//! [`VcpuTemplate::new`] gathers once what all vCPUs share; [`configure`] then runs once for each,
//! on the thread that builds the machine. An ioctl costs several microseconds, so what a new vCPU
//! has already is not written: the FPU (FCW 0x37f, MXCSR 0x1f80), the run state (the boot processor
//! runs, the others wait for INIT and SIPI, with the local APICs in the kernel in both irqchip
//! modes), and everything but CPUID and MSRs of the other processors, which INIT resets.
//! arch/tests/kvm holds KVM to that.

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::capabilities::Capabilities;
use crate::cpu_template::CpuidChange;
use crate::cpuid::{CpuidError, CpuidTemplate};
use crate::interrupts;
use crate::msr::{BootMsrs, MsrError};
use crate::topology::Topology;
use crate::vm::IrqchipMode;

/// A vCPU could not be configured.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The CPUID template is at fault.
    #[error("cannot prepare CPUID for vCPU {index}")]
    Cpuid {
        /// Index of the vCPU.
        index: u16,
        /// Cause.
        #[source]
        source: CpuidError,
    },
    /// An MSR could not be written.
    #[error("cannot set the MSRs of vCPU {index}")]
    Msr {
        /// Index of the vCPU.
        index: u16,
        /// Cause.
        #[source]
        source: MsrError,
    },
    /// KVM refused another part of the state.
    #[error("KVM refuses {ioctl} on vCPU {index}")]
    Ioctl {
        /// Index of the vCPU.
        index: u16,
        /// Name of the ioctl.
        ioctl: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// What cannot be gathered for a guest's vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// MSRs.
    #[error(transparent)]
    Msr(#[from] MsrError),
}

/// Everything that all vCPUs of a guest share.
#[derive(Clone, Debug)]
pub struct VcpuTemplate {
    /// CPUID, topology included.
    pub cpuid: CpuidTemplate,
    /// MSRs that are written before the guest starts.
    pub msrs: BootMsrs,
}

impl VcpuTemplate {
    /// Ask KVM and normalise its answers, with the `changes` of a CPU template: it needs only `&Kvm` and may run on another thread while
    /// the VM is created.
    ///
    /// # Errors
    /// [`TemplateError`] when KVM does not answer.
    pub fn new(
        kvm: &Kvm,
        topology: &Topology,
        capabilities: &Capabilities,
        tsc_khz: Option<u32>,
        changes: &[CpuidChange],
    ) -> Result<Self, TemplateError> {
        let cpuid = CpuidTemplate::new(kvm, topology, capabilities, tsc_khz, changes)?;
        let msrs = BootMsrs::new(kvm, cpuid.has_mtrr())?;
        Ok(Self { cpuid, msrs })
    }
}

/// How the boot processor enters the guest.
pub struct Boot<'a> {
    /// Changes the segment and control registers and returns the general ones, as a boot protocol
    /// wants them.
    pub enter: &'a dyn Fn(&mut kvm_sregs) -> kvm_regs,
    /// Where the interrupt controllers are, for the local APIC's pins.
    pub irqchip: IrqchipMode,
}

/// Configure the vCPU with this index, which was created with the id [`Topology::apic_id`]. `boot` is
/// given for index 0 alone.
///
/// # Errors
/// [`VcpuError`] names the vCPU and what KVM refused.
pub fn configure(
    fd: &VcpuFd,
    index: u16,
    template: &VcpuTemplate,
    boot: Option<&Boot<'_>>,
) -> Result<(), VcpuError> {
    let failed = |ioctl| {
        move |source| VcpuError::Ioctl {
            index,
            ioctl,
            source,
        }
    };
    let cpuid = template
        .cpuid
        .for_vcpu(index)
        .map_err(|source| VcpuError::Cpuid { index, source })?;
    // CPUID first: KVM checks the registers that follow against it.
    fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    template
        .msrs
        .write(fd)
        .map_err(|source| VcpuError::Msr { index, source })?;
    let Some(boot) = boot else { return Ok(()) };

    let mut sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let regs = (boot.enter)(&mut sregs);
    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;

    let mut lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    if interrupts::set_local_pins(&mut lapic, boot.irqchip) {
        fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
    }
    Ok(())
}
