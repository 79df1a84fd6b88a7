//! From the configuration's CPU template to that of `arch`.

use arch::cpu_template::{Bits, CpuTemplate, CpuidChange};
use arch::static_template::{C3, StaticTemplateError, T2, T2A, T2CL, T2S};

use crate::config::{
    self, Bitmap, Config, CpuConfig, CpuidModifier, CustomCpuTemplate, KvmCapability,
};

/// The template of a checked configuration, which has no file left to be read: the user's, or one of
/// bulle's where the host's processor is one that it is for.
pub fn template(config: &Config) -> Result<CpuTemplate, StaticTemplateError> {
    if let Some(template) = custom(config) {
        return Ok(convert(template));
    }
    let template = match config.machine_config.cpu_template {
        Some(config::CpuTemplate::C3) => &C3,
        Some(config::CpuTemplate::T2) => &T2,
        Some(config::CpuTemplate::T2S) => &T2S,
        Some(config::CpuTemplate::T2CL) => &T2CL,
        Some(config::CpuTemplate::T2A) => &T2A,
        // The last is not taken from anybody.
        None | Some(config::CpuTemplate::None | config::CpuTemplate::V1N1) => {
            return Ok(CpuTemplate::default());
        }
    };
    template.for_host()
}

/// Capabilities of KVM by number: whether the host has to have it, as the user says.
pub fn capabilities(config: &Config) -> Vec<(u32, bool)> {
    let capabilities = custom(config).map(|template| &template.kvm_capabilities[..]);
    let capabilities = capabilities.unwrap_or_default().iter();
    let pair = |capability: &KvmCapability| (capability.number, capability.needed);
    capabilities.map(pair).collect()
}

fn custom(config: &Config) -> Option<&CustomCpuTemplate> {
    match &config.cpu_config {
        Some(CpuConfig::Template(template)) => Some(template),
        Some(CpuConfig::File(_)) | None => None,
    }
}

fn convert(template: &CustomCpuTemplate) -> CpuTemplate {
    let msrs = template.msr_modifiers.iter();
    CpuTemplate {
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
