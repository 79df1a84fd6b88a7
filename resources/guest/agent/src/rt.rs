//! What a libc would bring: the entry point, the panic handler, and the memory functions that the
//! compiler calls.
//!
//! Unsafe: raw entry stack and C-ABI functions on raw pointers.

use core::arch::{asm, global_asm};
use core::ffi::{CStr, c_char, c_int};

global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {enter}",
    "ud2",
    enter = sym enter,
);

/// First Rust code: `stack` points to argc, then argv.
unsafe extern "C" fn enter(stack: *const usize) -> ! {
    // SAFETY: the kernel puts argc at the initial stack pointer (System V ABI).
    let argc = unsafe { *stack };
    let mut args = (0..argc).map(|i| {
        // SAFETY: argc pointers to NUL-terminated strings follow argc and stay for the whole life
        // of the process.
        unsafe { CStr::from_ptr(*stack.add(1 + i).cast::<*const c_char>()) }
    });
    crate::main(&mut args)
}

#[panic_handler]
fn on_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::sys::complain(format_args!("{info}"));
    if rustix::process::getpid().is_init() {
        crate::power::end(agent_protocol::Power::Off)
    }
    crate::sys::exit(125)
}

/// C's memcpy.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(dest: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller gives two valid ranges of n bytes; the direction flag is clear by ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") dest => _, inout("rsi") src => _,
             options(nostack, preserves_flags));
    }
    dest
}

/// C's memmove.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(dest: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    if (dest as usize).wrapping_sub(src as usize) >= n {
        // SAFETY: copying upwards never overwrites a byte that is still to be read.
        return unsafe { memcpy(dest, src, n) };
    }
    // SAFETY: the ranges are valid; dest is above src, so copying downwards is right. n is not 0
    // here. The direction flag is restored.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _,
             inout("rdi") dest.add(n - 1) => _, inout("rsi") src.add(n - 1) => _,
             options(nostack));
    }
    dest
}

/// C's memset.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(dest: *mut u8, byte: c_int, n: usize) -> *mut u8 {
    // SAFETY: the caller gives a valid range of n bytes; the direction flag is clear by ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") dest => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    dest
}

/// C's memcmp.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> c_int {
    for i in 0..n {
        // SAFETY: i is within both ranges.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return c_int::from(x) - c_int::from(y);
        }
    }
    0
}

/// BSD's bcmp.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> c_int {
    // SAFETY: passed on.
    unsafe { memcmp(a, b, n) }
}

/// C's strlen.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(s: *const c_char) -> usize {
    let mut n = 0;
    // SAFETY: the string ends with NUL, so every byte up to it is readable.
    while unsafe { s.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}
