//! What happens when the host gives bulle itself no more memory: one clear error, not an abort.
//!
//! Any thread may get here. Guest memory is mapped elsewhere and has its own error.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Cursor, Write};

use crate::session::{CODE_FAILURE, restore_terminal};

/// The system's allocator, except that running out ends the process with bulle's exit code.
pub struct Allocator;

// SAFETY: each call goes to `System` as it came, and its answer is passed on unless it is null;
// ending the process then breaks no promise to the caller.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`.
        or_end(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        or_end(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `realloc`.
        or_end(unsafe { System.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn or_end(pointer: *mut u8, size: usize) -> *mut u8 {
    if pointer.is_null() {
        end(size);
    }
    pointer
}

#[cold]
fn end(size: usize) -> ! {
    restore_terminal();
    let mut text = Cursor::new([0; 256]);
    // Longer than the text is; the heap cannot be used for it.
    let _ = writeln!(
        text,
        "bulle: Out of memory: the host refused {size} bytes for bulle itself: raise the limit \
         (ulimit -v, the container's memory limit) or make the guest's root or kernel smaller"
    );
    let length = text.position() as usize;
    // SAFETY: the pointer and the length describe `text`; _exit does not return.
    unsafe {
        libc::write(2, text.get_ref().as_ptr().cast(), length);
        libc::_exit(CODE_FAILURE.into())
    }
}
