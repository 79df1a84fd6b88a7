//! What the guest's CPUID instruction answers.
//!
//! [`CpuidTemplate::new`] takes what the host can offer ([`supported`]), normalises the answer to the guest's
//! topology and keeps it. [`CpuidTemplate::for_vcpu`] then only writes the APIC id.
//! Invariants: the host's own topology never shows through, and leaves that are all zero are left
//! out, because KVM answers zero for them anyway and every entry costs time in `KVM_SET_CPUID2`.

mod normalise;

use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;

use crate::capabilities::Capabilities;
use crate::cpu_template::CpuidChange;
use crate::topology::Topology;

/// One leaf, or one sub-leaf.
type Entry = kvm_cpuid_entry2;

/// The guest's CPUID could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// `KVM_GET_SUPPORTED_CPUID` failed.
    #[error("KVM does not tell which CPUID it supports (KVM_GET_SUPPORTED_CPUID)")]
    Supported(#[source] kvm_ioctls::Error),
    /// KVM's answer has no leaf that every processor has.
    #[error("KVM's supported CPUID has no leaf {leaf:#x}, without which no guest can run")]
    NoLeaf {
        /// The leaf.
        leaf: u32,
    },
    /// A template changes what is not there.
    #[error(
        "Template changes a CPUID entry not supported by KVM: Leaf: {leaf:0x}, Subleaf: {subleaf:0x}"
    )]
    NotSupported {
        /// Leaf.
        leaf: u32,
        /// Sub-leaf.
        subleaf: u32,
    },
    /// More entries than KVM takes.
    #[error("the guest's CPUID has {count} entries, KVM takes {KVM_MAX_CPUID_ENTRIES}")]
    TooMany {
        /// Entries there are.
        count: usize,
    },
}

/// What this host's KVM supports, asked for once in a process: that takes 0.3 ms, and may not be done before
/// [`permit_guests`](crate::xstate::permit_guests), on which it depends.
///
/// # Errors
/// [`CpuidError::Supported`] when KVM does not answer.
pub fn supported(kvm: &Kvm) -> Result<&'static [kvm_cpuid_entry2], CpuidError> {
    static LIST: OnceLock<Vec<Entry>> = OnceLock::new();
    if let Some(list) = LIST.get() {
        return Ok(list);
    }
    let list = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let list = list.map_err(CpuidError::Supported)?;
    Ok(LIST.get_or_init(|| list.as_slice().to_vec()))
}

/// CPUID of all vCPUs of a guest but for what differs between them.
#[derive(Clone, Debug)]
pub struct CpuidTemplate {
    entries: Vec<Entry>,
    topology: Topology,
}

impl CpuidTemplate {
    /// CPUID of a guest with this topology on this host, with the `changes` of a template. `tsc_khz` is the guest's TSC frequency
    /// when it is known already; see [`Self::set_tsc_khz`].
    ///
    /// # Errors
    /// [`CpuidError`] when KVM does not answer, or answers with something no guest could use.
    pub fn new(
        kvm: &Kvm,
        topology: &Topology,
        capabilities: &Capabilities,
        tsc_khz: Option<u32>,
        changes: &[CpuidChange],
    ) -> Result<Self, CpuidError> {
        let mut supported = Leaves(supported(kvm)?.to_vec());
        for change in changes {
            apply(&mut supported, change)?;
        }
        Self::from_supported(&supported.0, topology, capabilities, tsc_khz)
    }

    fn from_supported(
        supported: &[Entry],
        topology: &Topology,
        capabilities: &Capabilities,
        tsc_khz: Option<u32>,
    ) -> Result<Self, CpuidError> {
        let given = supported
            .iter()
            .filter(|e| e.eax | e.ebx | e.ecx | e.edx != 0);
        let mut leaves = Leaves(given.copied().collect());
        for leaf in [0, 1] {
            leaves.get(leaf, 0).ok_or(CpuidError::NoLeaf { leaf })?;
        }
        normalise::all(&mut leaves, topology, capabilities.tsc_deadline_timer);
        let mut template = Self {
            entries: leaves.0,
            topology: *topology,
        };
        if let Some(tsc_khz) = tsc_khz {
            template.set_tsc_khz(tsc_khz);
        }
        if template.entries.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(CpuidError::TooMany {
                count: template.entries.len(),
            });
        }
        Ok(template)
    }

    /// Tell the guest its TSC frequency in kHz, by the timing leaf 0x4000_0010. It takes effect when
    /// the host's TSC is invariant; else the frequency is nothing a guest may rely on. A vCPU's
    /// `KVM_GET_TSC_KHZ` gives the number.
    pub fn set_tsc_khz(&mut self, tsc_khz: u32) {
        let mut leaves = Leaves(std::mem::take(&mut self.entries));
        normalise::timing(&mut leaves, tsc_khz);
        self.entries = leaves.0;
    }

    /// The topology this template was made for.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// What `KVM_SET_CPUID2` takes for the vCPU with this index.
    ///
    /// # Errors
    /// [`CpuidError::TooMany`] if there are more entries than KVM takes.
    pub fn for_vcpu(&self, index: u16) -> Result<CpuId, CpuidError> {
        let mut cpuid = CpuId::from_entries(&self.entries).map_err(|_| CpuidError::TooMany {
            count: self.entries.len(),
        })?;
        for entry in cpuid.as_mut_slice() {
            normalise::number(entry, &self.topology, index);
        }
        Ok(cpuid)
    }

    /// Whether the guest's processor has memory type range registers.
    pub(crate) fn has_mtrr(&self) -> bool {
        const MTRR: u32 = 1 << 12;
        self.entries
            .iter()
            .any(|e| e.function == 1 && e.edx & MTRR != 0)
    }
}

/// Change one entry, which has to be there.
fn apply(leaves: &mut Leaves, change: &CpuidChange) -> Result<(), CpuidError> {
    let CpuidChange { leaf, subleaf, .. } = *change;
    let entry = leaves
        .get_mut(leaf, subleaf)
        .ok_or(CpuidError::NotSupported { leaf, subleaf })?;
    entry.flags = change.flags;
    let registers = [
        &mut entry.eax,
        &mut entry.ebx,
        &mut entry.ecx,
        &mut entry.edx,
    ];
    for (register, changes) in registers.into_iter().zip(&change.registers) {
        for bits in changes {
            // The upper half of the bits is that of larger registers.
            *register = bits.apply((*register).into()) as u32;
        }
    }
    Ok(())
}

/// Entries addressed by leaf and sub-leaf.
struct Leaves(Vec<Entry>);

impl Leaves {
    fn get(&self, function: u32, index: u32) -> Option<&Entry> {
        self.0
            .iter()
            .find(|e| e.function == function && e.index == index)
    }

    fn get_mut(&mut self, function: u32, index: u32) -> Option<&mut Entry> {
        self.0
            .iter_mut()
            .find(|e| e.function == function && e.index == index)
    }

    /// Every sub-leaf of a leaf.
    fn all_mut(&mut self, function: u32) -> impl Iterator<Item = &mut Entry> {
        self.0.iter_mut().filter(move |e| e.function == function)
    }

    fn remove(&mut self, function: u32) {
        self.0.retain(|e| e.function != function);
    }

    /// Put all sub-leaves of a leaf in place of those there are: EAX, EBX, ECX, EDX of each.
    fn replace(&mut self, function: u32, indexed: bool, registers: &[[u32; 4]]) {
        self.remove(function);
        let flags = if indexed {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        };
        self.0.extend(
            (0..)
                .zip(registers)
                .map(|(index, &[eax, ebx, ecx, edx])| Entry {
                    function,
                    index,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    padding: [0; 3],
                }),
        );
    }
}

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;
