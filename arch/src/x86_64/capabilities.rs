//! What the host's KVM can do, asked once before anything is created.
//!
//! Owner: the thread that opens `/dev/kvm`. [`check`] refuses a host that lacks a capability bulle
//! cannot do without and names every missing one at once; what bulle can do without is reported in
//! [`Capabilities`], so that later code asks the host and never guesses from a processor's name.

use std::borrow::Cow;
use std::fmt;

use kvm_bindings::{KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};
use kvm_ioctls::{Cap, Kvm};

/// The host's KVM cannot run bulle.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The file called /dev/kvm does not know KVM's requests.
    #[error(
        "/dev/kvm does not answer as KVM does, so it is another file or device: remove it, and \
         load the kvm module or pass the device into this container"
    )]
    NotKvm,
    /// The kernel speaks another KVM API version.
    #[error(
        "/dev/kvm speaks API version {found}, bulle needs version {needed}: use a Linux kernel of \
         2.6.22 or later"
    )]
    ApiVersion {
        /// Version the kernel reports.
        found: i32,
        /// Version bulle needs.
        needed: u32,
    },
    /// Capabilities are missing; all of them are listed.
    #[error("this host's KVM lacks what bulle needs: {0}; use a newer host kernel (5.10 or later)")]
    Missing(MissingCapabilities),
}

/// Names of the capabilities a host lacks, as in `linux/kvm.h`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingCapabilities(pub Vec<Cow<'static, str>>);

impl fmt::Display for MissingCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// What the host offers beyond the needed capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Recommended highest number of vCPUs of one VM.
    pub recommended_vcpus: u32,
    /// Highest number of vCPUs of one VM.
    pub max_vcpus: u32,
    /// One more than the highest vCPU id, which is the vCPU's APIC id.
    pub max_vcpu_id: u32,
    /// Highest number of memory slots of one VM.
    pub memory_slots: u32,
    /// The local APICs can be in the kernel while PIC, I/O APIC and PIT are in userspace.
    pub split_irqchip: bool,
    /// 32-bit APIC ids in the local APIC's and MSI's interfaces.
    pub x2apic_api: bool,
    /// The local APIC's timer has TSC-deadline mode.
    pub tsc_deadline_timer: bool,
    /// The guest's TSC frequency can be set.
    pub tsc_control: bool,
    /// The TSC frequency can be read.
    pub get_tsc_khz: bool,
    /// Register sets that `kvm_run` can carry (`KVM_SYNC_X86_*` bits); 0 when there is none.
    pub sync_regs: u32,
    /// Largest dirty ring in bytes per vCPU; 0 when there is none.
    pub dirty_ring: u32,
    /// Dirty logging can be cleared page by page (`KVM_CLEAR_DIRTY_LOG`).
    pub manual_dirty_log: bool,
    /// The extended control registers can be read and written: the host's processor has XSAVE.
    pub xcrs: bool,
    /// Bytes of the extended state (`KVM_GET_XSAVE2`); 0 when the 4 KiB interface is all there is.
    pub xsave2_size: u32,
    /// The state of guests of the guest can be read and written (`KVM_CAP_NESTED_STATE`).
    pub nested_state: bool,
    /// `KVM_KVMCLOCK_CTRL`, which tells a guest that it was stopped.
    pub kvmclock_ctrl: bool,
    /// MSR accesses can be handed to userspace.
    pub user_space_msr: bool,
    /// Exits for port writes can be batched in a ring.
    pub coalesced_pio: bool,
    /// An irqfd can be level-triggered with a resample event.
    pub irqfd_resample: bool,
    /// Memory slots can be read-only.
    pub readonly_memory: bool,
    /// `kvm_guest_memfd` exists.
    pub guest_memfd: bool,
}

/// Everything bulle cannot run without, with its name for the message.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (
        Cap::DestroyMemoryRegionWorks,
        "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
    ),
    (
        Cap::JoinMemoryRegionsWorks,
        "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS",
    ),
];

/// Ask the host's KVM for everything bulle needs or can use.
///
/// # Errors
/// [`HostError::ApiVersion`] when the API is not version 12, [`HostError::Missing`] with the names
/// of all needed capabilities the host lacks.
pub fn check(kvm: &Kvm) -> Result<Capabilities, HostError> {
    check_with(kvm, &[])
}

/// [`check`], where capabilities by number are needed besides, or need not be there though bulle
/// thinks so; of two that contradict each other the last counts.
///
/// # Errors
/// As [`check`].
pub fn check_with(kvm: &Kvm, changes: &[(u32, bool)]) -> Result<Capabilities, HostError> {
    check_version(kvm.get_api_version())?;
    from_host(&|cap| kvm.check_extension_raw(cap), changes)
}

/// Which capabilities are needed, by number and name.
fn needed(changes: &[(u32, bool)]) -> Vec<(libc::c_ulong, Cow<'static, str>)> {
    let own = NEEDED.iter();
    let mut needed: Vec<_> = own
        .map(|(cap, name)| (*cap as libc::c_ulong, Cow::Borrowed(*name)))
        .collect();
    for &(number, is_needed) in changes {
        let cap = libc::c_ulong::from(number);
        let known = needed.iter().any(|(other, _)| *other == cap);
        if is_needed && !known {
            needed.push((cap, format!("capability {number} (KVM_CAP_*)").into()));
        } else if !is_needed {
            needed.retain(|(other, _)| *other != cap);
        }
    }
    needed
}

fn check_version(found: i32) -> Result<(), HostError> {
    match u32::try_from(found) {
        Ok(KVM_API_VERSION) => Ok(()),
        Ok(_) => Err(HostError::ApiVersion {
            found,
            needed: KVM_API_VERSION,
        }),
        Err(_) => Err(HostError::NotKvm),
    }
}

/// `ask` is `KVM_CHECK_EXTENSION`: 0 or below for "no", else "yes" or a number.
fn from_host(
    ask: &dyn Fn(libc::c_ulong) -> i32,
    changes: &[(u32, bool)],
) -> Result<Capabilities, HostError> {
    let number = |cap: Cap| u32::try_from(ask(cap as libc::c_ulong)).unwrap_or(0);
    let has = |cap: Cap| number(cap) > 0;
    let missing: Vec<_> = needed(changes)
        .into_iter()
        .filter(|(cap, _)| ask(*cap) <= 0)
        .map(|(_, name)| name)
        .collect();
    if !missing.is_empty() {
        return Err(HostError::Missing(MissingCapabilities(missing)));
    }
    // Where a number is not reported, linux/Documentation/virt/kvm/api.rst (KVM_CREATE_VCPU) says
    // what to assume: 4 recommended vCPUs; the maximum is that, and so is the highest id.
    let or = |value: u32, fallback: u32| if value == 0 { fallback } else { value };
    let recommended_vcpus = or(number(Cap::NrVcpus), 4);
    let max_vcpus = or(number(Cap::MaxVcpus), recommended_vcpus);
    let acq_rel = u32::try_from(ask(libc::c_ulong::from(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)));
    Ok(Capabilities {
        recommended_vcpus,
        max_vcpus,
        max_vcpu_id: or(number(Cap::MaxVcpuId), max_vcpus),
        memory_slots: or(number(Cap::NrMemslots), 32),
        split_irqchip: has(Cap::SplitIrqchip),
        x2apic_api: has(Cap::X2ApicApi),
        tsc_deadline_timer: has(Cap::TscDeadlineTimer),
        tsc_control: has(Cap::TscControl),
        get_tsc_khz: has(Cap::GetTscKhz),
        sync_regs: number(Cap::SyncRegs),
        dirty_ring: number(Cap::DirtyLogRing).max(acq_rel.unwrap_or(0)),
        manual_dirty_log: ask(libc::c_ulong::from(
            kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        )) > 0,
        xcrs: has(Cap::Xcrs),
        xsave2_size: number(Cap::Xsave2),
        nested_state: has(Cap::NestedState),
        kvmclock_ctrl: has(Cap::KvmclockCtrl),
        user_space_msr: has(Cap::X86UserSpaceMsr),
        coalesced_pio: has(Cap::CoalescedPio),
        irqfd_resample: has(Cap::IrqfdResample),
        readonly_memory: has(Cap::ReadonlyMem),
        guest_memfd: has(Cap::GuestMemfd),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_capability_is_named() {
        let lacks = [
            Cap::Irqfd as libc::c_ulong,
            Cap::ImmediateExit as libc::c_ulong,
        ];
        let error = from_host(&|cap| i32::from(!lacks.contains(&cap)), &[]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("KVM_CAP_IRQFD, KVM_CAP_IMMEDIATE_EXIT"),
            "{text}"
        );
        assert!(!text.contains("KVM_CAP_XSAVE"), "{text}");
    }

    #[test]
    fn a_refused_question_counts_as_missing() {
        let HostError::Missing(missing) = from_host(&|_| -1, &[]).unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(missing.0.len(), NEEDED.len());
    }

    #[test]
    fn optional_capabilities_may_be_absent_and_numbers_have_fallbacks() {
        let needed: Vec<_> = NEEDED
            .iter()
            .map(|(cap, _)| *cap as libc::c_ulong)
            .collect();
        let found = from_host(&|cap| i32::from(needed.contains(&cap)), &[]).unwrap();
        assert!(!found.split_irqchip && !found.tsc_deadline_timer && !found.x2apic_api);
        assert_eq!(
            (found.recommended_vcpus, found.max_vcpus, found.max_vcpu_id),
            (4, 4, 4)
        );
        assert_eq!(
            (found.sync_regs, found.dirty_ring, found.memory_slots),
            (0, 0, 32)
        );
    }

    #[test]
    fn numbers_are_reported() {
        let ask = |cap| {
            if cap == Cap::MaxVcpus as libc::c_ulong {
                1024
            } else {
                7
            }
        };
        let found = from_host(&ask, &[]);
        let found = found.unwrap();
        assert_eq!((found.max_vcpus, found.sync_regs), (1024, 7));
    }

    #[test]
    fn what_is_needed_can_be_changed() {
        let irqfd = Cap::Irqfd as u32;
        let lacks = [irqfd, 9999].map(libc::c_ulong::from);
        let ask = |cap| i32::from(!lacks.contains(&cap));
        let text = |changes: &[_]| from_host(&ask, changes).unwrap_err().to_string();
        assert!(text(&[(9999, true)]).contains("KVM_CAP_IRQFD, capability 9999"));
        assert!(!text(&[(9999, true), (irqfd, false)]).contains("IRQFD"));
        assert!(from_host(&ask, &[(irqfd, false)]).is_ok());
        assert!(from_host(&ask, &[(9999, true), (irqfd, false), (9999, false)]).is_ok());
        assert!(!text(&[(irqfd, false), (irqfd, true)]).contains("KVM_CAP_IRQFD"));
    }

    #[test]
    fn another_api_version_is_refused() {
        assert!(check_version(12).is_ok());
        let text = check_version(11).unwrap_err().to_string();
        assert!(
            text.contains("version 11") && text.contains("version 12"),
            "{text}"
        );
        assert!(matches!(check_version(-1), Err(HostError::NotKvm)));
    }
}
