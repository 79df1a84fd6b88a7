//! Ends with the exit code that `exit=N` on the command line gives.
#![no_std]
#![no_main]

use payloads::{println, start::StartInfo};

payloads::start!(main);

fn main(info: &StartInfo) -> u8 {
    println!("command line: {}", info.cmdline());
    info.option("exit")
        .and_then(|v| v.parse().ok())
        .unwrap_or(255)
}
