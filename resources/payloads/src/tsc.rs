//! Time by the time stamp counter.

use core::arch::x86_64::_rdtsc;

/// Cycles in which anything that a device does has long been done: seconds.
pub const LONG: u64 = 20_000_000_000;

/// Cycles since some time.
pub fn now() -> u64 {
    // SAFETY: every x86_64 processor has a time stamp counter.
    unsafe { _rdtsc() }
}

/// Waits until `done`, or for about `cycles`; says whether it is done.
pub fn wait(cycles: u64, mut done: impl FnMut() -> bool) -> bool {
    let begin = now();
    loop {
        if done() {
            return true;
        }
        if now().wrapping_sub(begin) >= cycles {
            return false;
        }
        core::hint::spin_loop();
    }
}
