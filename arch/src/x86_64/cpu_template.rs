//! Changes of a guest's processor that the user asks for: bits of CPUID, of MSRs, and which
//! capabilities of KVM the host has to have.
//!
//! CPUID changes before bulle normalises it, and bulle's own boot MSRs are written behind those of a
//! template, so that a template cannot break what the guest starts with. Only what the host's KVM
//! lists can be changed; a snapshot has all of that.

/// Bits of a register that change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    /// Which ones.
    pub mask: u64,
    /// Their values.
    pub value: u64,
}

impl Bits {
    /// `register` with the changes.
    #[must_use]
    pub fn apply(self, register: u64) -> u64 {
        register & !self.mask | self.value & self.mask
    }
}

/// Changes of one CPUID entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidChange {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf.
    pub subleaf: u32,
    /// KVM's flags of the entry.
    pub flags: u32,
    /// Changes of EAX, EBX, ECX and EDX, one behind the other.
    pub registers: [Vec<Bits>; 4],
}

/// A CPU template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuTemplate {
    /// Changes of CPUID.
    pub cpuid: Vec<CpuidChange>,
    /// Changes of MSRs, by number.
    pub msrs: Vec<(u32, Bits)>,
}
