//! Getting a vCPU thread out of KVM_RUN, and out of a blocking write, at any moment.
//!
//! The kick is a signal whose handler sets `kvm_run.immediate_exit` of the vCPU that the thread
//! runs, so that a kick just before KVM_RUN is not lost. The handler touches one thread-local
//! pointer and nothing else.

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

thread_local! {
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal of a kick.
pub fn signal_number() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: i32) {
    // A thread that is being torn down has no run area any more.
    let _ = RUN.try_with(|run| set_immediate_exit(run.get(), 1));
}

fn set_immediate_exit(run: *mut kvm_run, value: u8) {
    if run.is_null() {
        return;
    }
    // SAFETY: a non-null pointer in RUN is the run area of the vCPU that this very thread owns
    // (see `Registration`), mapped while registered; the byte is only written through this
    // function, and KVM reads it as a single byte.
    unsafe {
        let byte = &raw mut (*run).immediate_exit;
        AtomicU8::from_ptr(byte).store(value, Ordering::SeqCst);
    }
}

/// Installs the handler, once a process.
pub fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the structure is plain data, filled in before use; the handler is
        // async-signal-safe (one const-initialised thread-local and one byte store).
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal_number(), &action, ptr::null_mut())
        };
        if result != 0 {
            log::error!(
                "no handler for vCPU kicks: {}",
                std::io::Error::last_os_error()
            );
        }
    });
}

/// While it lives, kicks to this thread reach the vCPU.
pub struct Registration(());

impl Registration {
    /// Registers `fd` for the calling thread.
    pub fn new(fd: &mut VcpuFd) -> Self {
        let run: *mut kvm_run = fd.get_kvm_run();
        RUN.with(|cell| cell.set(run));
        Self(())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        RUN.with(|cell| cell.set(ptr::null_mut()));
    }
}

/// Interrupts `thread`.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle is not joined, so the thread id is valid even after the thread ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), signal_number()) };
}
