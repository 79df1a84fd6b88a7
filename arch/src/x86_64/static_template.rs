//! Static CPU templates: guests on several models of processors see what all of them have.
//!
//! Those of Firecracker by name and effect: what an instance of Amazon EC2 of that name sees, `S` and `CL`
//! with the mitigations that IA32_ARCH_CAPABILITIES tells of. Bits are named as in the Intel SDM (volume 2,
//! CPUID; volume 4, MSRs) and the AMD APM (volume 3, appendix E).

use std::arch::x86_64::__cpuid;

use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

use crate::cpu_template::{Bits, CpuTemplate, CpuidChange};

/// The host's processor is none that a template is for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StaticTemplateError {
    /// Another maker.
    #[error(
        "Failed to get CPU template: CPU vendor mismatched between actual CPU and CPU template. {name} \
         is for {vendor}, this is {found}: choose another, or None"
    )]
    Vendor {
        /// The template.
        name: &'static str,
        /// Whose processors it is for.
        vendor: &'static str,
        /// Whose this is.
        found: String,
    },
    /// Another processor of that maker.
    #[error(
        "Failed to get CPU template: The current CPU model is not permitted to apply the CPU template. \
         {name} is for {models}, this one's signature (CPUID leaf 1, EAX) is {found:#x}: choose \
         another, or None"
    )]
    Model {
        /// The template.
        name: &'static str,
        /// What it is for.
        models: String,
        /// What this is.
        found: u32,
    },
}

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

/// A model and its signature.
type Model = (&'static str, u32);
const SKYLAKE: Model = ("Skylake", 0x5_0654);
const CASCADE_LAKE: Model = ("Cascade Lake", 0x5_0657);
const ICE_LAKE: Model = ("Ice Lake", 0x6_06a6);
const MILAN: Model = ("Milan", 0xa0_0f11);
/// Families, models and stepping of a signature.
const SIGNATURE: u32 = 0x0fff_0fff;

/// Leaf, sub-leaf and flags of KVM, and what changes in EAX, EBX, ECX and EDX.
type Leaf = (u32, u32, u32, [Bits; 4]);

/// A static CPU template.
#[derive(Debug)]
pub struct StaticTemplate {
    name: &'static str,
    vendor: &'static str,
    models: &'static [Model],
    cpuid: &'static [Leaf],
    msrs: &'static [(u32, Bits)],
}

/// Nothing changes.
const KEEP: Bits = fixed(0, 0);
/// Processor type, families, model and stepping in EAX of leaf 1.
const VERSION: u64 = 0x0fff_3fff;
/// MTRR and MCE in EDX of leaf 1, which are set.
const MTRR_MCE: u64 = 1 << 12 | 1 << 7;
const INDEXED: u32 = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
const ARCH_CAPABILITIES: u32 = 0x10a;

const fn fixed(mask: u64, value: u64) -> Bits {
    Bits { mask, value }
}

const fn clear(bits: &[u8]) -> Bits {
    set(bits, 0)
}

/// Clears `bits` but those of `value`, which it sets.
const fn set(bits: &[u8], value: u64) -> Bits {
    let (mut mask, mut rest) = (value, bits);
    while let [bit, behind @ ..] = rest {
        mask |= 1 << *bit;
        rest = behind;
    }
    fixed(mask, value)
}

/// Haswell, as T2 instances have it.
const T2_FEATURES: Leaf = (
    0x1,
    0,
    0,
    [
        fixed(VERSION, 0x3_06f2),
        KEEP,
        // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2; CNXT-ID, SDBG, xTPR, PDCM, DCA.
        clear(&[2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18]),
        // PSN, DS, ACPI, SS, TM, IA-64, PBE.
        set(&[18, 21, 22, 27, 29, 30, 31], MTRR_MCE),
    ],
);

const T2_EXTENDED_FEATURES: Leaf = (
    0x7,
    0,
    INDEXED,
    [
        KEEP,
        // SGX, HLE, RTM, RDT-M, MPX, RDT-A, AVX512F and DQ, RDSEED, ADX, AVX512-IFMA, PCOMMIT, CLFLUSHOPT,
        // CLWB, PT, AVX512PF, ER and CD, SHA, AVX512BW and VL; ERMS is set.
        set(
            &[
                2, 4, 11, 12, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
            ],
            1 << 9,
        ),
        // AVX512-VBMI, UMIP, PKU, OSPKE, AVX512-VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512-VNNI, -BITALG and
        // -VPOPCNTDQ, LA57, RDPID, SGX-LC.
        clear(&[1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14, 16, 22, 30]),
        // AVX512-4VNNIW and -4FMAPS, FSRM, AVX512-VP2INTERSECT.
        clear(&[2, 3, 4, 8]),
    ],
);

/// States of MPX, AVX-512 and PKRU.
const STATES: Leaf = (
    0xd,
    0,
    INDEXED,
    [clear(&[3, 4, 5, 6, 7, 9]), KEEP, KEEP, KEEP],
);
/// XSAVEC, XGETBV with ECX 1, XSAVES.
const COMPACT_STATES: Leaf = (0xd, 1, INDEXED, [clear(&[1, 2, 3]), KEEP, KEEP, KEEP]);
/// WBNOINVD.
const T2_SIZES: Leaf = (0x8000_0008, 0, 0, [KEEP, clear(&[9]), KEEP, KEEP]);

/// Those of the family T2, with two leaves of their own.
const fn t2(ecx: Bits, edx: Bits, sizes: Leaf) -> [Leaf; 6] {
    [
        T2_FEATURES,
        T2_EXTENDED_FEATURES,
        STATES,
        COMPACT_STATES,
        (0x8000_0001, 0, 0, [KEEP, KEEP, ecx, edx]),
        sizes,
    ]
}

/// PREFETCHW, MONITORX; 1 GiB pages.
const T2_LEAVES: [Leaf; 6] = t2(clear(&[8, 29]), clear(&[26]), T2_SIZES);

/// As T2, with what only AMD has: SSE4A, misaligned SSE; MMXEXT, MMX, FXSR, FFXSR.
const T2CL_LEAVES: [Leaf; 6] = t2(
    clear(&[6, 7, 8, 29]),
    clear(&[22, 23, 24, 25, 26]),
    T2_SIZES,
);

/// As T2CL, with SVM; MMXEXT and FFXSR; CLZERO, WBNOINVD. RstrFpErrPtrs, IbrsPreferred, IbrsSameMode
/// and EferLmsleUnsupported are set.
const T2A_LEAVES: [Leaf; 6] = t2(
    clear(&[2, 6, 7, 8, 29]),
    clear(&[22, 25, 26]),
    (
        0x8000_0008,
        0,
        0,
        [
            KEEP,
            set(&[0, 9], 1 << 2 | 1 << 18 | 1 << 19 | 1 << 20),
            KEEP,
            KEEP,
        ],
    ),
);

/// Ivy Bridge, as C3 instances have it.
const C3_FEATURES: Leaf = (
    0x1,
    0,
    0,
    [
        fixed(VERSION, 0x3_06e4),
        KEEP,
        // DTES64, MONITOR, DS-CPL, VMX, TM2, CNXT-ID, SDBG, FMA, xTPR, PDCM, MOVBE.
        clear(&[2, 3, 4, 5, 8, 10, 11, 12, 14, 15, 22]),
        // PSN, DS, ACPI, SS, TM, PBE.
        set(&[18, 21, 22, 27, 29, 31], MTRR_MCE),
    ],
);

const C3_EXTENDED_FEATURES: Leaf = (
    0x7,
    0,
    INDEXED,
    [
        KEEP,
        // SGX, BMI1, HLE, AVX2, BMI2, INVPCID, RTM, RDT-M, MPX, RDT-A, AVX512F and DQ, RDSEED, ADX,
        // AVX512-IFMA, CLFLUSHOPT, CLWB, PT, AVX512PF, ER and CD, SHA, AVX512BW and VL.
        clear(&[
            2, 3, 4, 5, 8, 10, 11, 12, 14, 15, 16, 17, 18, 19, 21, 23, 24, 25, 26, 27, 28, 29, 30,
            31,
        ]),
        // AVX512-VBMI, UMIP, PKU, OSPKE, AVX512-VNNI and -VPOPCNTDQ, LA57, RDPID, SGX-LC.
        clear(&[1, 2, 3, 4, 11, 14, 16, 22, 30]),
        // AVX512-4VNNIW and -4FMAPS.
        clear(&[2, 3]),
    ],
);

const C3_LEAVES: [Leaf; 5] = [
    C3_FEATURES,
    C3_EXTENDED_FEATURES,
    STATES,
    COMPACT_STATES,
    // LZCNT, PREFETCHW; 1 GiB pages.
    (
        0x8000_0001,
        0,
        0,
        [KEEP, KEEP, clear(&[5, 8]), clear(&[26])],
    ),
];

/// RSBA, SKIP_L1DFL_VMENTRY, IF_PSCHANGE_MC_NO; MISC_PACKAGE_CTLS, ENERGY_FILTERING_CTL; FB_CLEAR,
/// RRSBA; GDS_NO, RFDS_NO: as if on the most vulnerable of its processors.
const T2S_CAPABILITIES: u64 =
    1 << 2 | 1 << 3 | 1 << 6 | 1 << 10 | 1 << 11 | 1 << 17 | 1 << 19 | 1 << 26 | 1 << 27;

/// What says nothing of a mitigation: MCU_CONTROL, MISC_PACKAGE_CTLS, ENERGY_FILTERING_CTL, DOITM,
/// FB_CLEAR_CTRL, BHI_NO, XAPIC_DISABLE_STATUS, OVERCLOCKING_STATUS, GDS_CTRL, and what is reserved.
const T2CL_CAPABILITIES: Bits = fixed(
    !0 << 29 | clear(&[9, 10, 11, 12, 16, 18, 20, 21, 22, 23, 25]).mask,
    0,
);

/// Intel from Skylake to Ice Lake as Ivy Bridge.
pub const C3: StaticTemplate = StaticTemplate {
    name: "C3",
    vendor: INTEL,
    models: &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
    cpuid: &C3_LEAVES,
    msrs: &[],
};

/// Intel from Skylake to Ice Lake as Haswell.
pub const T2: StaticTemplate = StaticTemplate {
    name: "T2",
    vendor: INTEL,
    models: &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
    cpuid: &T2_LEAVES,
    msrs: &[],
};

/// As [`T2`], for snapshots that go from one model to the other.
pub const T2S: StaticTemplate = StaticTemplate {
    name: "T2S",
    vendor: INTEL,
    models: &[SKYLAKE, CASCADE_LAKE],
    cpuid: &T2_LEAVES,
    msrs: &[(ARCH_CAPABILITIES, fixed(!0, T2S_CAPABILITIES))],
};

/// Intel from Cascade Lake on, with the features of [`T2A`].
pub const T2CL: StaticTemplate = StaticTemplate {
    name: "T2CL",
    vendor: INTEL,
    models: &[CASCADE_LAKE, ICE_LAKE],
    cpuid: &T2CL_LEAVES,
    msrs: &[(ARCH_CAPABILITIES, T2CL_CAPABILITIES)],
};

/// AMD Milan with the features of [`T2CL`].
pub const T2A: StaticTemplate = StaticTemplate {
    name: "T2A",
    vendor: AMD,
    models: &[MILAN],
    cpuid: &T2A_LEAVES,
    msrs: &[],
};

impl StaticTemplate {
    /// What changes on this host.
    ///
    /// # Errors
    /// [`StaticTemplateError`] where it is not for the host's processor.
    pub fn for_host(&self) -> Result<CpuTemplate, StaticTemplateError> {
        let vendor = __cpuid(0);
        let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        self.check(vendor.as_flattened(), __cpuid(1).eax)?;
        if self.name == C3.name && __cpuid(1).eax & SIGNATURE == SKYLAKE.1 {
            log::warn!(
                "On processors that do not enumerate FBSDP_NO, PSDP_NO and SBDR_SSDP_NO on \
                 IA32_ARCH_CAPABILITIES MSR, the guest kernel does not apply the mitigation against \
                 MMIO stale data vulnerability."
            );
        }
        Ok(self.changes())
    }

    fn check(&self, vendor: &[u8], signature: u32) -> Result<(), StaticTemplateError> {
        if vendor != self.vendor.as_bytes() {
            return Err(StaticTemplateError::Vendor {
                name: self.name,
                vendor: self.vendor,
                found: String::from_utf8_lossy(vendor).into_owned(),
            });
        }
        let permitted = |&(_, known): &Model| signature & SIGNATURE == known;
        if !self.models.iter().any(permitted) {
            let models: Vec<_> = self.models.iter().map(|(name, _)| *name).collect();
            return Err(StaticTemplateError::Model {
                name: self.name,
                models: models.join(", "),
                found: signature,
            });
        }
        Ok(())
    }

    fn changes(&self) -> CpuTemplate {
        let some = |bits: Bits| if bits == KEEP { vec![] } else { vec![bits] };
        let leaf = |&(leaf, subleaf, flags, registers): &Leaf| CpuidChange {
            leaf,
            subleaf,
            flags,
            registers: registers.map(some),
        };
        CpuTemplate {
            cpuid: self.cpuid.iter().map(leaf).collect(),
            msrs: self.msrs.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mask and value of each register that a template changes, by leaf, sub-leaf and register.
    fn changes(template: &StaticTemplate) -> Vec<(u32, u32, usize, u64, u64)> {
        let leaves = template.changes().cpuid;
        let registers = leaves.iter().flat_map(|leaf| {
            let registers = leaf.registers.iter().enumerate();
            registers.flat_map(move |(register, bits)| {
                let bits = bits.iter();
                bits.map(move |bits| (leaf.leaf, leaf.subleaf, register, bits.mask, bits.value))
            })
        });
        registers.collect()
    }

    #[test]
    fn templates_change_what_firecracker_s_change() {
        const T2_FIRST: [(u32, u32, usize, u64, u64); 8] = [
            (1, 0, 0, 0x0fff_3fff, 0x3_06f2),
            (1, 0, 2, 0x0004_cdfc, 0),
            (1, 0, 3, 0xe864_1080, 0x1080),
            (7, 0, 1, 0xffef_da14, 0x200),
            (7, 0, 2, 0x4041_5f5e, 0),
            (7, 0, 3, 0x11c, 0),
            (0xd, 0, 0, 0x2f8, 0),
            (0xd, 1, 0, 0xe, 0),
        ];
        for (template, last) in [
            (&T2, [(0x2000_0100, 0x0400_0000), (0x200, 0)]),
            (&T2S, [(0x2000_0100, 0x0400_0000), (0x200, 0)]),
            (&T2CL, [(0x2000_01c0, 0x07c0_0000), (0x200, 0)]),
            (
                &T2A,
                [(0x2000_01c4, 0x0640_0000), (0x001c_0205, 0x001c_0004)],
            ),
        ] {
            let [(ecx, edx), (ebx, value)] = last;
            let mut expected = T2_FIRST.to_vec();
            expected.extend([
                (0x8000_0001, 0, 2, ecx, 0),
                (0x8000_0001, 0, 3, edx, 0),
                (0x8000_0008, 0, 1, ebx, value),
            ]);
            assert_eq!(changes(template), expected, "{}", template.name);
        }
        let c3 = [
            (1, 0, 0, 0x0fff_3fff, 0x3_06e4),
            (1, 0, 2, 0x0040_dd3c, 0),
            (1, 0, 3, 0xa864_1080, 0x1080),
            (7, 0, 1, 0xffaf_dd3c, 0),
            (7, 0, 2, 0x4041_481e, 0),
            (7, 0, 3, 0xc, 0),
            (0xd, 0, 0, 0x2f8, 0),
            (0xd, 1, 0, 0xe, 0),
            (0x8000_0001, 0, 2, 0x120, 0),
            (0x8000_0001, 0, 3, 0x0400_0000, 0),
        ];
        assert_eq!(changes(&C3), c3);
        let msrs = |template: &StaticTemplate| template.changes().msrs;
        assert_eq!(msrs(&T2S), [(0x10a, fixed(u64::MAX, 0x0c0a_0c4c))]);
        assert_eq!(msrs(&T2CL), [(0x10a, fixed(0xffff_ffff_e2f5_1e00, 0))]);
        assert!(msrs(&T2).is_empty() && msrs(&T2A).is_empty() && msrs(&C3).is_empty());
        let indexed = |leaf: &CpuidChange| (leaf.flags == INDEXED) == [7, 0xd].contains(&leaf.leaf);
        assert!(T2A.changes().cpuid.iter().all(indexed));
    }

    #[test]
    fn a_template_is_for_some_processors() {
        // In this order: Skylake, Cascade Lake, Ice Lake, Sapphire Rapids; Milan, Rome.
        let intel = [0x5_0654, 0x5_0657, 0x6_06a6, 0x8_06f8];
        let amd = [0xa0_0f11, 0x83_0f10];
        let permitted = |template: &StaticTemplate, vendor: &str, signature: u32| {
            template.check(vendor.as_bytes(), signature)
        };
        for (template, models) in [
            (&C3, [true, true, true, false]),
            (&T2, [true, true, true, false]),
            (&T2S, [true, true, false, false]),
            (&T2CL, [false, true, true, false]),
        ] {
            // The processor's type does not matter.
            let found =
                intel.map(|signature| permitted(template, INTEL, signature | 1 << 12).is_ok());
            assert_eq!(found, models, "{}", template.name);
        }
        let found = amd.map(|signature| permitted(&T2A, AMD, signature).is_ok());
        assert_eq!(found, [true, false]);
        let error = permitted(&T2A, INTEL, 0xa0_0f11).unwrap_err().to_string();
        assert_eq!(
            error,
            "Failed to get CPU template: CPU vendor mismatched between actual CPU and CPU template. T2A \
             is for AuthenticAMD, this is GenuineIntel: choose another, or None"
        );
        let error = permitted(&T2S, INTEL, 0x6_06a6).unwrap_err().to_string();
        assert_eq!(
            error,
            "Failed to get CPU template: The current CPU model is not permitted to apply the CPU \
             template. T2S is for Skylake, Cascade Lake, this one's signature (CPUID leaf 1, EAX) is \
             0x606a6: choose another, or None"
        );
    }
}
