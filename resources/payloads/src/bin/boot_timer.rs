//! Says that it has booted, to the boot timer, and ends.
#![no_std]
#![no_main]

use payloads::{io, println, start::StartInfo};

payloads::start!(main);

fn main(_: &StartInfo) -> u8 {
    println!("reads {}", io::read::<u8>(0xc000_0000));
    io::write::<u8>(0xc000_0000, 123);
    0
}
