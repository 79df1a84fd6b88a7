//! What a machine needs of this host beside memory, checked before anything is made.

use arch::capabilities::Capabilities;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Irqchip, MachineConfig};

/// Files that a machine without vCPUs has open, with those it opens on its way, rounded up.
const OPEN_FILES: u64 = 32;

/// This host cannot run such a machine.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// More vCPUs than this host runs.
    #[error("{asked} vCPUs cannot be had: KVM on this host runs at most {most} in one VM")]
    TooManyVcpus {
        /// As asked.
        asked: u16,
        /// As KVM says.
        most: u32,
    },
    /// The split interrupt controller is not to be had.
    #[error("KVM on this host has no split interrupt controller: use --irqchip kernel")]
    NoSplitIrqchip,
    /// Too few open files allowed.
    #[error(
        "A VM with {vcpus} vCPUs and these devices needs {need} open files, but this process may have only {limit}: \
         raise the limit (ulimit -n, or LimitNOFILE of the service)"
    )]
    OpenFiles {
        /// As asked.
        vcpus: u16,
        /// Files needed.
        need: u64,
        /// The hard limit.
        limit: u64,
    },
    /// The limit cannot be asked or changed.
    #[error("Cannot raise the limit on open files")]
    SetOpenFiles(#[source] Errno),
}

/// Checks `machine` against what KVM can do.
pub fn check(machine: &MachineConfig, kvm: &Capabilities) -> Result<(), LimitError> {
    let (asked, most) = (machine.vcpu_count, kvm.max_vcpus);
    if u32::from(asked) > most {
        return Err(LimitError::TooManyVcpus { asked, most });
    }
    if machine.irqchip == Irqchip::Split && !kvm.split_irqchip {
        return Err(LimitError::NoSplitIrqchip);
    }
    Ok(())
}

/// Raises the limit on open files where `machine`, whose virtio devices need so many, needs more than
/// are allowed now.
pub fn allow_open_files(machine: &MachineConfig, devices: u64) -> Result<(), LimitError> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(LimitError::SetOpenFiles)?;
    match missing_files(machine, devices, soft, hard)? {
        None => Ok(()),
        Some(need) => {
            setrlimit(Resource::RLIMIT_NOFILE, need, hard).map_err(LimitError::SetOpenFiles)
        }
    }
}

/// Raises the limit on open files as far as this process may, and returns it. Where it cannot be
/// asked or raised, it stays as it is.
pub fn allow_most_open_files() -> u64 {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => hard,
            Err(_) => soft,
        },
        Ok((soft, _)) => soft,
        Err(_) => 0,
    }
}

/// The soft limit to set, if the present one is too low.
fn missing_files(
    machine: &MachineConfig,
    devices: u64,
    soft: u64,
    hard: u64,
) -> Result<Option<u64>, LimitError> {
    let vcpus = machine.vcpu_count;
    let need = OPEN_FILES + u64::from(vcpus) + devices;
    if hard < need {
        let limit = hard;
        return Err(LimitError::OpenFiles { vcpus, need, limit });
    }
    Ok((soft < need).then_some(need))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kvm(max_vcpus: u32, split_irqchip: bool) -> Capabilities {
        Capabilities {
            recommended_vcpus: 4,
            max_vcpus,
            max_vcpu_id: 255,
            memory_slots: 32,
            split_irqchip,
            x2apic_api: false,
            tsc_deadline_timer: false,
            tsc_control: false,
            get_tsc_khz: false,
            sync_regs: 0,
            dirty_ring: 0,
            manual_dirty_log: false,
            xcrs: false,
            xsave2_size: 0,
            nested_state: false,
            kvmclock_ctrl: false,
            user_space_msr: false,
            coalesced_pio: false,
            irqfd_resample: false,
            readonly_memory: false,
            guest_memfd: false,
        }
    }

    fn machine(vcpu_count: u16) -> MachineConfig {
        MachineConfig {
            vcpu_count,
            ..MachineConfig::default()
        }
    }

    #[test]
    fn a_host_with_few_vcpus_is_named_with_both_numbers() {
        assert!(check(&machine(8), &kvm(8, true)).is_ok());
        let text = check(&machine(9), &kvm(8, true)).unwrap_err().to_string();
        assert!(
            text.contains("9 vCPUs") && text.contains("at most 8"),
            "{text}"
        );
    }

    #[test]
    fn a_host_without_a_split_controller_is_told_of_the_other() {
        let text = check(&machine(1), &kvm(8, false)).unwrap_err().to_string();
        assert!(text.contains("--irqchip kernel"), "{text}");
        let kernel = MachineConfig {
            irqchip: Irqchip::Kernel,
            ..machine(1)
        };
        assert!(check(&kernel, &kvm(8, false)).is_ok());
    }

    #[test]
    fn the_limit_on_open_files_is_raised_as_far_as_needed_and_allowed() {
        assert_eq!(missing_files(&machine(1), 0, 1024, 4096).unwrap(), None);
        assert_eq!(
            missing_files(&machine(254), 0, 256, 4096).unwrap(),
            Some(286)
        );
        assert_eq!(
            missing_files(&machine(8), 1000, 1024, 4096).unwrap(),
            Some(1040)
        );
        let text = missing_files(&machine(4), 0, 8, 16)
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("needs 36") && text.contains("only 16"),
            "{text}"
        );
        assert!(text.contains("ulimit -n"), "{text}");
    }
}
