//! Whether a host can run a guest: what the guest's CPUID promised it against what the host's KVM
//! supports.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::vcpu::get_cpuid;
use super::{Feature, MissingFeatures, StateError, VcpuState};
use crate::cpuid::supported;

/// What a host's KVM can give to a vCPU.
#[derive(Debug)]
pub struct HostCpuid {
    /// Where to ask for more, when `supported` does not suffice.
    kvm: Option<Arc<Kvm>>,
    supported: Vec<kvm_cpuid_entry2>,
    /// What a guest was found to be promised that this host has: mostly the next one is too.
    known: Mutex<Vec<kvm_cpuid_entry2>>,
}

impl HostCpuid {
    /// Ask KVM.
    ///
    /// # Errors
    /// [`StateError::Cpuid`] when KVM does not answer.
    pub fn new(kvm: Arc<Kvm>) -> Result<Self, StateError> {
        let supported = supported(&kvm)?.to_vec();
        Ok(Self {
            kvm: Some(kvm),
            supported,
            known: Mutex::default(),
        })
    }

    /// What a vCPU has that got all that is supported. There are KVMs that give it more, such as those
    /// whose guests run the processor's own CPUID instruction.
    fn given(&self) -> Option<Vec<kvm_cpuid_entry2>> {
        let vcpu = self.kvm.as_ref()?.create_vm().ok()?.create_vcpu(0).ok()?;
        let supported = CpuId::from_entries(&self.supported).ok()?;
        vcpu.set_cpuid2(&supported).ok()?;
        get_cpuid(&vcpu).ok()
    }

    #[cfg(test)]
    pub(super) fn from_entries(entries: &[kvm_cpuid_entry2]) -> Self {
        Self {
            kvm: None,
            supported: entries.to_vec(),
            known: Mutex::default(),
        }
    }
}

/// A register whose bits are features.
struct Register {
    leaf: u32,
    subleaf: u32,
    name: &'static str,
    /// Bits that say nothing about the host: KVM or bulle answer for them, or the guest sets them.
    ignored: u32,
    /// Names from bit 0 on; `-` where there is none.
    bits: &'static str,
}

const fn register(
    leaf: u32,
    subleaf: u32,
    name: &'static str,
    ignored: u32,
    bits: &'static str,
) -> Register {
    Register {
        leaf,
        subleaf,
        name,
        ignored,
        bits,
    }
}

/// x2APIC, TSC deadline, OSXSAVE, hypervisor.
const LEAF_1_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31;
/// HTT, which says that there is more than one processor.
const LEAF_1_EDX: u32 = 1 << 28;
/// OSPKE.
const LEAF_7_ECX: u32 = 1 << 4;
/// CmpLegacy, which says that there is more than one processor.
const LEAF_8000_0001_ECX: u32 = 1 << 1;

/// Table: the registers with features, and the names of linux/arch/x86/include/asm/cpufeatures.h.
const REGISTERS: &[Register] = &[
    register(
        1,
        0,
        "ecx",
        LEAF_1_ECX,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid \
         dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand \
         hypervisor",
    ),
    register(
        1,
        0,
        "edx",
        LEAF_1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts \
         acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    register(
        7,
        0,
        "ebx",
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb \
         intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    register(
        7,
        0,
        "ecx",
        LEAF_7_ECX,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
         avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect \
         cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    register(
        7,
        0,
        "edx",
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - \
         amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities \
         core_capabilities spec_ctrl_ssbd",
    ),
    register(
        7,
        1,
        "eax",
        0,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs - \
         - amx_fp16 - avx_ifma - - lam",
    ),
    register(
        7,
        1,
        "edx",
        0,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - \
         - - avx10",
    ),
    register(
        7,
        2,
        "edx",
        0,
        "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    // Parts of the extended state, by their bit in XCR0 and IA32_XSS.
    register(
        0xd,
        0,
        "eax",
        0,
        "x87 sse-state avx-state bndregs bndcsr avx512-opmask avx512-zmm-hi256 avx512-hi16-zmm - \
         pkru-state - - - - - - - amx-tilecfg amx-tiledata",
    ),
    register(0xd, 1, "eax", 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    register(
        0xd,
        1,
        "ecx",
        0,
        "- - - - - - - - pt - pasid cet-user cet-supervisor",
    ),
    // What KVM offers to its guests (linux/arch/x86/include/uapi/asm/kvm_para.h).
    register(
        0x4000_0001,
        0,
        "eax",
        0,
        "kvmclock nop_io_delay mmu_op kvmclock2 async_pf steal_time pv_eoi pv_unhalt - pv_tlb_flush \
         async_pf_vmexit pv_send_ipi poll_control pv_sched_yield async_pf_int msi_ext_dest_id \
         hc_map_gpa_range migration_control - - - - - - kvmclock_stable",
    ),
    register(
        0x8000_0001,
        0,
        "ecx",
        LEAF_8000_0001_ECX,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop \
         skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc \
         perfctr_llc mwaitx",
    ),
    register(
        0x8000_0001,
        0,
        "edx",
        0,
        "fpu-amd vme-amd de-amd pse-amd tsc-amd msr-amd pae-amd mce-amd cx8-amd apic-amd - syscall \
         mtrr-amd pge-amd mca-amd cmov-amd pat-amd pse36-amd - mp nx - mmxext mmx-amd fxsr-amd \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    register(0x8000_0007, 0, "edx", 0, "- - - - - - - - constant_tsc"),
    register(
        0x8000_0008,
        0,
        "ebx",
        0,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
         amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no \
         ibpb_ret brs",
    ),
    register(
        0x8000_000a,
        0,
        "edx",
        0,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter \
         - pfthreshold avic - v_vmsave_vmload vgif x2avic - v_spec_ctrl",
    ),
    register(
        0x8000_0021,
        0,
        "eax",
        0,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr fsrs-amd \
         fsrc-amd - prefetchctlmsr",
    ),
];

impl Register {
    fn read(&self, entries: &[kvm_cpuid_entry2]) -> u32 {
        let found = entries
            .iter()
            .find(|e| e.function == self.leaf && e.index == self.subleaf);
        found.map_or(0, |entry| match self.name {
            "eax" => entry.eax,
            "ebx" => entry.ebx,
            "ecx" => entry.ecx,
            _ => entry.edx,
        })
    }

    /// Bits that `saved` has and `host` lacks.
    fn missing<'a>(
        &'a self,
        saved: &[kvm_cpuid_entry2],
        host: &[kvm_cpuid_entry2],
    ) -> impl Iterator<Item = Feature> + use<'a> {
        let missing = self.read(saved) & !self.read(host) & !self.ignored;
        (0..u32::BITS)
            .filter(move |bit| missing >> bit & 1 != 0)
            .map(|bit| Feature {
                leaf: self.leaf,
                subleaf: self.subleaf,
                register: self.name,
                bit,
                name: self
                    .bits
                    .split_ascii_whitespace()
                    .nth(bit as usize)
                    .filter(|name| *name != "-"),
            })
    }
}

/// The twelve characters of leaf 0.
fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let leaf = entries.iter().find(|e| e.function == 0);
    let bytes = leaf.map_or([[0; 4]; 3], |e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes));
    bytes.as_flattened().escape_ascii().to_string()
}

impl VcpuState {
    /// Whether a host has what this vCPU's CPUID promised its guest.
    ///
    /// # Errors
    /// [`StateError::Vendor`] or [`StateError::Features`], which lists all that the host lacks.
    pub fn check(&self, host: &HostCpuid) -> Result<(), StateError> {
        let known = || host.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (saved, supported) = (&self.cpuid[..], &host.supported[..]);
        if !saved.is_empty() && *known() == saved {
            return Ok(());
        }
        let vendors = (vendor(saved), vendor(supported));
        if vendors.0 != vendors.1 {
            return Err(StateError::Vendor {
                saved: vendors.0,
                host: vendors.1,
            });
        }
        let mut missing = missing(saved, supported);
        if !missing.is_empty()
            && let Some(given) = host.given()
        {
            missing = self::missing(saved, &given);
        }
        if missing.is_empty() {
            saved.clone_into(&mut known());
            Ok(())
        } else {
            Err(StateError::Features(MissingFeatures(missing)))
        }
    }
}

fn missing(saved: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<Feature> {
    REGISTERS
        .iter()
        .flat_map(|register| register.missing(saved, host))
        .collect()
}
