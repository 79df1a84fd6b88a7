//! From the configuration's CPU template to that of `arch`.

use arch::cpu_template::{Bits, CpuTemplate, CpuidChange};

use crate::config::{Bitmap, CpuConfig, CpuidModifier, CustomCpuTemplate};

/// The template of a checked configuration, which has no file left to be read.
pub fn template(config: Option<&CpuConfig>) -> CpuTemplate {
    match config {
        Some(CpuConfig::Template(template)) => convert(template),
        Some(CpuConfig::File(_)) | None => CpuTemplate::default(),
    }
}

fn convert(template: &CustomCpuTemplate) -> CpuTemplate {
    let capabilities = template.kvm_capabilities.iter();
    let msrs = template.msr_modifiers.iter();
    CpuTemplate {
        capabilities: capabilities.map(|cap| (cap.number, cap.needed)).collect(),
        cpuid: template.cpuid_modifiers.iter().map(leaf).collect(),
        msrs: msrs.map(|msr| (msr.addr, bits(msr.bitmap))).collect(),
    }
}

fn leaf(leaf: &CpuidModifier) -> CpuidChange {
    let mut change = CpuidChange {
        leaf: leaf.leaf,
        subleaf: leaf.subleaf,
        flags: leaf.flags,
        ..CpuidChange::default()
    };
    for modifier in &leaf.modifiers {
        // EAX, EBX, ECX, EDX in both.
        let register = change.registers.get_mut(modifier.register as usize);
        register
            .into_iter()
            .for_each(|to| to.push(bits(modifier.bitmap)));
    }
    change
}

fn bits<const BITS: usize>(bitmap: Bitmap<BITS>) -> Bits {
    Bits {
        mask: bitmap.mask,
        value: bitmap.value,
    }
}
