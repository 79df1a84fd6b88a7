//! An end that the guest did not ask for, as a report that a person can use.

use std::fmt;

use arch::report::{ReportError, VcpuReport};

/// What KVM said.
#[derive(Debug, thiserror::Error)]
pub enum FailureCause {
    /// A fault while delivering a double fault, or a guest that asked for a shutdown cycle.
    #[error("triple fault: the processor met a fault that no handler could take")]
    TripleFault,
    /// The processor refused the guest's state.
    #[error("the processor refused to enter the guest (hardware reason {reason:#x}, CPU {cpu})")]
    EntryFailed {
        /// VM-entry failure code of the processor.
        reason: u64,
        /// Host CPU.
        cpu: u32,
    },
    /// KVM gave up.
    #[error("KVM internal error {suberror}{}{}", suberror_text(*suberror), data_text(data))]
    Internal {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// What KVM adds to it.
        data: Vec<u64>,
    },
    /// A guest access to memory that KVM cannot map.
    #[error("KVM cannot map {size:#x} bytes of guest memory at {gpa:#x} (flags {flags:#x})")]
    MemoryFault {
        /// KVM_MEMORY_EXIT_FLAG_*.
        flags: u64,
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// The same, of a KVM that does not say where.
    #[error(
        "KVM cannot reach guest memory: the host has no page for it (reserved huge pages, or room \
         for a file behind persistent memory), or the guest wrote to memory that it has not plugged"
    )]
    Unreachable,
    /// KVM_EXIT_SYSTEM_EVENT of an unknown kind.
    #[error("KVM system event {kind}, which bulle has not asked for")]
    SystemEvent {
        /// KVM_SYSTEM_EVENT_*.
        kind: u32,
    },
    /// An exit that bulle does not enable.
    #[error("KVM exit {exit}, which bulle has not asked for")]
    Unhandled {
        /// The exit.
        exit: String,
    },
    /// The ioctl failed.
    #[error("KVM_RUN failed: {0}")]
    RunFailed(kvm_ioctls::Error),
}

fn suberror_text(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
            " (an instruction that KVM must emulate and cannot: on a host without VT-x or AMD-V, \
             KVM emulates all guest kernel code)"
        }
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => " (an exception while delivering another)",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => " (an exit while delivering an event)",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => " (unexpected exit reason)",
        _ => "",
    }
}

fn data_text(data: &[u64]) -> String {
    if data.is_empty() {
        return String::new();
    }
    let words: Vec<String> = data.iter().map(|word| format!("{word:#x}")).collect();
    format!(", data {}", words.join(" "))
}

/// The failure of one vCPU.
#[derive(Debug)]
pub struct Failure {
    /// Index of the vCPU.
    pub vcpu: u16,
    /// What KVM said.
    pub cause: FailureCause,
    /// Registers and the bytes at the instruction pointer.
    pub state: Result<(VcpuReport, Vec<u8>), ReportError>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vCPU {}: {}", self.vcpu, self.cause)?;
        match &self.state {
            Ok((report, code)) => {
                let code: Vec<String> = code.iter().map(|byte| format!("{byte:02x}")).collect();
                write!(f, "{report}\nCode: {}", code.join(" "))
            }
            Err(error) => error.fmt(f),
        }
    }
}
