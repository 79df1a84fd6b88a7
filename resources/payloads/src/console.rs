//! Text on COM1.

use core::fmt;

/// Base port of the console.
pub const COM1: u16 = 0x3f8;

/// Writes to COM1, without waiting: the tested UARTs are always ready to send.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        crate::io::outs8(COM1, text.as_bytes());
        Ok(())
    }
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::console::Console, $($arg)*);
    }};
}
