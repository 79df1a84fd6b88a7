//! The time stamp counter of the host, and how far a guest's is from it.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;

/// `hw_counter` of a time stamp counter in virtio's clock device.
pub const VIRTIO_COUNTER: u8 = 1;

/// `KVM_GET_DEVICE_ATTR`, which kvm-ioctls has not for vCPUs: `_IOW(KVMIO, 0xe2, kvm_device_attr)`.
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
/// `KVM_SET_DEVICE_ATTR`, likewise: `_IOW(KVMIO, 0xe1, kvm_device_attr)`.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;

/// Reads the host's counter.
pub fn read() -> u64 {
    // SAFETY: every x86_64 processor has the counter, and Linux lets programs read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What to add to the host's counter, with wrap-around, to have that of a vCPU, unless the guest
/// sets its own. `None` where KVM does not say (before Linux 5.16).
///
/// bulle does not ask for a frequency of the guest's counter, so both are equally fast.
pub fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0_u64;
    offset_attribute(vcpu, KVM_GET_DEVICE_ATTR, &mut offset).ok()?;
    Some(offset)
}

/// Set a vCPU's counter by what it has more than the host's, with wrap-around.
///
/// # Errors
/// What the kernel says, where KVM does not have this (before Linux 5.16).
pub fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    offset_attribute(vcpu, KVM_SET_DEVICE_ATTR, &mut offset)
}

/// Reads or writes the attribute that is the distance of a vCPU's counter from the host's.
fn offset_attribute(vcpu: &VcpuFd, request: libc::c_ulong, offset: &mut u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw mut *offset) as u64,
        flags: 0,
    };
    // SAFETY: the descriptor is a vCPU's, the attribute a structure to read, and its address that
    // of 64 bits to read or to write.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), request as _, &attribute) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
