//! State of a paused machine, as plain data: taken from one VM, given to another.
//!
//! [`VcpuState`] is one vCPU's, for the thread that owns its descriptor; [`VmState`] has what the
//! vCPUs share: kvmclock and, where they are in the kernel, the interrupt controllers and the timer.
//! Taking: all vCPUs stand still and have completed what they left the guest for; then their states
//! and the VM's in any order. Giving: guest memory has its slots; then [`VmState::shift`] once, the
//! vCPUs' states in any order, [`VmState::restore`] behind them all (a line that waits in the I/O
//! APIC goes to a local APIC that is complete), and `KVM_KVMCLOCK_CTRL` before the guest runs.
//! State may come from a file that nobody vouches for: what it says is bounded here, checked by KVM,
//! and refused with a [`StateError`].

mod check;
mod msrs;
mod nested;
mod raw;
mod vcpu;
mod vm;

use std::fmt;
use std::sync::OnceLock;

use kvm_ioctls::Kvm;

pub use self::check::HostCpuid;
pub use self::vcpu::{Tsc, VcpuState};
pub use self::vm::{ClockPolicy, ClockShift, KernelChips, VmState};
use crate::capabilities::Capabilities;
use crate::cpuid::CpuidError;
use crate::msr::MsrError;

/// State could not be taken or given, or does not fit this host.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The host does not say which MSRs it has.
    #[error(transparent)]
    Msrs(#[from] MsrError),
    /// The host does not say which CPUID it supports.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// KVM refused a request on a vCPU.
    #[error("KVM refuses {ioctl} with the state of vCPU {vcpu}")]
    Vcpu {
        /// Index of the vCPU.
        vcpu: u16,
        /// Name of the ioctl.
        ioctl: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused a request on the VM.
    #[error("KVM refuses {ioctl} with the state of the VM")]
    Vm {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A machine's state with too few vCPUs.
    #[error("The saved state has no vCPU {vcpu}")]
    NoVcpu {
        /// Index of the vCPU.
        vcpu: u16,
    },
    /// KVM refused the value of one MSR.
    #[error("KVM refuses {value:#x} in MSR {index:#x} of vCPU {vcpu}")]
    MsrRefused {
        /// Index of the vCPU.
        vcpu: u16,
        /// Register number.
        index: u32,
        /// Value that was to be written.
        value: u64,
    },
    /// The state has an MSR that this host does not save.
    #[error(
        "vCPU {vcpu} has MSR {index:#x}, which this host's KVM does not: use a host with the same \
         processor and a kernel at least as new"
    )]
    MsrUnknown {
        /// Index of the vCPU.
        vcpu: u16,
        /// Register number.
        index: u32,
    },
    /// A list is longer than any VM's.
    #[error("vCPU {vcpu} has {count} {what}, and {most} is the most there can be")]
    TooMany {
        /// Index of the vCPU.
        vcpu: u16,
        /// What the list has.
        what: &'static str,
        /// Entries there are.
        count: usize,
        /// Entries there may be.
        most: usize,
    },
    /// The extended state does not have the size of a processor's.
    #[error(
        "vCPU {vcpu} has {found} bytes of extended state (XSAVE), this host has {wanted}: use a host \
         with the same processor"
    )]
    Xsave {
        /// Index of the vCPU.
        vcpu: u16,
        /// Bytes in the state.
        found: usize,
        /// Bytes on this host.
        wanted: usize,
    },
    /// The state of a guest's own virtual machines is none.
    #[error("vCPU {vcpu} has a state of virtual machines of its own whose length is wrong")]
    Nested {
        /// Index of the vCPU.
        vcpu: u16,
    },
    /// The TSC has another frequency, and this host cannot change it.
    #[error(
        "the guest's TSC has {saved} kHz, this host's has {host} kHz and KVM cannot change it: use a \
         host of the same frequency"
    )]
    TscFrequency {
        /// Frequency in the state, in kHz.
        saved: u32,
        /// Frequency of this host, in kHz.
        host: u32,
    },
    /// The state needs what this host's KVM lacks.
    #[error("the state needs {0}, which this host's KVM lacks")]
    Capability(&'static str),
    /// The processor is another vendor's.
    #[error(
        "the guest's processor is from {saved}, this host's from {host}: use a host of the same vendor"
    )]
    Vendor {
        /// Vendor in the state's CPUID.
        saved: String,
        /// Vendor in the host's CPUID.
        host: String,
    },
    /// The guest has been promised what this host lacks; all of it is listed.
    #[error("this host lacks what the guest's processor has: {0}")]
    Features(MissingFeatures),
}

/// A bit of a CPUID register that a guest has and a host lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf.
    pub subleaf: u32,
    /// Register: `eax`, `ebx`, `ecx` or `edx`.
    pub register: &'static str,
    /// Number of the bit.
    pub bit: u32,
    /// Name as in Linux's `/proc/cpuinfo`, where it has a common one.
    pub name: Option<&'static str>,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            leaf,
            subleaf,
            register,
            bit,
            name,
        } = self;
        if let Some(name) = name {
            write!(f, "{name} ")?;
        }
        write!(f, "(CPUID {leaf:#x}.{subleaf:#x} {register} bit {bit})")
    }
}

/// Features a host lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingFeatures(pub Vec<Feature>);

impl fmt::Display for MissingFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, feature) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{feature}")?;
        }
        Ok(())
    }
}

/// What taking and giving state needs to know of a host, asked once. It can be shared by the threads
/// of all vCPUs.
#[derive(Debug)]
pub struct Context {
    msrs: msrs::MsrList,
    /// Bytes of the extended state; 0 when the 4 KiB interface is all there is.
    xsave2_size: usize,
    xcrs: bool,
    nested_state: bool,
    tsc_control: bool,
    get_tsc_khz: bool,
    /// Frequency that a new vCPU's TSC has, once one was asked.
    host_tsc_khz: OnceLock<u32>,
}

impl Context {
    /// Ask the host.
    ///
    /// # Errors
    /// [`StateError::Msrs`] when KVM does not list its MSRs.
    pub fn new(kvm: &Kvm, capabilities: &Capabilities) -> Result<Self, StateError> {
        Ok(Self {
            msrs: msrs::MsrList::new(crate::msr::indices(kvm)?),
            xsave2_size: usize::try_from(capabilities.xsave2_size).unwrap_or(0),
            xcrs: capabilities.xcrs,
            nested_state: capabilities.nested_state,
            tsc_control: capabilities.tsc_control,
            get_tsc_khz: capabilities.get_tsc_khz,
            host_tsc_khz: OnceLock::new(),
        })
    }
}

#[cfg(test)]
mod tests;
