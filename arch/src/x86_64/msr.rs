//! The model-specific registers a vCPU has when its guest starts.
//!
//! [`BootMsrs::new`] chooses them once for a host; the thread that builds the machine then writes
//! them all with one `KVM_SET_MSRS` a vCPU. Invariant: a register in the list is one that KVM says
//! it has, or one that the guest's CPUID promises.

use std::sync::OnceLock;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::cpu_template::Bits;

/// MSRs cannot be chosen or written.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// `KVM_GET_MSR_INDEX_LIST` failed.
    #[error("KVM does not list the MSRs it has (KVM_GET_MSR_INDEX_LIST)")]
    List(#[source] kvm_ioctls::Error),
    /// More registers than one `KVM_SET_MSRS` takes.
    #[error("{count} MSRs are too many for one KVM_SET_MSRS")]
    TooMany {
        /// Registers there are.
        count: usize,
    },
    /// `KVM_SET_MSRS` failed as a whole.
    #[error("cannot write the boot MSRs (KVM_SET_MSRS)")]
    Set(#[source] kvm_ioctls::Error),
    /// A template changes what KVM does not have.
    #[error("Template changes an MSR entry not supported by KVM: Register Address: {index:0x}")]
    NotSupported {
        /// Register number.
        index: u32,
    },
    /// KVM refused what a template makes of a register.
    #[error("KVM refuses {value:#x} in MSR {index:#x}, which the CPU template asks for")]
    Template {
        /// Register number.
        index: u32,
        /// Value that was to be written.
        value: u64,
    },
    /// KVM refused one register.
    #[error("KVM refuses {value:#x} in MSR {index:#x} ({name}), which a guest cannot do without")]
    Refused {
        /// Register number.
        index: u32,
        /// Register name in linux/arch/x86/include/asm/msr-index.h.
        name: &'static str,
        /// Value that was to be written.
        value: u64,
    },
}

/// When a register is written, and whether KVM may refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    /// If it is in KVM's list; then it must work.
    Listed,
    /// If it is in KVM's list; a refusal is passed over, since the guest then has the reset value.
    Optional,
    /// If CPUID promises memory type range registers, which KVM has but does not list. It must work:
    /// after reset these say that all memory is uncached.
    Mtrr,
}

struct BootMsr {
    index: u32,
    name: &'static str,
    value: u64,
    presence: Presence,
}

/// Fast string operations on, without which Linux drops `rep movsb`; branch trace store absent,
/// which KVM does not have.
const MISC_ENABLE: u64 = 1 | 1 << 11;
/// MTRRs on, fixed ranges off, all memory write-back. The fixed ranges would be uncached.
const MTRR_DEF_TYPE: u64 = 1 << 11 | 6;

const fn msr(index: u32, name: &'static str, value: u64, presence: Presence) -> BootMsr {
    BootMsr {
        index,
        name,
        value,
        presence,
    }
}

/// All of them. Those that are 0 after reset are here for a vCPU that ran before; one more register
/// in the same ioctl costs next to nothing.
const BOOT_MSRS: &[BootMsr] = &[
    msr(0x174, "MSR_IA32_SYSENTER_CS", 0, Presence::Listed),
    msr(0x175, "MSR_IA32_SYSENTER_ESP", 0, Presence::Listed),
    msr(0x176, "MSR_IA32_SYSENTER_EIP", 0, Presence::Listed),
    msr(0xc000_0081, "MSR_STAR", 0, Presence::Listed),
    msr(0xc000_0082, "MSR_LSTAR", 0, Presence::Listed),
    msr(0xc000_0083, "MSR_CSTAR", 0, Presence::Listed),
    msr(0xc000_0084, "MSR_SYSCALL_MASK", 0, Presence::Listed),
    msr(0xc000_0102, "MSR_KERNEL_GS_BASE", 0, Presence::Listed),
    // Writing 0 makes KVM start this vCPU's counter in step with the other vCPUs'.
    msr(0x10, "MSR_IA32_TSC", 0, Presence::Listed),
    msr(
        0x1a0,
        "MSR_IA32_MISC_ENABLE",
        MISC_ENABLE,
        Presence::Optional,
    ),
    msr(0x2ff, "MSR_MTRRdefType", MTRR_DEF_TYPE, Presence::Mtrr),
];

/// The boot MSRs of a host.
#[derive(Clone, Debug)]
pub struct BootMsrs {
    msrs: Msrs,
}

impl BootMsrs {
    /// Choose the registers this host offers. KVM's list is asked for once in a process.
    ///
    /// # Errors
    /// [`MsrError::List`] when KVM does not list its MSRs.
    pub fn new(kvm: &Kvm, has_mtrr: bool) -> Result<Self, MsrError> {
        Self::choose(indices(kvm)?, has_mtrr)
    }

    /// Write what a template makes of the values that this new vCPU has, before all others. `kvm` says
    /// which ones can be changed.
    ///
    /// # Errors
    /// [`MsrError::NotSupported`] names the register that KVM does not have.
    pub fn change(
        &mut self,
        kvm: &Kvm,
        vcpu: &VcpuFd,
        changes: &[(u32, Bits)],
    ) -> Result<(), MsrError> {
        if changes.is_empty() {
            return Ok(());
        }
        let listed = indices(kvm)?;
        let mut entries: Vec<kvm_msr_entry> = Vec::with_capacity(changes.len());
        for &(index, bits) in changes {
            let unsupported = MsrError::NotSupported { index };
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            let mut msr = batch(&[entry])?;
            let read = listed.contains(&index).then(|| vcpu.get_msrs(&mut msr));
            let (Some(Ok(1)), [entry]) = (read, msr.as_slice()) else {
                return Err(unsupported);
            };
            // Of several changes of one register each goes on from the one before.
            let before = entries.iter().rfind(|other| other.index == index);
            let data = bits.apply(before.unwrap_or(entry).data);
            entries.push(kvm_msr_entry { data, ..*entry });
        }
        entries.extend(self.msrs.as_slice());
        self.msrs = batch(&entries)?;
        Ok(())
    }

    fn choose(listed: &[u32], has_mtrr: bool) -> Result<Self, MsrError> {
        let offered = |msr: &&BootMsr| match msr.presence {
            Presence::Listed | Presence::Optional => listed.contains(&msr.index),
            Presence::Mtrr => has_mtrr,
        };
        let entries: Vec<_> = BOOT_MSRS
            .iter()
            .filter(offered)
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        Ok(Self {
            msrs: batch(&entries)?,
        })
    }

    /// Write them to a vCPU.
    ///
    /// # Errors
    /// [`MsrError::Refused`] names the register KVM did not take.
    pub fn write(&self, vcpu: &VcpuFd) -> Result<(), MsrError> {
        write_all(
            self.msrs.as_slice(),
            &|msrs| vcpu.set_msrs(msrs),
            &self.msrs,
        )
    }
}

/// Write `entries` (all in `whole`), going on behind an optional one that is refused.
fn write_all(
    entries: &[kvm_msr_entry],
    set: &dyn Fn(&Msrs) -> Result<usize, kvm_ioctls::Error>,
    whole: &Msrs,
) -> Result<(), MsrError> {
    // KVM stops at the first register it refuses and returns how many it wrote.
    let mut done = set(whole).map_err(MsrError::Set)?;
    while let Some(refused) = entries.get(done) {
        let (index, value) = (refused.index, refused.data);
        let own = |msr: &&BootMsr| (msr.index, msr.value) == (index, value);
        match BOOT_MSRS.iter().find(own) {
            None => return Err(MsrError::Template { index, value }),
            Some(known) if known.presence != Presence::Optional => {
                let name = known.name;
                return Err(MsrError::Refused { index, name, value });
            }
            Some(_) => {}
        }
        done += 1;
        let rest = entries.get(done..).unwrap_or_default();
        if !rest.is_empty() {
            done += set(&batch(rest)?).map_err(MsrError::Set)?;
        }
    }
    Ok(())
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, MsrError> {
    Msrs::from_entries(entries).map_err(|_| MsrError::TooMany {
        count: entries.len(),
    })
}

/// Numbers of the MSRs that KVM saves and restores, asked for once in a process.
///
/// # Errors
/// [`MsrError::List`] when KVM does not answer.
pub fn indices(kvm: &Kvm) -> Result<&'static [u32], MsrError> {
    static LIST: OnceLock<Vec<u32>> = OnceLock::new();
    if let Some(list) = LIST.get() {
        return Ok(list);
    }
    let list = kvm.get_msr_index_list().map_err(MsrError::List)?;
    Ok(LIST.get_or_init(|| list.as_slice().to_vec()))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn all_listed() -> Vec<u32> {
        BOOT_MSRS.iter().map(|msr| msr.index).collect()
    }

    /// Writes to a KVM that refuses one register; the result has what was written.
    fn write(boot: &BootMsrs, refused: u32) -> (Result<(), MsrError>, Vec<u32>) {
        let written = RefCell::new(Vec::new());
        let set = |msrs: &Msrs| {
            let taken = msrs
                .as_slice()
                .iter()
                .take_while(|msr| msr.index != refused);
            let taken: Vec<_> = taken.map(|msr| msr.index).collect();
            written.borrow_mut().extend(&taken);
            Ok(taken.len())
        };
        let result = write_all(boot.msrs.as_slice(), &set, &boot.msrs);
        (result, written.into_inner())
    }

    #[test]
    fn only_what_the_host_offers_is_chosen() {
        let boot = BootMsrs::choose(&[0x10, 0x174, 0x999], false).unwrap();
        let chosen: Vec<_> = boot.msrs.as_slice().iter().map(|msr| msr.index).collect();
        assert_eq!(chosen, [0x174, 0x10]);
        let boot = BootMsrs::choose(&[], true).unwrap();
        let [mtrr] = boot.msrs.as_slice() else {
            panic!("more than one")
        };
        assert_eq!((mtrr.index, mtrr.data), (0x2ff, 0x806));
    }

    #[test]
    fn nothing_refused_is_one_call() {
        let boot = BootMsrs::choose(&all_listed(), true).unwrap();
        let (result, written) = write(&boot, 0);
        assert!(result.is_ok());
        assert_eq!(written, all_listed());
    }

    #[test]
    fn an_optional_register_may_be_refused() {
        let boot = BootMsrs::choose(&all_listed(), true).unwrap();
        let (result, written) = write(&boot, 0x1a0);
        assert!(result.is_ok());
        assert_eq!(written.len(), BOOT_MSRS.len() - 1);
        assert!(written.contains(&0x2ff));
        // The last of the list, with nothing behind it.
        let boot = BootMsrs::choose(&all_listed(), false).unwrap();
        assert!(write(&boot, 0x1a0).0.is_ok());
    }

    #[test]
    fn a_needed_register_that_is_refused_is_named() {
        let boot = BootMsrs::choose(&all_listed(), true).unwrap();
        let text = write(&boot, 0xc000_0082).0.unwrap_err().to_string();
        assert!(
            text.contains("MSR_LSTAR") && text.contains("0xc0000082"),
            "{text}"
        );
        assert!(
            write(&boot, 0x2ff)
                .0
                .unwrap_err()
                .to_string()
                .contains("MSR_MTRRdefType")
        );
    }
}
