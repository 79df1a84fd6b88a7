//! `KVM_GET_SUPPORTED_CPUID` for two kinds of host, reduced to the leaves that matter.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf, sub-leaf, whether sub-leaves count, EAX, EBX, ECX, EDX.
type Row = (u32, u32, u32, u32, u32, u32, u32);

/// Recorded on an AMD EPYC (family 26).
pub const AMD: &[Row] = &[
    (
        0x0,
        0,
        0,
        0x0000_001c,
        0x6874_7541,
        0x444d_4163,
        0x6974_6e65,
    ),
    (
        0x1,
        0,
        0,
        0x00b0_0f21,
        0x0002_0800,
        0x8120_2000,
        0x078b_fbff,
    ),
    (0x2, 0, 0, 0, 0, 0, 0),
    (0x4, 0, 1, 0, 0, 0, 0),
    (0x6, 0, 0, 0x0000_0004, 0, 0, 0),
    (
        0x7,
        0,
        1,
        0x0000_0001,
        0x0180_0002,
        0x0000_0104,
        0x2000_0000,
    ),
    (0xb, 0, 1, 0, 0, 0, 0),
    (
        0x8000_0000,
        0,
        0,
        0x8000_0021,
        0x6874_7541,
        0x444d_4163,
        0x6974_6e65,
    ),
    (
        0x8000_0001,
        0,
        0,
        0x00b0_0f21,
        0x4000_0000,
        0x0040_0393,
        0x23d3_fbff,
    ),
    (0x8000_0007, 0, 0, 0, 0, 0, 0x0000_0100),
    (0x8000_0008, 0, 0, 0x0000_3030, 0x5002_0005, 0x0000_7001, 0),
    (0x8000_001d, 0, 1, 0x0000_0121, 0x02c0_003f, 0x0000_003f, 0),
    (0x8000_001d, 1, 1, 0x0000_0122, 0x01c0_003f, 0x0000_003f, 0),
    (0x8000_001d, 2, 1, 0x0000_0143, 0x03c0_003f, 0x0000_03ff, 2),
    (0x8000_001d, 3, 1, 0x0000_4163, 0x03c0_003f, 0x0000_7fff, 1),
    (0x8000_001d, 4, 1, 0, 0, 0, 0),
    (0x8000_001e, 0, 0, 0, 0, 0, 0),
    (
        0x4000_0000,
        0,
        0,
        0x4000_0001,
        0x4b4d_564b,
        0x564b_4d56,
        0x0000_004d,
    ),
    (0x4000_0001, 0, 0, 0x0100_7efb, 0, 0, 0),
];

/// An Intel Xeon of 20 cores with two threads whose own topology shows. Put together from the SDM's
/// description of the fields, not recorded.
pub const INTEL: &[Row] = &[
    (
        0x0,
        0,
        0,
        0x0000_0016,
        0x756e_6547,
        0x6c65_746e,
        0x4965_6e69,
    ),
    (
        0x1,
        0,
        0,
        0x0005_0657,
        0x2740_0800,
        0xfffa_320b,
        0x1f8b_fbff,
    ),
    (0x4, 0, 1, 0x7c00_4121, 0x01c0_003f, 0x0000_003f, 0),
    (0x4, 1, 1, 0x7c00_4122, 0x01c0_003f, 0x0000_003f, 0),
    (0x4, 2, 1, 0x7c00_4143, 0x03c0_003f, 0x0000_03ff, 0),
    (0x4, 3, 1, 0x7c0f_c163, 0x0280_003f, 0x0000_9fff, 4),
    (0x4, 4, 1, 0, 0, 0, 0),
    (0x5, 0, 0, 0x40, 0x40, 0x3, 0x2020),
    (0x6, 0, 0, 0x0000_0004, 0, 0, 0),
    (
        0xb,
        0,
        1,
        0x0000_0001,
        0x0000_0002,
        0x0000_0100,
        0x0000_0027,
    ),
    (
        0xb,
        1,
        1,
        0x0000_0006,
        0x0000_0028,
        0x0000_0201,
        0x0000_0027,
    ),
    (0x15, 0, 0, 2, 0xa8, 0, 0),
    (0x16, 0, 0, 0x0834, 0x0e74, 0x64, 0),
    (0x8000_0000, 0, 0, 0x8000_0008, 0, 0, 0),
    (0x8000_0001, 0, 0, 0, 0, 0x0000_0121, 0x2c10_0800),
    (0x8000_0007, 0, 0, 0, 0, 0, 0x0000_0100),
    (0x8000_0008, 0, 0, 0x0000_302e, 0x0100_d000, 0, 0),
    (
        0x4000_0000,
        0,
        0,
        0x4000_0001,
        0x4b4d_564b,
        0x564b_4d56,
        0x0000_004d,
    ),
    (0x4000_0001, 0, 0, 0x0100_7afb, 0, 0, 0),
];

/// Entries as KVM passes them.
pub fn entries(rows: &[Row]) -> Vec<kvm_cpuid_entry2> {
    rows.iter()
        .map(
            |&(function, index, indexed, eax, ebx, ecx, edx)| kvm_cpuid_entry2 {
                function,
                index,
                flags: indexed * KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx,
                edx,
                padding: [0; 3],
            },
        )
        .collect()
}
