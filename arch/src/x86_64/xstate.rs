//! Extended processor state that Linux gives to guests only when their process asks: today the tiles of
//! Intel's AMX.
//!
//! Source: Linux, Documentation/arch/x86/xstate.rst. Kernels before 5.17 have no such requests and hide
//! these features from guests.

/// `ARCH_GET_XCOMP_SUPP`: components that the kernel supports, as in XCR0.
const GET_SUPPORTED: libc::c_int = 0x1021;
/// `ARCH_REQ_XCOMP_GUEST_PERM`: permits guests of this process one component and those below it.
const REQUEST_GUEST: libc::c_int = 0x1025;
/// Components that have to be asked for: XTILEDATA.
const DYNAMIC: u64 = 1 << 18;

/// Permits guests of this process all that they may have, where the host has it. It has to come before
/// KVM is asked what it supports, and before the first vCPU.
pub fn permit_guests() {
    let mut supported = 0_u64;
    // SAFETY: the kernel writes 64 bits to `supported`, which lives as long as the call.
    let known = unsafe { libc::syscall(libc::SYS_arch_prctl, GET_SUPPORTED, &raw mut supported) };
    let dynamic = supported & DYNAMIC;
    if known != 0 || dynamic == 0 {
        return;
    }
    let component = u64::from(dynamic.ilog2());
    // SAFETY: it takes a number and no memory.
    if unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_GUEST, component) } != 0 {
        let error = std::io::Error::last_os_error();
        log::warn!("guests get no extended state of component {component} (AMX): {error}");
    }
}
