//! Port I/O and MMIO accesses of every width. Payloads own the whole machine, so these are safe to
//! call; addresses must be mapped, or the processor triple-faults, which a test then reports.

use core::arch::asm;

macro_rules! port {
    ($out:ident, $in:ident, $outs:ident, $ins:ident, $ty:ty, $reg:tt, $suffix:literal) => {
        #[doc = concat!("Writes one `", stringify!($ty), "` to a port.")]
        pub fn $out(port: u16, value: $ty) {
            // SAFETY: port I/O touches no memory of this program.
            unsafe {
                asm!(concat!("out dx, ", $reg), in("dx") port, in($reg) value,
                     options(nomem, nostack, preserves_flags));
            }
        }
        #[doc = concat!("Reads one `", stringify!($ty), "` from a port.")]
        pub fn $in(port: u16) -> $ty {
            let value;
            // SAFETY: as above.
            unsafe {
                asm!(concat!("in ", $reg, ", dx"), in("dx") port, out($reg) value,
                     options(nomem, nostack, preserves_flags));
            }
            value
        }
        #[doc = concat!("Writes a string of `", stringify!($ty), "` with one `rep outs`.")]
        pub fn $outs(port: u16, data: &[$ty]) {
            // SAFETY: reads exactly `data.len()` elements from `data`.
            unsafe {
                asm!(concat!("rep outs", $suffix), in("dx") port,
                     inout("rsi") data.as_ptr() => _, inout("rcx") data.len() => _,
                     options(readonly, nostack, preserves_flags));
            }
        }
        #[doc = concat!("Reads a string of `", stringify!($ty), "` with one `rep ins`.")]
        pub fn $ins(port: u16, data: &mut [$ty]) {
            // SAFETY: writes exactly `data.len()` elements to `data`.
            unsafe {
                asm!(concat!("rep ins", $suffix), in("dx") port,
                     inout("rdi") data.as_mut_ptr() => _, inout("rcx") data.len() => _,
                     options(nostack, preserves_flags));
            }
        }
    };
}

port!(out8, in8, outs8, ins8, u8, "al", "b");
port!(out16, in16, outs16, ins16, u16, "ax", "w");
port!(out32, in32, outs32, ins32, u32, "eax", "d");

/// Reads a value from guest-physical `addr` with one access of its width.
pub fn read<T: Copy>(addr: u64) -> T {
    // SAFETY: memory is mapped one to one; `T` is a plain integer and any bits are valid in it.
    unsafe { (addr as *const T).read_volatile() }
}

/// Writes a value to guest-physical `addr` with one access of its width.
pub fn write<T: Copy>(addr: u64, value: T) {
    // SAFETY: as in `read`; the caller writes to a device or to RAM that this program does not use.
    unsafe { (addr as *mut T).write_volatile(value) }
}
