//! Listens to the keyboard until Delete is pressed while Ctrl and Alt are, and prints what came.
#![no_std]
#![no_main]

use payloads::{io, println, start::StartInfo};

payloads::start!(main);

const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
/// Scan codes of set 2.
const CTRL: u8 = 0x14;
const ALT: u8 = 0x11;
const DELETE: u8 = 0x71;

fn main(_: &StartInfo) -> u8 {
    // Command byte: interrupt of the keyboard on, no translation.
    io::out8(COMMAND, 0x60);
    io::out8(DATA, 1);
    println!("listening");
    let (mut ctrl, mut alt) = (false, false);
    loop {
        while io::in8(COMMAND) & 1 == 0 {
            core::hint::spin_loop();
        }
        let code = io::in8(DATA);
        println!("key {code:02x}");
        ctrl |= code == CTRL;
        alt |= code == ALT;
        if code == DELETE && ctrl && alt {
            return 0;
        }
    }
}
