//! State of a guest's own virtual machines: what KVM keeps of SVM and VMX for a vCPU.
//!
//! There is some while EFER.SVME or CR4.VMXE is set. It is given behind the MSRs, which KVM does not let
//! change under VMX operation, and moves the registers that the vCPU has then to the nested guest's.
//! Sources: Linux, Documentation/virt/kvm/api.rst, `KVM_SET_NESTED_STATE`; AMD APM volume 2, 15.5.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

use super::vcpu::{VcpuState, failed};
use super::{Context, StateError};

/// Bytes of `struct kvm_nested_state` without a nested guest.
const HEADER: usize = 128;
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;
/// An address that is none (`vmxon_pa`, `vmcs12_pa`).
const NO_ADDRESS: u64 = u64::MAX;

/// What KVM keeps of a vCPU with these registers; empty where it can have no virtual machines.
pub(super) fn save(
    fd: &VcpuFd,
    index: u16,
    sregs: &kvm_sregs,
    context: &Context,
) -> Result<Vec<u8>, StateError> {
    if sregs.efer & EFER_SVME == 0 && sregs.cr4 & CR4_VMXE == 0 {
        return Ok(Vec::new());
    }
    has(context)?;
    let mut state = KvmNestedStateBuffer::empty();
    fd.nested_state(&mut state)
        .map_err(failed(index, "KVM_GET_NESTED_STATE"))?;
    let bytes = state.as_bytes();
    let size = usize::try_from(state.size).unwrap_or(usize::MAX);
    Ok(bytes[..size.min(bytes.len())].to_vec())
}

/// Gives what was saved to a vCPU that has everything else but its events.
pub(super) fn restore(fd: &VcpuFd, state: &VcpuState, context: &Context) -> Result<(), StateError> {
    if state.nested.is_empty() {
        return Ok(());
    }
    has(context)?;
    let wrong = || StateError::Nested { vcpu: state.index };
    let mut bytes = [0; size_of::<KvmNestedStateBuffer>()];
    let len = state.nested.len();
    let to = bytes.get_mut(..len).ok_or_else(wrong)?;
    to.copy_from_slice(&state.nested);
    let buffer = KvmNestedStateBuffer::read_from_bytes(&bytes).map_err(|_| wrong())?;
    // KVM reads as much as that, and checks the rest.
    if len < HEADER || usize::try_from(buffer.size) != Ok(len) {
        return Err(wrong());
    }
    fd.set_nested_state(&buffer)
        .map_err(failed(state.index, "KVM_SET_NESTED_STATE"))
}

/// Ends what virtual machines a vCPU with the CPUID of `state` has, so that its registers are its own.
pub(super) fn leave(fd: &VcpuFd, state: &VcpuState, context: &Context) -> Result<(), StateError> {
    let has = |leaf, bit| {
        let mut entries = state.cpuid.iter();
        entries.any(|entry| entry.function == leaf && entry.ecx & bit != 0)
    };
    let (svm, vmx) = (has(0x8000_0001, 1 << 2), has(1, 1 << 5));
    if !context.nested_state || !(svm || vmx) {
        return Ok(());
    }
    let mut buffer = KvmNestedStateBuffer::empty();
    buffer.size = HEADER as u32;
    if svm {
        buffer.format = KVM_STATE_NESTED_FORMAT_SVM as u16;
        buffer.flags = KVM_STATE_NESTED_GIF_SET as u16;
    } else {
        buffer.format = KVM_STATE_NESTED_FORMAT_VMX as u16;
        buffer.hdr.vmx.vmxon_pa = NO_ADDRESS;
        buffer.hdr.vmx.vmcs12_pa = NO_ADDRESS;
    }
    fd.set_nested_state(&buffer)
        .map_err(failed(state.index, "KVM_SET_NESTED_STATE"))
}

fn has(context: &Context) -> Result<(), StateError> {
    match context.nested_state {
        true => Ok(()),
        false => Err(StateError::Capability("KVM_CAP_NESTED_STATE")),
    }
}
