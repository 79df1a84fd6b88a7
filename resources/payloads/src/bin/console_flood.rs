//! Writes one MiB of text, or `lines=N` of 64 bytes, to COM1, single bytes and strings by turns, then its FNV-1a checksum.
#![no_std]
#![no_main]

use payloads::{console::COM1, io, println, start::StartInfo};

payloads::start!(main);

const LINES: usize = 1 << 14;

fn main(info: &StartInfo) -> u8 {
    let lines = info.option("lines").and_then(|lines| lines.parse().ok());
    let (mut state, mut hash) = (0x2545_f491_4f6c_dd1du64, 0xcbf2_9ce4_8422_2325u64);
    for number in 0..lines.unwrap_or(LINES) {
        let mut line = [b'\n'; 64];
        for byte in &mut line[..63] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = b' ' + 1 + (state % 90) as u8;
        }
        for byte in line {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        if number % 16 == 0 {
            line.iter().for_each(|byte| io::out8(COM1, *byte));
        } else {
            io::outs8(COM1, &line);
        }
    }
    println!("fnv1a {hash:016x}");
    0
}
