//! Echoes what comes on COM1 until the end of a line or of the transmission.
#![no_std]
#![no_main]

use payloads::{console::COM1, io, println, start::StartInfo};

payloads::start!(main);

const LSR: u16 = COM1 + 5;

fn main(_: &StartInfo) -> u8 {
    println!("ready");
    let mut bytes = 0;
    loop {
        while io::in8(LSR) & 1 == 0 {
            core::hint::spin_loop();
        }
        match io::in8(COM1) {
            b'\n' | b'\r' => break,
            4 => {
                println!("end of transmission");
                break;
            }
            byte => io::out8(COM1, byte),
        }
        bytes += 1;
    }
    println!("\n{bytes} bytes");
    0
}
