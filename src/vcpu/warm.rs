//! KVM_RUN without a guest's instruction: what KVM makes for a vCPU when it runs first (page tables, caches
//! of pages for them, a thread of the VM's) is then there before it matters.
//!
//! A signal that is blocked, but not in KVM_RUN, waits: KVM prepares the entry, sees the signal and
//! returns. The thread of the vCPU does that, parked.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr;

use arch::memory;
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::handle::Vcpu;
use super::kick;

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)` of linux/kvm.h.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

/// `struct kvm_signal_mask`, with as many signals as the kernel has.
#[repr(C)]
struct SignalMask {
    len: u32,
    blocked: [u8; 8],
}

/// Has KVM do all that precedes the next instruction of `vcpu`, which has its registers and memory.
///
/// # Errors
/// Of KVM_RUN, and of the requests about signals.
pub fn enter(vcpu: &mut Vcpu) -> io::Result<()> {
    // Another one would wait for the host's signal, or an interrupt.
    if vcpu.fd.get_mp_state().map_err(host)?.mp_state != KVM_MP_STATE_RUNNABLE {
        return Ok(());
    }
    touch(vcpu);
    let signal = kick::signal_number();
    let only = only(signal);
    let before = mask(libc::SIG_BLOCK, &only)?;
    // SAFETY: the calling thread is alive.
    unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
    let entered = enter_once(&mut vcpu.fd, signal);
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Kicks too: what they are for is among the commands.
    // SAFETY: the set and the time are valid, and nobody asks which signal it was.
    while unsafe { libc::sigtimedwait(&only, ptr::null_mut(), &now) } == signal {}
    mask(libc::SIG_SETMASK, &before)?;
    entered
}

fn enter_once(fd: &mut VcpuFd, signal: i32) -> io::Result<()> {
    let bit = 1u64 << (signal - 1);
    let inside = SignalMask {
        len: 8,
        blocked: (!bit).to_le_bytes(),
    };
    set_mask(fd, &inside)?;
    let entered = match fd.run() {
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Ok(()),
        Err(error) => Err(host(error)),
        // It has nothing to leave for before its first instruction.
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
    };
    set_mask(fd, ptr::null()).and(entered)
}

fn set_mask(fd: &VcpuFd, mask: *const SignalMask) -> io::Result<()> {
    // SAFETY: KVM reads the structure, which is as long as its `len` says; null is allowed.
    match unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_SIGNAL_MASK, mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The set of this signal.
fn only(signal: i32) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises all of it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        set.assume_init()
    }
}

/// Changes the thread's mask, and returns what it was.
fn mask(how: i32, set: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: both sets are valid, and `before` is written on success.
    match unsafe { libc::pthread_sigmask(how, set, before.as_mut_ptr()) } {
        // SAFETY: as just said.
        0 => Ok(unsafe { before.assume_init() }),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn host(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// Has the host map the pages of the next instruction and of the stack, and copy the latter, which is
/// going to be written. They may be anywhere.
fn touch(vcpu: &Vcpu) {
    let Ok(regs) = vcpu.fd.get_regs() else { return };
    let at = |address| {
        let found = vcpu.fd.translate_gva(address).ok();
        let found = found.filter(|found| found.valid != 0);
        found.map(|found| GuestAddress(found.physical_address))
    };
    if let Some(instruction) = at(regs.rip) {
        // It may be a device's.
        let _ = vcpu.memory.read_obj::<u8>(instruction);
    }
    if let Some(stack) = at(regs.rsp) {
        memory::touch(&vcpu.memory, stack);
    }
}
