//! What the bare-metal guests share: entry, ports, console, start information, ACPI, processors.
//!
//! A payload is a PVH ELF file of its own, linked at 1 MiB. Those in assembly ([`start32!`]) stay in
//! 32-bit kernel mode without paging; those in Rust ([`start!`]) run in 64-bit mode at privilege
//! level 3 with I/O privilege (see `boot/user64.s`). There is one thread and no interrupt in either.
#![no_std]

pub mod acpi;
pub mod console;
pub mod io;
mod mem;
pub mod memory;
pub mod polled;
pub mod random;
pub mod smp;
pub mod start;
pub mod tsc;
pub mod virtio;

/// Port on which a byte ends the virtual machine, as its exit code.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// Ends the virtual machine with `code`, or with a keyboard controller reset where there is no
/// debug-exit port.
pub fn exit(code: u8) -> ! {
    loop {
        io::out8(DEBUG_EXIT_PORT, code);
        io::out8(0x64, 0xfe);
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("payload panicked: {info}");
    exit(254)
}

/// Makes a payload of assembly (AT&T syntax), entered in 32-bit protected mode with `ebx` pointing
/// to the start information. `putc` as a macro writes one byte to COM1.
#[macro_export]
macro_rules! start32 {
    ($($line:literal),+ $(,)?) => {
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/boot/pvh.s")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/boot/macros.s")),
            ".section .text.boot, \"ax\"",
            ".code32",
            ".global pvh_start",
            "pvh_start:",
            $($line),+,
            ".code64",
            ".section .text, \"ax\"",
            options(att_syntax)
        );
    };
}

/// Makes a payload of a `fn(&StartInfo) -> u8`; what it returns is the exit code.
#[macro_export]
macro_rules! start {
    ($main:path) => {
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/boot/pvh.s")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/boot/user64.s")),
            options(att_syntax)
        );

        /// Called by the boot code with the address of the start information.
        #[unsafe(no_mangle)]
        extern "C" fn payload_main(info: &'static $crate::start::StartInfo) -> ! {
            let main: fn(&$crate::start::StartInfo) -> u8 = $main;
            $crate::exit(main(info))
        }
    };
}
